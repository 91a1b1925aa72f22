"""Your own text → a dataset: files or folders of .txt, .md and .jsonl, in any common encoding.

python data/text/prepare.py --input=my_songs/ --out_dir=data/mine
python train.py config/small.py --dataset=mine
"""

import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, '..', '..'))
from configurator import configure, run
from lyregpt.dataset import write_dataset
from lyregpt.text import (
    Piece,
    check_fraction,
    find_files,
    pick_split,
    read_documents,
    shown,
    split_text,
)
from lyregpt.tokenizer import choose_tokenizer

MANY = 20  # from so many documents on, validation gets whole ones, not the end of each


@dataclass
class PrepareConfig:
    input: list[str] | None = None  # files and folders, as in --input=a.txt,songs/
    out_dir: str = shown(HERE)  # where the token files go; data/NAME makes it --dataset=NAME
    encoding: str = ''  # of the files; '': detected
    text_field: str = ''  # of .jsonl: the field with the text; '': text, lyrics or content
    tokenizer: str = 'bpe'  # bpe or wordpiece (trained on this text), char or gpt2,
    # or a tokenizer.json or meta.json
    vocab_size: int = 2048  # for bpe and wordpiece: 1024 to 4096 suits a few MB of text
    lowercase: bool = False  # turn all text to lower case
    squeeze: bool = False  # squeeze runs of blanks and empty lines
    val_fraction: float = 0.1  # fraction kept for validation: whole documents, or the end of each
    # if there are fewer than 20
    seed: int = 1337  # of the split
    offline: bool = False  # download nothing (this script never does, except for GPT-2's tokens)

    def __post_init__(self) -> None:
        check_fraction('val_fraction', self.val_fraction)


def main() -> None:
    config = configure(PrepareConfig, description=(__doc__ or '').split('\n')[0])
    files = find_files(config.input or [])
    documents = functools.partial(read_documents, files, config.encoding, config.text_field)
    tokenizer = choose_tokenizer(
        config.tokenizer,
        (text for document in documents() for text in document),
        config.vocab_size,
        lowercase=config.lowercase,
        squeeze=config.squeeze,
    )
    total_bytes = sum(map(os.path.getsize, files))
    source = ', '.join(config.input or [])
    write_dataset(config.out_dir, pieces(config, documents), tokenizer, total_bytes, source)
    texts = [path for path in files if not path.lower().endswith('.jsonl')]
    large = [path for path in texts if os.path.getsize(path) > 20_000]
    if large and len(files) > 1:
        print(
            f'note: {large[0]} is one document of {os.path.getsize(large[0]) / 1000:,.0f} kB; if '
            'it holds several, give each a file, or a line of a .jsonl',
            file=sys.stderr,
        )


def pieces(
    config: PrepareConfig, documents: Callable[[], Iterator[Iterator[str]]]
) -> Iterator[Piece]:
    """The documents, each in its split."""
    lengths = [sum(map(len, document)) for document in itertools.islice(documents(), MANY)]
    for number, document in enumerate(documents()):
        if len(lengths) < MANY:
            yield from split_text(document, lengths[number], config.val_fraction)
            continue
        text = next(document, '')
        split = pick_split(text, config.val_fraction, config.seed)
        for following in document:
            yield split, text, False
            text = following
        if text:
            yield split, text, True


if __name__ == '__main__':
    run(main)
