import hashlib
import json
import pickle
import runpy
import struct
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from configurator import UserError
from lyregpt.dataset import Split, TokenFile, permute, read_meta, read_tokenizer, write_dataset
from lyregpt.text import download, pick_split, read_documents, read_pieces, split_text
from lyregpt.tokenizer import BPETokenizer, CharTokenizer
from tests.conftest import DEMO, ROOT, mistake, script


def write_bin(path, tokens, header=False):
    ids = np.asarray(tokens, dtype='<u2').tobytes()
    if header:
        words = np.zeros(256, dtype='<i4')
        words[:3] = 20240520, 1, len(tokens)
        ids = words.tobytes() + ids
    path.write_bytes(ids)


@pytest.mark.parametrize('n', [1, 2, 3, 7, 64, 1000, 4097])
def test_permutation_is_one_and_depends_on_seed_and_epoch(n):
    first = permute(np.arange(n), n, 1, 0)
    assert sorted(first) == list(range(n))
    assert (permute(np.arange(n), n, 1, 0) == first).all()
    if n > 7:
        assert (permute(np.arange(n), n, 1, 1) != first).any() and (
            permute(np.arange(n), n, 2, 0) != first
        ).any()
        assert abs(np.corrcoef(first, np.arange(n))[0, 1]) < 0.3


def test_permutation_of_a_huge_file_needs_no_memory():
    n = 10**11
    places = permute(np.arange(10**6), n, 1337, 3)
    assert len(set(places.tolist())) == 10**6 and places.min() >= 0 and places.max() < n
    assert 0.49 < places.mean() / n < 0.51


@pytest.mark.parametrize('length', [33, 34, 64, 65, 100, 1000])
def test_each_epoch_visits_every_sequence_once(tmp_path, length):
    write_bin(tmp_path / 'train.bin', range(length))
    split = Split(str(tmp_path), 'train', 32)
    offsets = set()
    for epoch in range(20):
        x, y = split.batch(epoch * split.n_sequences, split.n_sequences)
        assert (y == x + 1).all()
        starts = sorted(x[:, 0])
        assert (np.diff(starts) == 32).all(), 'sequences that touch and do not overlap'
        offsets.add(int(starts[0]))
    assert len(offsets) > 1 or length == 33, 'epochs cut the text in different places'


def test_batches_are_a_function_of_seed_and_step(tmp_path):
    write_bin(tmp_path / 'train.bin', np.random.default_rng(0).integers(0, 1000, 5000))
    a, b = Split(str(tmp_path), 'train', 16, seed=1), Split(str(tmp_path), 'train', 16, seed=1)
    b.batch(0, 50)
    assert all((p == q).all() for p, q in zip(a.batch(700, 12), b.batch(700, 12)))
    whole = a.batch(700, 12)[0]
    assert (np.concatenate([a.batch(700, 6)[0], a.batch(706, 6)[0]]) == whole).all(), (
        'two ranks see together what one sees'
    )
    assert (Split(str(tmp_path), 'train', 16, seed=2).batch(700, 12)[0] != whole).any()


def test_evaluation_reads_every_token_once(tmp_path):
    write_bin(tmp_path / 'val.bin', range(1, 101))
    split = Split(str(tmp_path), 'val', 32)
    for world_size in 1, 2, 3:
        targets = [
            t
            for rank in range(world_size)
            for _, y in split.eval_batches(2, None, rank, world_size)
            for t in y.ravel()
            if t >= 0
        ]
        assert sorted(targets) == list(range(2, 101))
    some = [x.tolist() for x, _ in split.eval_batches(2, 2)]
    assert some == [x.tolist() for x, _ in split.eval_batches(2, 2)] and sum(map(len, some)) == 2


def test_a_short_validation_split_is_read(tmp_path):
    write_bin(tmp_path / 'val.bin', [5, 6, 7])
    ((x, y),) = Split(str(tmp_path), 'val', 32).eval_batches(4)
    assert y[0, :2].tolist() == [6, 7] and (y[0, 2:] == -1).all()


def test_shards_and_headers(tmp_path):
    tokens = np.arange(1000)
    write_bin(tmp_path / 'train_000001.bin', tokens[:600], header=True)
    write_bin(tmp_path / 'train_000002.bin', tokens[600:])
    split = Split(str(tmp_path), 'train', 16)
    x, y = split.batch(0, split.n_sequences)
    assert split.n_tokens == 1000 and len(set(x[:, 0])) == split.n_sequences and (y == x + 1).all()


@pytest.mark.parametrize(
    'content, message',
    [
        (None, 'no such file; prepare the dataset first: python'),
        (b'', 'is empty'),
        (b'\x01\x00\x02', 'odd size'),
        (struct.pack('<10H', *range(10)), 'fewer than one sequence'),
        (struct.pack('<100H', *range(900, 1000)), 'token id 9.. is beyond the vocabulary of 50'),
        (struct.pack('<256i', 20240520, 1, 99, *[0] * 253) + b'\0\0', 'cut off'),
        (struct.pack('<256i', 20240520, 7, 1, *[0] * 253) + b'\0\0', 'header version 7'),
    ],
)
def test_bad_token_files(tmp_path, content, message):
    if content is not None:
        (tmp_path / 'train.bin').write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        Split(str(tmp_path), 'train', 32, vocab_size=50).batch(0, 1)
    assert 'train.bin' in str(error.value)


def test_meta_pickles_run_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / 'pwned'), 'w'))

    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'itos': Evil()}))
    with pytest.raises(UserError, match='meta.pkl.*plain'):
        read_meta(str(tmp_path))
    assert not (tmp_path / 'pwned').exists()
    (tmp_path / 'meta.pkl').write_bytes(
        pickle.dumps({'vocab_size': 2, 'itos': {0: 'a', 1: 'b'}, 'stoi': {'a': 0, 'b': 1}})
    )
    assert read_tokenizer(str(tmp_path)).encode('ba') == [1, 0]


def test_a_char_dataset_is_one_that_nanogpt_reads(chars):
    meta = pickle.loads((chars / 'meta.pkl').read_bytes())
    tokenizer = read_tokenizer(str(chars))
    text = 'the rain'
    assert [meta['stoi'][c] for c in text] == tokenizer.encode(text) and meta[
        'vocab_size'
    ] == tokenizer.vocab_size
    assert (
        len(np.fromfile(chars / 'train.bin', dtype=np.uint16))
        == read_meta(str(chars))['splits']['train']['tokens']
    )


def test_failed_preparation_changes_nothing(tmp_path):
    tokenizer = CharTokenizer.train(['abc'])
    write_dataset(str(tmp_path), [('train', 'abc', True), ('val', 'ab', True)], tokenizer)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for pieces in [('train', 'abcz', True), ('val', 'a', True)], [('train', 'abc', True)]:
        with pytest.raises(UserError):
            write_dataset(str(tmp_path), pieces, tokenizer)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_large_vocabularies(tmp_path):
    """Beyond 65,536 tokens, ids take four bytes each below llm.c's header; readers handle both."""
    tokenizer = CharTokenizer.train([''.join(map(chr, range(0x20000, 0x20000 + 70000)))])
    text = ''.join(chr(0x20000 + i * 7 % 70000) for i in range(5000))
    write_dataset(str(tmp_path), [('train', text, True), ('val', text[:100], True)], tokenizer)
    raw = (tmp_path / 'train.bin').read_bytes()
    assert struct.unpack('<3i', raw[:12]) == (20240801, 7, 5001) and len(raw) == 1024 + 4 * 5001
    expected = [*tokenizer.encode(text), tokenizer.eot]
    assert (
        max(expected) > 65536
        and TokenFile(str(tmp_path / 'train.bin')).read(0, 10**6).tolist() == expected
    )
    x, y = Split(str(tmp_path), 'val', 100, tokenizer.vocab_size).batch(0, 1)
    assert [*x[0], y[0, -1]] == [*expected[:100], tokenizer.eot]
    (tmp_path / 'train.bin').write_bytes(raw[:-4])
    with pytest.raises(UserError, match='says 5001 tokens, the file holds 5000'):
        TokenFile(str(tmp_path / 'train.bin'))


def test_split_text_loses_nothing():
    text = [f'line {i}\n' for i in range(100)]
    whole = ''.join(text)
    pieces = list(split_text(text, len(whole), 0.1))
    assert (
        ''.join(p[1] for p in pieces) == whole
        and ''.join(p[1] for p in pieces if p[0] == 'train') == whole[: int(len(whole) * 0.9)]
    )
    assert [p[0] for p in pieces if p[2]] == ['train', 'val']


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'cp1252', 'cp1251'])
def test_encodings_are_detected(tmp_path, encoding):
    text = 'Über den Flüssen schläft größer die Nacht, café fermé.\n' * 40
    if encoding == 'cp1251':
        text = 'Над рекой холодный туман, и мой брат молчит у окна.\n' * 40
    (tmp_path / 'a.txt').write_bytes(text.replace('\n', '\r\n').encode(encoding))
    assert (
        ''.join(read_pieces(str(tmp_path / 'a.txt')))
        == text
        == ''.join(read_pieces(str(tmp_path / 'a.txt'), encoding))
    )
    (tmp_path / 'a.txt').write_bytes(b'caf\xe9')
    with pytest.raises(UserError, match='save it as UTF-8$'):  # sample.py has no --encoding
        list(read_pieces(str(tmp_path / 'a.txt'), 'utf-8'))
    with pytest.raises(UserError, match='unknown encoding'):
        list(read_pieces(str(tmp_path / 'a.txt'), 'klingon'))
    (tmp_path / 'a.txt').write_bytes(b'cafe' * (1 << 18) + b'\xe9')
    with pytest.raises(UserError, match='save it as UTF-8, or .* --encoding=cp1252'):
        list(*read_documents([str(tmp_path / 'a.txt')]))


# -----------------------------------------------------------------------------
# The prepare.py scripts, run as a user runs them


def test_darklyrics(tmp_path):
    done = script('data/darklyrics/prepare.py', f'--out_dir={tmp_path}')
    assert done.returncode == 0, done.stderr
    meta = json.loads((tmp_path / 'meta.json').read_text(encoding='utf-8'))
    tokenizer = read_tokenizer(str(tmp_path))
    texts = {
        s: tokenizer.decode(np.fromfile(tmp_path / f'{s}.bin', dtype='<u2').tolist()).split(
            '<|endoftext|>'
        )[:-1]
        for s in ('train', 'val')
    }
    songs = [json.loads(line) for line in DEMO.read_text(encoding='utf-8').splitlines()]
    sung = [s for s in songs if s['lyrics'] != '[Instrumental]']
    assert (
        meta['splits']['train']['documents'] + meta['splits']['val']['documents']
        == len(sung)
        < len(songs)
    )
    assert not set(texts['train']) & set(texts['val']) and len(texts['val']) > 10
    names = ('artist', 'album', 'year', 'title')
    header = ''.join(f'{name.title()}: {sung[0][name]}\n' for name in names)
    assert f'{header}\n{sung[0]["lyrics"]}\n' in texts['train'] + texts['val']
    again = tmp_path / 'again'
    script('data/darklyrics/prepare.py', f'--out_dir={again}')
    assert (again / 'train.bin').read_bytes() == (tmp_path / 'train.bin').read_bytes()


def test_the_split_keeps_when_the_corpus_grows():
    keys = [f'song {i}' for i in range(2000)]
    assert 120 < sum(pick_split(k, 0.08) == 'val' for k in keys) < 200


def test_own_text(tmp_path):
    source = tmp_path / 'songs'
    (source / 'deep').mkdir(parents=True)
    for i in range(30):
        (source / 'deep' / f'{i}.txt').write_text(
            f'Song {i}\nover the ridge the wind came {i}\n' * 5, encoding='utf-8'
        )
    (source / 'more.jsonl').write_text(
        ''.join(json.dumps({'lyrics': f'and so they sang {i}\u2028'}) + '\n' for i in range(30)),
        encoding='utf-8',
    )
    (source / 'picture.png').write_bytes(b'\x89PNG')
    done = script(
        'data/text/prepare.py',
        f'--input={source}',
        f'--out_dir={tmp_path / "d"}',
        '--vocab_size=300',
        '--val_fraction=0.2',
    )
    assert done.returncode == 0, done.stderr
    counts = read_meta(str(tmp_path / 'd'))['splits']
    assert counts['train']['documents'] + counts['val']['documents'] == 60
    one = script(
        'data/text/prepare.py',
        f'--input={source / "deep" / "1.txt"}',
        f'--out_dir={tmp_path / "e"}',
        '--tokenizer=char',
        '--lowercase',
    )
    assert one.returncode == 0, one.stderr
    text = (source / 'deep' / '1.txt').read_text().lower()
    tokenizer = read_tokenizer(str(tmp_path / 'e'))
    parts = [
        tokenizer.decode(
            np.fromfile(tmp_path / 'e' / f'{s}.bin', dtype='<u2').tolist()
        ).removesuffix('<|endoftext|>')
        for s in ('train', 'val')
    ]
    assert ''.join(parts) == text


@pytest.mark.parametrize(
    'name, words, message',
    [
        ('text', ['--input=nowhere'], 'nowhere: no such file or folder'),
        (
            'text',
            ['--val_fraction=2', f'--input={DEMO}', '--tokenizer=char'],
            'val_fraction=2.0: expected a fraction',
        ),
        ('text', ['--input=EMPTY'], 'came out empty'),
        ('darklyrics', ['--input=nowhere.jsonl'], 'nowhere.jsonl: No such file'),
        ('darklyrics', ['--input=BAD'], 'line 1: not JSON'),
        ('darklyrics', ['--artists=Nobody'], 'came out empty'),
        ('shakespeare_char', ['--input=nowhere'], 'nowhere: No such file'),
        ('openwebtext', ['--offline'], '--input=FILE'),
        ('text', ['--tokenizer=bpe', '--vocab_size=12', '--input=BAD'], 'vocab_size=12'),
    ],
)
def test_bad_input(tmp_path, name, words, message, capsys):
    (tmp_path / 'empty.txt').write_text('')
    (tmp_path / 'bad.jsonl').write_text('{"lyrics": ')
    words = [
        w.replace('EMPTY', str(tmp_path / 'empty.txt')).replace(
            'BAD', str(tmp_path / ('bad.jsonl' if name == 'darklyrics' else 'empty.txt'))
        )
        for w in words
    ]
    prepare = runpy.run_path(str(ROOT / f'data/{name}/prepare.py'))
    assert message in mistake(capsys, prepare['main'], *words, f'--out_dir={tmp_path / "out"}')
    assert not (tmp_path / 'out').exists() or not list((tmp_path / 'out').iterdir())


def test_shakespeare_is_cut_as_nanogpt_cuts_it(tmp_path):
    source = ROOT.parent / 'shared' / 'data' / 'tinyshakespeare.txt'
    if not source.exists():
        pytest.skip('Tiny Shakespeare is not at hand (shared data)')
    done = script('data/shakespeare_char/prepare.py', f'--input={source}', f'--out_dir={tmp_path}')
    assert done.returncode == 0, done.stderr
    text = source.read_text(encoding='utf-8')
    stoi = {c: i for i, c in enumerate(sorted(set(text)))}
    assert np.fromfile(tmp_path / 'val.bin', dtype=np.uint16).tolist() == [
        stoi[c] for c in text[int(len(text) * 0.9) :]
    ]
    assert np.fromfile(tmp_path / 'train.bin', dtype=np.uint16).tolist() == [
        stoi[c] for c in text[: int(len(text) * 0.9)]
    ]


def test_shakespeare_in_gpt2s_tokens(tmp_path):
    source, cache = (
        ROOT.parent / 'shared' / 'data' / 'tinyshakespeare.txt',
        ROOT.parent / 'shared' / 'tiktoken_cache',
    )
    if not source.exists() or not cache.exists():
        pytest.skip("Tiny Shakespeare or GPT-2's tokenizer files are not at hand (shared data)")
    done = script(
        'data/shakespeare/prepare.py',
        f'--input={source}',
        f'--out_dir={tmp_path}',
        TIKTOKEN_CACHE_DIR=cache,
    )
    assert done.returncode == 0, done.stderr
    counts = read_meta(str(tmp_path))['splits']
    assert (
        abs(counts['train']['tokens'] - 301_966) < 20 and abs(counts['val']['tokens'] - 36_059) < 20
    ), "nanoGPT's counts, but for where pieces meet"


def test_bytes_are_those_of_the_text_as_it_is_encoded(tmp_path):
    tokenizer = CharTokenizer.train(['a b'], squeeze=True)
    meta = write_dataset(
        str(tmp_path), [('train', 'a    b' * 9, True), ('val', 'a b', True)], tokenizer
    )
    assert meta['splits']['train'] == {'documents': 1, 'tokens': 28, 'bytes': 27}


def test_other_peoples_files_stay(tmp_path):
    (tmp_path / 'notes.tmp').write_text('mine')
    write_dataset(
        str(tmp_path), [('train', 'abc', True), ('val', 'ab', True)], CharTokenizer.train(['abc'])
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        'meta.json',
        'meta.pkl',
        'notes.tmp',
        'train.bin',
        'val.bin',
    ]


def test_downloads_are_checked(tmp_path, monkeypatch):
    """Against a real HTTP server on this machine that cuts the first answer in half."""
    body, asked = bytes(range(256)) * 1000, []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body[:100_000] if len(asked) == 1 else body)

        def log_message(self, *args):
            pass

    server = HTTPServer(('127.0.0.1', 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, path = f'http://127.0.0.1:{server.server_port}/x', str(tmp_path / 'x')
    digest = hashlib.sha256(body).hexdigest()
    for name in 'http_proxy', 'HTTP_PROXY', 'all_proxy', 'ALL_PROXY':
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match='by hand'):
        download(url, path, digest)
    assert not list(tmp_path.iterdir()), 'nothing is left behind'
    assert download(url, path, digest) == path and (tmp_path / 'x').read_bytes() == body
    assert download(url, path, digest) == path and len(asked) == 2, 'it is there already'
    with pytest.raises(UserError, match='is corrupt'):
        download(url, str(tmp_path / 'y'), '0' * 64)
    assert not (tmp_path / 'y').exists()
    server.shutdown()


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Preparing 24 MB takes hardly more memory than preparing 6 MB."""
    peaks = []
    for size in 6, 24:
        path = tmp_path / f'{size}.txt'
        with open(path, 'w') as f:
            for i in range(size * 25_000):
                f.write(f'the road goes over the ridge {i:09d}\n')
        code = f"""
import sys, runpy, resource
sys.argv = ['p', '--input={path}', '--out_dir={tmp_path}/o', '--tokenizer=char']
try:
    runpy.run_path('data/text/prepare.py', run_name='__main__')
finally:
    print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
        pytest.importorskip('resource')
        done = script('-c', code)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < peaks[0] + 40_000, peaks


def test_trained_bpe_is_used_again(tmp_path, demo_text):
    BPETokenizer.train([demo_text], 300).save(str(tmp_path / 't.json'))
    (tmp_path / 'a.txt').write_text(demo_text[:20000], encoding='utf-8')
    done = script(
        'data/text/prepare.py',
        f'--input={tmp_path / "a.txt"}',
        f'--out_dir={tmp_path / "d"}',
        f'--tokenizer={tmp_path / "t.json"}',
    )
    assert (
        done.returncode == 0
        and read_meta(str(tmp_path / 'd'))['tokenizer']
        == BPETokenizer.train([demo_text], 300).state()
    )


def test_preparing_leaves_folders_of_the_user_alone(tmp_path):
    drafts = tmp_path / 'unfinished'
    drafts.mkdir()
    (drafts / 'draft.txt').write_text('the rain in spain ' * 30)
    words = ('data/text/prepare.py', f'--input={tmp_path}', f'--out_dir={tmp_path}')
    done = script(*words, '--tokenizer=char')
    assert done.returncode == 0 and (drafts / 'draft.txt').exists(), done.stderr
    assert (tmp_path / 'train.bin').exists() and not (tmp_path / 'prepare.tmp').exists()


@pytest.mark.parametrize('fraction', ['10', '0', '1', 'nan', '-0.1'])
def test_a_fraction_is_checked_before_the_work(tmp_path, fraction):
    words = ('data/text/prepare.py', f'--input={tmp_path}', f'--out_dir={tmp_path / "out"}')
    done = script(*words, f'--val_fraction={fraction}')
    assert done.returncode == 2 and 'expected a fraction between 0 and 1' in done.stderr
    assert not (tmp_path / 'out').exists()
