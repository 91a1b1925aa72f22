"""OpenWebText in GPT-2's tokens: the open copy of GPT-2's training text, 9 billion tokens.

pip install datasets
python data/openwebtext/prepare.py                         (streams about 13 GB, writes 17 GB)
python data/openwebtext/prepare.py --input=pages.jsonl     (uses your copy, with a field text)
"""

import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, '..', '..'))
from configurator import UserError, configure, run
from lyregpt.dataset import write_dataset
from lyregpt.text import (
    check_fraction,
    datasets_library,
    find_files,
    pick_split,
    read_documents,
    read_stream,
    shown,
)
from lyregpt.tokenizer import GPT2Tokenizer

NAME = 'Skylion007/openwebtext'
BY_HAND = 'get the pages by hand and name them with --input=FILE (.jsonl with a field text)'


@dataclass
class PrepareConfig:
    input: str = ''  # a file or folder of .jsonl with a field text; '': streamed from the hub
    out_dir: str = shown(HERE)  # where the token files go
    val_fraction: float = 0.0005  # fraction of the pages kept for validation
    max_documents: int = 0  # stop after this many pages; 0: all
    seed: int = 1337  # of the split
    offline: bool = False  # download nothing

    def __post_init__(self) -> None:
        check_fraction('val_fraction', self.val_fraction)


def main() -> None:
    config = configure(PrepareConfig, description=(__doc__ or '').split('\n')[0])
    if config.offline and not config.input:
        raise UserError(
            f'openwebtext comes from the network, and nothing is downloaded now: {BY_HAND}'
        )
    pieces = (
        (pick_split(page, config.val_fraction, config.seed), page, True)
        for page in itertools.islice(pages(config.input), config.max_documents or None)
    )
    write_dataset(config.out_dir, pieces, GPT2Tokenizer(), source=config.input or NAME)


def pages(path: str) -> Iterator[str]:
    """The text of each page, from a file or folder, else from the hub. Raises UserError."""
    if path:
        files = find_files([path], ('.jsonl',))
        for document in read_documents(files, text_field='text'):
            yield ''.join(document)
        return
    load_dataset = datasets_library(f'; or {BY_HAND}').load_dataset
    for page, _ in read_stream(
        lambda: load_dataset(NAME, split='train', streaming=True), NAME, hint=BY_HAND, kept=BY_HAND
    ):
        yield page['text']


if __name__ == '__main__':
    run(main)
