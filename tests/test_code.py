"""data/code/prepare.py: the Python sources on this machine, and those of folders made for it."""

import sys
import sysconfig

import numpy as np
import pytest

from configurator import UserError
from lyregpt.dataset import read_meta, read_tokenizer
from tests.conftest import ROOT, load_script


@pytest.fixture
def prepare(monkeypatch):
    """The script as a module; calling it runs `main` with these words."""
    module = load_script(monkeypatch, ROOT / 'data' / 'code' / 'prepare.py')

    def call(*words):
        monkeypatch.setattr(sys, 'argv', ['prepare.py', '--vocab_size=300', *map(str, words)])
        module.main()

    call.module = module
    return call


def documents(folder, split):
    tokenizer, ids = read_tokenizer(str(folder)), np.fromfile(folder / f'{split}.bin', '<u2')
    ends = np.flatnonzero(
        ids == tokenizer.eot
    )  # not by the words <|endoftext|>, which a source may hold
    return [tokenizer.decode(part[part != tokenizer.eot]) for part in np.split(ids, ends + 1)[:-1]]


@pytest.fixture
def packages(tmp_path):
    """30 packages of 3 files, and what must be left out."""
    root = tmp_path / 'lib'
    for i in range(30):
        (root / f'pkg{i:02d}').mkdir(parents=True)
        for j in range(3):
            (root / f'pkg{i:02d}' / f'm{j}.py').write_text(
                f'# pkg{i:02d}\ndef f{j}():\n    return {i}\n' + 'x = 1\n' * j
            )
    (root / 'alone.py').write_bytes(
        '# -*- coding: latin-1 -*-\r\ns = "naïve"\r\n'.encode('latin-1')
    )
    for name, content in {
        'pkg00/copy.py': (root / 'pkg07' / 'm1.py').read_bytes(),
        'pkg01/blank.py': b'\n \n',
        'pkg01/wrong.py': b's = "\xff\xfe"\n',
        'pkg01/unknown.py': b'# coding: klingon\n',
        'pkg02/table.py': b'T = [' + b'1, ' * 400 + b']\n',
        'pkg02/_vendor/other.py': b'vendored = True\n',
        'pkg03/site-packages/other.py': b'nested = True\n',
        'pkg03/data.txt': b'no source\n',
    }.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    return root


def test_packages_are_split_whole(tmp_path, prepare, packages):
    prepare(f'--input={packages}', f'--out_dir={tmp_path / "d"}', '--val_fraction=0.2')
    train, val = documents(tmp_path / 'd', 'train'), documents(tmp_path / 'd', 'val')
    assert len(train) + len(val) == 91 == len(set(train + val)), (
        'each source once, and nothing else'
    )
    assert '# -*- coding: latin-1 -*-\ns = "naïve"\n' in train + val
    names = [
        {text.split()[1] for text in split if text.startswith('# pkg')} for split in (train, val)
    ]
    assert len(names[1]) in range(4, 9) and len(names[0] | names[1]) == 30
    assert len(names[0] & names[1]) == 0, 'no package is on both sides'


def test_the_seed_draws_the_order(tmp_path, prepare, packages):
    def made(*words):
        prepare(f'--input={packages}', f'--out_dir={tmp_path / "d"}', *words)
        return (tmp_path / 'd' / 'train.bin').read_bytes()

    first = made('--max_bytes=20000', '--seed=1')
    assert made('--max_bytes=20000', '--seed=1') == first != made('--max_bytes=20000', '--seed=2')
    packages.rename(tmp_path / 'moved')
    prepare(
        f'--input={tmp_path / "moved"}',
        f'--out_dir={tmp_path / "d"}',
        '--max_bytes=20000',
        '--seed=1',
    )
    assert (tmp_path / 'd' / 'train.bin').read_bytes() == first, 'wherever the files lie'


def test_a_project_of_few_packages_is_split_by_file(tmp_path, prepare, packages):
    words = ','.join(str(packages / f'pkg{i:02d}') for i in range(4))
    prepare(
        f'--input={words},{packages / "alone.py"}',
        f'--out_dir={tmp_path / "d"}',
        '--val_fraction=0.3',
    )
    assert len(documents(tmp_path / 'd', 'train')) + len(documents(tmp_path / 'd', 'val')) == 14
    assert len(documents(tmp_path / 'd', 'val')) in range(3, 7)


def test_this_machine(tmp_path, prepare):
    prepare('--max_bytes=300000', f'--out_dir={tmp_path}')
    counts = read_meta(str(tmp_path))['splits']
    assert 200_000 < counts['train']['bytes'] + counts['val']['bytes'] <= 310_000
    assert all(compile(text, 'x', 'exec') for text in documents(tmp_path, 'train')[:20]), (
        'whole files of Python'
    )
    files = prepare.module.group_files([sysconfig.get_paths()['stdlib']])
    packages = prepare.module.choose_files(files, 300_000, 1)
    sizes = [sum(size for _, size in package) for package in packages if len(package) > 1]
    assert sizes and max(sizes) <= 6000, 'a package gives a fiftieth'


@pytest.mark.parametrize(
    'words, message',
    [
        (['--input=nowhere'], 'nowhere: no such file or folder'),
        (['--input=LIB', '--max_bytes=3'], 'no Python source of use below max_bytes=3'),
        (['--max_bytes=0'], 'max_bytes=0: expected at least 1'),
        (['--input=LIB', '--val_fraction=1'], 'expected a fraction between 0 and 1'),
        (['--input=LIB/pkg03/data.txt'], 'no Python source'),
    ],
)
def test_mistakes(tmp_path, prepare, packages, words, message):
    with pytest.raises(UserError) as error:
        prepare(*[w.replace('LIB', str(packages)) for w in words], f'--out_dir={tmp_path / "d"}')
    assert (
        message in str(error.value)
        and '\n' not in str(error.value)
        and not list((tmp_path / 'd').glob('*'))
    )
