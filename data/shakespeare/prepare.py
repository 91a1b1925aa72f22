"""Tiny Shakespeare, 1.1 MB, in GPT-2's tokens, to fine-tune GPT-2: the first 90% for training, the rest for validation.

python data/shakespeare/prepare.py                    (downloads the text once)
python data/shakespeare/prepare.py --input=FILE       (takes your copy)
"""

import os
import sys
from dataclasses import dataclass

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, '..', '..'))
from configurator import UserError, configure, run  # noqa: E402
from lyregpt.dataset import write_dataset  # noqa: E402
from lyregpt.text import download, read_pieces, shown, split_text  # noqa: E402
from lyregpt.tokenizer import GPT2Tokenizer  # noqa: E402

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


@dataclass
class PrepareConfig:
    """The knobs; the comment behind each is its help."""

    input: str = (
        ''  # a copy of the text; '': input.txt beside this file, downloaded if it is not there
    )
    out_dir: str = shown(HERE)  # where the token files go
    offline: bool = False  # download nothing


def main() -> None:
    """Write the token files."""
    config = configure(PrepareConfig, description=(__doc__ or '').split('\n')[0])
    if config.input and not os.path.isfile(config.input):
        raise UserError(f'{config.input}: no such file')
    path = config.input or download(URL, os.path.join(HERE, 'input.txt'), SHA256, config.offline)
    tokenizer = GPT2Tokenizer()
    write_dataset(
        config.out_dir,
        split_text(read_pieces(path), sum(map(len, read_pieces(path))), 0.1),
        tokenizer,
        os.path.getsize(path),
        source=URL,
    )


if __name__ == '__main__':
    run(main)
