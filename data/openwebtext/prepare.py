"""OpenWebText, the open copy of GPT-2's training text (8 million pages, 9 billion tokens), in GPT-2's tokens.

pip install datasets
python data/openwebtext/prepare.py                         (streams about 13 GB, writes 17 GB)
python data/openwebtext/prepare.py --input=pages.jsonl     (takes your copy: .jsonl with a text field)
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, '..', '..'))
from configurator import UserError, configure, run  # noqa: E402
from lyregpt.dataset import write_dataset  # noqa: E402
from lyregpt.text import Piece, find_files, pick_split, read_jsonl, read_stream, shown  # noqa: E402
from lyregpt.tokenizer import GPT2Tokenizer  # noqa: E402


@dataclass
class PrepareConfig:
    """The knobs; the comment behind each is its help."""

    input: str = (
        ''  # a file or folder of .jsonl with a text field; '': streamed from the Hugging Face hub
    )
    out_dir: str = shown(HERE)  # where the token files go
    val_fraction: float = 0.0005  # share of the pages kept for validation
    max_documents: int = 0  # stop after this many pages; 0: all
    seed: int = 1337  # of the split
    offline: bool = False  # download nothing


def main() -> None:
    """Write the token files."""
    config = configure(PrepareConfig, description=(__doc__ or '').split('\n')[0])
    by_hand = 'get the pages by hand and name them with --input=FILE (.jsonl with a text field)'
    if config.offline and not config.input:
        raise UserError(
            f'openwebtext comes from the network, and nothing is downloaded now: {by_hand}'
        )

    def texts() -> Iterator[str]:
        if config.input:
            for path in find_files([config.input], ('.jsonl',)):
                for number, page in enumerate(read_jsonl(path), 1):
                    if not isinstance(page.get('text'), str):
                        raise UserError(f'{path}, record {number}: no field text in it')
                    yield page['text']
            return
        try:
            from datasets import load_dataset
        except ImportError:
            raise UserError(
                f'this dataset is streamed by the datasets library: pip install datasets; or {by_hand}'
            ) from None
        name = 'Skylion007/openwebtext'
        for page, _ in read_stream(
            lambda: load_dataset(name, split='train', streaming=True),
            name,
            hint=by_hand,
            kept=by_hand,
        ):
            yield page['text']

    def pages() -> Iterator[Piece]:
        for number, text in enumerate(texts()):
            if config.max_documents and number >= config.max_documents:
                return
            yield pick_split(text, config.val_fraction, config.seed), text, True

    write_dataset(
        config.out_dir, pages(), GPT2Tokenizer(), source=config.input or 'Skylion007/openwebtext'
    )


if __name__ == '__main__':
    run(main)
