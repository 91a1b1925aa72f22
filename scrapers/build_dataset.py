"""Turn a crawl into data/darklyrics/lyrics.jsonl, clean and without duplicates.

    python scrapers/build_dataset.py              # reads crawl/songs.jsonl
    python scrapers/build_dataset.py --languages=en,de --min_lines=8
    python scrapers/build_dataset.py --metadata=bands.csv --genres=doom  # columns artist, genre

Leaves out instrumentals, removed songs, prose, and the same song on a demo, an album and a live
record; removes boilerplate lines. What was left out, and why, is printed and written beside the
result. The same input gives the same output. Next: data/darklyrics/prepare.py.
"""

import collections
import csv
import hashlib
import json
import os
import re
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasketch import MinHash
from tqdm import tqdm

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from configurator import UserError, configure, run  # noqa: E402
from lyregpt.text import atomic_write, read_jsonl, read_pieces  # noqa: E402

FIELDS = ('artist', 'album', 'album_type', 'year', 'track', 'title', 'lyrics', 'url')
# Of two similar songs, the one on the kind of record with the lower number is kept.
RECORDS = {'album': 0, 'ep': 1, 'single': 2, 'demo': 3, 'live': 4}
# MinHash: songs with a similarity of (1/24)^(1/4) = 0.45 are compared with a probability of 64%,
# songs with one of 0.7 with 99.8%.
BANDS, ROWS = 24, 4
BOILERPLATE = re.compile(
    r'(https?://|www\.)\S+|\S+@\S+\.\S+|(submits|comments|corrections).*(welcome|mail)'
    r'|^\W*(lyrics\s*(by|©|\(c\)|copyright)|copyright\b|all rights reserved'
    r'|thanks to .* (for|lyrics)|transcribed by|lyrics in .* order|more lyrics at)',
    re.I,
)

Song = dict[str, Any]


@dataclass
class BuildConfig:
    """The options; the comment behind each is its help. Raises ValueError for an invalid value."""

    input: str = 'crawl/songs.jsonl'  # the scraper's export, or JSON Lines with the same fields
    output: str = 'data/darklyrics/lyrics.jsonl'  # where the songs go, and the report beside it

    # What to leave out
    min_lines: int = 2  # songs with fewer lines of words
    similarity: float = 0.7  # songs that share this much of their three-word sequences with
    # another one; 1: only exact duplicates
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
            raise ValueError(f'similarity={self.similarity}: expected a number above 0, up to 1')
        if self.years and not re.fullmatch(r'\d{4}-\d{4}', self.years):
            raise ValueError(f'years={self.years}: expected two years, as in 1984-1999')
        if (self.genres or self.countries) and not self.metadata:
            raise ValueError(
                'genres and countries are columns of a table of yours: add --metadata=FILE.csv'
            )


def tidy(lyrics: str) -> tuple[str, int]:
    """Remove boilerplate lines and repeated empty lines; returns (lyrics, lines removed)."""
    lines = lyrics.replace('\r\n', '\n').split('\n')
    kept = [line.rstrip() for line in lines if not BOILERPLATE.search(line)]
    return re.sub(r'\n{3,}', '\n\n', '\n'.join(kept)).strip('\n'), len(lines) - len(kept)


def capitalize(name: str) -> str:
    """The usual spelling of an artist: the site writes them all in capitals."""
    if not name.isupper():
        return name
    return ' '.join(word[:1] + word[1:].lower() for word in name.split(' '))


def words_of(lyrics: str) -> list[str]:
    """The words for comparisons: without notes, case and punctuation."""
    return re.findall(r'\w+', re.sub(r'\[[^\]]*\]', ' ', lyrics).casefold())


def shingles(song: Song) -> set[str]:
    """The sequences of three words, which near copies have in common (Broder 1997)."""
    words = words_of(song['lyrics'])
    return {' '.join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def read_metadata(path: str) -> dict[str, dict[str, str]]:
    """Casefolded artist to table row. Raises UserError for a file that is not such a CSV."""
    table = {}
    for record in csv.DictReader(''.join(read_pieces(path)).split('\n'), restval=''):
        row = {key.strip().lower(): value.strip() for key, value in record.items() if key}
        if 'artist' not in row:
            raise UserError(f'metadata={path}: expected a CSV with a column artist')
        table[row['artist'].casefold()] = row
    return table


def select(config: BuildConfig, songs: Iterable[Song]) -> Iterator[Song]:
    """The songs, tidied, each with `why`: why its own fields and words leave it out, or ''."""
    table = read_metadata(config.metadata) if config.metadata else {}
    first, last = (config.years or '0000-9999').split('-')
    artists, genres, countries = (
        [name.casefold() for name in names or []]
        for names in (config.artists, config.genres, config.countries)
    )
    if config.languages:
        import py3langid

        unknown = set(config.languages) - set(py3langid.langid._get_identifier().labels)
        if unknown:
            raise UserError(
                f'languages={min(unknown)}: expected two-letter codes such as en, de, fi'
            )
    for song in songs:
        song = {field: song.get(field) for field in (*FIELDS, 'instrumental', 'removed')}
        if not isinstance(song['lyrics'], str) or not isinstance(song['artist'], str):
            yield song | {'why': 'no lyrics or artist field'}
            continue
        song['artist'] = capitalize(song['artist'])
        song['lyrics'], song['boilerplate'] = tidy(song['lyrics'])

        # what the rules look at; liner notes and stories have lines as long as paragraphs
        lines = [line for line in song['lyrics'].split('\n') if not re.fullmatch(r'|\[.*\]', line)]
        lengths = [len(line) for line in lines] or [0]
        artist = song['artist'].casefold()
        row = collections.defaultdict(str, table.get(artist, {}))
        genre, country = row['genre'].casefold(), row['country'].casefold()
        year = str(song['year'] or row['year'])
        year = year.zfill(4) if year.isdigit() else '0000'
        reasons = {
            "removed at the copyright holder's request": song['removed'],
            'instrumental or empty': song['instrumental'] or not lines,
            f'fewer than {config.min_lines} lines': len(lines) < config.min_lines,
            'prose, not verse': statistics.median(lengths) > 160 or max(lengths) > 1500,
            'another artist': artists and artist not in artists,
            'another year': not first <= year <= last,
            'another genre, or none known': genres and not any(g in genre for g in genres),
            'another country, or none known': countries and country not in countries,
        }
        song['why'] = next((why for why, applies in reasons.items() if applies), '')
        if config.languages and not song['why']:
            if py3langid.classify(' '.join(lines)[:2000])[0] not in config.languages:
                song['why'] = 'another language'
        yield song


def mark_duplicates(songs: list[Song], similarity: float) -> None:
    """Set `why`, and `of` to the url of the song that is kept, where a song is a duplicate.

    First, songs of the same words. Then those whose three-word sequences have a Jaccard similarity
    of at least `similarity`: MinHash signatures, cut into bands (Leskovec et al., Mining of Massive
    Datasets, 3.4), propose the pairs, and each pair is compared exactly.
    """
    ranks = [RECORDS.get(str(song['album_type']).lower(), len(RECORDS)) for song in songs]
    order = sorted(range(len(songs)), key=lambda n: (ranks[n], songs[n]['year'] or 9999))
    first: dict[bytes, int] = {}
    for n in order:
        words = ' '.join(words_of(songs[n]['lyrics'])).encode()
        kept = first.setdefault(hashlib.blake2b(words, digest_size=16).digest(), n)
        if kept != n:
            songs[n] |= {'why': 'the same words as another song', 'of': songs[kept]['url']}
    if similarity == 1:
        return

    # one signature per song
    distinct = [songs[n] for n in order if not songs[n]['why']]
    sets = (
        [shingle.encode() for shingle in shingles(song)]
        for song in tqdm(distinct, desc='comparing', unit='song', disable=None, leave=False)
    )
    sketches = MinHash.generator(sets, num_perm=BANDS * ROWS, seed=1)
    signatures = [sketch.hashvalues.astype(np.uint32).reshape(BANDS, ROWS) for sketch in sketches]

    # songs that agree in all rows of a band are compared, each with at most 50 others
    for band in range(BANDS):
        buckets: dict[bytes, list[Song]] = collections.defaultdict(list)
        for song, signature in zip(distinct, signatures):
            bucket = buckets[signature[band].tobytes()]
            if song['why']:
                continue
            mine = shingles(song) if bucket else set()
            for other in bucket[:50]:
                theirs = set() if other['why'] else shingles(other)
                if theirs and len(mine & theirs) >= similarity * len(mine | theirs):
                    song |= {'why': 'nearly the words of another song', 'of': other['url']}
                    break
            else:
                bucket.append(song)


def main() -> None:
    """Build the dataset that the command line describes."""
    config = configure(BuildConfig, description='Turn a crawl into a clean dataset.')
    if not os.path.isfile(config.input):
        raise UserError(
            f'{config.input}: no such file; crawl first: '
            'python scrapers/darklyrics_scraper.py --letters=…'
        )
    songs = list(select(config, read_jsonl(config.input)))
    chosen = [song for song in songs if not song['why']]
    mark_duplicates(chosen, config.similarity)
    kept = [{field: song[field] for field in FIELDS} for song in chosen if not song['why']]
    if not kept:
        raise UserError(
            f'{config.input}: no song is left of {len(songs):,}; the filters leave nothing'
        )

    # the report: duplicates come last
    left_out = sorted((song for song in songs if song['why']), key=lambda song: 'of' in song)
    counts = dict(collections.Counter(song['why'] for song in left_out).most_common())
    result: Song = {
        'read': len(songs),
        'kept': len(kept),
        'boilerplate_lines': sum(song['boilerplate'] for song in chosen),
        'left_out': counts,
        'songs': [
            {key: song[key] for key in ('url', 'artist', 'title', 'why', 'of') if key in song}
            for song in left_out
        ],
    }
    report = os.path.splitext(config.output)[0] + '.report.json'
    os.makedirs(os.path.dirname(config.output) or '.', exist_ok=True)
    with open(config.output + '.tmp', 'w', encoding='utf-8', newline='\n') as f:
        f.writelines(json.dumps(song, ensure_ascii=False) + '\n' for song in kept)
    os.replace(config.output + '.tmp', config.output)
    atomic_write(report, json.dumps(result, ensure_ascii=False, indent=0).encode())
    print(
        f'read {len(songs):,} songs, kept {len(kept):,}; '
        f'removed {result["boilerplate_lines"]:,} boilerplate lines'
    )
    for why, number in counts.items():
        print(f'  {number:>8,}  {why}')
    print(f'wrote {config.output} and {report}; next: python data/darklyrics/prepare.py')


if __name__ == '__main__':
    run(main)
