"""Song lyrics → train.bin, val.bin and meta.json; each song is a document with a header.

python data/darklyrics/prepare.py          (reads lyrics.jsonl if you have it, else demo.jsonl)
python data/darklyrics/prepare.py --tokenizer=gpt2 --out_dir=data/darklyrics_gpt2
"""

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, '..', '..'))
from configurator import UserError, configure, run
from lyregpt.dataset import write_dataset
from lyregpt.text import Piece, check_fraction, pick_split, read_jsonl, shown, song_header
from lyregpt.tokenizer import choose_tokenizer


@dataclass
class PrepareConfig:
    input: str = ''  # JSON Lines, a song per line; '': lyrics.jsonl here, else demo.jsonl
    out_dir: str = shown(HERE)  # where the token files go
    tokenizer: str = 'bpe'  # bpe, wordpiece, char or gpt2, or a tokenizer.json or meta.json
    vocab_size: int = 4096  # for bpe and wordpiece: enough that most common words are one token
    lowercase: bool = False  # turn all text to lower case
    squeeze: bool = False  # squeeze runs of blanks and empty lines
    val_fraction: float = 0.08  # fraction of the songs kept for validation
    artists: list[str] | None = None  # only these, as in --artists="Quillmoth,Ninth Lantern Tax"
    seed: int = 1337  # of the split
    offline: bool = False  # download nothing (this script never does)

    def __post_init__(self) -> None:
        check_fraction('val_fraction', self.val_fraction)


def main() -> None:
    config = configure(PrepareConfig, description=(__doc__ or '').split('\n')[0])
    crawl = os.path.join(HERE, 'lyrics.jsonl')
    demo = os.path.join(HERE, 'demo.jsonl')
    path = config.input or (crawl if os.path.exists(crawl) else demo)
    tokenizer = choose_tokenizer(
        config.tokenizer,
        (text for _, text, _ in songs(config, path)),
        config.vocab_size,
        lowercase=config.lowercase,
        squeeze=config.squeeze,
    )
    total_bytes = os.path.getsize(path)
    write_dataset(config.out_dir, songs(config, path), tokenizer, total_bytes, shown(path))


def songs(config: PrepareConfig, path: str) -> Iterator[Piece]:
    """The songs that are asked for, without instrumentals. Raises UserError."""
    artists = {name.casefold() for name in config.artists or []}
    for number, song in enumerate(read_jsonl(path), 1):
        lyrics = song.get('lyrics')
        if not isinstance(lyrics, str):
            raise UserError(f'{path}, song {number}: no lyrics in it')
        if artists and str(song.get('artist', '')).casefold() not in artists:
            continue
        if re.sub(r'\[[^\]]*\]', '', lyrics).strip():  # else "[Instrumental]"
            header = song_header(*(song.get(key) for key in ('artist', 'album', 'year', 'title')))
            split = pick_split(lyrics, config.val_fraction, config.seed)
            yield split, header + lyrics.strip() + '\n', True


if __name__ == '__main__':
    run(main)
