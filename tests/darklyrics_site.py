"""A local site to crawl: songs with the structure, headers and quirks of the real one, and faults.

In a test:    with Site(songs, faults={'*': ['503:1']}) as site: crawl(site.url); site.requests
By hand:      python -m tests.darklyrics_site --port=8000

A fault is 'name' or 'name:argument'; FAULTS lists them. `faults` maps a path (without its query),
or '*' for every path but /robots.txt, to a list that is used up one per request to that path; then
the page is served. 'always:name' stays. A path with an entry of its own is not subject to '*'.
Instead of a list there may be a callable: it gets the path and the number of the request to it
(from 1) and returns a fault or None. Everything is deterministic: same songs, same bytes.
"""

import argparse
import hashlib
import html
import itertools
import json
import math
import re
import socket
import threading
import time
import unicodedata
import zlib
from email.utils import formatdate, parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

DEMO = Path(__file__).resolve().parent.parent / 'data' / 'darklyrics' / 'demo.jsonl'
# album pages link to their artist by full address, on a host that is never the one being crawled
HOME = 'http://lyrics.invalid'
REMOVED = "lyrics were removed due to copyright holder's request"
NON_ALBUM = 'non-album songs'
LETTERS = ['19', *'abcdefghijklmnopqrstuvwxyz']
BUILT = 1_456_833_600  # the Last-Modified of every page that nobody changed
ENDLESS, HUGE, BLOCK = 100 * 2**20, 50 * 2**20, 2**16
FAULTS = set(
    'ok 404 403 429 503 empty block cut cut_chunked cut_silent endless huge slow drip '
    'redirect_away redirect_loop redirect_same 202 latin1 nulls'.split()
)


# ---- songs -> pages


def demo_songs():
    return [json.loads(line) for line in DEMO.read_text(encoding='utf-8').splitlines()]


def one_in(n, *key):
    """True for about one key in n, and always for the same ones."""
    return (
        int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), 'big') % n == 0
    )


def album_path(song):
    return urlsplit(song['url']).path


def artist_path(song):
    slug, first = (
        album_path(song).split('/')[2],
        unicodedata.normalize('NFKD', song['artist'])[0].lower(),
    )
    letter = (
        first if first in LETTERS else slug[0] if first.isalpha() and slug[0] in LETTERS else '19'
    )
    return f'/{letter}/{slug}.html'


def album_credits(path):
    """The lines of an album page's div.thanks, before escaping; [] where the page has none."""
    if one_in(6, 'thanks', path):
        return []
    names = ['Ulla Brandt', 'Per Snoo', 'Odo & Ida Kvist', 'Zdenka Mort', 'Lars "Lid" Holm']
    turn = zlib.crc32(path.encode()) % len(names)
    names = names[turn:] + names[:turn]
    lines = [
        f'{names[0]} - Drums',
        f'{names[1]} & {names[2]} - Guitars, Kettle',
        f'Thanks to {names[3].split()[0].lower()}_66',
    ]
    lines[-1] += (
        ' for sending track # 1 lyrics.'
        if one_in(2, 'one', path)
        else ' & a friend for sending tracks ## 1, 2 lyrics.'
    )
    return lines


def crlf(text):
    return text.replace('\n', '\r\n')


def page(title, body, up=''):
    """The template around every page; its lines end in CRLF, the body is taken as it is."""
    bar = ' '.join(
        f'<a href="{up}{letter}.html">{"#" if letter == "19" else letter.upper()}</a>'
        for letter in LETTERS
    )
    head = f"""<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Transitional//EN" \
"http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd">
<html xmlns="http://www.w3.org/1999/xhtml">
<head>
<title>{html.escape(title)}</title>
<meta http-equiv="Content-Type" content="text/html; charset=utf-8" />
<link rel="stylesheet" type="text/css" href="{up}main.css" />
<script type="text/javascript">
var ads = 1 < 2 && "<a href='{up}z/advert.html'>ADVERT</a><h3><a name='1'>1. Not A Song</a></h3>";
</script>
</head>
<body>
<div class="listrow">{bar}</div>
<form action="{up}search" method="get"><input type="text" name="q" value="" /> \
<input type="submit" value="Search" /></form>
<script src="{up}banner.js"></script>
<div class="cont">
"""
    foot = (
        '</div>\n<div class="foot"><a href="/about.html">about</a> &copy; 1999 - 2026</div>\n'
        '</body>\n</html>'
    )
    return (crlf(head) + body + crlf(foot)).encode()


def heading(song, quoted):
    """'album: "Name" (2003)'; songs outside albums stand under a bare heading."""
    name = html.escape(song['album'], quote=False)
    if song['album_type'] == 'non-album':
        return name
    return f'{song["album_type"]}: {quoted.format(name)}' + (
        f' ({song["year"]})' if song['year'] else ''
    )


def lyrics_html(song):
    lines, out = song['lyrics'].split('\n') if song['lyrics'] else [], ''
    for i, line in enumerate(lines):
        text = html.escape(line, quote=one_in(3, 'quote', song['url'], i))
        if re.fullmatch(r'\[[^\[\]]*\]', line):
            if line == '[Instrumental]' or not one_in(3, 'bare', song['url'], i):
                text = f'<i>{text}</i>'
        else:
            text = re.sub(r'(\[[^\[\]]*\])', r'<i>\1</i>', text)
        if line and one_in(6, 'blank', song['url'], i):
            text += ' '
        glued = (
            line and all(lines[i + 1 : i + 2] or ['']) and one_in(15, 'glue', song['url'], i)
        )  # the next line follows on this one
        out += text + ('<br />' if glued else '<br />\n')
    return out


def album_page(songs):
    first = songs[0]
    name, path = html.escape(first['artist'].upper(), quote=False), album_path(first)
    title = f'{first["artist"].upper()} LYRICS - ' + (
        first['album']
        if first['album_type'] == 'non-album'
        else f'"{first["album"]}" '
        + (f'({first["year"]}) ' if first['year'] else '')
        + first['album_type']
    )
    back = f'<a href="{HOME}{artist_path(first)}">{name} LYRICS</a>'
    numbered = [
        (song, f'{song["track"]}. {html.escape(song["title"], quote=False)}') for song in songs
    ]
    title_line = heading(first, '"{}"')
    body = f'<h1>{back}</h1>\n<div class="albumlyrics">\n<h2>{title_line}</h2>\n'
    body += ''.join(f'<a href="#{song["track"]}">{label}</a><br />\n' for song, label in numbered)
    body = crlf(
        body + '<br /></div>\n<script src="../../rect.js"></script>\n<div class="lyrics">\n'
    )
    for song, label in numbered:
        body += f'<h3><a name="{song["track"]}">{label}</a></h3><br />'
        body += '' if song['lyrics'] and one_in(15, 'glue', song['url']) else '\r\n'
        body += lyrics_html(song) + '<br /><br />\r\n'
    tail = '\n'
    if thanks := album_credits(path):
        tail += (
            '<br /><div class="thanks">' + '<br />\n'.join(thanks) + '</div><br />\n\n'
        )  # & and " stay raw here
    tail += (
        '<br /><div class="note">A slip of the pen? Mail '
        '<a href="mailto:desk@lyrics.invalid">desk@lyrics.invalid</a></div>\n'
    )
    return page(title, body + crlf(f'{tail}<br /><br />{back}\n</div>\n'), '../../')


def artist_page(albums):
    first = albums[0][0]
    body = f'<h1>{html.escape(first["artist"].upper(), quote=False)} LYRICS</h1>\n'
    for songs in albums:
        title = heading(songs[0], '<strong>"{}"</strong>')
        body += f'<div class="album"><h2>{title}</h2>\n'
        for song in songs:
            anchor = '' if one_in(11, 'anchor', song['url']) else f'#{song["track"]}'
            title = html.escape(song['title'], quote=False)
            blank = ' ' if one_in(9, 'blank', song['url']) else ''
            body += f'<a href="..{album_path(song)}{anchor}">{title}</a>{blank}<br />\n'
        body = body[:-1] + '</div>\n<br />\n'
    return page(f'{first["artist"].upper()} LYRICS', crlf(body), '../')


def index_page(letter, artists):
    """artists: [(path, name)], shown in two columns; some pages list one artist twice."""
    artists = sorted(artists, key=lambda found: found[1].upper())
    if len(artists) > 1 and letter in '19 a d f h k m o q t v z'.split():
        artists.insert(len(artists) // 2 + 1, artists[len(artists) // 2])
    rows = []
    for path, name in artists:
        name = html.escape(name.upper(), quote=False) + ' ' * one_in(4, 'blank', path)
        rows.append(f'<a href="{path[1:]}">{name}</a>{" " * one_in(5, "after", path)}<br />\n')
    half = (len(rows) + 1) // 2
    columns = [
        f'<div class="artists {side}">\n{"".join(some)}</div>\n'
        for side, some in [('fl', rows[:half]), ('fr', rows[half:])]
    ]
    shown = '#' if letter == '19' else letter.upper()
    return page(f'METAL LYRICS - {shown}', crlf(f'<h1>ARTISTS: {shown}</h1>\n' + ''.join(columns)))


def build_pages(songs):
    albums, artists = {}, {}
    for song in songs:
        albums.setdefault(album_path(song), []).append(song)
    pages = {
        '/': page('METAL LYRICS', crlf('<h1>METAL LYRICS</h1>\n<p>Choose a letter above.</p>\n'))
    }
    for path, its in albums.items():
        its.sort(key=lambda song: song['track'])
        pages[path] = album_page(its)
        artists.setdefault(artist_path(its[0]), []).append(its)
    for path, its in artists.items():
        pages[path] = artist_page(its)
    for letter in LETTERS:
        found = [
            (path, its[0][0]['artist'])
            for path, its in artists.items()
            if path.split('/')[1] == letter
        ]
        pages[f'/{letter}.html'] = index_page(letter, found)
    return pages


NOT_FOUND = page('Page not Found', crlf('<h1>Page not Found</h1>\n'))
ERROR = '<html><head><title>{0}</title></head><body><center><h1>{0}</h1></center></body></html>'
DENIED = (
    b'<html><head><title>Access denied</title></head>\r\n'
    b'<body><p>Your address asks too often. Access is denied.</p></body></html>'
)
CHALLENGE = (
    b'<html><head><title>One moment</title></head><body><script>check();</script>'
    b'<p>Looking at your browser.</p></body></html>'
)


# ---- pages -> answers


class Site:
    """The server; `pages` (path -> bytes) may change while it runs, `faults` with set_faults."""

    def __init__(self, songs, faults=None, robots=None, port=0):
        self.pages = build_pages(songs)
        if robots is not None:
            self.pages['/robots.txt'] = robots.encode()
        self.requests, self.headers = [], []
        self.port, self.lock, self.stopping = port, threading.Lock(), threading.Event()
        self.connections, self._stamps = set(), {}
        self.set_faults(faults)

    @property
    def url(self):
        return f'http://127.0.0.1:{self.port}'

    def set_faults(self, faults):
        """Replace the faults; every path starts at the first of its list again."""
        for fault in itertools.chain.from_iterable(
            its for its in (faults or {}).values() if not callable(its)
        ):
            if fault.removeprefix('always:').partition(':')[0] not in FAULTS:
                raise ValueError(f'no such fault: {fault!r}')
        with self.lock:
            self.faults, self._asked = dict(faults or {}), {}

    def __enter__(self):
        self.stopping.clear()
        self._server = Server(('127.0.0.1', self.port), Handler)
        self._server.site, self.port = self, self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        with self.lock:
            for (
                connection
            ) in self.connections:  # a client that kept its connection must find nobody there
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
        self._thread.join()

    def note(self, target, headers):
        """Record a request; the fault that it meets."""
        path, _, query = target.partition('?')
        with self.lock:
            self.requests.append(target)
            self.headers.append(headers)
            if query == 'x=1':  # where redirect_same leads
                return 'ok'
            turn = self._asked[path] = self._asked.get(path, 0) + 1
            faults = self.faults.get(
                path, [] if path == '/robots.txt' else self.faults.get('*', [])
            )
        if callable(faults):
            return faults(path, turn) or 'ok'
        for fault in faults[:turn]:
            if fault.startswith('always:'):
                return fault.removeprefix('always:')
        return faults[turn - 1] if turn <= len(faults) else 'ok'

    def modified(self, path):
        """When the page was last changed: a test that changes self.pages makes it newer."""
        with self.lock:
            body, (old, stamp) = self.pages[path], self._stamps.get(path, (None, BUILT))
            if old is not None and old != body:
                stamp = max(int(time.time()), stamp + 1)
            self._stamps[path] = (body, stamp)
            return stamp


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 64

    def handle_error(self, request, client_address):
        pass  # clients that hang up are part of the tests


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm, timeout, verbose = True, 60, False

    def setup(self):
        super().setup()
        with self.server.site.lock:
            self.server.site.connections.add(self.connection)
        if self.server.site.stopping.is_set():
            self.connection.shutdown(socket.SHUT_RDWR)

    def finish(self):
        with self.server.site.lock:
            self.server.site.connections.discard(self.connection)
        super().finish()

    def version_string(self):
        return 'nginx'

    def log_message(self, *args):
        if self.verbose:
            super().log_message(*args)

    def do_GET(self):
        try:
            self.answer(self.server.site, self.path.partition('?')[0])
        except OSError:
            self.close_connection = True

    def head(self, status, length=None, **headers):
        """The status line and headers; without a length the connection's end is the body's end."""
        self.send_response(status)
        self.send_header(
            'Content-Type', 'text/plain' if self.path == '/robots.txt' else 'text/html'
        )  # no charset
        if length is not None:
            self.send_header('Content-Length', str(length))
        elif status != 304 and 'Transfer_Encoding' not in headers:
            headers['Connection'] = 'close'
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()

    def send(self, status, body, **headers):
        self.head(status, len(body), **headers)
        self.wfile.write(body)

    def stream(self, block, count):
        """Send a block until `count` bytes are out, the client hangs up or the site closes."""
        for at in range(0, count, len(block)):
            if self.server.site.stopping.is_set():
                break
            self.wfile.write(block[: count - at])

    def answer(self, site, path):
        fault, _, argument = site.note(self.path, dict(self.headers)).partition(':')
        body = site.pages.get(path, NOT_FOUND)
        half = len(body) // 2
        if fault not in FAULTS:
            raise ValueError(f'no such fault: {fault!r}')
        if fault in ('404', '403', '429', '503'):
            wait = (
                formatdate(math.ceil(time.time()) + 1, usegmt=True)
                if argument == 'date'
                else argument
            )
            texts = {
                '403': '403 Forbidden',
                '429': '429 Too Many Requests',
                '503': '503 Service Temporarily Unavailable',
            }
            text = NOT_FOUND if fault == '404' else ERROR.format(texts[fault]).encode()
            self.send(int(fault), text, **({'Retry_After': wait} if wait else {}))
        elif fault in ('empty', 'block', '202'):
            self.send(
                202 if fault == '202' else 200,
                {'empty': b'', 'block': DENIED, '202': CHALLENGE}[fault],
            )
        elif fault.startswith('redirect_'):
            target = {'away': f'http://127.0.0.2:9{path}', 'loop': path, 'same': f'{path}?x=1'}[
                fault[9:]
            ]
            self.send(302, ERROR.format('302 Found').encode(), Location=target)
        elif fault.startswith('cut'):
            self.close_connection = True
            if fault == 'cut_chunked':
                self.head(200, Transfer_Encoding='chunked')
                self.wfile.write(
                    b'%x\r\n%s\r\n%x\r\n%s'
                    % (half // 2, body[: half // 2], half, body[half // 2 : half])
                )
            else:
                self.head(200, len(body) if fault == 'cut' else None)
                self.wfile.write(body[:half])
        elif fault == 'endless':
            self.head(200)
            self.wfile.write(body[:half])
            self.stream(b'and on and on it goes<br />\n' * (BLOCK // 28), ENDLESS - half)
        elif fault == 'huge':
            self.head(200, HUGE)
            self.wfile.write(body[:half])
            self.stream(b'<b>more</b><br />\n' * (BLOCK // 18), HUGE - len(body))
            self.wfile.write(body[half:])
        elif fault == 'drip':
            self.head(200, len(body))
            for at in range(len(body)):
                if site.stopping.wait(0.2):
                    break
                self.wfile.write(body[at : at + 1])
        else:
            if fault == 'slow':
                site.stopping.wait(float(argument))
            self.serve(site, path, body, fault)

    def serve(self, site, path, body, fault):
        if path not in site.pages:
            return self.send(404, body)
        if fault == 'latin1':
            body = body.decode(errors='replace').encode('cp1252', errors='replace')
        elif fault == 'nulls':  # before every fifth word that stands outside of tags
            turn = itertools.count()
            body = re.sub(
                rb'(?<= )(?=\w[^<>]*<)', lambda _: b'\0' if next(turn) % 5 == 0 else b'', body
            )
        stamp = site.modified(path)
        about = {
            'Last_Modified': formatdate(stamp, usegmt=True),
            'ETag': f'"{hashlib.blake2b(body, digest_size=8).hexdigest()}"',
        }
        if (tags := self.headers.get('If-None-Match')) is not None:
            known = tags.strip() == '*' or about['ETag'] in re.findall(r'"[^"]*"', tags)
        else:
            try:
                known = (
                    parsedate_to_datetime(self.headers['If-Modified-Since']).timestamp() >= stamp
                )
            except (TypeError, ValueError):
                known = False
        return self.head(304, **about) if known else self.send(200, body, **about)


# ---- songs that a careless parser gets wrong


def hostile_songs():
    """Every trap of the site that fits into the fields of a song; all of it invented."""
    songs = []

    def album(artist, slug, name, kind, year, *tracks):
        page_slug = re.sub(r'[^a-z0-9]', '', name.lower()) or 'untitled'
        for track, (title, lyrics) in enumerate(tracks, 1):
            url = f'http://lyrics.invalid/lyrics/{slug}/{page_slug}.html#{track}'
            fields = {'artist': artist, 'album': name, 'album_type': kind, 'year': year}
            songs.append({**fields, 'track': track, 'title': title, 'lyrics': lyrics, 'url': url})

    album(
        'Brackenmaw', 'brackenmaw', 'Ledger: of "Teeth" & Tallow', 'album', 2011,
        ('Prologue: The Bell; or, Not', 'The bell: it hung.\nThe bell: it rang [x 4]\n\n'
            'The "bell" is [sic] no bell'),
        ('13 Steps', '1. Lift the latch\n2. 13 Steps\n3. Do not look\n\n4.\n5) Look'),
        ('2. 13 Steps', 'Down again, and down [x 2]\n[Solo: Odo]\nDown [softly] to the tar'),
        ('The "Mouth" Says \'No\'', 'He said "no", and \'no\', and "No!" [repeat]\n\n'
            'He\'d said it [twice] before'),
        ('1999', '1999\n2000. A year of rust\n10. Ten'),
        ('7', '[Instrumental]'),
        ('Echo, Echo', 'This is the first of two\n\nIt says its own name'),
        ('Echo, Echo', 'This is the second of two\n\nIt forgets its own name'),
        ('Prologue: The Bell; or, Not', 'The bell came back [till fade]'),
    )  # fmt: skip
    album(
        'Ash & Plinth', 'ashplinth', 'Less < More > Less', 'EP', 2004,
        ('Salt & Iron', 'Salt & iron & rye\nAT&T is no word, nor is &amp; nor &lt;b&gt;'),
        ('A < B', 'I <3 the wolves\nif a < b and b > c\n<i>not a tag</i>\n<br /> nor this\n'
            '</div><script>knock()</script>'),
        ('h3', '<h3><a name="9">9. A False Door</a></h3>\nbehind it, wall\n'
            '<!-- and behind the wall -->'),
        ('Untold', ''),
        ('Withdrawn', REMOVED),
        ('Nearly Withdrawn', 'We said the lyrics were removed\n'
            'The holder laughed and hummed the rest'),
        ('Thanks', 'Thanks to the frost for sending tracks ## 2, 8 of wolves\n'
            'Odo - Drums, but no drum came\n\nBRACKENMAW LYRICS'),
    )  # fmt: skip
    album(
        'Ångkvist Ödla', 'angkvistodla', 'Çelik ve Süt', 'album', 1998,
        ('Éveil', 'Là-haut, où l’été gèle – “encore”…\nDvě věže, žlutý kůň\nСнег на крыше\n雪の鐘'),
        ('Naïve Tide', 'NaÃ¯ve was the tide\nand naïve the shore\n\n'
            'the cafÃ© closed at dÃ¦wn\nItâ€™s late'),
        ('[Untitled]', '[Spoken] Come in, come in\n[Door]\n[Door]\n\n'
            '[a bracket that never closes\nand one that closes only]'),
        ('Ø', '[Instrumental]'),
    )  # fmt: skip
    album(
        'Éloquex',
        'loquex',
        'Untitled (Yet)',
        'demo',
        None,
        ('Untaped', 'No year was on the tape\nNo tape was in the year'),
    )
    album(
        'Éloquex', 'loquex', NON_ALBUM, 'non-album', None,
        ('Stray', 'I belong to nothing\n[Chorus]\nNothing belongs to me [x 3]'),
        ('Stray (2010 version): Part 2', REMOVED),
    )  # fmt: skip
    album(
        'Éloquex',
        'loquex',
        '(2001)',
        'single',
        2002,
        ('(2001)', 'A year in round arms (2001)\n- and a dash -\n* and a star *'),
    )
    album(
        '7 Damp Cellars',
        '7dampcellars',
        'Live: in "the" Well',
        'live',
        2016,
        ('Rope', '[Crowd]\n\nRope!\nRope!'),
        ('Bucket', ''),
    )
    album(
        '7 Damp Cellars',
        '7dampcellars',
        '1',
        'split',
        2017,
        ('1. 1', '1'),
        ('Wide', 'one two three\n' + 'long ' * 400 + 'line'),
    )
    album(
        '!Knurr',
        'knurr',
        '???',
        'compilation',
        2020,
        ('?', '?\n!\n...\n[?]'),
        ('Album: "Album" (1991)', 'album: "Album" (1991)'),
    )
    return songs


def main():
    words = argparse.ArgumentParser(description='Serve the demo songs as a site to crawl.')
    words.add_argument('--port', type=int, default=8000)
    words.add_argument(
        '--hostile', action='store_true', help='add the songs that are hard to parse'
    )
    words = words.parse_args()
    Handler.verbose = True
    with Site(demo_songs() + (hostile_songs() if words.hostile else []), port=words.port) as site:
        print(f'serving on {site.url} (stop with Ctrl-C). Now try, in another terminal:')
        print(
            f'python scrapers/darklyrics_scraper.py --base_url={site.url} --letters=all '
            '--delay=0 --local',
            flush=True,
        )
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print()


if __name__ == '__main__':
    main()
