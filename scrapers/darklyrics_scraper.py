"""Collect a corpus of metal lyrics, politely: letters, then artists, then albums.

    python scrapers/darklyrics_scraper.py --artists="Quillmoth,Thawferry"  # only these: minutes
    python scrapers/darklyrics_scraper.py --letters=q                      # all under Q: hours
    python scrapers/darklyrics_scraper.py --letters=q --list               # only list the albums
    python scrapers/darklyrics_scraper.py --stats                          # what the crawl holds

An SQLite file holds each page and what was read from it, written in one transaction: after a crash,
the same command continues and fetches no page twice. songs.jsonl is exported from it. Lyrics belong
to their writers: what you collect is for your own study, do not pass it on.
"""

import contextlib
import difflib
import io
import json
import os
import pathlib
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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from typing import Any

import ftfy
import requests
import urllib3
from bs4 import BeautifulSoup, NavigableString, Tag
from bs4.exceptions import ParserRejectedMarkup
from tqdm import tqdm

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))
from configurator import UserError, configure, run  # noqa: E402

USER_AGENT = (
    'lyreGPT/1.0 (a lyrics corpus for private study; one request at a time; obeys robots.txt)'
)
LETTERS = [*'abcdefghijklmnopqrstuvwxyz', '19']
LETTER, ARTIST, ALBUM = 'letter', 'artist', 'album'
# The paths of each kind of page; a link to any other path is never followed.
PATHS = {
    LETTER: re.compile(r'/(?:[a-z]|19)\.html'),
    ARTIST: re.compile(r'/(?:[a-z]|19)/[\w.~-]+\.html'),
    ALBUM: re.compile(r'/lyrics/[\w.~-]+/[\w.~-]+\.html'),
}
MAX_BYTES, MAX_SECONDS = 5_000_000, 120  # for one page; the largest album pages are some 200 KB
MAX_WAIT = 3600.0  # the longest wait before a retry, in seconds


@dataclass
class ScrapeConfig:
    """The options; the comment behind each is its help. Raises ValueError for an invalid value."""

    # What to fetch
    letters: list[str] | None = None  # a … z and 19 (names that do not begin with a letter),
    # as in --letters=a,b,19; or all
    artists: str = (
        ''  # names, as in --artists="Quillmoth,Thawferry", or a file with a name per line
    )
    max_albums: int = 0  # stop after this many album pages; 0: no limit
    max_requests: int = 0  # stop after this many requests; 0: no limit
    base_url: str = 'http://www.darklyrics.com'  # the site, or another one built like it
    refresh: bool = False  # check the pages that are already here for changes

    # What to do instead of fetching lyrics
    list: bool = False  # list the albums; fetches letter and artist pages only
    stats: bool = False  # show what the crawl holds; no requests
    parse_only: bool = False  # parse the stored pages again; no requests

    # Where
    crawl_dir: str = 'crawl'  # pages.sqlite, songs.jsonl and report.jsonl go here

    # How politely
    delay: float = 5.0  # seconds between two requests; longer if robots.txt asks for it or
    # the site answers slowly
    local: bool = False  # the site is on this machine: allows a delay below one second
    retry_wait: float = 30.0  # seconds before a failed request is retried; doubles each time
    retries: int = 5  # retries of one page before it is left for the next run
    timeout: float = 30.0  # seconds to wait for the site to answer

    def __post_init__(self) -> None:
        if min(self.max_albums, self.max_requests, self.delay, self.retry_wait, self.retries) < 0:
            raise ValueError(
                'max_albums, max_requests, delay, retry_wait and retries: expected 0 or more'
            )
        if self.timeout <= 0:
            raise ValueError(f'timeout={self.timeout}: expected more than 0 seconds')
        site = urllib.parse.urlsplit(self.base_url)
        if site.scheme not in ('http', 'https') or not site.hostname:
            raise ValueError(
                f'base_url={self.base_url}: expected an address such as http://www.darklyrics.com'
            )
        if self.delay < 1 and not (
            self.local and re.fullmatch(r'localhost|127(\.\d+){3}|::1', site.hostname)
        ):
            raise ValueError(
                f'delay={self.delay}: below one second only for a site on this machine, '
                'with --local'
            )
        letters = [letter.lower() for letter in self.letters or []]
        if not {*LETTERS, 'all'}.issuperset(letters):
            raise ValueError(
                f'letters={",".join(letters)}: expected a … z, 19 (names that do not begin with '
                'a letter) or all'
            )
        self.letters = LETTERS if 'all' in letters else letters


# -----------------------------------------------------------------------------
# Parsing: bytes in, plain values out. No input makes these functions raise.

# What a page holds: links (path, text), songs, and descriptions of what was not understood
Found = tuple[list[tuple[str, str]], list[dict[str, Any]], list[str]]


def parse(body: bytes) -> BeautifulSoup:
    """The page's tree. The bytes are decoded as UTF-8 whatever the HTTP header says."""
    # marked sections are not HTML, and the parser rejects some of them
    text = body.decode('utf-8', 'surrogateescape').replace('\0', '').replace('<![', '&lt;![')
    # the bytes that are not UTF-8 are Windows-1252: old pages hold both
    text = re.sub(
        '[\udc80-\udcff]+',
        lambda run: run[0].encode('utf-8', 'surrogateescape').decode('cp1252', 'replace'),
        text,
    )
    try:
        return BeautifulSoup(text, 'html.parser')
    except ParserRejectedMarkup:
        return BeautifulSoup('', 'html.parser')  # is reported as a page of another kind


def text_of(tag: Tag | None) -> str:
    """The element's text; '' if there is no such element."""
    return tag.get_text() if tag else ''


def links_of(roots: Iterable[Tag], path: str, kind: str) -> list[tuple[str, str]]:
    """(path, text) of the links under `roots` to pages of this kind of the same site, each once."""
    found: dict[str, str] = {}
    for a in (a for root in roots for a in root.find_all('a', href=True)):
        try:
            address = urllib.parse.urljoin('http://site' + path, str(a['href']).strip())
            url = urllib.parse.urlsplit(address)
        except ValueError:
            continue
        same_site = url.netloc in ('site', 'www.darklyrics.com')
        if same_site and PATHS[kind].fullmatch(url.path) and '..' not in url.path:
            found.setdefault(url.path, ' '.join(a.get_text().split()))
    return list(found.items())


def read_letter(body: bytes, path: str) -> Found | None:
    """The links to the letter's artists; None if this is not a letter page."""
    columns = parse(body).find_all('div', class_='artists')
    return (links_of(columns, path, ARTIST), [], []) if columns else None


def read_artist(body: bytes, path: str) -> Found | None:
    """The links to the artist's albums, with their headings; None if this is not an artist page."""
    soup = parse(body)
    blocks = soup.find_all('div', class_='album')
    if not blocks and 'lyrics' not in text_of(soup.find('h1')).lower():
        return None
    albums = {
        album: ' '.join(text_of(block.find('h2')).split())
        for block in blocks
        for album, _ in links_of([block], path, ALBUM)
    }
    return list(albums.items()), [], []


HEADING = re.compile(
    r'\s*(?P<album_type>[^:"]{1,30}?)\s*:\s*"\s*(?P<album>.*?)\s*"\s*(?:\((?P<year>\d{4})\))?\s*',
    re.S,
)
SONG_HEADING = re.compile(r'(?:(\d{1,3})\s*\.\s*)?(.*)')
REMOVED = re.compile(
    r'\W*(?:the(?:se)?\s+)?lyrics\s+(?:were|have been)\s+removed\b'
    r'[^\n]*(?:copyright|request)[^\n]*',
    re.I,
)
INSTRUMENTAL = re.compile(r'\W*instrumental\W*', re.I)
NOTE_TAGS = ('i', 'em')


def read_album(body: bytes, path: str) -> Found | None:
    """The album's songs; None if this is not an album page.

    A song has: artist, album, album_type, year, track, title, lyrics, notes, credits, instrumental,
    removed. Lines and stanzas are kept. A note stays in its line and is in `notes` too. Credits and
    the page's footer are not part of the lyrics.
    """
    soup = parse(body)
    root = soup.find('div', class_='lyrics')
    if root is None:
        return None
    credits, problems = remove_blocks(root)
    before, *songs = split_songs(root)
    lost = clean(''.join(before['lyrics']))

    # what all songs of the page have in common
    artist = re.sub(r'\s*LYRICS\s*$', '', clean(text_of(soup.find('h1'))), flags=re.I)
    top = soup.find('div', class_='albumlyrics')
    heading = clean(text_of(top and top.h2))
    album = {'album': heading.strip(' :"'), 'album_type': 'non-album', 'year': None}
    match = HEADING.fullmatch(heading)
    if match:
        album |= match.groupdict() | {'year': int(match['year']) if match['year'] else None}
    elif not re.search('non-album|other', heading.lower()):
        problems.append(f'unknown form of album heading: {heading[:80]!r}')
    if not artist or not songs or lost:
        problems.append(f'no artist, no song, or text before the first song: {lost[:80]!r}')

    for song in songs:
        text = lay_out(''.join(song['lyrics']))
        bracketed = [line for line in text.split('\n') if re.fullmatch(r'\[.*\]', line)]
        removed, instrumental = bool(REMOVED.fullmatch(text)), bool(INSTRUMENTAL.fullmatch(text))
        if not text:
            problems.append(f'song {song["title"][:60]!r} has neither words nor a mark')
        song |= {
            'lyrics': '' if removed or instrumental else text,
            'notes': list(dict.fromkeys(song['notes'] + bracketed)),
            'artist': artist,
            **album,
            'credits': credits,
            'instrumental': instrumental,
            'removed': removed,
        }
    return [], songs, problems


def remove_blocks(root: Tag) -> tuple[str, list[str]]:
    """Remove what is not lyrics from the tree; returns the credits, and what was not understood."""
    for tag in [
        *root.find_all(['script', 'style', 'iframe', 'form', 'noscript']),
        *root.find_all('a', href=PATHS[ARTIST]),
    ]:
        tag.decompose()
    credits, problems = '', []
    for div in (div for div in root.find_all('div') if not div.decomposed):
        kind, text = ' '.join(div.get('class') or []), ''.join(map(plain, div.descendants))
        if 'thanks' in kind:
            credits = lay_out(text)
        elif 'note' not in kind and clean(text):
            problems.append(f'unknown block {kind!r}: {clean(text)[:80]!r}')
        div.decompose()
    return credits, problems


def split_songs(root: Tag) -> list[dict[str, Any]]:
    """The songs: track, title, lyrics, notes. The first entry has what precedes all headings."""
    for heading in root.find_all('h3'):
        heading.string = heading.get_text()
    songs: list[dict[str, Any]] = [{'lyrics': [], 'notes': []}]
    node: Any
    for node in root.descendants:
        if node.name == 'h3':
            number, title = SONG_HEADING.findall(clean(node.get_text()))[0]
            songs.append(
                {'track': int(number or len(songs)), 'title': title, 'lyrics': [], 'notes': []}
            )
        elif node.parent.name != 'h3':
            songs[-1]['lyrics'].append(plain(node))
        if node.name in NOTE_TAGS and not node.find_parent(NOTE_TAGS) and clean(node.get_text()):
            songs[-1]['notes'].append(clean(node.get_text()))
    return songs


def plain(node: Any) -> str:
    """The text of this node alone: that of a string, a line end for <br>, else ''."""
    if type(node) is NavigableString:  # comments and scripts are of subclasses
        return re.sub(r'\s+', ' ', node)
    return '\n' if node.name == 'br' else ''


def clean(text: str) -> str:
    """One line of text: mojibake repaired, then white space squeezed."""
    return ' '.join(ftfy.fix_encoding(text).split())


def lay_out(text: str) -> str:
    """Several lines: mojibake repaired, no blanks around a line, no empty lines at the ends."""
    lines = ftfy.fix_encoding(text).split('\n')
    return '\n'.join(line.strip() for line in lines).strip('\n')


READERS = {LETTER: read_letter, ARTIST: read_artist, ALBUM: read_album}


# -----------------------------------------------------------------------------
# Storage: one SQLite file, one transaction per page

# The exclusive lock: two scrapers on one crawl would fetch pages twice.
SCHEMA = """
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
CREATE TABLE IF NOT EXISTS pages (path TEXT PRIMARY KEY, kind TEXT, status INT, fetched_at TEXT,
    etag TEXT, modified TEXT, body BLOB);
CREATE TABLE IF NOT EXISTS links (parent TEXT, place INT, child TEXT, label TEXT,
    PRIMARY KEY (parent, place));
CREATE TABLE IF NOT EXISTS songs (path TEXT, place INT, song TEXT, PRIMARY KEY (path, place));
CREATE TABLE IF NOT EXISTS problems (path TEXT, reason TEXT, at TEXT, PRIMARY KEY (path, reason));
CREATE TABLE IF NOT EXISTS crawl (base_url TEXT);
BEGIN IMMEDIATE;
COMMIT;
"""
EXPORTS = {
    'songs.jsonl': 'SELECT song FROM songs ORDER BY path, place',
    'report.jsonl': """
        SELECT json_object('page', base_url || path, 'reason', reason, 'at', at)
        FROM problems, crawl ORDER BY path, reason""",
}
COUNTS = """
SELECT (SELECT count(*) FROM pages WHERE kind = 'letter' AND status = 200),
    (SELECT count(*) FROM pages WHERE kind = 'artist' AND status = 200),
    (SELECT count(*) FROM pages WHERE kind = 'album' AND status = 200),
    (SELECT count(DISTINCT child) FROM links WHERE child LIKE '/lyrics/%'),
    (SELECT count(*) FROM songs),
    (SELECT count(*) FROM songs WHERE json_extract(song, '$.lyrics') = ''),
    (SELECT count(*) FROM problems)
"""


class Store:
    """The crawl's file: pages as received, the links and songs found in them, and problems.

    Without a `base_url`, the crawl may be of any site. Raises UserError if it is of another one.
    """

    def __init__(self, folder: str, base_url: str | None):
        self.folder, self.base_url = folder, (base_url or '').rstrip('/')
        self.path = os.path.join(folder, 'pages.sqlite')
        os.makedirs(folder, exist_ok=True)
        self.db = sqlite3.connect(self.path, timeout=1, isolation_level=None)
        self.db.executescript(SCHEMA)
        self.db.execute(
            'INSERT INTO crawl SELECT ? WHERE NOT EXISTS (SELECT * FROM crawl)', (self.base_url,)
        )
        owner = self.db.execute('SELECT base_url FROM crawl').fetchone()[0]
        if self.base_url not in ('', owner):
            self.db.close()
            raise UserError(
                f'{self.path} holds a crawl of {owner}, not of {self.base_url}: '
                'name another --crawl_dir'
            )
        self.base_url = owner

    def save(self, path: str, kind: str, answer: requests.Response, found: Found | None) -> None:
        """Write a page and everything found in it, in one transaction."""
        now = time.strftime('%Y-%m-%dT%H:%M:%S+00:00', time.gmtime())
        page = (
            path,
            kind,
            answer.status_code,
            now,
            answer.headers.get('ETag'),
            answer.headers.get('Last-Modified'),
            zlib.compress(answer.content, 9),
        )
        with self.db:
            self.db.execute('BEGIN')
            self.db.execute('INSERT OR REPLACE INTO pages VALUES (?, ?, ?, ?, ?, ?, ?)', page)
            self._save_found(path, found, now)

    def _save_found(self, path: str, found: Found | None, now: str) -> None:
        for table, column in (('links', 'parent'), ('songs', 'path'), ('problems', 'path')):
            self.db.execute(f'DELETE FROM {table} WHERE {column} = ?', (path,))
        links, songs, problems = found or ([], [], [])
        texts = [
            json.dumps(
                song | {'url': f'{self.base_url}{path}#{song["track"]}', 'fetched_at': now},
                ensure_ascii=False,
            )
            for song in songs
        ]
        self.db.executemany(
            'INSERT INTO links VALUES (?, ?, ?, ?)',
            [(path, i, *link) for i, link in enumerate(links)],
        )
        self.db.executemany(
            'INSERT INTO songs VALUES (?, ?, ?)', [(path, i, text) for i, text in enumerate(texts)]
        )
        self.db.executemany(
            'INSERT OR REPLACE INTO problems VALUES (?, ?, ?)', [(path, x, now) for x in problems]
        )

    def add_problem(self, path: str, reason: str) -> None:
        """Record why a page could not be fetched."""
        self.db.execute(
            'INSERT OR REPLACE INTO problems '
            "VALUES (?, ?, strftime('%Y-%m-%dT%H:%M:%S+00:00', 'now'))",
            (path, reason),
        )

    def validators(self, path: str) -> dict[str, str] | None:
        """The headers that request a page only if it has changed; None if it is not here."""
        row = self.db.execute('SELECT etag, modified FROM pages WHERE path = ?', (path,)).fetchone()
        names = ('If-None-Match', 'If-Modified-Since')
        return row and {name: value for name, value in zip(names, row) if value}

    def children(self, path: str) -> list[tuple[str, str]]:
        """(path, label) of the pages that this one links to, in its order."""
        return self.db.execute(
            'SELECT child, label FROM links WHERE parent = ? ORDER BY place', (path,)
        ).fetchall()

    def parse_again(self) -> None:
        """Parse all stored pages again with the current parser, in one transaction."""
        pages = 'SELECT path, kind, fetched_at, body FROM pages WHERE status = 200 ORDER BY path'
        with self.db:
            self.db.execute('BEGIN')
            rows = tqdm(self.db.execute(pages), desc='parsing', unit='page', disable=None)
            for path, kind, fetched_at, body in rows:
                self._save_found(path, READERS[kind](zlib.decompress(body), path), fetched_at)

    def export(self) -> None:
        """Write songs.jsonl and report.jsonl, each in a fixed order, completely or not at all."""
        for name, query in EXPORTS.items():
            path = os.path.join(self.folder, name)
            with open(path + '.tmp', 'w', encoding='utf-8', newline='\n') as f:
                f.writelines(line + '\n' for (line,) in self.db.execute(query))
            os.replace(path + '.tmp', path)

    def summary(self) -> str:
        """What the crawl holds, in one line."""
        return (
            '{} letters, {:,} artists, {:,} of {:,} known albums, {:,} songs ({:,} of them without '
            'words: instrumental, removed or empty); {:,} entries in the report; {:.1f} MB on disk'
        ).format(*self.db.execute(COUNTS).fetchone(), os.path.getsize(self.path) / 1e6)


# -----------------------------------------------------------------------------
# Requests


class LimitReached(Exception):
    """max_albums or max_requests is reached."""


class Site:
    """Requests one page at a time, slowly. Raises UserError when the site turns us away."""

    def __init__(self, config: ScrapeConfig):
        self.config, self.base = config, config.base_url.rstrip('/')
        self.session = requests.Session()
        self.session.trust_env = False  # no proxies or credentials from the environment
        self.session.headers = requests.structures.CaseInsensitiveDict(
            {'User-Agent': USER_AGENT, 'Accept': 'text/html', 'Accept-Encoding': 'gzip'}
        )
        self.session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self.pace = self.floor = config.delay  # seconds between requests: now, and at least
        self.requests = self.failures = 0  # requests sent; pages in a row that were not fetched
        self.last = float('-inf')  # when the last request ended
        self.seconds: list[float] = []  # that the last 20 answers took
        self.robots = urllib.robotparser.RobotFileParser()

    def obey_robots(self) -> None:
        """Read robots.txt. If the site cannot provide it, nothing may be fetched (RFC 9309)."""
        try:
            answer = self._ask('/robots.txt', {})
        except requests.RequestException as error:
            raise UserError(
                f'{self.base}/robots.txt could not be fetched ({error}), so what is allowed is '
                'unknown; check the address and the network, or try again later'
            ) from None
        rules = answer.content.decode('utf-8', 'replace') if answer.status_code == 200 else ''
        self.robots.parse(rules.splitlines())
        self.pace = self.floor = max(self.floor, float(self.robots.crawl_delay(USER_AGENT) or 0))

    def get(
        self, path: str, kind: str, headers: dict[str, str]
    ) -> tuple[requests.Response, Found | None] | str:
        """The page and what was found in it, with retries; or why it could not be fetched.

        Raises UserError when the site turns us away: a 403, or three pages in a row that are empty,
        of another kind, or unavailable.
        """
        wait, unexpected = self.config.retry_wait, list[bytes]()
        for attempt in range(self.config.retries + 1):
            if attempt:
                time.sleep(wait * random.uniform(1, 1.2))
                wait = min(wait * 2, MAX_WAIT)
            try:
                answer = self._ask(path, headers)
            except requests.RequestException as error:
                reason = str(error)
                self.slow_down()
                wait = max(wait, retry_after(getattr(error.response, 'headers', {})))
                continue
            status, body, found = answer.status_code, answer.content, None
            # a page without an end may have been cut off; if it comes twice, it is complete
            if status == 200 and (b'</html>' in body[-200:].lower() or body in unexpected):
                found = READERS[kind](body, path)
            if found or status in (304, 404, 410):
                self.failures = 0
                return answer, found
            text = clean(parse(body[:20000]).get_text(' '))[:120]
            reason = f'status {status}, incomplete or of another kind: {text!r}'
            unexpected.append(body)
            if len(unexpected) == 3:
                break
        self.failures += 1
        if self.failures == 3:
            raise UserError(
                f'stopped: three pages in a row could not be fetched (the last: {reason}); the '
                'site seems to block us, or is down. Everything is kept; wait a day, then continue '
                'with the same command'
            )
        return reason

    def slow_down(self) -> None:
        """Wait twice as long between requests from now on, at most a minute."""
        self.pace = min(max(self.pace * 2, self.floor), max(60.0, self.floor))

    def _ask(self, path: str, headers: dict[str, str]) -> requests.Response:
        """Request a page and follow redirects, but only to pages of this site."""
        url = self.base + path
        for _ in range(4):
            answer = self._request(url, headers)
            url = urllib.parse.urljoin(url, answer.headers.get('Location', ''))
            known = any(p.fullmatch(urllib.parse.urlsplit(url).path) for p in PATHS.values())
            if not (answer.is_redirect and known and url.startswith(self.base + '/')):
                return answer
        raise requests.TooManyRedirects('a loop of redirects')

    def _request(self, url: str, headers: dict[str, str]) -> requests.Response:
        """Send one request, after the pause that is due.

        Raises requests.RequestException if it may be repeated, UserError if the site refuses it.
        """
        if self.config.max_requests and self.requests >= self.config.max_requests:
            raise LimitReached(f'max_requests={self.config.max_requests} reached')
        pause = self.pace * random.uniform(1.0, 1.4)
        time.sleep(max(0.0, self.last + pause - time.monotonic()))
        self.requests += 1
        began, body = time.monotonic(), b''
        try:
            with self.session.get(
                url,
                headers=headers,
                timeout=self.config.timeout,
                allow_redirects=False,
                stream=True,
            ) as answer:
                # read1() returns what has arrived; read() waits for whole blocks, so a server that
                # sends a byte at a time could keep us for hours
                for chunk in iter(lambda: answer.raw.read1(1 << 16, decode_content=True), b''):
                    body += chunk
                    if len(body) > MAX_BYTES or time.monotonic() - began > MAX_SECONDS:
                        raise requests.ConnectionError('the page does not end')
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise requests.ConnectionError(f'no complete answer ({type(error).__name__})') from None
        finally:
            self.last = time.monotonic()
        answer.raw = io.BytesIO(body)  # where answer.content is read from
        status, seconds = answer.status_code, self.last - began
        if status == 403:
            raise UserError(
                f'stopped: {url} was refused with status 403: the site seems to block us. '
                'Everything is kept; wait a day, then continue with a longer --delay'
            )
        if status == 429 or status >= 500:
            raise requests.HTTPError(f'status {status}', response=answer)
        # slow down when the site answers more slowly than usual, else recover step by step
        if len(self.seconds) >= 5 and seconds > max(1.0, 3 * statistics.median(self.seconds)):
            self.slow_down()
        else:
            self.pace = max(self.floor, self.pace * 0.9)
        self.seconds = [*self.seconds[-19:], seconds]
        return answer


def retry_after(headers: Mapping[str, str]) -> float:
    """The seconds that the Retry-After header asks for, at most an hour; 0 if there is none."""
    try:
        seconds = urllib3.Retry().parse_retry_after(headers.get('Retry-After', ''))
        return min(float(seconds), MAX_WAIT)
    except (urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
        return 0.0


# -----------------------------------------------------------------------------
# The crawl


class Crawl:
    """Goes from the letters to the artists and their albums, each page once."""

    def __init__(self, config: ScrapeConfig, store: Store, site: Site):
        self.config, self.store, self.site = config, store, site
        self.new_albums = 0
        self.bar = tqdm(unit='page', disable=None, dynamic_ncols=True)

    def page(self, path: str, kind: str) -> list[tuple[str, str]]:
        """Fetch the page if it is not in the store; returns its links."""
        known = self.store.validators(path)
        if known is not None and not self.config.refresh:
            return self.store.children(path)
        if not self.site.robots.can_fetch(USER_AGENT, self.site.base + path):
            self.store.add_problem(path, 'forbidden by robots.txt')
            return []
        result = self.site.get(path, kind, known or {})
        if isinstance(result, str):
            self.store.add_problem(path, f'left for the next run: {result}')
        else:
            status = result[0].status_code
            if status == 200 or known is None:  # a page that is gone stays in the store
                self.store.save(path, kind, *result)
            if status in (404, 410):
                self.store.add_problem(path, f'not on the site (status {status})')
        self.bar.update(1)
        return self.store.children(path)

    def artists(self) -> list[tuple[str, str]]:
        """(path, name) of the artists asked for. Raises UserError for one that is not listed."""
        wanted = {fold(name): name for name in read_names(self.config.artists)}
        artists: dict[str, str] = {}
        for letter in self.config.letters or sorted(set(map(letter_of, wanted.values()))):
            listed = self.page(f'/{letter}.html', LETTER)
            names = {fold(name): name for _, name in listed}
            for key, name in wanted.items():
                if letter_of(name) == letter and key not in names:
                    near = ' or '.join(difflib.get_close_matches(key, names, 3)).upper()
                    raise UserError(
                        f'artist {name!r} is not under {letter.upper()}; '
                        f'did you mean {near or "another letter"}?'
                    )
            artists |= {path: name for path, name in listed if not wanted or fold(name) in wanted}
        return list(artists.items())

    def run(self) -> None:
        """Fetch what was asked for and is not in the store. Raises LimitReached and UserError."""
        artists = self.artists()
        for number, (path, name) in enumerate(artists, 1):
            albums = self.page(path, ARTIST)
            if self.config.list:
                print(f'{name}: {len(albums)} albums', *(title for _, title in albums), sep='\n  ')
                continue
            for place, (album, _) in enumerate(albums, 1):
                if self.store.validators(album) is not None and not self.config.refresh:
                    continue
                if self.config.max_albums and self.new_albums >= self.config.max_albums:
                    raise LimitReached(f'max_albums={self.config.max_albums} reached')
                self.page(album, ALBUM)
                self.new_albums += 1
                # an estimate: as if the other artists had as many albums as this one
                left = (len(artists) - number) * (1 + len(albums)) + len(albums) - place
                progress = (
                    f'artist {number}/{len(artists)} {name[:20]}, {self.new_albums} albums in this '
                    f'run, about {left} requests and {left * self.site.pace / 3000:.1f} hours left'
                )
                self.bar.set_postfix_str(progress)
                if self.bar.disable and self.new_albums % 50 == 1:  # without a terminal
                    print(progress, flush=True)


def read_names(text: str) -> list[str]:
    """The names in a file with a name per line, or in a comma-separated text."""
    names = text.split(',')
    if os.path.isfile(text):
        names = pathlib.Path(text).read_text(encoding='utf-8').splitlines()
    return [name.strip() for name in names if name.strip()]


def fold(name: str) -> str:
    """The name for comparisons: without case and accents, with single blanks."""
    plain = unicodedata.normalize('NFKD', name).encode('ascii', 'ignore').decode() or name
    return ' '.join(plain.casefold().split())


def letter_of(name: str) -> str:
    """The letter under which the site lists an artist: a … z, or 19."""
    first = fold(name)[:1]
    return first if first.isascii() and first.isalpha() else '19'


def scrape(config: ScrapeConfig) -> None:
    """Do what the options say. Raises UserError for what stops the crawl; it keeps every page."""
    offline = config.stats or config.parse_only
    if not (offline or config.letters or config.artists):
        raise UserError(
            'choose what to fetch: --letters=a,b,19 or --artists="Name,Name"; '
            '--letters=all takes days'
        )
    path = os.path.join(config.crawl_dir, 'pages.sqlite')
    if offline and not os.path.exists(path):
        raise UserError(f'{config.crawl_dir}: no crawl is there')
    try:
        store = Store(config.crawl_dir, None if offline else config.base_url)
        with contextlib.closing(store.db):
            if not offline:
                return fetch(config, store)
            if not config.stats:
                store.parse_again()
                store.export()
            print(store.summary())
    except sqlite3.Error as error:
        raise UserError(
            f'{path}: {error}; is another scraper at work there, the disk full or the file damaged?'
        ) from None


def fetch(config: ScrapeConfig, store: Store) -> None:
    """Crawl, and export what there is whatever happens."""
    crawl = Crawl(config, store, Site(config))
    try:
        crawl.site.obey_robots()
        crawl.run()
    except LimitReached as limit:
        print(f'stopped: {limit}; the same command continues')
    finally:
        crawl.bar.close()
        store.export()
        print(
            f'{crawl.site.requests:,} requests in this run. {config.crawl_dir}: {store.summary()}'
        )


if __name__ == '__main__':
    run(lambda: scrape(configure(ScrapeConfig, description='Collect lyrics, politely.')))
