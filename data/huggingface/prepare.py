"""Any text dataset of the Hugging Face hub, by its name → train.bin, val.bin and meta.json. Streamed, and kept: a second run needs no network.

pip install datasets
python data/huggingface/prepare.py --name=roneneldan/TinyStories --num_samples=50000 --validation_split=validation
python data/huggingface/prepare.py --name=my_folder/                (your own .parquet, .jsonl, .csv; nothing is downloaded)
"""

import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, '..', '..'))
from configurator import UserError, configure, run  # noqa: E402
from lyregpt.dataset import write_dataset  # noqa: E402
from lyregpt.text import TEXT_FIELDS, WAITS, Piece, atomic_write, pick_split, read_stream, shown  # noqa: E402
from lyregpt.tokenizer import choose_tokenizer  # noqa: E402

LEARN_FROM = 100_000_000  # characters that a bpe or wordpiece tokenizer learns from: more hardly changes it, and would fill the memory
KEPT = 'what has come is kept, and the same command goes on behind it'


@dataclass
class PrepareConfig:
    """The knobs; the comment behind each is its help. Raises ValueError for a bad one."""

    # What is read
    name: str = ''  # on the hub, as in roneneldan/TinyStories; or a folder of .parquet, .jsonl, .csv or .txt
    config: str = ''  # its subset, if it has several
    split: str = 'train'  # of its splits, the one to train on
    text_field: str = ''  # the column that holds the text; '': text, lyrics or content, or the only one that is text
    num_samples: int | None = None  # the first so many documents of a split; None: all
    validation_split: float | str = (
        0.05  # the share of the documents kept for validation; or another of its splits, by name
    )
    revision: str = (
        ''  # its commit on the hub; '': the newest when it is first read, and that one from then on
    )

    # What is written
    out_dir: str = (
        ''  # where the token files go; '': data/huggingface-NAME, for --dataset=huggingface-NAME
    )
    cache_dir: str = shown(
        os.path.join(HERE, 'cache')
    )  # where the texts that have come from the hub are kept
    tokenizer: str = 'bpe'  # bpe or wordpiece (trained on this text), char, gpt2, or a tokenizer.json or meta.json to use again
    vocab_size: int = (
        4096  # for bpe and wordpiece: 4,096 suits tens of MB of text, 16,384 gigabytes
    )
    lowercase: bool = False  # turn all text to lower case
    squeeze: bool = False  # squeeze runs of blanks and empty lines
    seed: int = 1337  # of the share kept for validation
    offline: bool = False  # download nothing

    def __post_init__(self) -> None:
        if self.num_samples is not None and self.num_samples < 1:
            raise ValueError(
                f'num_samples={self.num_samples}: expected at least 1, or None for all'
            )
        if isinstance(self.validation_split, float) and not 0 < self.validation_split < 1:
            raise ValueError(
                f'validation_split={self.validation_split:g}: expected a share between 0 and 1, or the name of a split'
            )
        if self.validation_split == self.split:
            raise ValueError(
                f'validation_split={self.split} is what is trained on: expected another split, or a share as in 0.05'
            )


def main() -> None:
    """Write the token files."""
    config = configure(PrepareConfig, description=(__doc__ or '').split('\n')[0])
    name = config.name
    local = os.path.isdir(name)
    if not local and not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', name):
        raise UserError(
            f'name={name}: expected a folder that is here, or a name on the hub, as in --name=roneneldan/TinyStories'
        )
    folder = '-'.join(
        filter(
            None,
            [
                'huggingface',
                os.path.basename(os.path.abspath(name)) if local else name.replace('/', '-'),
                config.config,
            ],
        )
    )
    out_dir = config.out_dir or shown(os.path.join(HERE, '..', folder))

    def texts(split: str) -> Callable[[], Iterator[str]]:
        return (
            (lambda: (text for text, _ in stream(config, split))) if local else kept(config, split)
        )

    share, other = (
        (config.validation_split, '')
        if isinstance(config.validation_split, float)
        else (0.0, config.validation_split)
    )
    sources = {
        split: texts(name_) for split, name_ in (('train', config.split), ('val', other)) if name_
    }

    def pieces() -> Iterator[Piece]:
        for split, documents in sources.items():
            for text in documents():
                yield pick_split(text, share, config.seed) if share else split, text, True

    def to_learn_from() -> Iterator[str]:
        seen = 0
        for _, text, _ in pieces():
            yield text
            seen += len(text)
            if seen > LEARN_FROM and config.tokenizer != 'char':  # which must know every character
                return

    tokenizer = choose_tokenizer(
        config.tokenizer,
        to_learn_from(),
        config.vocab_size,
        lowercase=config.lowercase,
        squeeze=config.squeeze,
    )
    write_dataset(
        out_dir,
        pieces(),
        tokenizer,
        source=' '.join(filter(None, [name, config.config, config.split])),
    )
    used = (
        os.path.basename(out_dir)
        if os.path.abspath(os.path.dirname(out_dir)) == os.path.dirname(HERE)
        else out_dir
    )
    print(
        f'train on it: python train.py config/small.py --dataset={used} --out_dir=out-{os.path.basename(out_dir)}'
    )


def stream(
    config: PrepareConfig, split: str, notes: dict[str, Any] | None = None
) -> Generator[tuple[str, Any], None, None]:
    """(text, place behind it) of each document of the split that is not empty, `num_samples` at most, from notes['place'] on.

    The commit is written into notes['revision'] before it is read: a place in one commit is none in another. Raises UserError.
    """
    try:
        import datasets
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError
        from huggingface_hub.utils import logging
    except ImportError:
        raise UserError('datasets are read by the datasets library: pip install datasets') from None
    datasets.logging.set_verbosity_error()  # what is wrong is said once, below
    logging.set_verbosity_error()
    name, column = config.name, ''

    def open_stream() -> Any:
        nonlocal column
        revision = None
        try:
            if notes is not None:
                revision = notes['revision'] = notes['revision'] or HfApi().dataset_info(name).sha
            # a dataset is data: one that brings a script is refused, by old versions of the library too
            splits = datasets.load_dataset(
                name,
                config.config or None,
                revision=revision,
                streaming=True,
                trust_remote_code=False,
            )
        except RepositoryNotFoundError:
            raise UserError(
                f'{name}: no such dataset on the hub, and no such folder here; a private one needs `hf auth login`'
            ) from None
        except (datasets.exceptions.DatasetNotFoundError, ValueError, RuntimeError) as error:
            reason = ' '.join(str(error).split())
            if 'gated' in reason:
                reason += f'; accept its terms at https://huggingface.co/datasets/{name}, then `hf auth login`'
            raise UserError(
                f'{name}: {reason[:400]}'
                + ('; name one with --config' if 'onfig' in reason else '')
            ) from None
        if split not in splits:
            raise UserError(
                f'{name}: has no split {split!r}, but {", ".join(splits)}; see --split and --validation_split'
            )
        column = text_column(splits[split], config)
        return splits[split].select_columns(column)

    count = (notes or {}).get('documents', 0)
    for row, place in read_stream(
        open_stream,
        name,
        (notes or {}).get('place'),
        WAITS if notes else (),
        kept=KEPT if notes else '',
    ):
        text = row[column]
        if text and text.strip():
            yield text, place
            count += 1
            if count == config.num_samples:
                return


def text_column(rows: Any, config: PrepareConfig) -> str:
    """The column of the streamed `rows` that holds their text. Raises UserError that lists the columns if there is none or any doubt."""
    first: dict[str, Any] = {} if rows.features else next(iter(rows), {})
    kinds = {k: getattr(f, 'dtype', 'nested') for k, f in (rows.features or {}).items()} or {
        k: type(v).__name__ for k, v in first.items()
    }
    texts = [
        k for k, kind in kinds.items() if kind in ('str', 'string', 'large_string', 'string_view')
    ]
    if config.text_field in texts:
        return config.text_field
    likely = texts if len(texts) == 1 else [k for k in TEXT_FIELDS if k in texts]
    if config.text_field or not likely:
        what = (
            f'text_field={config.text_field}: no column of text'
            if config.text_field
            else 'which column is the text? Name it with --text_field'
        )
        raise UserError(
            f'{config.name}: {what}; it has {", ".join(f"{k} ({kind})" for k, kind in kinds.items()) or "no rows"}'
        )
    return likely[0]


def kept(config: PrepareConfig, split: str) -> Callable[[], Iterator[str]]:
    """Have the split's first documents in the cache, going on where an earlier run stopped; returns what reads them.

    NAME.jsonl holds one {"text": …} a line, NAME.json how much of it is whole, and the stream's place behind that. What a kill left
    behind the last note is cut off.
    """
    of_text = [config.revision, config.text_field] if config.revision or config.text_field else []
    words = [config.name.replace('/', '--'), config.config, split, *of_text]
    path = os.path.join(config.cache_dir, re.sub(r'[^\w.-]', '_', '+'.join(words)))
    notes: dict[str, Any] = {
        'documents': 0,
        'bytes': 0,
        'place': None,
        'ended': False,
        'revision': config.revision,
    }
    try:
        with open(path + '.json', encoding='utf-8') as f:
            stored = json.load(f)
        if os.path.getsize(path + '.jsonl') >= stored['bytes']:
            notes |= stored
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ):  # nothing there, or nothing of use: from the beginning
        pass
    complete = notes['ended'] or config.num_samples and notes['documents'] >= config.num_samples
    if not complete and config.offline:
        have = (
            f'{notes["documents"]:,} documents of it are'
            if notes['documents']
            else 'nothing of it is'
        )
        raise UserError(
            f'{config.name}, split {split}: {have} in {config.cache_dir}, and nothing is downloaded now; run it without --offline'
        )
    if not complete:
        try:
            fetch(config, split, path, notes)
        except OSError as error:
            raise UserError(f'{error.filename or path}: {error.strerror}; {KEPT}') from None

    def read() -> Iterator[str]:
        with open(path + '.jsonl', encoding='utf-8') as f:
            for line in itertools.islice(
                f, min(notes['documents'], config.num_samples or notes['documents'])
            ):
                yield json.loads(line)['text']

    return read


def fetch(config: PrepareConfig, split: str, path: str, notes: dict[str, Any]) -> None:
    """Add documents behind those in the cache until there are enough, noting every few seconds how far it is."""
    os.makedirs(config.cache_dir, exist_ok=True)
    with (
        open(path + '.jsonl', 'ab') as f,
        tqdm(
            initial=notes['documents'],
            total=config.num_samples,
            desc=f'{config.name} {split}',
            disable=None,
        ) as bar,
    ):
        f.truncate(notes['bytes'])

        def note() -> None:
            f.flush()
            os.fsync(f.fileno())
            notes['bytes'] = os.fstat(f.fileno()).st_size
            atomic_write(path + '.json', json.dumps(notes).encode())

        noted = time.monotonic()
        documents = stream(config, split, notes)
        try:
            for text, place in documents:
                f.write(json.dumps({'text': text}, ensure_ascii=False).encode() + b'\n')
                notes |= {'documents': notes['documents'] + 1, 'place': place}
                bar.update()
                if time.monotonic() - noted > 5:
                    note()
                    noted = time.monotonic()
            notes['ended'] = notes['documents'] != config.num_samples
        finally:  # also when it breaks, or is stopped
            documents.close()
            if notes['documents']:
                note()


if __name__ == '__main__':
    run(main)
