"""Songs → train.bin, val.bin and meta.json, one song a document, its artist, album, year and title before its words.

python data/darklyrics/prepare.py                                  (lyrics.jsonl if you have one, else the embedded demo.jsonl)
python data/darklyrics/prepare.py --tokenizer=gpt2 --out_dir=data/darklyrics_gpt2
"""

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, '..', '..'))
from configurator import UserError, configure, run  # noqa: E402
from lyregpt.dataset import write_dataset  # noqa: E402
from lyregpt.text import Piece, pick_split, read_jsonl, shown, song_header  # noqa: E402
from lyregpt.tokenizer import choose_tokenizer  # noqa: E402


@dataclass
class PrepareConfig:
    """The knobs; the comment behind each is its help. Raises ValueError for a bad one."""

    input: str = ''  # JSON Lines, one song each; '': lyrics.jsonl beside this file if there is one, else demo.jsonl
    out_dir: str = shown(HERE)  # where the token files go
    tokenizer: str = (
        'bpe'  # bpe, wordpiece, char, gpt2, or a tokenizer.json or meta.json to use again
    )
    vocab_size: int = 4096  # for bpe and wordpiece: enough that most common words are one token
    lowercase: bool = False  # turn all words to lower case
    squeeze: bool = False  # squeeze runs of blanks and empty lines
    val_fraction: float = 0.08  # share of the songs kept for validation
    artists: list[str] | None = None  # only these, as in --artists="Quillmoth,Ninth Lantern Tax"
    seed: int = 1337  # of the split
    offline: bool = False  # download nothing (this script never does)

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ValueError(f'val_fraction={self.val_fraction}: expected a share between 0 and 1')


def main() -> None:
    """Write the token files."""
    config = configure(PrepareConfig, description=(__doc__ or '').split('\n')[0])
    crawl = os.path.join(HERE, 'lyrics.jsonl')
    path = config.input or (crawl if os.path.exists(crawl) else os.path.join(HERE, 'demo.jsonl'))
    if not os.path.isfile(path):
        raise UserError(f'{path}: no such file')
    wanted = {name.casefold() for name in config.artists or []}

    def songs() -> Iterator[Piece]:
        for number, song in enumerate(read_jsonl(path), 1):
            words = song.get('lyrics')
            if not isinstance(words, str):
                raise UserError(f'{path}, song {number}: no lyrics in it')
            if wanted and str(song.get('artist', '')).casefold() not in wanted:
                continue
            if re.sub(
                r'\[[^\]]*\]', '', words
            ).strip():  # an instrumental has nothing to learn from
                head = song_header(*(song.get(key) for key in ('artist', 'album', 'year', 'title')))
                yield (
                    pick_split(words, config.val_fraction, config.seed),
                    head + words.strip() + '\n',
                    True,
                )

    tokenizer = choose_tokenizer(
        config.tokenizer,
        (text for _, text, _ in songs()),
        config.vocab_size,
        lowercase=config.lowercase,
        squeeze=config.squeeze,
    )
    write_dataset(config.out_dir, songs(), tokenizer, os.path.getsize(path), source=shown(path))


if __name__ == '__main__':
    run(main)
