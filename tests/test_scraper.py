"""The scraper and the dataset builder against a local site built like the real one, with faults."""

import importlib.util
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from urllib.parse import urlsplit

import pytest

from configurator import UserError, configure
from tests.conftest import ROOT, script
from tests.darklyrics_site import REMOVED, Site, album_path, artist_path, demo_songs, hostile_songs


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / 'scrapers' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


scraper, builder = load('darklyrics_scraper'), load('build_dataset')
SONGS = demo_songs()
FEW = [s for s in SONGS if s['artist'] in ('Ambersluice', 'Thawferry', '19 Uninvited Uncles')]


def crawl(site, folder, *more):
    words = [
        f'--base_url={site.url}',
        f'--crawl_dir={folder}',
        '--delay=0',
        '--local',
        '--retry_wait=0.01',
        '--timeout=2',
        *map(str, more),
    ]
    scraper.scrape(configure(scraper.ScrapeConfig, words))


def songs_in(folder):
    with open(folder / 'songs.jsonl', encoding='utf-8') as f:
        return {
            urlsplit(s['url']).path + '#' + urlsplit(s['url']).fragment: s
            for s in map(json.loads, f)
        }


def report_of(folder):
    return [
        json.loads(line)
        for line in (folder / 'report.jsonl').read_text(encoding='utf-8').splitlines()
    ]


def expect(folder, songs):
    """All songs are there, field by field; the site shows artists in capitals."""
    found = songs_in(folder)
    assert len(found) == len(songs)
    for song in songs:
        got = found[album_path(song) + '#' + urlsplit(song['url']).fragment]
        assert got['artist'] == song['artist'].upper()
        for field in 'album', 'album_type', 'year', 'track', 'title':
            assert got[field] == song[field], (field, song['url'])
        silent = song['lyrics'] == '[Instrumental]' or song['lyrics'] == REMOVED
        assert got['lyrics'] == (
            ''
            if silent
            else song['lyrics']
            .replace('NaÃ¯ve', 'Naïve')
            .replace('cafÃ©', 'café')
            .replace('dÃ¦wn', 'dæwn')
            .replace('Itâ€™s', 'It’s')
        )
        assert (
            got['instrumental'] == (song['lyrics'] == '[Instrumental]')
            and got['fetched_at']
            and 'thanks' not in got['lyrics'].lower().split('\n')[-1]
        )


def test_the_round_trip(tmp_path):
    """Songs → site → crawl → build → the same songs; one request a page, one page an album."""
    with Site(SONGS + hostile_songs()) as site:
        crawl(site, tmp_path, '--letters=all')
        assert len(site.requests) == len(set(site.requests)) and site.requests[0] == '/robots.txt'
        assert sum(p.startswith('/lyrics/') for p in site.requests) == len(
            {album_path(s) for s in SONGS + hostile_songs()}
        )
        assert all('lyreGPT' in h['User-Agent'] and 'Cookie' not in h for h in site.headers)
        expect(tmp_path, SONGS + hostile_songs())
        before = len(site.requests)
        crawl(site, tmp_path, '--letters=all')
        assert site.requests[before:] == ['/robots.txt'], 'nothing is fetched twice'
    out = tmp_path / 'lyrics.jsonl'
    for _ in range(2):
        assert (
            script(
                'scrapers/build_dataset.py',
                f'--input={tmp_path / "songs.jsonl"}',
                f'--output={out}',
            ).returncode
            == 0
        )
        found = [json.loads(line) for line in out.read_text(encoding='utf-8').splitlines()]
        by_path = {urlsplit(s['url'])[2:]: s for s in found}
        for song in SONGS:
            got = by_path.get(urlsplit(song['url'])[2:])
            assert (got is None) == (song['lyrics'] == '[Instrumental]')
            assert got is None or {k: v for k, v in got.items() if k != 'url'} == {
                k: v for k, v in song.items() if k != 'url'
            }
    assert list(found[0]) == list(SONGS[0]), 'the very fields of the embedded corpus'


def test_notes_and_credits(tmp_path):
    from tests.darklyrics_site import album_credits

    with Site(FEW) as site:
        crawl(site, tmp_path, '--letters=all')
    for song in songs_in(tmp_path).values():
        assert all(note in song['lyrics'] or song['instrumental'] for note in song['notes'])
        assert song['credits'].split('\n') == (album_credits(urlsplit(song['url']).path) or [''])
        marked = [
            line
            for line in song['lyrics'].split('\n')
            if line.startswith('[') and line.endswith(']')
        ]
        assert set(marked) <= set(song['notes'])


TRANSIENT = [
    '429',
    '429:1',
    '503',
    '503:1',
    '503:date',
    'empty',
    'block',
    'cut',
    'cut_chunked',
    'cut_silent',
    'huge',
    'endless',
    'redirect_away',
    'redirect_loop',
    'redirect_same',
    '202',
    'nulls',
]


@pytest.mark.parametrize('fault', [*TRANSIENT, 'slow:2.5', 'drip'])
def test_all_songs_in_spite_of(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(scraper, 'MAX_SECONDS', 1.5)
    few = [s for s in FEW if s['artist'] == 'Thawferry']
    hit = {album_path(s): [fault] for s in few} | {artist_path(few[0]): [fault], '/t.html': [fault]}
    if fault in ('huge', 'endless', 'drip', 'slow:2.5'):
        hit = {album_path(few[0]): [fault]}
    with Site(few, faults=hit) as site:
        crawl(site, tmp_path, '--letters=t')
        expect(tmp_path, few)
        assert not [r for r in report_of(tmp_path) if 'left for' in r['reason']]


def test_latin_pages(tmp_path):
    """A page in Windows' Latin although it says UTF-8: what it can hold comes out right."""
    song = dict(FEW[0], lyrics='café née Müller', title='Größe')
    with Site([song], faults={album_path(song): ['always:latin1']}) as site:
        crawl(site, tmp_path, '--letters=all')
    assert next(iter(songs_in(tmp_path).values()))['lyrics'] == song['lyrics']


@pytest.mark.parametrize(
    'fault, said',
    [
        ('403', 'status 403: the site seems to block us'),
        ('block', 'the site seems to block us'),
        ('empty', r'of another kind: \'\''),
        ('503', 'could not be fetched'),
    ],
)
def test_a_block_stops_the_crawl_and_keeps_what_there_is(fault, said, tmp_path):
    with Site(SONGS) as site:
        crawl(site, tmp_path, '--letters=a', '--max_albums=3')
        kept = songs_in(tmp_path)
        site.set_faults({'*': [f'always:{fault}']})
        before = len(site.requests)
        with pytest.raises(UserError, match=said):
            crawl(site, tmp_path, '--letters=all', '--retries=2')
        assert songs_in(tmp_path) == kept and len(site.requests) - before <= 12
        assert fault == '403' or any(
            'left for the next run' in r['reason'] for r in report_of(tmp_path)
        )
        site.set_faults({})
        crawl(site, tmp_path, '--letters=all')
        expect(tmp_path, SONGS)


def test_one_broken_page_is_reported_and_the_rest_is_had(tmp_path):
    broken = album_path(FEW[0])
    with Site(FEW, faults={broken: ['always:block']}) as site:
        crawl(site, tmp_path, '--letters=all')
        expect(tmp_path, [s for s in FEW if album_path(s) != broken])
        assert any(
            broken in r['page'] and 'another kind' in r['reason'] for r in report_of(tmp_path)
        )
        site.set_faults({})
        crawl(site, tmp_path, '--letters=all')
        expect(tmp_path, FEW)
        assert not any(broken in r['page'] for r in report_of(tmp_path)), (
            'what was mended is no longer reported'
        )


def test_robots(tmp_path):
    forbidden = album_path(FEW[0])
    with Site(FEW, robots=f'User-agent: *\nDisallow: {forbidden}\nCrawl-delay: 0.05\n') as site:
        crawl(site, tmp_path / 'a', '--letters=all')
        assert forbidden not in site.requests and any(
            r['reason'] == 'forbidden by robots.txt' for r in report_of(tmp_path / 'a')
        )
    with Site(FEW, robots='User-agent: *\nDisallow: /\n') as site:
        crawl(site, tmp_path / 'b', '--letters=all')
        assert site.requests == ['/robots.txt']
    with Site(FEW, faults={'/robots.txt': ['always:503']}) as site:
        with pytest.raises(UserError, match='robots.txt could not be fetched .status 503.'):
            crawl(site, tmp_path / 'c', '--letters=all')
        assert set(site.requests) == {'/robots.txt'}


def test_the_pace():
    config = scraper.ScrapeConfig()
    site = scraper.Site(config)
    assert site.pace == 5.0
    site.slow_down()
    assert site.pace == 10.0
    assert (
        scraper.retry_after({'Retry-After': '7'}) == 7
        and scraper.retry_after({'Retry-After': 'Wed, 21 Oct 2099 07:28:00 GMT'}) == 3600
        and scraper.retry_after({'Retry-After': 'soon'}) == scraper.retry_after({}) == 0
    )


def kill_rounds(tmp_path, rounds, songs):
    """kill -9 at random instants; returns how often a stored page was fetched again (must be 0)."""
    dice, again = random.Random(1), 0
    with Site(songs) as site:
        words = [
            sys.executable,
            'scrapers/darklyrics_scraper.py',
            f'--base_url={site.url}',
            f'--crawl_dir={tmp_path}',
            '--letters=all',
            '--delay=0.02',
            '--local',
        ]
        for _ in range(rounds):
            kept = set()
            if (tmp_path / 'pages.sqlite').exists():
                with sqlite3.connect(tmp_path / 'pages.sqlite') as db:
                    kept = (
                        {row[0] for row in db.execute('SELECT path FROM pages')}
                        if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'pages'").fetchone()
                        else set()
                    )
                db.close()
            before = len(site.requests)
            process = subprocess.Popen(
                words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            time.sleep(dice.uniform(0.4, 0.75))
            process.send_signal(signal.SIGKILL)
            process.wait()
            again += len(kept & set(site.requests[before:]))
        crawl(site, tmp_path, '--letters=all')
    expect(tmp_path, songs)
    return again


def test_kill_and_go_on(tmp_path):
    assert kill_rounds(tmp_path, 6, SONGS) == 0


@pytest.mark.long
def test_kill_and_go_on_fifty_times(tmp_path):
    assert kill_rounds(tmp_path, 50, SONGS + hostile_songs()) == 0


def test_ctrl_c_exports_what_there_is(tmp_path):
    with Site(SONGS) as site:
        words = [
            sys.executable,
            'scrapers/darklyrics_scraper.py',
            f'--base_url={site.url}',
            f'--crawl_dir={tmp_path}',
            '--letters=all',
            '--delay=0.05',
            '--local',
        ]
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        while sum('/lyrics/' in p for p in site.requests) < 3 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=20)[0]
    assert process.returncode == 130 and 'requests in this run' in told and songs_in(tmp_path)


def test_refresh_and_parse_only(tmp_path):
    with Site(FEW) as site:
        crawl(site, tmp_path, '--letters=all')
        first = (tmp_path / 'songs.jsonl').read_bytes()
        before = len(site.requests)
        path = album_path(FEW[0])
        site.pages[path] = site.pages[path].replace(FEW[0]['title'].encode(), b'Changed Title')
        crawl(site, tmp_path, '--letters=all', '--refresh')
        asked = site.headers[before + 1 :]
        assert len(asked) == before - 1 and all('If-None-Match' in h for h in asked)
        assert any(s['title'] == 'Changed Title' for s in songs_in(tmp_path).values()) and len(
            songs_in(tmp_path)
        ) == len(FEW)
        before, second = len(site.requests), (tmp_path / 'songs.jsonl').read_bytes()
        crawl(site, tmp_path, '--parse_only')
        assert (tmp_path / 'songs.jsonl').read_bytes() == second != first and len(
            site.requests
        ) == before


def test_choices_and_limits(tmp_path, capsys):
    with Site(SONGS) as site:
        crawl(site, tmp_path / 'a', '--artists=thawferry,Vyrelamp')
        assert {s['artist'] for s in songs_in(tmp_path / 'a').values()} == {'THAWFERRY', 'VYRELAMP'}
        (tmp_path / 'names.txt').write_text('Ambersluice\n\n19 Uninvited Uncles\n')
        crawl(site, tmp_path / 'b', f'--artists={tmp_path / "names.txt"}')
        assert {s['artist'] for s in songs_in(tmp_path / 'b').values()} == {
            'AMBERSLUICE',
            '19 UNINVITED UNCLES',
        }
        before = len(site.requests)
        crawl(site, tmp_path / 'c', '--letters=a', '--list')
        assert 'AMBERSLUICE: ' in capsys.readouterr().out and not any(
            '/lyrics/' in p for p in site.requests[before:]
        )
        crawl(site, tmp_path / 'd', '--letters=all', '--max_albums=4')
        assert len({urlsplit(s['url']).path for s in songs_in(tmp_path / 'd').values()}) == 4
        before = len(site.requests)
        crawl(site, tmp_path / 'e', '--letters=all', '--max_requests=7')
        assert (
            len(site.requests) - before == 7 and 'max_requests=7 reached' in capsys.readouterr().out
        )
        scraper.scrape(scraper.ScrapeConfig(crawl_dir=str(tmp_path / 'd'), stats=True))
        assert '4 of' in capsys.readouterr().out


@pytest.mark.parametrize(
    'words, message',
    [
        ([], 'choose what to fetch'),
        (['--letters=7'], 'letters=7'),
        (['--letters=a', '--delay=0.5'], 'delay=0.5'),
        (['--letters=a', '--delay=0', '--local'], 'with --local'),
        (['--stats'], 'no crawl is there'),
        (['--letters=a', '--base_url=ftp://x'], 'base_url=ftp://x'),
        (
            ['--letters=a', '--base_url=http://127.0.0.1:9', '--local', '--delay=0'],
            'robots.txt could not be fetched',
        ),
    ],
)
def test_mistakes_get_one_line(tmp_path, words, message):
    done = script('scrapers/darklyrics_scraper.py', f'--crawl_dir={tmp_path / "c"}', *words)
    said = [line for line in done.stderr.splitlines() if 'error' in line]
    assert (
        done.returncode == 2
        and len(said) == 1
        and message in said[0]
        and 'Traceback' not in done.stderr
    ), done.stderr


def test_more_mistakes(tmp_path):
    with Site(FEW) as site:
        with pytest.raises(
            UserError, match="artist 'Thawfery' is not under T; did you mean THAWFERRY"
        ):
            crawl(site, tmp_path / 'a', '--artists=Thawfery')
        crawl(site, tmp_path / 'b', '--letters=t')
        with pytest.raises(UserError, match='name another --crawl_dir'):
            scraper.scrape(scraper.ScrapeConfig(crawl_dir=str(tmp_path / 'b'), letters=['t']))
        (tmp_path / 'b' / 'pages.sqlite').write_bytes(b'nonsense' * 500)
        for name in '-wal', '-shm':
            (tmp_path / 'b' / f'pages.sqlite{name}').unlink(missing_ok=True)
        with pytest.raises(UserError, match='pages.sqlite: .*damaged'):
            crawl(site, tmp_path / 'b', '--letters=t')
        holder = scraper.Store(str(tmp_path / 'c'), site.url)
        with pytest.raises(UserError, match='is another scraper at work'):
            crawl(site, tmp_path / 'c', '--letters=t')
        holder.db.close()


def test_links_that_lead_away_are_never_followed(tmp_path):
    bad = [
        'http://127.0.0.2:9/x.html',
        '../../../etc/passwd',
        'file:///etc/passwd',
        '//evil.invalid/lyrics/a/b.html',
        '../lyrics/../../x.html',
        'javascript:alert(1)',
        '../lyrics/a/b.html?x=../..',
        'http://[bad',
    ]
    with Site(FEW) as site:
        page = artist_path(FEW[0])
        site.pages[page] = site.pages[page].replace(
            b'<h2>', b'<h2>' + b''.join(b'<a href="%s">x</a>' % b.encode() for b in bad)
        )
        crawl(site, tmp_path, '--letters=all')
        expect(tmp_path, FEW)
        assert {p for p in site.requests if p not in site.pages} <= {
            '/robots.txt',
            '/lyrics/a/b.html',
            '/x.html',
            *(f'/{x}.html' for x in [*'abcdefghijklmnopqrstuvwxyz', '19']),
        }
    assert sorted(os.listdir(tmp_path)) == ['pages.sqlite', 'report.jsonl', 'songs.jsonl']


def fuzz(count):
    dice = random.Random(7)
    with Site(FEW + hostile_songs()) as site:
        pages = [(p, b) for p, b in sorted(site.pages.items()) if p.endswith('.html')]
    bits = [
        b'<',
        b'>',
        b'"',
        b'<div>',
        b'</div>',
        b'<i>',
        b'<h3>',
        b'<!--',
        b'-->',
        b'<script>',
        b'&#x110000;',
        b'&amp;',
        b'\0',
        b'\xff\xfe',
        b'<br />' * 50,
        b'<a href="',
        b'<![CDATA[',
        b'<?',
        b']]>',
        b'&lol9;',
    ]
    longest = 0.0
    for _ in range(count):
        path, body = dice.choice(pages)
        body = bytearray(body)
        for _ in range(dice.randrange(1, 12)):
            at = dice.randrange(len(body))
            body[at : at + dice.choice([0, 1, 5, 400])] = dice.choice(bits)
        kind = dice.choice(list(scraper.READERS))
        began = time.process_time()
        found = scraper.READERS[kind](bytes(body), path)
        longest = max(longest, time.process_time() - began)
        assert found is None or isinstance(found, (list, tuple))
        json.dumps(found)
    return longest


def test_the_parser_survives_anything():
    assert fuzz(300) < 2
    bombs = [
        b'<div class="lyrics">' + b'<i>' * 50_000,
        b'<div class="lyrics"><h3>1. x</h3>' + b'<div>' * 50_000,
        b'<div class="lyrics">' + b'&amp;' * 200_000,
        b'<' * 200_000,
        b'</i>' * 200_000,
        b'<!DOCTYPE lolz [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>&b;'
        + b'<div class="lyrics">x',
        bytes(range(256)) * 500,
    ]
    for bomb in bombs:
        for read in scraper.READERS.values():
            began = time.process_time()
            read(bomb, '/x.html')
            assert time.process_time() - began < 10


@pytest.mark.long
def test_the_parser_survives_thousands():
    assert fuzz(5000) < 2


# -----------------------------------------------------------------------------
# build_dataset.py


def build(tmp_path, songs, *more):
    (tmp_path / 'songs.jsonl').write_text(
        ''.join(json.dumps(s) + '\n' for s in songs), encoding='utf-8'
    )
    done = script(
        'scrapers/build_dataset.py',
        f'--input={tmp_path / "songs.jsonl"}',
        f'--output={tmp_path / "lyrics.jsonl"}',
        *more,
    )
    assert done.returncode == 0, done.stderr
    return [
        json.loads(line)
        for line in (tmp_path / 'lyrics.jsonl').read_text(encoding='utf-8').splitlines()
    ], json.loads((tmp_path / 'lyrics.report.json').read_text(encoding='utf-8'))


def test_doubles_boilerplate_and_prose(tmp_path):
    a, b, c = (
        (
            dict(s)
            for s in SONGS
            if s['lyrics'] != '[Instrumental]'
            and len(s['lyrics']) > 800
            and s['album_type'] == 'album'
            and s['year'] > 1990
        ).__iter__().__next__(),
        dict(SONGS[5]),
        dict(SONGS[9]),
    )
    lines = a['lyrics'].split('\n')
    demo = a | {
        'album_type': 'demo',
        'year': a['year'] - 1,
        'lyrics': '\n'.join(lines[:-2]).upper(),
        'url': 'http://x/demo#1',
    }
    live = a | {
        'album_type': 'live',
        'lyrics': a['lyrics'].replace(',', ''),
        'url': 'http://x/live#1',
    }
    noisy = b | {
        'lyrics': b['lyrics']
        + '\nSubmits, comments, corrections are welcomed at someone@example.org\n\n\n\nlast line',
        'url': 'http://x/n#1',
    }
    prose = c | {
        'lyrics': '\n'.join(
            [
                'It was a long winter and the men of the village told one another stories of it '
                'for years afterwards, each of them longer than the last ' * 2
            ]
            * 4
        ),
        'url': 'http://x/p#1',
    }
    kept, report = build(tmp_path, [live, demo, a, noisy, prose, {'artist': 'x'}])
    assert (
        [s['url'] for s in kept] == [a['url'], 'http://x/n#1']
        and '@' not in kept[1]['lyrics']
        and kept[1]['lyrics'].endswith('\n\nlast line')
    )
    assert report['left_out'] == {
        'the same words as another song': 1,
        'nearly the words of another song': 1,
        'prose, not verse': 1,
        'no lyrics or artist field': 1,
    }
    assert {
        s.get('of') for s in report['songs'] if 'words of' in s['why'] or 'same' in s['why']
    } == {a['url']} and report['boilerplate_lines'] == 1


def test_filters(tmp_path):
    kept, _ = build(tmp_path, SONGS, '--languages=de')
    assert 1 <= len(kept) <= 8 and all(
        any(w in s['lyrics'].lower().split() for w in ('der', 'die', 'und', 'ich')) for s in kept
    )
    (tmp_path / 'bands.csv').write_text(
        'Artist,Genre,Country\nThawferry,Melodic Death Metal,FI\nAmbersluice,Doom Metal,UK\n',
        encoding='utf-8',
    )
    kept, report = build(tmp_path, SONGS, f'--metadata={tmp_path / "bands.csv"}', '--genres=doom')
    assert {s['artist'] for s in kept} == {'Ambersluice'} and report['left_out'][
        'another genre, or none known'
    ] > 300
    kept, _ = build(tmp_path, SONGS, '--years=2000-2004', '--min_lines=10')
    assert kept and all(2000 <= s['year'] <= 2004 for s in kept)


@pytest.mark.parametrize(
    'words, message',
    [
        (['--input=nowhere'], 'nowhere: no such file'),
        (['--years=old'], 'years=old'),
        (['--genres=doom'], 'add --metadata'),
        (['--similarity=0'], 'similarity=0'),
        (['--languages=xx'], 'languages=xx'),
        (['--metadata=nowhere', '--genres=a'], 'nowhere: No such file'),
        (['--artists=Nobody'], 'the filters leave nothing'),
    ],
)
def test_builder_mistakes(tmp_path, words, message):
    done = script(
        'scrapers/build_dataset.py',
        f'--input={ROOT / "data/darklyrics/demo.jsonl"}',
        f'--output={tmp_path / "o.jsonl"}',
        *words,
    )
    assert (
        done.returncode == 2
        and message in done.stderr
        and done.stderr.count('\n') == 1
        and not os.listdir(tmp_path)
    ), done.stderr


@pytest.mark.long
def test_a_quarter_million_songs(tmp_path):
    """250,000 synthetic songs, a fifth of them doubles, in under 10 minutes and 2 GB on 2 cores."""
    pytest.importorskip('resource')
    dice = random.Random(3)
    lines = sorted(
        {
            line
            for s in SONGS
            for line in s['lyrics'].split('\n')
            if len(line) > 15 and line[0] != '['
        }
    )
    with open(tmp_path / 'songs.jsonl', 'w', encoding='utf-8') as f:
        lyrics = ''
        for n in range(250_000):
            if n % 5 or not lyrics:
                chosen = [
                    ' '.join(dice.choices(dice.choice(lines).split(), k=2))
                    + ' '
                    + dice.choice(lines)
                    for _ in range(dice.randrange(16, 40))
                ]
                lyrics = '\n'.join(chosen)
            else:
                lyrics = lyrics.replace(',', '') + '\none more line'
            song = dict(
                SONGS[0],
                artist=f'BAND {n // 40}',
                album=f'Album {n // 10}',
                track=n % 10 + 1,
                title=f'Song {n}',
                lyrics=lyrics,
                url=f'http://x/{n // 10}.html#{n % 10 + 1}',
            )
            f.write(json.dumps(song) + '\n')
    code = f"""
import resource, runpy, sys, time
began = time.time()
sys.argv = ['b', '--input={tmp_path / 'songs.jsonl'}', '--output={tmp_path / 'lyrics.jsonl'}']
try:
    runpy.run_path('scrapers/build_dataset.py', run_name='__main__')
finally:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
    print('took', round(time.time() - began), 's', used, 'MB')
"""
    done = script('-c', code, timeout=1200)
    seconds, megabytes = (int(x) for x in (done.stdout.split()[-4], done.stdout.split()[-2]))
    print(done.stdout)
    assert done.returncode == 0 and seconds < 600 and megabytes < 2000, done.stdout + done.stderr
    assert (
        json.loads((tmp_path / 'lyrics.report.json').read_text())['kept'] == 200_001
    )  # all but the doubles, every fifth from the sixth on
