"""Gather a metal lyrics corpus of your own, politely: letters → artists → albums, one request an album.

    python scrapers/darklyrics_scraper.py --letters=q                       (all artists under Q: hours)
    python scrapers/darklyrics_scraper.py --artists="Quillmoth,Thawferry"   (only these)
    python scrapers/darklyrics_scraper.py --letters=q --list                (what there is; no album pages)
    python scrapers/darklyrics_scraper.py --stats                           (what you have)

Everything is in one SQLite file: each page as it came, compressed, with the songs read from it, written in one
transaction. So it can be killed at any instant; run the same command again and it goes on, and no page is fetched twice.
`--parse_only` reads the kept pages again, without a request. The songs are exported to crawl/songs.jsonl.

It obeys robots.txt, asks for one page at a time, waits 5 seconds and more between two, and says who it is. Lyrics belong
to their writers: what you gather is for your own study, not for passing on.
"""

import codecs
import contextlib
import datetime
import difflib
import email.utils
import ipaddress
import json
import os
import random
import re
import sqlite3
import statistics
import sys
import time
import unicodedata
import urllib.parse
import urllib.robotparser
import zlib
from collections import deque
from dataclasses import dataclass
from typing import Any

import ftfy
import requests
import urllib3
from bs4 import BeautifulSoup, Comment, NavigableString, Tag
from bs4.exceptions import ParserRejectedMarkup
from tqdm import tqdm

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from configurator import UserError, configure, run  # noqa: E402

AGENT = 'lyreGPT'
USER_AGENT = (
    f'{AGENT}/1.0 (a lyrics corpus for private study; one request at a time; obeys robots.txt)'
)
LETTERS = [*'abcdefghijklmnopqrstuvwxyz', '19']
LETTER, ARTIST, ALBUM = 'letter', 'artist', 'album'
PATHS = {  # what a link of each kind may look like; anything else is never followed
    LETTER: re.compile(r'/(?:[a-z]|19)\.html'),
    ARTIST: re.compile(r'/(?:[a-z]|19)/[\w.~-]+\.html'),
    ALBUM: re.compile(r'/lyrics/[\w.~-]+/[\w.~-]+\.html'),
}
MAX_BYTES, MAX_SECONDS = 5_000_000, 120  # the longest album pages are some 200 KB


@dataclass
class ScrapeConfig:
    """The knobs; the comment behind each is its help. Raises ValueError for a bad one."""

    # What to fetch
    letters: list[str] | None = (
        None  # a … z and 19 (names that begin with no letter), as in --letters=a,b,19; or all
    )
    artists: str = (
        ''  # names, as in --artists="Quillmoth,Thawferry", or a file with a name on each line
    )
    max_albums: int = 0  # stop after this many album pages; 0: no limit
    max_requests: int = 0  # stop after this many requests; 0: no limit
    base_url: str = 'http://www.darklyrics.com'  # the site, or another one built like it
    refresh: bool = False  # ask again for pages that we have, in case they changed

    # What to do instead of fetching lyrics
    list: bool = False  # show what would be fetched; asks for letter and artist pages only
    stats: bool = False  # show what the crawl holds; no request
    parse_only: bool = False  # read the kept pages again; no request

    # Where
    crawl_dir: str = 'crawl'  # pages.sqlite, songs.jsonl and report.jsonl go here

    # How politely
    delay: float = 5.0  # seconds between two requests; robots.txt may ask for more; slow answers make it longer
    local: bool = False  # the site is on this machine: allows a delay below one second
    retry_wait: float = 30.0  # seconds before the first retry of a failed request; each further one waits twice as long
    retries: int = 5  # tries of one page before it is left for the next run
    timeout: float = 30.0  # seconds to wait for the site to answer

    def __post_init__(self) -> None:
        for name in ('max_albums', 'max_requests', 'delay', 'retry_wait', 'retries'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name}={getattr(self, name)}: expected 0 or more')
        if self.timeout <= 0:
            raise ValueError(f'timeout={self.timeout}: expected more than 0 seconds')
        site = urllib.parse.urlsplit(self.base_url)
        if site.scheme not in ('http', 'https') or not site.hostname:
            raise ValueError(
                f'base_url={self.base_url}: expected an address such as http://www.darklyrics.com'
            )
        if self.delay < 1 and not (self.local and is_local(site.hostname)):
            raise ValueError(
                f'delay={self.delay}: below one second only for a site on this machine, with --local'
            )
        for letter in self.letters or []:
            if letter.lower() not in (*LETTERS, 'all'):
                raise ValueError(
                    f'letters={letter}: expected a … z, 19 (names that begin with no letter) or all'
                )


def is_local(host: str) -> bool:
    """Does this host name mean this machine?"""
    try:
        return host == 'localhost' or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# -----------------------------------------------------------------------------
# Reading pages: bytes in, plain values out; these functions never raise on any input


def _cp1252(error: UnicodeError) -> tuple[str, int]:
    """Decode what is not UTF-8 as Windows' Latin, byte by byte: old pages hold both."""
    assert isinstance(error, UnicodeDecodeError)
    return error.object[error.start : error.end].decode('cp1252', 'replace'), error.end


codecs.register_error('cp1252', _cp1252)


def soup_of(body: bytes) -> BeautifulSoup:
    """The page's tree. The bytes are UTF-8 whatever the header says; what is not is read as Windows' Latin."""
    text = (
        body.decode('utf-8', 'cp1252').replace('\0', '').replace('<![', '&lt;![')
    )  # marked sections are no HTML and upset the parser
    try:
        return BeautifulSoup(text, 'html.parser')
    except ParserRejectedMarkup:
        return BeautifulSoup(
            '', 'html.parser'
        )  # reads as a page of another kind, and is reported as one


def links_of(
    soup: BeautifulSoup, path: str, kind: str, root: Tag | None = None
) -> list[tuple[str, str]]:
    """(path, text) of the links to pages of `kind` under `root`, in order, each once. Other hosts and odd paths are no links."""
    found: dict[str, str] = {}
    for a in (root or soup).find_all('a', href=True):
        try:
            url = urllib.parse.urlsplit(
                urllib.parse.urljoin('http://site' + path, str(a['href']).strip())
            )
        except ValueError:
            continue
        if (
            url.netloc in ('site', 'www.darklyrics.com')
            and PATHS[kind].fullmatch(url.path)
            and '..' not in url.path
        ):
            found.setdefault(url.path, ' '.join(a.get_text().split()))
    return list(found.items())


def read_letter(body: bytes, path: str) -> list[tuple[str, str]] | None:
    """(path, name) of the letter's artists; None if this is no letter page."""
    soup = soup_of(body)
    columns = soup.find_all('div', class_='artists')
    if not columns:
        return None
    found: dict[str, str] = {}
    for column in columns:
        for where, name in links_of(soup, path, ARTIST, column):
            found.setdefault(where, name)
    return list(found.items())


def read_artist(body: bytes, path: str) -> list[tuple[str, str]] | None:
    """(path, heading) of the artist's albums; None if this is no artist page."""
    soup = soup_of(body)
    blocks = soup.find_all('div', class_='album')
    heading = soup.find('h1')
    if not blocks and not (heading and 'lyrics' in heading.get_text().lower()):
        return None
    found: dict[str, str] = {}
    for block in blocks:
        title = block.find('h2')
        for where, _ in links_of(soup, path, ALBUM, block):
            found.setdefault(where, ' '.join(title.get_text().split()) if title else '')
    return list(found.items())


HEADING = re.compile(
    r'\s*(?P<type>[^:"]{1,30}?)\s*:\s*"(?P<name>.*)"\s*(?:\((?P<year>\d{4})\))?\s*', re.S
)
REMOVED = re.compile(
    r'\W*(?:the(?:se)?\s+)?lyrics\s+(?:were|have been)\s+removed\b[^\n]*(?:copyright|request)[^\n]*',
    re.I,
)
INSTRUMENTAL = re.compile(r'\W*instrumental\W*', re.I)


def read_album(body: bytes, path: str) -> tuple[list[dict[str, Any]], list[str]] | None:
    """The album's songs and what was not understood; None if this is no album page.

    A song: artist, album, album_type, year, track, title, lyrics, notes, credits, instrumental, removed. Lines and
    stanzas are kept; a note stays in its line and stands in `notes` too; credits and footer are no lyrics.
    """
    soup = soup_of(body)
    words = soup.find('div', class_='lyrics')
    if words is None:
        return None
    problems: list[str] = []
    h1 = soup.find('h1')
    artist = re.sub(r'\s*LYRICS\s*$', '', clean(h1.get_text()) if h1 else '', flags=re.I)
    top = soup.find('div', class_='albumlyrics')
    heading = clean(top.h2.get_text()) if top and top.h2 else ''
    match = HEADING.fullmatch(heading)
    if match:
        album, album_type, year = (
            match['name'].strip(),
            match['type'].strip(),
            int(match['year']) if match['year'] else None,
        )
    else:
        album, album_type, year = heading.strip(' :"'), 'non-album', None
        if 'non-album' not in heading.lower() and 'other' not in heading.lower():
            problems.append(f'album heading {heading[:80]!r} is of no known form')
    songs: list[dict[str, Any]] = []
    text: list[str] = []
    notes: list[str] = []
    credits = ''
    skipped: set[int] = set()  # ids of elements whose text is no lyrics
    noted: set[int] = set()  # ids of elements within a note: it is taken once

    def finish() -> None:
        if songs:
            songs[-1] |= {
                'lyrics': lay_out(''.join(text)),
                'notes': [n for n in map(clean, notes) if n],
            }
        elif clean(''.join(text)):
            problems.append(f'text before the first song: {clean("".join(text))[:80]!r}')
        text.clear()
        notes.clear()

    for node in words.descendants:
        parent_skipped = node.parent is not None and id(node.parent) in skipped
        if isinstance(node, Tag):
            if parent_skipped:
                skipped.add(id(node))
            elif node.name == 'h3':
                finish()
                title = clean(node.get_text())
                number = re.match(r'\s*(\d{1,3})\s*\.\s*', title)
                if not number:
                    problems.append(f'song heading {title[:80]!r} has no number')
                songs.append(
                    {
                        'track': int(number[1]) if number else len(songs) + 1,
                        'title': title[number.end() :] if number else title,
                    }
                )
                skipped.add(id(node))
            elif node.name == 'br':
                text.append('\n')
            elif node.name in ('script', 'style', 'iframe', 'form', 'noscript'):
                skipped.add(id(node))
            elif node.name == 'div':
                kind = ' '.join(node.get('class') or [])
                skipped.add(id(node))
                if 'thanks' in kind:
                    credits = lay_out(flat(node))
                elif 'note' not in kind and clean(node.get_text()):
                    problems.append(f'unknown block {kind!r}: {clean(node.get_text())[:80]!r}')
            elif node.name == 'a' and PATHS[ARTIST].search(str(node.get('href', ''))):
                skipped.add(id(node))  # the way back to the artist
            elif id(node.parent) in noted:
                noted.add(id(node))
            elif node.name in ('i', 'em'):
                noted.add(id(node))
                notes.append(node.get_text())
        elif (
            isinstance(node, NavigableString)
            and not isinstance(node, Comment)
            and type(node) is NavigableString
            and not parent_skipped
        ):
            text.append(re.sub(r'\s+', ' ', node))
    finish()
    for number, song in enumerate(songs, 1):
        lyrics = song['lyrics']
        removed = bool(REMOVED.fullmatch(lyrics))
        instrumental = bool(INSTRUMENTAL.fullmatch(lyrics))
        if not lyrics:
            problems.append(f'song {number}, {song["title"][:60]!r}, has no words and no mark')
        bare = [line for line in lyrics.split('\n') if re.fullmatch(r'\[.*\]', line)]
        song |= {
            'artist': artist,
            'album': album,
            'album_type': album_type,
            'year': year,
            'lyrics': '' if removed or instrumental else lyrics,
            'notes': list(dict.fromkeys(song['notes'] + bare)),
            'credits': credits,
            'instrumental': instrumental,
            'removed': removed,
        }
    if not songs:
        problems.append('no song on the page')
    if not artist:
        problems.append('no artist on the page')
    return songs, problems


def flat(node: Tag) -> str:
    """The element's text, each <br> a line end."""
    parts = []
    for child in node.descendants:
        if isinstance(child, Tag):
            parts.append('\n' if child.name == 'br' else '')
        elif type(child) is NavigableString:
            parts.append(re.sub(r'\s+', ' ', child))
    return ''.join(parts)


def clean(text: str) -> str:
    """One line of text: blanks squeezed, mojibake repaired."""
    return ' '.join(ftfy.fix_encoding(text).split())


def lay_out(text: str) -> str:
    """Several lines: blanks at their ends off, empty lines at the beginning and end off, mojibake repaired."""
    return '\n'.join(
        ' '.join(line.split(' ')).strip() for line in ftfy.fix_encoding(text).split('\n')
    ).strip('\n')


READERS = {LETTER: read_letter, ARTIST: read_artist, ALBUM: read_album}


# -----------------------------------------------------------------------------
# Keeping: one SQLite file, one transaction a page


class Store:
    """The crawl's file: pages as they came, the links and songs read from them, and what was not understood."""

    def __init__(self, folder: str, base_url: str | None):  # None: whatever site the crawl is of
        self.folder, self.base_url = folder, (base_url or '').rstrip('/')
        self.path = os.path.join(folder, 'pages.sqlite')
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise UserError(f'crawl_dir={folder}: cannot be made ({error.strerror})') from None
        self.db = sqlite3.connect(self.path, timeout=1, isolation_level=None)
        try:
            self._open()
        except BaseException:
            self.db.close()
            raise

    def _open(self) -> None:
        for statement in (
            'PRAGMA locking_mode = EXCLUSIVE',  # two scrapers on one crawl would ask twice
            'PRAGMA journal_mode = WAL',
            'PRAGMA synchronous = FULL',
            'CREATE TABLE IF NOT EXISTS pages (path TEXT PRIMARY KEY, kind TEXT, status INT, fetched_at TEXT, etag TEXT, modified TEXT, body BLOB)',
            'CREATE TABLE IF NOT EXISTS links (parent TEXT, place INT, child TEXT, label TEXT, PRIMARY KEY (parent, place))',
            'CREATE TABLE IF NOT EXISTS songs (path TEXT, place INT, song TEXT, PRIMARY KEY (path, place))',
            'CREATE TABLE IF NOT EXISTS problems (path TEXT, reason TEXT, at TEXT, PRIMARY KEY (path, reason))',
            'CREATE TABLE IF NOT EXISTS crawl (base_url TEXT)',
            'BEGIN IMMEDIATE',
            'COMMIT',
        ):
            self.db.execute(statement)
        owner = self.db.execute('SELECT base_url FROM crawl').fetchone()
        if owner and not self.base_url:
            self.base_url = owner[0]
        if owner and owner[0] != self.base_url:
            raise UserError(
                f'{self.path} holds a crawl of {owner[0]}, not of {self.base_url}: name another --crawl_dir'
            )
        if not owner:
            self.db.execute('INSERT INTO crawl VALUES (?)', (self.base_url,))

    def save(
        self, path: str, kind: str, status: int, headers: Any, body: bytes, found: Any
    ) -> None:
        """Write a page and all that was read from it, whole or not at all."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')
        page = (
            path,
            kind,
            status,
            now,
            headers.get('ETag'),
            headers.get('Last-Modified'),
            zlib.compress(body, 9),
        )
        self.db.execute('BEGIN')
        try:
            self.db.execute('INSERT OR REPLACE INTO pages VALUES (?, ?, ?, ?, ?, ?, ?)', page)
            self._read(path, kind, found, now)
            self.db.execute('COMMIT')
        except BaseException:
            if self.db.in_transaction:
                self.db.execute('ROLLBACK')
            raise

    def _read(self, path: str, kind: str, found: Any, fetched_at: str) -> None:
        for table, column in (('links', 'parent'), ('songs', 'path'), ('problems', 'path')):
            self.db.execute(f'DELETE FROM {table} WHERE {column} = ?', (path,))
        if kind == ALBUM and found:
            songs, problems = found
            for n, song in enumerate(songs):
                song |= {'url': f'{self.base_url}{path}#{song["track"]}', 'fetched_at': fetched_at}
                self.db.execute(
                    'INSERT INTO songs VALUES (?, ?, ?)',
                    (path, n, json.dumps(song, ensure_ascii=False)),
                )
            for reason in dict.fromkeys(problems):
                self.db.execute('INSERT INTO problems VALUES (?, ?, ?)', (path, reason, fetched_at))
        else:
            self.db.executemany(
                'INSERT INTO links VALUES (?, ?, ?, ?)',
                [(path, n, child, label) for n, (child, label) in enumerate(found or [])],
            )

    def problem(self, path: str, reason: str) -> None:
        """Note why a page could not be read."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')
        self.db.execute('INSERT OR REPLACE INTO problems VALUES (?, ?, ?)', (path, reason, now))

    def has(self, path: str) -> bool:
        """Is this page here?"""
        return self.db.execute('SELECT 1 FROM pages WHERE path = ?', (path,)).fetchone() is not None

    def validators(self, path: str) -> dict[str, str]:
        """The headers that ask for a page only if it changed since we fetched it."""
        etag, modified = self.db.execute(
            'SELECT etag, modified FROM pages WHERE path = ?', (path,)
        ).fetchone() or (None, None)
        return ({'If-None-Match': etag} if etag else {}) | (
            {'If-Modified-Since': modified} if modified else {}
        )

    def children(self, path: str) -> list[tuple[str, str]]:
        """(path, label) of the pages that this one links to, in its order."""
        return self.db.execute(
            'SELECT child, label FROM links WHERE parent = ? ORDER BY place', (path,)
        ).fetchall()

    def read_again(self) -> int:
        """Read all kept pages anew with the parser as it is now; returns how many."""
        paths = [
            row[0]
            for row in self.db.execute('SELECT path FROM pages WHERE status = 200 ORDER BY path')
        ]
        for path in tqdm(paths, desc='reading', unit='page', disable=None):
            kind, fetched_at, body = self.db.execute(
                'SELECT kind, fetched_at, body FROM pages WHERE path = ?', (path,)
            ).fetchone()
            self.db.execute('BEGIN')
            self._read(path, kind, READERS[kind](zlib.decompress(body), path), fetched_at)
            self.db.execute('COMMIT')
        return len(paths)

    def export(self) -> None:
        """Write songs.jsonl and report.jsonl, in a fixed order, each whole or not at all."""
        for name, rows in (
            (
                'songs.jsonl',
                (row[0] for row in self.db.execute('SELECT song FROM songs ORDER BY path, place')),
            ),
            (
                'report.jsonl',
                (
                    json.dumps(
                        {'page': self.base_url + path, 'reason': reason, 'at': at},
                        ensure_ascii=False,
                    )
                    for path, reason, at in self.db.execute(
                        'SELECT * FROM problems ORDER BY path, reason'
                    )
                ),
            ),
        ):
            target = os.path.join(self.folder, name)
            with open(target + '.tmp', 'w', encoding='utf-8', newline='\n') as f:
                f.writelines(row + '\n' for row in rows)
            os.replace(target + '.tmp', target)

    def close(self) -> None:
        """Close the database."""
        self.db.close()

    def summary(self) -> str:
        """What is here, in a line."""

        def count(query: str) -> int:
            return self.db.execute(query).fetchone()[0]

        pages = {
            kind: count(f"SELECT count(*) FROM pages WHERE kind = '{kind}' AND status = 200")
            for kind in READERS
        }
        known = count("SELECT count(DISTINCT child) FROM links WHERE child LIKE '/lyrics/%'")
        songs = count('SELECT count(*) FROM songs')
        silent = count("SELECT count(*) FROM songs WHERE json_extract(song, '$.lyrics') = ''")
        return (
            f'{pages[LETTER]} letters, {pages[ARTIST]:,} artists, {pages[ALBUM]:,} of {known:,} known albums, {songs:,} songs '
            f'({silent:,} of them without words: instrumental, removed or empty); {count("SELECT count(*) FROM problems"):,} entries in the report; '
            f'{os.path.getsize(self.path) / 1e6:.1f} MB on disk'
        )


# -----------------------------------------------------------------------------
# Asking


class Stop(Exception):
    """The crawl must end here: the site seems to turn us away, or a limit is reached."""


class Site:
    """Asks for one page at a time, slowly, and takes no for an answer."""

    def __init__(self, config: ScrapeConfig):
        self.config, self.base = config, config.base_url.rstrip('/')
        self.session = requests.Session()
        self.session.trust_env = False  # no proxies, no credentials from elsewhere
        self.session.headers.clear()
        self.session.headers.update(
            {'User-Agent': USER_AGENT, 'Accept': 'text/html', 'Accept-Encoding': 'gzip'}
        )
        self.session.cookies.set_policy(_NoCookies())
        self.pace = self.floor = config.delay
        self.requests = self.odd_pages = self.failed_pages = 0
        self.last = 0.0
        self.answers: deque[float] = deque(maxlen=20)
        self.robots = urllib.robotparser.RobotFileParser()

    def obey_robots(self) -> None:
        """Read robots.txt. Raises Stop if it forbids everything or cannot be had (RFC 9309: then nothing may be fetched)."""
        try:
            status, _, body = self._ask('/robots.txt', {})
        except requests.RequestException as error:
            raise UserError(
                f'{self.base} could not be reached ({type(error).__name__}); is the address right, is there a network?'
            ) from None
        if status == 403:
            raise Stop(
                'robots.txt was refused with status 403: the site seems to block us; wait a day before you try again'
            )
        if status >= 500 or status == 429:
            raise Stop(
                f'robots.txt answered with status {status}, so we do not know what is allowed; try again later'
            )
        self.robots.parse(body.decode('utf-8', 'replace').splitlines() if status == 200 else [])
        wish = self.robots.crawl_delay(AGENT)
        if wish:
            self.pace = self.floor = max(self.floor, float(wish))

    def allowed(self, path: str) -> bool:
        """May robots.txt let us fetch this?"""
        return self.robots.can_fetch(AGENT, self.base + path)

    def get(
        self, path: str, kind: str, headers: dict[str, str]
    ) -> tuple[int, Any, bytes, Any] | str:
        """(status, headers, body, what was read), tried until it is good; or why it could not be had this time.

        Raises Stop when the site turns us away: a 403, or three pages in a row that are empty, foreign or silent.
        """
        wait, reason, odd, before = self.config.retry_wait, '', 0, b''
        for attempt in range(self.config.retries + 1):
            if attempt:
                time.sleep(wait * random.uniform(1, 1.2))
                wait = min(wait * 2, 3600) if wait else 0
            try:
                status, answer, body = self._ask(path, headers)
            except requests.RequestException as error:
                reason = f'no whole answer ({type(error).__name__})'
                self.slow_down()
                continue
            if status == 403:
                raise Stop(
                    f'{path} was refused with status 403: the site seems to block us. All is kept; wait a day, then go on with a longer --delay'
                )
            if status in (404, 410):
                self.odd_pages = self.failed_pages = 0
                return status, answer, body, None
            if status == 304:
                return status, answer, b'', None
            if status in (429, 500, 502, 503, 504):
                reason = f'status {status}'
                self.slow_down()
                wait = max(wait, after(answer.get('Retry-After')))
                continue
            if status == 200 and body and b'</html>' not in body[-200:].lower() and body != before:
                reason, before = (
                    'the page ends in the middle',
                    body,
                )  # the same bytes twice are the whole page
                continue
            found = READERS[kind](body, path) if status == 200 else None
            if found is None:
                odd += 1
                text = clean(soup_of(body[:20000]).get_text(' '))[:120] if body else ''
                reason = f'status {status}, ' + (
                    f'a page of another kind: {text!r}' if body else 'an empty page'
                )
                if odd < 3:
                    continue
                break
            self.odd_pages = self.failed_pages = 0
            return status, answer, body, found
        self.odd_pages += odd > 0
        self.failed_pages += 1
        if self.odd_pages >= 3:
            raise Stop(
                f'three pages in a row were not what the site holds (the last: {reason}); the site seems to block us. All is kept; wait a day, then go on'
            )
        if self.failed_pages >= 3:
            raise Stop(
                f'three pages in a row could not be had (the last: {reason}). All is kept; go on later with the same command'
            )
        return reason

    def slow_down(self) -> None:
        """Wait twice as long between requests from now on, a minute at most."""
        self.pace = min(max(self.pace * 2, self.floor), max(60.0, self.floor))

    def _ask(self, path: str, headers: dict[str, str]) -> tuple[int, Any, bytes]:
        """One request, after the pause that is due; (status, headers, body). Redirects within the site are followed."""
        url = self.base + path
        for _ in range(4):
            if self.config.max_requests and self.requests >= self.config.max_requests:
                raise Stop(f'max_requests={self.config.max_requests} reached')
            pause = self.last + self.pace * random.uniform(1.0, 1.4) - time.monotonic()
            if pause > 0 and self.last:
                time.sleep(pause)
            self.requests += 1
            began = time.monotonic()
            try:
                with self.session.get(
                    url,
                    headers=headers,
                    timeout=self.config.timeout,
                    allow_redirects=False,
                    stream=True,
                ) as answer:
                    body = b''
                    # read1 gives what has come: waiting for whole blocks, a page that drips would hold us for hours
                    while chunk := answer.raw.read1(1 << 16, decode_content=True):
                        body += chunk
                        if len(body) > MAX_BYTES or time.monotonic() - began > MAX_SECONDS:
                            raise requests.exceptions.ContentDecodingError('the page does not end')
            except urllib3.exceptions.HTTPError as error:
                raise requests.exceptions.ConnectionError(str(error)) from None
            finally:
                self.last = time.monotonic()
            took = self.last - began
            if len(self.answers) >= 5 and took > max(1.0, 3 * statistics.median(self.answers)):
                self.slow_down()
            else:
                self.pace = max(self.floor, self.pace * 0.9)
            self.answers.append(took)
            if answer.status_code not in (301, 302, 303, 307, 308):
                return answer.status_code, answer.headers, body
            target = urllib.parse.urljoin(url, answer.headers.get('Location', ''))
            if not target.startswith(self.base + '/') or not any(
                p.fullmatch(urllib.parse.urlsplit(target).path) for p in PATHS.values()
            ):
                return answer.status_code, answer.headers, b''  # leaves the site: not followed
            url = target
        raise requests.exceptions.TooManyRedirects('a loop of redirects')


class _NoCookies(requests.cookies.cookielib.DefaultCookiePolicy):  # type: ignore[name-defined,misc]
    def set_ok(self, cookie: Any, request: Any) -> bool:
        return False


def after(value: str | None) -> float:
    """Seconds that a Retry-After header asks for, at most an hour: it holds seconds or a date."""
    try:
        if value and value.strip().isdigit():
            return min(float(value), 3600.0)
        when = email.utils.parsedate_to_datetime(value or '')
        return min(
            max(0.0, (when - datetime.datetime.now(datetime.timezone.utc)).total_seconds()), 3600.0
        )
    except (TypeError, ValueError):
        return 0.0


# -----------------------------------------------------------------------------
# The crawl


class Crawl:
    """Walks from the letters to the bands and their albums, each page once."""

    def __init__(self, config: ScrapeConfig, store: Store, site: Site):
        self.config, self.store, self.site, self.new_albums, self.new_songs = (
            config,
            store,
            site,
            0,
            0,
        )
        self.next_line = 0
        self.bar = tqdm(unit='page', disable=None, dynamic_ncols=True)

    def page(self, path: str, kind: str) -> list[tuple[str, str]]:
        """Have the page in the store, fetched if need be; returns its links."""
        have = self.store.has(path)
        if have and not self.config.refresh:
            return self.store.children(path)
        if not self.site.allowed(path):
            self.store.problem(path, 'forbidden by robots.txt')
            return []
        answer = self.site.get(path, kind, self.store.validators(path) if have else {})
        if isinstance(answer, str):
            self.store.problem(path, f'left for the next run: {answer}')
        elif answer[0] in (404, 410) and have:
            self.store.problem(
                path, f'gone since we fetched it (status {answer[0]}); the kept page stays'
            )
        elif answer[0] != 304:
            self.store.save(path, kind, *answer)
            self.new_songs += len(answer[3][0]) if kind == ALBUM and answer[3] else 0
            if answer[0] != 200:
                self.store.problem(path, f'the site has no such page (status {answer[0]})')
        self.bar.update(1)
        return self.store.children(path)

    def run(self) -> None:
        """Fetch all that was asked for and is not there yet. Raises Stop at a limit or when the site turns us away."""
        wanted = {fold(name): name for name in names_of(self.config.artists)}
        letters = [x.lower() for x in self.config.letters or []] or sorted(
            {letter_of(name) for name in wanted.values()}
        )
        artists: list[tuple[str, str]] = []
        for letter in LETTERS if 'all' in letters else letters:
            found = self.page(f'/{letter}.html', LETTER)
            artists += [(path, name) for path, name in found if not wanted or fold(name) in wanted]
            if not found:
                tqdm.write(f'letter {letter}: no artists were found there')
            missing = [
                name
                for key, name in wanted.items()
                if letter_of(name) == letter and key not in {fold(n) for _, n in found}
            ]
            if missing:
                near = difflib.get_close_matches(
                    missing[0].upper(), [n.upper() for _, n in found], 3
                )
                raise UserError(
                    f'artist {missing[0]!r} is not under {letter.upper()}'
                    + (f'; did you mean {" or ".join(near)}?' if near else '')
                )
        artists = list(dict(artists).items())
        for number, (path, name) in enumerate(artists):
            albums = self.page(path, ARTIST)
            if self.config.list:
                print(f'{name}: {len(albums)} albums')
                for _, heading in albums:
                    print(f'  {heading}')
                continue
            for place, (album, _) in enumerate(albums):
                if not self.store.has(album) or self.config.refresh:
                    if self.config.max_albums and self.new_albums >= self.config.max_albums:
                        raise Stop(f'max_albums={self.config.max_albums} reached')
                    self.page(album, ALBUM)
                    self.new_albums += 1
                left = (len(artists) - number - 1) * (1 + len(albums)) + len(albums) - place - 1
                told = (
                    f'artist {number + 1}/{len(artists)} {name[:20]}, {self.new_albums} albums and {self.new_songs} songs in this run, '
                    f'about {left} requests and {left * self.site.pace * 1.2 / 3600:.1f} hours left'
                )
                self.bar.set_postfix_str(told)
                if (
                    self.bar.disable and self.site.requests >= self.next_line
                ):  # no terminal: a plain line now and then
                    self.next_line = self.site.requests + 50
                    print(told, flush=True)


def names_of(text: str) -> list[str]:
    """The names in a file, one a line, or in a comma-separated text."""
    if os.path.isfile(text):
        with open(text, encoding='utf-8') as f:
            return [line.strip() for line in f if line.strip()]
    return [name.strip() for name in text.split(',') if name.strip()]


def fold(name: str) -> str:
    """The name as it is compared: no case, no accents, single blanks."""
    plain = unicodedata.normalize('NFKD', name).encode('ascii', 'ignore').decode() or name
    return ' '.join(plain.casefold().split())


def letter_of(name: str) -> str:
    """The letter under which the site lists a band: a … z, or 19."""
    first = fold(name)[:1]
    return first if first.isascii() and first.isalpha() else '19'


def scrape(config: ScrapeConfig) -> None:
    """Do what the config says. Raises UserError for what stops the crawl; all that was fetched is kept then."""
    if not (config.stats or config.parse_only or config.letters or config.artists):
        raise UserError(
            'choose what to fetch: --letters=a,b,19 or --artists="Name,Name"; --letters=all takes weeks'
        )
    if (config.stats or config.parse_only) and not os.path.exists(
        os.path.join(config.crawl_dir, 'pages.sqlite')
    ):
        raise UserError(f'{config.crawl_dir}: no crawl is there')
    try:
        with contextlib.closing(
            Store(config.crawl_dir, None if config.stats or config.parse_only else config.base_url)
        ) as store:
            if config.stats:
                return print(store.summary())
            if config.parse_only:
                print(f'read {store.read_again():,} kept pages again')
                store.export()
                return print(store.summary())
            crawl, why = Crawl(config, store, Site(config)), ''
            try:
                crawl.site.obey_robots()
                crawl.run()
            except Stop as stop:
                why = str(stop)
            finally:
                crawl.bar.close()
                store.export()
                print(
                    f'{crawl.site.requests:,} requests in this run. {config.crawl_dir}: {store.summary()}'
                )
        if why and 'reached' not in why:
            raise UserError(f'stopped: {why}')
        if why:
            print(f'stopped: {why}; the same command goes on')
    except sqlite3.Error as error:
        hint = (
            'another scraper is at work there'
            if 'locked' in str(error)
            else 'make room and start again'
            if 'full' in str(error)
            else 'the file is damaged'
        )
        raise UserError(f'{config.crawl_dir}/pages.sqlite: {error} ({hint})') from None
    except OSError as error:
        raise UserError(f'{config.crawl_dir}: {error.strerror or error}') from None


if __name__ == '__main__':
    run(lambda: scrape(configure(ScrapeConfig, description='Gather lyrics, politely.')))
