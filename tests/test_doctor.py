"""`lyregpt doctor` on this installation, and on ones broken on purpose: it must find the fault."""

import os

import pytest

from tests.conftest import ROOT, script

CHECKS = ['packages', 'disk', 'imports', 'device', 'training', 'resuming', 'generating']


def doctor(*words, **env):
    """(exit status, {check: (status, text)}, the last line, stderr)"""
    done = script('-m', 'lyregpt', 'doctor', '--device=cpu', *words, timeout=400, **env)
    *lines, last = done.stdout.splitlines() or ['']
    checks = {line[6:16].strip(): (line[:5].strip(), line[17:]) for line in lines}
    return done.returncode, checks, last, done.stderr


def test_this_installation_works(tmp_path):
    before, started = sorted(os.listdir(ROOT)), os.times()
    status, checks, last, stderr = doctor(TMPDIR=tmp_path)
    ended = os.times()
    assert status == 0 and last.endswith('0 FAIL') and not stderr, (checks, stderr)
    assert list(checks) == CHECKS
    # Other versions than the pinned ones get a note.
    assert {checks[name][0] for name in checks if name != 'packages'} == {'ok'}, checks
    assert checks['resuming'][1].endswith('differ by at most 0')
    # Seconds of one core, whatever else this machine does.
    assert sum(ended[2:4]) - sum(started[2:4]) < 30
    assert os.listdir(tmp_path) == [] and sorted(os.listdir(ROOT)) == before, 'nothing is left'


@pytest.mark.parametrize('name', ['tqdm', 'bs4'])
def test_a_package_that_cannot_be_imported(tmp_path, name):
    error = f'ModuleNotFoundError("No module named {name!r}", name={name!r})'
    (tmp_path / f'{name}.py').write_text(f'raise {error}\n', encoding='utf-8')
    status, checks, last, _ = doctor(PYTHONPATH=tmp_path)
    assert status == 1 and last == '2 ok, 0 note, 1 FAIL' and list(checks) == CHECKS[:3]
    assert checks['imports'][0] == 'FAIL'
    assert f"No module named '{name}'. pip install -r requirements.txt" in checks['imports'][1]


BREAKAGES = """
import importlib.metadata, os, torch

def version(name, old=importlib.metadata.version):
    if name == 'gguf':
        raise importlib.metadata.PackageNotFoundError(name)
    return old(name)

def wrong(a, b, old=torch.Tensor.__matmul__):
    return old(a, b) * (1 if a.dtype == torch.float64 else 1.5)

def no_gradient(parameters, most):
    for p in parameters:
        p.grad.zero_()
    return torch.zeros(())

def load(*words, old=torch.load, **more):
    state = old(*words, **more)
    if isinstance(state, dict) and state.get('iter_num') == 10:
        state['model']['transformer.wte.weight'] += 1e-4
    return state

importlib.metadata.version = version
torch.Tensor.__matmul__ = wrong
torch.nn.utils.clip_grad_norm_ = no_gradient
torch.load = load
os.access = lambda path, mode, old=os.access, **more: path != '.' and old(path, mode, **more)
"""


def test_what_is_broken_is_found(tmp_path):
    """A missing package, a directory without permission, a driver that multiplies wrongly, lost
    gradients, and a file that comes back changed."""
    (tmp_path / 'sitecustomize.py').write_text(BREAKAGES, encoding='utf-8')
    status, checks, last, stderr = doctor(PYTHONPATH=tmp_path)
    assert status == 1 and last == '2 ok, 0 note, 5 FAIL', (checks, stderr)
    for check, reason in {
        'packages': 'not installed: gguf. pip install',
        'disk': 'is not writable: use another directory',
        'device': 'a matrix product is wrong by 5',
        'training': 'the loss did not fall',
        'resuming': 'check the disk and the memory',
    }.items():
        assert checks[check][0] == 'FAIL' and reason in checks[check][1], checks


OTHER_VERSION = """
import importlib.metadata

def version(name, old=importlib.metadata.version):
    return '1.0.0+cpu' if name == 'torch' else old(name)

importlib.metadata.version = version
"""


def test_another_version_is_a_note(tmp_path):
    (tmp_path / 'sitecustomize.py').write_text(OTHER_VERSION, encoding='utf-8')
    (tmp_path / 'bs4.py').write_text('raise ImportError\n', encoding='utf-8')  # ends it early
    _, checks, _, _ = doctor(PYTHONPATH=tmp_path)
    assert checks['packages'][0] == 'note'
    assert 'torch 1.0.0; if something fails: pip install' in checks['packages'][1]


@pytest.mark.parametrize(
    'word, message',
    [
        ('--device=cuda:77', 'device=cuda:77: this machine'),
        ('--devise=cpu', 'did you mean --device'),
        ('--dtype=int3', 'dtype=int3'),
    ],
)
def test_mistakes_get_one_line(word, message):
    status, _, _, stderr = doctor(word)
    assert status == 2 and stderr.count('\n') == 1 and message in stderr
    assert stderr.startswith('lyregpt doctor: error: ')


def test_help():
    done = script('-m', 'lyregpt', 'doctor', '--help')
    assert done.returncode == 0 and '--device=auto' in done.stdout
