"""data/fineweb/prepare.py: a corpus in shards, killed and resumed, in parts, from many sources."""

import importlib.util
import json
import os
import sys

import numpy as np
import pytest
import tiktoken

from configurator import UserError
from lyregpt.dataset import Split, bytes_per_token, read_meta, read_tokenizer
from tests.conftest import ROOT, gpt2, script

EOT = 50256
WORDS = (
    'a slow ferry carries lanterns over the bay and nobody on deck remembers '
    'who lit the first of them 海 éclair <|endoftext|>'
).split()
SMALL = '--val_tokens=1500', '--shard_tokens=2000'


@pytest.fixture(scope='module', autouse=True)
def tokens_at_hand():
    gpt2()


def texts(n=400, seed=1):
    rng = np.random.default_rng(seed)
    return [
        '',
        'half a pair \ud83d',
        *(' '.join(rng.choice(WORDS, rng.integers(1, 80))) + '\n' for _ in range(n - 2)),
    ]


def write_jsonl(path, pages):
    path.write_text(
        ''.join(json.dumps({'text': t, 'url': 'x'}) + '\n' for t in pages), encoding='utf-8'
    )
    return path


@pytest.fixture
def prepare(monkeypatch):
    """The script as a module; calling it runs `main` with these words."""
    spec = importlib.util.spec_from_file_location(
        'fineweb_prepare', ROOT / 'data' / 'fineweb' / 'prepare.py'
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, 'fineweb_prepare', module)
    spec.loader.exec_module(module)

    def call(*words):
        monkeypatch.setattr(sys, 'argv', ['prepare.py', *map(str, words)])
        module.main()

    call.module = module
    return call


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob('*.bin'))}


def documents(folder, *names):
    """The ids of each document of these shards, without its end."""
    ids = np.concatenate([np.fromfile(folder / name, '<u2') for name in names]).tolist()
    assert ids[-1] == EOT
    found = [[]]
    for i in ids[:-1]:
        found.append([]) if i == EOT else found[-1].append(i)
    return found


def expected(pages):
    return [
        tiktoken.get_encoding('gpt2').encode_ordinary(
            t.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
        )
        for t in pages
    ]


def test_shards_hold_the_documents(tmp_path):
    pages, out = texts(), tmp_path / 'out'
    words = [
        'data/fineweb/prepare.py',
        f'--input={write_jsonl(tmp_path / "p.jsonl", pages)}',
        f'--out_dir={out}',
        *SMALL,
    ]
    done = script(*words)
    assert done.returncode == 0, done.stderr
    names = list(shards(out))
    assert (
        names[0] == 'fineweb_train_000001.bin'
        and names[-1] == 'fineweb_val_000000.bin'
        and len(names) > 5
    )
    assert documents(out, names[-1], *names[:-1]) == expected(pages), (
        "tiktoken's ids, and one end behind each document"
    )
    assert all(len(np.fromfile(out / n, '<u2')) - 2000 in range(200) for n in names[:-2]), (
        'a shard ends with the document that fills it'
    )
    counts = read_meta(str(out))['splits']
    assert sum(c['documents'] for c in counts.values()) == len(pages)
    for split, of in ('train', names[:-1]), ('val', names[-1:]):
        own = documents(out, *of)
        assert counts[split]['tokens'] == sum(map(len, own)) + len(own)
        assert counts[split]['bytes'] == len(
            tiktoken.get_encoding('gpt2').decode_bytes([i for d in own for i in d])
        )
    assert 3 < bytes_per_token(str(out)) < 6 and read_tokenizer(str(out)).kind == 'gpt2'
    assert Split(str(out), 'train', 32, 50257).n_tokens == counts['train']['tokens']
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    again = script(*words)
    assert again.returncode == 0 and 'finished already' in again.stdout
    assert before == {p.name: p.stat().st_mtime_ns for p in out.iterdir()}


KILLED = """
import os, signal, sys
sys.path.insert(0, 'data/fineweb')
import prepare
prepare.GPT2Tokenizer().encode('')  # loaded once, for all of them
try:
    import datasets
except ImportError:
    pass
runs, least = 0, int(sys.argv.pop(1))
while True:
    runs += 1
    if not (child := os.fork()):
        left = least + 7 * runs % 23  # this many of the calls that change the disk succeed
        def count(call):
            def counted(*args, **kwargs):
                global left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)
            return counted
        for name in 'replace', 'fsync', 'link':
            setattr(os, name, count(getattr(os, name)))
        prepare.main()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL and runs < 500
print(runs)
"""


def run_killed(*words, least=0):
    done = script('-c', KILLED, least, *words)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='kills forked processes')
def test_killed_anywhere_it_writes_the_same_bytes(tmp_path, prepare):
    source = write_jsonl(tmp_path / 'p.jsonl', texts())
    prepare(f'--input={source}', f'--out_dir={tmp_path / "whole"}', *SMALL)
    assert run_killed(f'--input={source}', f'--out_dir={tmp_path / "killed"}', *SMALL) > 10
    assert shards(tmp_path / 'killed') == shards(tmp_path / 'whole')
    whole, killed = (
        json.loads((tmp_path / d / 'meta.json').read_text()) | {'prepared': ''}
        for d in ('whole', 'killed')
    )
    assert whole == killed
    assert not list((tmp_path / 'killed').glob('*.tmp'))


def test_parts_share_the_corpus(tmp_path, prepare):
    pages = texts()
    source = write_jsonl(tmp_path / 'p.jsonl', pages)
    (tmp_path / 'node').mkdir()
    for part in 0, 1, 2:
        prepare(f'--input={source}', f'--out_dir={tmp_path / "all"}', f'--part={part}/3', *SMALL)
        own = [n for n in shards(tmp_path / 'all') if int(n[-10:-4]) % 3 == part and 'train' in n]
        want = expected(pages[part::3])
        if part:
            assert documents(tmp_path / 'all', *own) == want
            assert Split(str(tmp_path / 'all'), 'train', 32, group=part, groups=3).n_tokens == sum(
                map(len, want)
            ) + len(want)
        else:
            assert documents(tmp_path / 'all', 'fineweb_val_000000.bin', *own) == want
    (tmp_path / 'node' / 'fineweb_val_000000.bin').write_bytes(
        b'ab'
    )  # copied from part 0, before this part is prepared
    prepare(f'--input={source}', f'--out_dir={tmp_path / "node"}', '--part=2/3', *SMALL)
    assert (
        'meta.json' not in os.listdir(tmp_path / 'node')
        and (tmp_path / 'node' / 'fineweb_val_000000.bin').read_bytes() == b'ab'
    )
    assert (tmp_path / 'node' / 'fineweb_train_000005.bin').read_bytes() == (
        tmp_path / 'all' / 'fineweb_train_000005.bin'
    ).read_bytes()


def test_enough_tokens_and_later_more(tmp_path, prepare):
    pages = texts()
    source, out = write_jsonl(tmp_path / 'p.jsonl', pages), tmp_path / 'out'
    prepare(f'--input={source}', f'--out_dir={out}', '--max_tokens=5000', *SMALL)
    counts = read_meta(str(out))['splits']['train']
    assert 5000 <= counts['tokens'] < 5200 and counts['shards'] == 3
    prepare(f'--input={source}', f'--out_dir={out}', *SMALL)
    names = list(shards(out))
    assert documents(out, names[-1], *names[:-1]) == expected(pages)


def write_ds(folder, pages, width=2, end=True):
    """What datatrove's DocumentTokenizer leaves: ids, one behind the other, and what they are."""
    folder.mkdir(exist_ok=True)
    for number in range(4):
        ids = [i for d in expected(pages[number::4]) for i in [*d, EOT][: None if end else -1]]
        np.array(ids, dtype=f'<u{width}').tofile(folder / f'{number:05d}_00000_doc_shuffled.ds')
        (folder / f'{number:05d}_00000_doc_shuffled.ds.metadata').write_text(
            f'gpt2|{width}\n{len(ids)}\n1 kT'
        )
    (folder / '00004_unshuffled.ds').touch()  # of a task that got no document
    return folder


def test_token_files_of_datatrove(tmp_path, prepare, monkeypatch):
    pages = texts()
    source = write_ds(tmp_path / 'tokens', pages)
    prepare(f'--input={source}', f'--out_dir={tmp_path / "out"}')
    assert [documents(tmp_path / 'out', n) for n in shards(tmp_path / 'out')] == [
        expected(pages[i::4]) for i in (1, 2, 3, 0)
    ]
    assert (tmp_path / 'out' / 'fineweb_train_000001.bin').stat().st_nlink == 2
    prepare(
        f'--input={write_jsonl(tmp_path / "p.jsonl", pages)}',
        f'--out_dir={tmp_path / "own"}',
        *SMALL,
    )
    linked, own = (read_meta(str(tmp_path / d))['splits'] for d in ('out', 'own'))
    for key in 'documents', 'tokens', 'bytes':
        assert sum(c[key] for c in linked.values()) == sum(c[key] for c in own.values())

    def no_link(*_):
        raise OSError

    if hasattr(os, 'fork'):
        assert run_killed(f'--input={source}', f'--out_dir={tmp_path / "killed"}') > 5
        assert shards(tmp_path / 'killed') == shards(tmp_path / 'out')
    monkeypatch.setattr(os, 'link', no_link)  # as on another disk
    prepare(f'--input={source}', f'--out_dir={tmp_path / "copied"}')
    assert shards(tmp_path / 'copied') == shards(tmp_path / 'out')


@pytest.mark.parametrize(
    'words, message',
    [
        (['--offline'], '--input=FOLDER'),
        (['--part=4/4'], 'part=4/4: expected i/n'),
        (['--part=half'], 'part=half: expected i/n'),
        (['--val_tokens=0'], 'val_tokens and shard_tokens of at least 2'),
        (['--input=nowhere'], 'nowhere: no such file or folder'),
        (['--input=TMP/p.jsonl'], 'too little text to train on'),
        (
            ['--input=TMP/p.jsonl', '--part=999/1000'],
            'too little text to train on in part 999/1000',
        ),
        (['--input=TMP/mixed'], 'found .ds and .jsonl'),
        (['--input=TMP/a.txt'], 'found .txt'),
        (['--input=TMP/bad.jsonl'], "bad.jsonl, record 2: no text in the field 'text'"),
        (['--input=TMP/mixed/x.ds'], 'x.ds.metadata'),
        (['--input=TMP/wide'], '4 bytes per token, as of gpt2; expected 2'),
        (['--input=TMP/endless'], 'behind each document'),
        (
            ['--input=TMP/p.jsonl', '--out_dir=TMP/full', *SMALL],
            'train.bin: of another preparation',
        ),
        (
            [
                '--input=TMP/p.jsonl',
                '--out_dir=TMP/begun',
                '--val_tokens=99',
                '--shard_tokens=2000',
            ],
            'begun with val_tokens=1500, not 99',
        ),
        (
            ['--input=TMP/p.jsonl', '--out_dir=TMP/begun', '--part=0/2', *SMALL],
            'of another preparation',
        ),
        (['--input=TMP/other.jsonl', '--out_dir=TMP/begun', *SMALL], 'begun with source=p.jsonl'),
    ],
)
def test_mistakes(tmp_path, prepare, words, message):
    pages = texts(100)
    write_jsonl(tmp_path / 'p.jsonl', pages)
    write_jsonl(tmp_path / 'other.jsonl', pages[1:])
    (tmp_path / 'bad.jsonl').write_text('{"text": "a lantern"}\n{"words": "a bay"}\n')
    (tmp_path / 'a.txt').write_text('a slow ferry')
    for name in 'mixed', 'full':
        (tmp_path / name).mkdir()
    (tmp_path / 'mixed' / 'x.ds').write_bytes(b'ab')
    (tmp_path / 'mixed' / 'x.jsonl').write_text('{"text": "a lantern"}\n')
    (tmp_path / 'full' / 'train.bin').write_bytes(b'ab')
    write_ds(tmp_path / 'wide', pages, width=4)
    write_ds(tmp_path / 'endless', pages, end=False)
    if any('begun' in w for w in words):
        prepare(f'--input={tmp_path / "p.jsonl"}', f'--out_dir={tmp_path / "begun"}', *SMALL)
    with pytest.raises((UserError, OSError)) as error:
        prepare(f'--out_dir={tmp_path / "out"}', *[w.replace('TMP', str(tmp_path)) for w in words])
    said = str(error.value)
    assert message in said and '\n' not in said
    assert not (tmp_path / 'out').exists(), 'nothing is left behind'


@pytest.mark.skipif(os.name != 'posix', reason='limits the size of files')
def test_a_full_disk(tmp_path):
    source, out = write_jsonl(tmp_path / 'p.jsonl', texts()), tmp_path / 'out'
    # the validation shard fits, the others do not
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (3500, 3500))
sys.path.insert(0, 'data/fineweb')
import prepare
sys.argv[0] = 'prepare.py'
prepare.run(prepare.main)
"""
    done = script('-c', code, f'--input={source}', f'--out_dir={out}', *SMALL)
    assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
    assert 'fineweb_train_000001.bin: ' in done.stderr and 'finished shards are kept' in done.stderr
    assert list(shards(out)) == ['fineweb_val_000000.bin']
    done = script('data/fineweb/prepare.py', f'--input={source}', f'--out_dir={out}', *SMALL)
    assert done.returncode == 0 and len(shards(out)) > 5, done.stderr


# -----------------------------------------------------------------------------
# With the datasets library, where it is installed


@pytest.fixture
def hf(monkeypatch, tmp_path):
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    return datasets


def test_without_the_library(tmp_path, prepare, monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(UserError, match='pip install datasets'):
        prepare(f'--out_dir={tmp_path / "out"}')


def write_parquet(folder, pages, files):
    arrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    folder.mkdir()
    for number in range(files):
        table = arrow.table(
            {'text': pages[number::files], 'score': [1.0] * len(pages[number::files])}
        )
        parquet.write_table(table, folder / f'{number}.parquet', row_group_size=30)
    return folder


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='kills forked processes')
@pytest.mark.parametrize(
    'part', ['0/1', '1/2', '0/5']
)  # of three files: all, every second file, every fifth document
def test_parquet(tmp_path, prepare, hf, part):
    pages = texts()[2:]
    source = write_parquet(tmp_path / 'pages', pages, 3)
    words = f'--input={source}', f'--part={part}', '--val_tokens=1500', '--shard_tokens=7000'
    prepare(f'--out_dir={tmp_path / "whole"}', *words)
    names = list(shards(tmp_path / 'whole'))
    want = {
        '0/1': pages[::3] + pages[1::3] + pages[2::3],
        '1/2': pages[1::3],
        '0/5': (pages[::3] + pages[1::3] + pages[2::3])[::5],
    }[part]
    assert (
        documents(tmp_path / 'whole', *names[-1:], *names[:-1]) == expected(want)
        if part[0] == '0'
        else True
    )
    assert sorted(documents(tmp_path / 'whole', *names)) == sorted(expected(want))
    if part == '0/1':
        assert run_killed(f'--out_dir={tmp_path / "killed"}', *words, least=6) > 2
        assert shards(tmp_path / 'killed') == shards(tmp_path / 'whole')


def test_a_network_that_breaks(tmp_path, prepare, hf, monkeypatch, capsys):
    pages, trouble = texts(1000)[2:], []

    def read(files):
        for file in files:
            for number, text in enumerate(pages[file::3]):
                if trouble and file == 2 and number == 60:
                    raise trouble.pop()
                yield {'text': text}

    def load_dataset(name, subset, revision, **_):
        assert (name, subset, revision) == ('HuggingFaceFW/fineweb-edu', 'sample-10BT', 'c0ffee')
        return hf.IterableDataset.from_generator(read, gen_kwargs={'files': [0, 1, 2]})

    class HfApi:
        def dataset_info(self, _):
            return type('', (), {'sha': 'c0ffee'})

    monkeypatch.setattr(hf, 'load_dataset', load_dataset)
    monkeypatch.setattr('huggingface_hub.HfApi', HfApi)
    monkeypatch.setattr(prepare.module, 'WAITS', (0.001, 0.002))
    prepare(f'--out_dir={tmp_path / "whole"}', *SMALL)
    trouble[:] = ConnectionError('gone'), TimeoutError('slow')
    prepare(f'--out_dir={tmp_path / "broken"}', *SMALL)
    assert capsys.readouterr().err.count('trying again') == 2
    assert shards(tmp_path / 'broken') == shards(tmp_path / 'whole')
    trouble[:] = [ConnectionError('gone\nfor good')] * 3
    with pytest.raises(
        UserError, match=r'ConnectionError: gone for good\); the finished shards are kept'
    ):
        prepare(f'--out_dir={tmp_path / "lost"}', *SMALL)
    assert 1 < len(shards(tmp_path / 'lost')) < len(shards(tmp_path / 'whole'))
    HfApi.dataset_info = (
        None  # the commit is known already, and a newer one would be another corpus
    )
    prepare(f'--out_dir={tmp_path / "lost"}', *SMALL)
    assert shards(tmp_path / 'lost') == shards(tmp_path / 'whole')
    assert json.loads((tmp_path / 'lost' / 'meta.json').read_text())['revision'] == 'c0ffee'
