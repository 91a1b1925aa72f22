"""A crawl → data/darklyrics/lyrics.jsonl, clean and without doubles, ready for data/darklyrics/prepare.py.

    python scrapers/build_dataset.py                                       (crawl/songs.jsonl → data/darklyrics/lyrics.jsonl)
    python scrapers/build_dataset.py --languages=en,de --min_lines=8
    python scrapers/build_dataset.py --metadata=bands.csv --genres=doom    (a CSV with the columns artist, genre)

Leaves out instrumentals, removed songs, prose, and the same song on a demo, an album and a live record; takes boilerplate
lines out of the others. What was left out, and why, is printed and written beside the result. Same input, same output.
"""

import collections
import csv
import hashlib
import json
import os
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasketch import MinHash
from tqdm import tqdm

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from configurator import UserError, configure, run  # noqa: E402
from lyregpt.text import read_jsonl  # noqa: E402

FIELDS = ('artist', 'album', 'album_type', 'year', 'track', 'title', 'lyrics', 'url')
KEEP_FIRST = (
    'album',
    'ep',
    'single',
    'demo',
    'live',
)  # of two like songs the one on the kind of record that stands first here
BANDS, ROWS = (
    24,
    4,
)  # MinHash: pairs of a similarity of (1/24)^(1/4) = 0.45 meet with a chance of 64%, of 0.7 with 99.8%
BOILERPLATE = re.compile(
    r'(https?://|www\.)\S+|\S+@\S+\.\S+|(submits|comments|corrections).*(welcome|mail)|^\W*(lyrics\s*(by|©|\(c\)|copyright)|copyright\b|all rights reserved'
    r'|thanks to .* (for|lyrics)|transcribed by|lyrics in .* order|more lyrics at)',
    re.I,
)


@dataclass
class BuildConfig:
    """The knobs; the comment behind each is its help. Raises ValueError for a bad one."""

    input: str = (
        'crawl/songs.jsonl'  # what the scraper exported, or any JSON Lines of the same fields
    )
    output: str = (
        'data/darklyrics/lyrics.jsonl'  # where the songs go; the report is written beside it
    )

    # What to leave out
    min_lines: int = 2  # songs with fewer lines of words
    similarity: float = 0.7  # songs that share so much of their three-word sequences with another one; 1 leaves exact doubles out only
    languages: list[str] | None = None  # keep only these, as in --languages=en,de
    artists: list[str] | None = None  # keep only these
    years: str = ''  # keep only these, as in --years=1984-1999
    metadata: str = ''  # a CSV with a column artist and any of genre, country, year, to choose by
    genres: list[str] | None = None  # keep artists whose genre in the CSV holds one of these words
    countries: list[str] | None = None  # keep artists from these countries in the CSV

    def __post_init__(self) -> None:
        if self.min_lines < 0:
            raise ValueError(f'min_lines={self.min_lines}: expected 0 or more')
        if not 0 < self.similarity <= 1:
            raise ValueError(f'similarity={self.similarity}: expected a share above 0, up to 1')
        if self.years and not re.fullmatch(r'\d{4}-\d{4}', self.years):
            raise ValueError(f'years={self.years}: expected two years, as in 1984-1999')
        if (self.genres or self.countries) and not self.metadata:
            raise ValueError(
                'genres and countries stand in a table of your own: name it with --metadata=FILE.csv'
            )


def tidy(lyrics: str) -> tuple[str, int]:
    """The lyrics without boilerplate lines and with single empty lines between stanzas; how many lines were taken out."""
    lines = lyrics.replace('\r\n', '\n').split('\n')
    kept = [line.rstrip() for line in lines if not BOILERPLATE.search(line)]
    return re.sub(r'\n{3,}', '\n\n', '\n'.join(kept)).strip('\n'), len(lines) - len(kept)


def nice_name(name: str) -> str:
    """The site writes all artists in capitals; words are easier to learn as they are written elsewhere."""
    return (
        ' '.join(
            word[:1] + word[1:].lower() if word.isupper() and len(word) > 1 else word
            for word in name.split(' ')
        )
        if name.isupper()
        else name
    )


def is_prose(lines: list[str]) -> bool:
    """Liner notes and stories: lines as long as paragraphs."""
    return bool(lines) and (statistics.median(map(len, lines)) > 160 or max(map(len, lines)) > 1500)


def words_of(lyrics: str) -> list[str]:
    """The words as they are compared: no notes, no case, no punctuation."""
    return re.findall(r'\w+', re.sub(r'\[[^\]]*\]', ' ', lyrics).casefold())


def shingles(words: list[str]) -> set[str]:
    """The runs of three words, by which near copies are known (Broder 1997)."""
    return {' '.join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def read_metadata(path: str) -> dict[str, dict[str, str]]:
    """artist, casefolded → its row. Raises UserError if there is no such file or no column artist."""
    try:
        with open(path, encoding='utf-8-sig', newline='') as f:
            rows = [
                {
                    (k or '').strip().lower(): (v or '').strip()
                    for k, v in row.items()
                    if isinstance(v, str)
                }
                for row in csv.DictReader(f)
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'metadata={path}: cannot be read ({error})') from None
    if not rows or 'artist' not in rows[0]:
        raise UserError(f'metadata={path}: expected a CSV whose first line names a column artist')
    return {row['artist'].casefold(): row for row in rows if row.get('artist')}


def chosen(
    config: BuildConfig, songs: Iterator[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], str]]:
    """(song, why it is left out or '') for each song, by what it says itself."""
    table = read_metadata(config.metadata) if config.metadata else {}
    artists = {name.casefold() for name in config.artists or []}
    first, last = (int(y) for y in config.years.split('-')) if config.years else (0, 9999)
    identify = None
    if config.languages:
        import py3langid

        identify = py3langid.classify
        unknown = set(config.languages) - set(py3langid.langid._get_identifier().labels)
        if unknown:
            raise UserError(
                f'languages={sorted(unknown)[0]}: expected two-letter codes such as en, de, fi'
            )
    for song in songs:
        if not isinstance(song.get('lyrics'), str) or not isinstance(song.get('artist'), str):
            yield song, 'no lyrics or artist field'
            continue
        lyrics, taken = tidy(song['lyrics'])
        song = (
            {field: song.get(field) for field in FIELDS}
            | {'lyrics': lyrics, 'artist': nice_name(song['artist'])}
            | {k: song.get(k) for k in ('instrumental', 'removed')}
            | {'taken': taken}
        )
        lines = [line for line in lyrics.split('\n') if line and not re.fullmatch(r'\[.*\]', line)]
        row = table.get(song['artist'].casefold(), {})
        year = (
            int(song['year'] or row.get('year') or 0)
            if str(song['year'] or row.get('year') or 0).isdigit()
            else 0
        )
        if song['removed']:
            yield song, "removed at the copyright holder's request"
        elif song['instrumental'] or not lines:
            yield song, 'instrumental or empty'
        elif len(lines) < config.min_lines:
            yield song, f'fewer than {config.min_lines} lines'
        elif is_prose(lines):
            yield song, 'prose, not verse'
        elif artists and song['artist'].casefold() not in artists:
            yield song, 'another artist'
        elif not first <= year <= last:
            yield song, 'another year'
        elif config.genres and not any(
            g.casefold() in row.get('genre', '').casefold() for g in config.genres
        ):
            yield song, 'another genre, or none known'
        elif config.countries and row.get('country', '').casefold() not in {
            c.casefold() for c in config.countries
        }:
            yield song, 'another country, or none known'
        elif identify and identify(' '.join(lines)[:2000])[0] not in (config.languages or []):
            yield song, 'another language'
        else:
            yield song, ''


def find_doubles(songs: list[dict[str, Any]], similarity: float) -> dict[int, tuple[int, str]]:
    """{number of a song to leave out: (number of the one that stays, why)}.

    Songs of the same words first, then those whose three-word sequences have a Jaccard similarity of at least
    `similarity`: MinHash signatures, cut into bands (Leskovec et al., Mining of Massive Datasets, 3.4), propose the
    pairs, and each pair is measured exactly.
    """

    def rank(n: int) -> tuple:
        song = songs[n]
        kind = str(song['album_type']).lower()
        return (
            KEEP_FIRST.index(kind) if kind in KEEP_FIRST else len(KEEP_FIRST),
            song['year'] or 9999,
            n,
        )

    order = sorted(range(len(songs)), key=rank)
    doubles: dict[int, tuple[int, str]] = {}
    first: dict[bytes, int] = {}
    for n in order:
        key = hashlib.blake2b(
            ' '.join(words_of(songs[n]['lyrics'])).encode(), digest_size=16
        ).digest()
        if first.setdefault(key, n) != n:
            doubles[n] = first[key], 'the same words as another song'
    if similarity == 1:
        return doubles
    left = [n for n in order if n not in doubles]
    blank = MinHash(num_perm=BANDS * ROWS, seed=1)
    signatures = np.empty((len(left), BANDS * ROWS), dtype=np.uint32)
    for i, n in enumerate(tqdm(left, desc='comparing', unit='song', disable=None, leave=False)):
        sketch = blank.copy()
        sketch.update_batch([s.encode() for s in shingles(words_of(songs[n]['lyrics']))])
        signatures[i] = sketch.hashvalues
    for band in range(BANDS):
        rows = (
            np.ascontiguousarray(signatures[:, band * ROWS : (band + 1) * ROWS]).view('V16').ravel()
        )
        meeting: dict[bytes, list[int]] = {}
        for i, row in enumerate(map(bytes, rows)):
            stays = meeting.setdefault(row, [])
            n = left[i]
            if n in doubles:
                continue
            mine = shingles(words_of(songs[n]['lyrics'])) if stays else set()
            for other in stays[:50]:
                if other in doubles:
                    continue
                theirs = shingles(words_of(songs[other]['lyrics']))
                if len(mine & theirs) >= similarity * len(mine | theirs):
                    doubles[n] = other, 'nearly the words of another song'
                    break
            else:
                stays.append(n)
    return doubles


def main() -> None:
    """Build the dataset that the command line names."""
    config = configure(BuildConfig, description='Turn a crawl into a clean dataset.')
    if not os.path.isfile(config.input):
        raise UserError(
            f'{config.input}: no such file; crawl first: python scrapers/darklyrics_scraper.py --letters=…'
        )
    report = os.path.splitext(config.output)[0] + '.report.json'
    songs: list[dict[str, Any]] = []
    out: list[dict[str, Any]] = []
    total = lines_taken = 0
    for song, why in chosen(config, read_jsonl(config.input)):
        total += 1
        if why:
            out.append(
                {
                    'url': song.get('url'),
                    'artist': song.get('artist'),
                    'title': song.get('title'),
                    'why': why,
                }
            )
        else:
            lines_taken += song.pop('taken')
            songs.append({field: song[field] for field in FIELDS})
    doubles = find_doubles(songs, config.similarity)
    for n, (other, why) in sorted(doubles.items()):
        out.append(
            {
                'url': songs[n]['url'],
                'artist': songs[n]['artist'],
                'title': songs[n]['title'],
                'why': why,
                'of': songs[other]['url'],
            }
        )
    kept = [song for n, song in enumerate(songs) if n not in doubles]
    if not kept:
        raise UserError(f'{config.input}: no song is left of {total:,}; the filters leave nothing')
    counts = collections.Counter(entry['why'] for entry in out)
    try:
        os.makedirs(os.path.dirname(config.output) or '.', exist_ok=True)
        with open(config.output + '.tmp', 'w', encoding='utf-8', newline='\n') as f:
            f.writelines(json.dumps(song, ensure_ascii=False) + '\n' for song in kept)
        with open(report + '.tmp', 'w', encoding='utf-8', newline='\n') as f:
            json.dump(
                {
                    'read': total,
                    'kept': len(kept),
                    'boilerplate_lines': lines_taken,
                    'left_out': dict(counts.most_common()),
                    'songs': out,
                },
                f,
                ensure_ascii=False,
                indent=0,
            )
        os.replace(config.output + '.tmp', config.output)
        os.replace(report + '.tmp', report)
    except OSError as error:
        raise UserError(f'{config.output}: {error.strerror}') from None
    print(f'read {total:,} songs, kept {len(kept):,}; took out {lines_taken:,} boilerplate lines')
    for why, number in counts.most_common():
        print(f'  {number:>8,}  {why}')
    print(f'wrote {config.output} and {report}; next: python data/darklyrics/prepare.py')


if __name__ == '__main__':
    run(main)
