"""Any text dataset of the Hugging Face hub, by its name → train.bin, val.bin and meta.json.

pip install datasets
python data/huggingface/prepare.py --name=roneneldan/TinyStories --num_samples=50000
python data/huggingface/prepare.py --name=my_folder/        (your own .parquet, .jsonl, .csv, .txt)

It is streamed and cached as text, so a second run needs no network.
"""

import contextlib
import itertools
import json
import math
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
from configurator import UserError, configure, run
from lyregpt.dataset import write_dataset
from lyregpt.text import (
    TEXT_FIELDS,
    WAITS,
    Piece,
    atomic_write,
    check_fraction,
    datasets_library,
    pick_split,
    read_stream,
    shown,
)
from lyregpt.tokenizer import choose_tokenizer

# Characters that a bpe or wordpiece tokenizer learns from; more would fill the memory and hardly
# change it.
LEARN_FROM = 100_000_000
Sources = dict[str, Callable[[], Iterator[str]]]  # train, val: reads the documents
KEPT = 'the documents fetched so far are kept; run the same command to continue'


@dataclass
class PrepareConfig:
    # What is read
    name: str = ''  # on the hub, as in roneneldan/TinyStories; or a folder of .parquet, .jsonl,
    # .csv or .txt
    config: str = ''  # its subset, if it has several
    split: str = 'train'  # the split to train on
    text_field: str = ''  # the column with the text; '': text, lyrics or content, or the only one
    # that is text
    num_samples: int | None = None  # the first so many documents of a split; None: all
    validation_split: float | str = 0.05  # the fraction of the documents kept for validation; or
    # the name of another split
    revision: str = ''  # its commit on the hub; '': the newest when it is first read

    # What is written
    out_dir: str = ''  # where the token files go; '': data/huggingface-NAME, for
    # --dataset=huggingface-NAME
    cache_dir: str = shown(os.path.join(HERE, 'cache'))  # where texts from the hub are kept
    tokenizer: str = 'bpe'  # bpe or wordpiece (trained on this text), char or gpt2,
    # or a tokenizer.json or meta.json
    vocab_size: int = 4096  # for bpe and wordpiece: 4,096 suits tens of MB, 16,384 gigabytes
    lowercase: bool = False  # turn all text to lower case
    squeeze: bool = False  # squeeze runs of blanks and empty lines
    seed: int = 1337  # of the fraction kept for validation
    offline: bool = False  # download nothing

    def __post_init__(self) -> None:
        if self.num_samples is not None and self.num_samples < 1:
            raise ValueError(f'num_samples={self.num_samples}: expected at least 1, or None')
        if isinstance(self.validation_split, float):
            check_fraction('validation_split', self.validation_split)
        if self.validation_split == self.split:
            raise ValueError(
                f'validation_split={self.split} is the training split: choose another, '
                'or a fraction as in 0.05'
            )


def main() -> None:
    config = configure(PrepareConfig, description=(__doc__ or '').split('\n')[0])
    name = config.name.replace('/', '-')
    if os.path.isdir(config.name):
        name = os.path.basename(os.path.abspath(config.name))
    elif not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', config.name):
        raise UserError(
            f'name={config.name}: expected a folder that is here, or a name on the hub, '
            'as in --name=roneneldan/TinyStories'
        )
    folder = '-'.join(filter(None, ['huggingface', name, config.config]))
    out_dir = config.out_dir or shown(os.path.join(HERE, '..', folder))
    sources = {'train': texts_of(config, config.split)}
    if isinstance(config.validation_split, str):
        sources['val'] = texts_of(config, config.validation_split)
    tokenizer = choose_tokenizer(
        config.tokenizer,
        texts_to_learn_from(config, sources),
        config.vocab_size,
        lowercase=config.lowercase,
        squeeze=config.squeeze,
    )
    described = ' '.join(filter(None, [config.name, config.config, config.split]))
    write_dataset(out_dir, pieces(config, sources), tokenizer, source=described)
    print(
        f'train on it: python train.py config/small.py --dataset={out_dir} '
        f'--out_dir=out-{os.path.basename(out_dir)}'
    )


def pieces(config: PrepareConfig, sources: Sources) -> Iterator[Piece]:
    """The documents, each in its split."""
    for split, texts in sources.items():
        for text in texts():
            if isinstance(config.validation_split, float):
                split = pick_split(text, config.validation_split, config.seed)
            yield split, text, True


def texts_to_learn_from(config: PrepareConfig, sources: Sources) -> Iterator[str]:
    """The documents for the tokenizer: the first of them, but all for characters."""
    seen = 0
    for _, text, _ in pieces(config, sources):
        yield text
        seen += len(text)
        if seen > LEARN_FROM and config.tokenizer != 'char':
            return


def texts_of(config: PrepareConfig, split: str) -> Callable[[], Iterator[str]]:
    """A function that reads the documents of a split of a folder, or of a dataset on the hub."""
    if os.path.isdir(config.name):
        return lambda: (text for text, _ in documents(config, split))
    return Cache(config, split).texts


class Cache:
    """The first documents of one split of a dataset on the hub, cached.

    NAME.jsonl has one {"text": …} per line. NAME.json has `notes`: how many documents and bytes
    are complete, the stream's position after them, and the commit. What a kill left after that is
    cut off.
    """

    def __init__(self, config: PrepareConfig, split: str):
        self.config, self.split = config, split
        words = [config.name.replace('/', '--'), config.config, split]
        if config.revision or config.text_field:
            words += [config.revision, config.text_field]
        self.path = os.path.join(config.cache_dir, re.sub(r'[^\w.-]', '_', '+'.join(words)))
        self.notes: dict[str, Any] = {
            'documents': 0,
            'bytes': 0,
            'place': None,
            'ended': False,
            'revision': config.revision,
        }
        # without a cache, or with one of no use, it starts from the beginning
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            with open(self.path + '.json', encoding='utf-8') as f:
                stored = json.load(f)
            if os.path.getsize(self.path + '.jsonl') >= stored['bytes']:
                self.notes |= stored
        have = self.notes['documents']
        if self.notes['ended'] or have >= (config.num_samples or math.inf):
            return
        if config.offline:
            known = f'{have:,} documents of it are' if have else 'nothing of it is'
            raise UserError(
                f'{config.name}, split {split}: {known} in {config.cache_dir}, and nothing is '
                'downloaded now; run it without --offline'
            )
        try:
            self.fetch()
        except OSError as error:
            raise UserError(f'{error.filename or self.path}: {error.strerror}; {KEPT}') from None

    def fetch(self) -> None:
        """Add documents until there are enough, and note every few seconds what is complete."""
        notes, config = self.notes, self.config
        os.makedirs(config.cache_dir, exist_ok=True)
        done, title = notes['documents'], f'{config.name} {self.split}'
        bar = tqdm(initial=done, total=config.num_samples, desc=title, disable=None)
        with open(self.path + '.jsonl', 'ab') as f, bar:
            f.truncate(notes['bytes'])
            noted = time.monotonic()
            try:
                with contextlib.closing(documents(config, self.split, notes)) as stream:
                    for text, position in stream:
                        f.write(json.dumps({'text': text}, ensure_ascii=False).encode() + b'\n')
                        notes |= {'documents': notes['documents'] + 1, 'place': position}
                        bar.update()
                        if time.monotonic() - noted > 5:
                            self.save_notes(f)
                            noted = time.monotonic()
                notes['ended'] = notes['documents'] != config.num_samples
            finally:  # also when it breaks, or is stopped
                if notes['documents']:
                    self.save_notes(f)

    def save_notes(self, f: Any) -> None:
        """Sync the open file of documents, then note what it has."""
        f.flush()
        os.fsync(f.fileno())
        self.notes['bytes'] = os.fstat(f.fileno()).st_size
        atomic_write(self.path + '.json', json.dumps(self.notes).encode())

    def texts(self) -> Iterator[str]:
        """The text of each document."""
        have = self.notes['documents']
        with open(self.path + '.jsonl', encoding='utf-8') as f:
            for line in itertools.islice(f, min(have, self.config.num_samples or have)):
                yield json.loads(line)['text']


def documents(
    config: PrepareConfig, split: str, notes: dict[str, Any] | None = None
) -> Generator[tuple[str, Any], None, None]:
    """(text, position after it) of each document of the split that is not empty.

    Starts at notes['place'] and stops at `num_samples` documents. `notes` is None for a folder.
    Raises UserError.
    """
    datasets_library()
    start = notes or {'documents': 0, 'place': None}
    count = start['documents']
    for row, position in read_stream(
        lambda: open_split(config, split, notes),
        config.name,
        start['place'],
        WAITS if notes else (),
        kept=KEPT if notes else '',
    ):
        (text,) = row.values()
        if text and text.strip():
            yield text, position
            count += 1
            if count == config.num_samples:
                return


def open_split(config: PrepareConfig, split: str, notes: dict[str, Any] | None) -> Any:
    """The column of text of a split, as a stream of the `datasets` library.

    The commit is noted in notes['revision']: a position in one is not valid in another.
    """
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import logging

    datasets.logging.set_verbosity_error()  # the error message below is enough
    logging.set_verbosity_error()
    name, revision = config.name, None
    try:
        if notes:
            revision = notes['revision'] = notes['revision'] or HfApi().dataset_info(name).sha
        # a dataset is data: old versions of the library, too, refuse one that brings a script
        splits = datasets.load_dataset(
            name, config.config or None, revision=revision, streaming=True, trust_remote_code=False
        )
    except RepositoryNotFoundError:
        raise UserError(
            f'{name}: no such dataset on the hub, and no such folder here; a private one needs '
            '`hf auth login`'
        ) from None
    except (datasets.exceptions.DatasetNotFoundError, ValueError, RuntimeError) as error:
        reason = ' '.join(str(error).split())[:400]
        hints = {
            'gated': f'; accept its terms at https://huggingface.co/datasets/{name}, '
            'then `hf auth login`',
            'onfig': '; name one with --config',
        }
        advice = ''.join(hint for word, hint in hints.items() if word in reason)
        raise UserError(f'{name}: {reason}{advice}') from None
    if split not in splits:
        raise UserError(
            f'{name}: has no split {split!r}, but {", ".join(splits)}; '
            'see --split and --validation_split'
        )
    return splits[split].select_columns(text_column(splits[split], config))


def text_column(rows: Any, config: PrepareConfig) -> str:
    """The column with the text. Raises UserError that lists the columns if there is any doubt."""
    if rows.features:
        kinds = {k: getattr(feature, 'dtype', 'nested') for k, feature in rows.features.items()}
    else:
        kinds = {k: type(value).__name__ for k, value in next(iter(rows), {}).items()}
    texts = [k for k, kind in kinds.items() if kind.endswith(('str', 'string', 'string_view'))]
    likely = texts if len(texts) == 1 else [k for k in TEXT_FIELDS if k in texts]
    problem = 'which column is the text? Name it with --text_field'
    if config.text_field:
        likely = [k for k in texts if k == config.text_field]
        problem = f'text_field={config.text_field}: no column of text'
    if not likely:
        columns = ', '.join(f'{k} ({kind})' for k, kind in kinds.items())
        raise UserError(f'{config.name}: {problem}; it has {columns or "no rows"}')
    return likely[0]


if __name__ == '__main__':
    run(main)
