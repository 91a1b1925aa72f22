"""Tiny Shakespeare (1.1 MB) in GPT-2's tokens, to fine-tune GPT-2, split as nanoGPT splits it.

python data/shakespeare/prepare.py                    (downloads the text once)
python data/shakespeare/prepare.py --input=FILE       (uses your copy)
"""

import os
import sys
from dataclasses import dataclass

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, '..', '..'))
from configurator import configure, run
from lyregpt.dataset import write_dataset
from lyregpt.text import SHAKESPEARE_URL, read_pieces, shown, split_text, tiny_shakespeare
from lyregpt.tokenizer import GPT2Tokenizer


@dataclass
class PrepareConfig:
    input: str = ''  # a copy of the text; '': input.txt in this folder, downloaded if missing
    out_dir: str = shown(HERE)  # where the token files go
    offline: bool = False  # download nothing


def main() -> None:
    config = configure(PrepareConfig, description=(__doc__ or '').split('\n')[0])
    path = config.input or tiny_shakespeare(HERE, config.offline)
    tokenizer = GPT2Tokenizer()
    length = sum(map(len, read_pieces(path)))
    pieces = split_text(read_pieces(path), length, val_fraction=0.1)
    write_dataset(config.out_dir, pieces, tokenizer, os.path.getsize(path), SHAKESPEARE_URL)


if __name__ == '__main__':
    run(main)
