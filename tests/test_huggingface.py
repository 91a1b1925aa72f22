"""data/huggingface/prepare.py with the real datasets library, on folders and a simulated hub."""

import json
import sys

import numpy as np
import pytest

from configurator import UserError
from lyregpt.dataset import read_meta, read_tokenizer
from tests.conftest import ROOT, load_script, script

datasets = pytest.importorskip('datasets')
WORDS = 'the ferryman keeps nine lamps and one of them is 海 and never lit'.split()


def pages(n=60, seed=1):
    rng = np.random.default_rng(seed)
    return [f'{i}: ' + ' '.join(rng.choice(WORDS, rng.integers(3, 30))) for i in range(n)]


def write_jsonl(path, texts, **more):
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        ''.join(json.dumps({'n': i, 'text': t} | more) + '\n' for i, t in enumerate(texts)),
        encoding='utf-8',
    )


@pytest.fixture
def prepare(monkeypatch, tmp_path):
    """The script as a module; calling it runs `main` with these words, and a cache of its own."""
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'hf')
    module = load_script(monkeypatch, ROOT / 'data' / 'huggingface' / 'prepare.py')

    def call(*words):
        monkeypatch.setattr(
            sys,
            'argv',
            [
                'prepare.py',
                '--vocab_size=300',
                f'--cache_dir={tmp_path / "cache"}',
                *map(str, words),
            ],
        )
        module.main()

    call.module = module
    return call


@pytest.fixture
def hub(monkeypatch, tmp_path, prepare):
    """The hub's dataset a/songs is the folder `hub`.

    `hub.trouble` are errors to raise after row 40; `hub.opened` counts.
    """
    folder, real = tmp_path / 'hub', datasets.load_dataset
    write_jsonl(folder / 'train.jsonl', ['', *pages()])
    write_jsonl(folder / 'validation.jsonl', pages(7, seed=2))

    class Hub:
        trouble, opened, revisions = [], 0, set()

    def breaking(row, number):
        if Hub.trouble and number == 40:
            raise Hub.trouble.pop()
        return row

    def load_dataset(name, config, revision, **options):
        assert name == 'a/songs' and options.pop('trust_remote_code') is False
        Hub.opened += 1
        Hub.revisions.add(revision)
        return {
            k: v.map(breaking, with_indices=True, features=v.features)
            for k, v in real(str(folder), config, **options).items()
        }

    class HfApi:
        def dataset_info(self, name):
            return type('', (), {'sha': 'c0ffee'})

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    monkeypatch.setattr('huggingface_hub.HfApi', HfApi)
    monkeypatch.setattr(prepare.module, 'WAITS', (0.001,))
    return Hub


def documents(folder, *splits):
    tokenizer = read_tokenizer(str(folder))
    ids = [
        i
        for s in splits or ('train', 'val')
        for i in np.fromfile(folder / f'{s}.bin', '<u2').tolist()
    ]
    return tokenizer.decode(ids).split('<|endoftext|>')[:-1]


@pytest.mark.parametrize('kind', ['jsonl', 'csv', 'parquet', 'txt'])
def test_folders(tmp_path, prepare, kind):
    texts = pages()
    (tmp_path / 'songs').mkdir()
    table, path = (
        datasets.Dataset.from_dict({'n': range(60), 'lyrics': texts}),
        str(tmp_path / 'songs' / f'a.{kind}'),
    )
    if kind == 'txt':
        (tmp_path / 'songs' / 'a.txt').write_text('\n'.join(texts), encoding='utf-8')
    else:
        {'jsonl': table.to_json, 'csv': table.to_csv, 'parquet': table.to_parquet}[kind](path)
    prepare(
        f'--name={tmp_path / "songs"}',
        f'--out_dir={tmp_path / "d"}',
        '--validation_split=0.2',
        '--num_samples=50',
    )
    assert sorted(documents(tmp_path / 'd')) == sorted(texts[:50])
    counts = read_meta(str(tmp_path / 'd'))['splits']
    assert 2 < counts['val']['documents'] < 20 and not (tmp_path / 'cache').exists()
    first = (tmp_path / 'd' / 'train.bin').read_bytes()
    prepare(
        f'--name={tmp_path / "songs"}',
        f'--out_dir={tmp_path / "d"}',
        '--validation_split=0.2',
        '--num_samples=50',
    )
    assert (tmp_path / 'd' / 'train.bin').read_bytes() == first


def test_the_hub_is_read_once(tmp_path, prepare, hub, capsys):
    words = '--name=a/songs', '--validation_split=validation', f'--out_dir={tmp_path / "d"}'
    prepare(*words, '--num_samples=20', '--tokenizer=wordpiece')
    assert documents(tmp_path / 'd', 'train') == pages()[:20] and documents(
        tmp_path / 'd', 'val'
    ) == pages(7, seed=2)
    assert (
        hub.opened == 2
        and hub.revisions == {'c0ffee'}
        and read_tokenizer(str(tmp_path / 'd')).kind == 'wordpiece'
    )
    prepare(*words, '--num_samples=12', '--offline')
    assert documents(tmp_path / 'd', 'train') == pages()[:12] and hub.opened == 2, (
        'fewer are there already, all of a split too'
    )
    with pytest.raises(UserError, match='20 documents of it are in .*without --offline'):
        prepare(*words, '--offline')
    prepare(*words)
    assert documents(tmp_path / 'd', 'train') == pages() and hub.opened == 3
    prepare(*words)
    assert hub.opened == 3, 'the end of the split is known'
    assert f'--dataset={tmp_path / "d"} --out_dir=out-d' in capsys.readouterr().out


def test_a_network_that_breaks(tmp_path, prepare, hub, monkeypatch, capsys):
    words = '--name=a/songs', f'--out_dir={tmp_path / "d"}'
    hub.trouble[:] = [ConnectionError('gone')]
    prepare(*words)
    assert capsys.readouterr().err.count('trying again') == 1 and sorted(
        documents(tmp_path / 'd')
    ) == sorted(pages())
    (tmp_path / 'cache').rename(tmp_path / 'whole')
    hub.trouble[:] = [ConnectionError('for\ngood'), ConnectionError('gone')]
    with pytest.raises(UserError, match='for good.*; the documents fetched so far are kept'):
        prepare(*words)
    (cached,) = (tmp_path / 'cache').glob('*.jsonl')
    with open(cached, 'a') as f:
        f.write('{"text": "what a kill lea')
    prepare(*words)
    assert cached.read_bytes() == (tmp_path / 'whole' / cached.name).read_bytes(), (
        'as if nothing had happened'
    )
    cached.write_text('')  # somebody emptied it: from the beginning
    prepare(*words)
    assert cached.read_bytes() == (tmp_path / 'whole' / cached.name).read_bytes()


@pytest.mark.parametrize(
    'error, message',
    [
        (ConnectionError("Couldn't reach it"), 'a/songs cannot be read .*network'),
        (
            datasets.exceptions.DatasetNotFoundError("'a/songs' is a gated dataset on the Hub."),
            'gated.*huggingface.co/datasets/a/songs',
        ),
        (
            ValueError("Config name is missing.\nPlease pick one among ['en', 'de']"),
            'en.*name one with --config',
        ),
        (RuntimeError('Dataset scripts are no longer supported, but found songs.py'), 'scripts'),
    ],
    ids=['network', 'gated', 'config', 'script'],
)
def test_the_hubs_refusals(tmp_path, prepare, hub, monkeypatch, error, message):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(datasets, 'load_dataset', refuse)
    with pytest.raises(UserError, match=message) as said:
        prepare('--name=a/songs', f'--out_dir={tmp_path / "d"}')
    assert '\n' not in str(said.value) and not (tmp_path / 'd').exists()


@pytest.mark.parametrize(
    'words, message',
    [
        (['--name='], 'roneneldan/TinyStories'),
        (['--name=no/such/folder'], 'no/such/folder: expected a folder'),
        (['--name=SONGS', '--num_samples=0'], 'num_samples=0: expected at least 1'),
        (['--name=SONGS', '--validation_split=1.5'], 'expected a fraction between 0 and 1'),
        (['--name=SONGS', '--validation_split=train'], 'is the training split'),
        (['--name=SONGS', '--validation_split=test'], "no split 'test', but train, validation"),
        (['--name=SONGS', '--split=tset'], "no split 'tset', but train, validation"),
        (['--name=SONGS', '--config=other'], 'other'),
        (
            ['--name=SONGS', '--text_field=txt'],
            'text_field=txt: no column of text; it has n (int64), text (string)',
        ),
        (['--name=SONGS', '--text_field=n'], 'text_field=n: no column of text'),
        (['--name=DOUBT'], 'it has n (int64), verse (string), refrain (string)'),
        (['--name=EMPTY'], 'EMPTY'),
        (['--name=SONGS', '--num_samples=1'], 'split came out empty'),
    ],
)
def test_mistakes(tmp_path, prepare, words, message):
    write_jsonl(tmp_path / 'SONGS' / 'train.jsonl', pages())
    write_jsonl(tmp_path / 'SONGS' / 'validation.jsonl', pages(5))
    (tmp_path / 'DOUBT').mkdir()
    (tmp_path / 'DOUBT' / 'train.jsonl').write_text('{"n": 1, "verse": "a", "refrain": "b"}\n')
    (tmp_path / 'EMPTY').mkdir()
    words = [
        w.replace('=', f'={tmp_path}/', 1) if w.startswith('--name') and w[7:].isupper() else w
        for w in words
    ]
    with pytest.raises(UserError) as error:
        prepare(*words, f'--out_dir={tmp_path / "d"}')
    assert message in str(error.value) and '\n' not in str(error.value)
    assert not (tmp_path / 'd').exists() or not list((tmp_path / 'd').iterdir())


def test_without_the_library(tmp_path, prepare, monkeypatch):
    write_jsonl(tmp_path / 'songs' / 'train.jsonl', pages())
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(UserError, match='pip install datasets'):
        prepare(f'--name={tmp_path / "songs"}', f'--out_dir={tmp_path / "d"}')


def test_from_the_shell(tmp_path):
    write_jsonl(tmp_path / 'songs' / 'train.jsonl', pages())
    words = 'data/huggingface/prepare.py', f'--out_dir={tmp_path / "d"}', '--tokenizer=char'
    done = script(*words, f'--name={tmp_path / "songs"}', HF_HOME=tmp_path / 'hf')
    assert done.returncode == 0 and 'val.bin' in done.stdout, done.stderr
    wrong = script(*words, '--name=a/songs', '--offline')
    assert (
        wrong.returncode == 2
        and wrong.stderr.count('\n') == 1
        and 'nothing of it is' in wrong.stderr
    )
