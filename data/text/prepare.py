"""Your own words → a dataset: files or folders of .txt, .md and .jsonl, in any encoding that can be detected.

python data/text/prepare.py --input=my_songs/ --out_dir=data/mine
python train.py config/small.py --dataset=mine
"""

import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, '..', '..'))
from configurator import configure, run  # noqa: E402
from lyregpt.dataset import write_dataset  # noqa: E402
from lyregpt.text import Piece, find_files, pick_split, read_documents, shown, split_text  # noqa: E402
from lyregpt.tokenizer import choose_tokenizer  # noqa: E402


@dataclass
class PrepareConfig:
    """The knobs; the comment behind each is its help. Raises ValueError for a bad one."""

    input: list[str] | None = None  # files and folders, as in --input=a.txt,songs/
    out_dir: str = shown(HERE)  # where the token files go; data/NAME makes it --dataset=NAME
    encoding: str = ''  # of the files; '': detected
    text_field: str = ''  # for .jsonl: which field holds the text; '': the first there is of text, lyrics, content
    tokenizer: str = 'bpe'  # bpe or wordpiece (trained on this text), char, gpt2, or a tokenizer.json or meta.json to use again
    vocab_size: int = 2048  # for bpe and wordpiece: 1024 to 4096 suits a few MB of text
    lowercase: bool = False  # turn all text to lower case
    squeeze: bool = False  # squeeze runs of blanks and empty lines
    val_fraction: float = 0.1  # share kept for validation: whole documents, or each one's end if they are fewer than 20
    seed: int = 1337  # of the split
    offline: bool = False  # download nothing (this script never does, but for GPT-2's tokens)

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ValueError(f'val_fraction={self.val_fraction}: expected a share between 0 and 1')


def main() -> None:
    """Write the token files."""
    config = configure(PrepareConfig, description=(__doc__ or '').split('\n')[0])
    files = find_files(config.input or [])

    def documents() -> Iterator[Iterator[str]]:
        return read_documents(files, config.encoding, config.text_field)

    few = [sum(map(len, pieces)) for pieces in itertools.islice(documents(), 20)]

    def pieces() -> Iterator[Piece]:
        for number, document in enumerate(documents()):
            if len(few) < 20:
                yield from split_text(document, few[number], config.val_fraction)
            elif first := next(document, ''):
                split = pick_split(first, config.val_fraction, config.seed)
                for text in document:
                    yield split, first, False
                    first = text
                yield split, first, True

    tokenizer = choose_tokenizer(
        config.tokenizer,
        (text for document in documents() for text in document),
        config.vocab_size,
        lowercase=config.lowercase,
        squeeze=config.squeeze,
    )
    write_dataset(
        config.out_dir,
        pieces(),
        tokenizer,
        sum(map(os.path.getsize, files)),
        source=', '.join(config.input or []),
    )
    large = [
        path
        for path in files
        if not path.lower().endswith('.jsonl') and os.path.getsize(path) > 20_000
    ]
    if large and len(few) > 1:
        print(
            f'note: {large[0]} is one document of {os.path.getsize(large[0]) / 1000:,.0f} kB; if it holds several, give each a file, or a line of a .jsonl',
            file=sys.stderr,
        )


if __name__ == '__main__':
    run(main)
