"""lyregpt/doctor.py on this installation, and on ones that were broken on purpose: it must find what is wrong."""

import importlib.metadata
import os
import shutil

import pytest

from tests.conftest import ROOT, script


def quick(*words, **env):
    """(exit status, {check: (status, text)}, the last line, stderr)"""
    done = script('-m', 'lyregpt', 'doctor', '--device=cpu', *words, **env)
    *lines, last = done.stdout.splitlines() or ['']
    return (
        done.returncode,
        {line[6:16].strip(): (line[:5].strip(), line[17:]) for line in lines},
        last,
        done.stderr,
    )


def test_this_installation_is_sound(tmp_path):
    before, spent = sorted(os.listdir(ROOT)), os.times()
    status, checks, last, stderr = quick(TMPDIR=tmp_path)
    after = os.times()
    assert status == 0 and last.startswith('sound: 10 checks in') and not stderr, (checks, stderr)
    assert (
        list(checks)
        == 'python packages disk scripts device products compiling training resuming writing'.split()
    )
    assert {checks[name][0] for name in checks if name != 'packages'} == {'ok'}, (
        checks
    )  # other versions than the pinned ones get a note
    assert 'to the last bit' in checks['resuming'][1]
    assert sum(after[2:4]) - sum(spent[2:4]) < 30, (
        'seconds of one core, whatever else this machine does'
    )
    assert os.listdir(tmp_path) == [] and sorted(os.listdir(ROOT)) == before, (
        'nothing is left behind'
    )


@pytest.mark.parametrize(
    'name, where', [('tqdm', 'train.py'), ('bs4', 'scrapers/darklyrics_scraper.py')]
)
def test_a_package_that_cannot_be_imported(tmp_path, name, where):
    (tmp_path / f'{name}.py').write_text(
        f'raise ModuleNotFoundError("No module named {name!r}", name={name!r})\n', encoding='utf-8'
    )
    status, checks, last, _ = quick(PYTHONPATH=tmp_path)
    assert (
        status == 1
        and last.startswith('1 of 4 checks FAILed')
        and last.endswith('6 could not be tried')
    )
    assert checks['scripts'][0] == 'FAIL'
    assert all(
        word in checks['scripts'][1]
        for word in (where, f'{name}: not installed, or damaged', 'pip install -r requirements.txt')
    )


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

importlib.metadata.version, torch.Tensor.__matmul__, torch.nn.utils.clip_grad_norm_, torch.load = version, wrong, no_gradient, load
os.access = lambda path, mode, old=os.access, **more: path != '.' and old(path, mode, **more)
"""


def test_what_is_broken_is_found(tmp_path):
    """A missing package, a folder without permission, a driver that multiplies wrongly, gradients that get lost, a file that comes back changed."""
    (tmp_path / 'sitecustomize.py').write_text(BREAKAGES, encoding='utf-8')
    status, checks, last, stderr = quick(PYTHONPATH=tmp_path)
    assert status == 1 and last.startswith('5 of 10 checks FAILed'), (checks, stderr)
    for check, reason in {
        'packages': 'not installed: gguf. pip install',
        'disk': 'cannot be written: go to a folder of yours',
        'products': 'is wrong by 50%',
        'training': 'the loss did not fall',
        'resuming': 'and should not at all',
    }.items():
        assert checks[check][0] == 'FAIL' and reason in checks[check][1], checks


def test_another_version_is_a_note(tmp_path):
    for name in 'lyregpt/doctor.py', 'configurator.py':
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / 'requirements.txt').write_text(
        'torch==1.0.0\nnumpy==1.0.0; python_version < "3.9"\nno-such-package==1.0; python_version < "3.9"\n'
    )
    done = script(tmp_path / 'lyregpt/doctor.py', '--device=cpu')
    version = importlib.metadata.version(
        'torch'
    )  # without +cpu or +cu130, where the package says so
    assert (
        f'note  packages   torch {version} (tested with 1.0.0); if something fails: pip install'
        in done.stdout
    )
    assert done.returncode == 1 and 'FAIL  scripts    train.py cannot start' in done.stdout, (
        'there are no scripts beside it'
    )


@pytest.mark.parametrize(
    'word, message',
    [
        ('--device=cuda:77', 'device=cuda:77: this machine'),
        ('--devise=cpu', 'did you mean --device'),
        ('--dtype=int3', 'dtype=int3'),
    ],
)
def test_mistakes_get_one_line(word, message):
    status, _, _, stderr = quick(word)
    assert status == 2 and stderr.count('\n') == 1 and message in stderr


def test_help():
    done = script('-m', 'lyregpt', 'doctor', '--help')
    assert done.returncode == 0 and '--device=auto' in done.stdout
