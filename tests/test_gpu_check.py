"""The GPU check's logic on a CPU, and choices for GPUs whose answers are made up."""

import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from lyregpt import device, trial
from lyregpt.quantize import Int8Linear
from tests.conftest import ROOT, script
from tests.gpu_check import (
    ROWS,
    Check,
    CheckConfig,
    Failed,
    NotHere,
    Worker,
    cpu_reference,
    training,
)

# A sitecustomize.py that hides all packages but those that the check needs, and what they need
HIDE = """
import importlib.machinery, importlib.metadata, re, sys

allowed, names = set(), ['torch', 'numpy', 'tiktoken', 'tokenizers', 'transformers', 'safetensors']
while names:
    name = re.match('[A-Za-z0-9._-]+', names.pop())[0].lower().replace('_', '-').replace('.', '-')
    if name not in allowed:
        allowed.add(name)
        try:
            names += [r for r in importlib.metadata.requires(name) or () if 'extra ==' not in r]
        except importlib.metadata.PackageNotFoundError:
            pass

class OnlyAllowed(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        owners = packages.get(name.partition('.')[0], ())
        owners = {o.lower().replace('_', '-').replace('.', '-') for o in owners}
        return super().find_spec(name, path, target) if not owners or owners & allowed else None

packages = importlib.metadata.packages_distributions()
sys.meta_path = [
    OnlyAllowed if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path
]
"""


def check_on_cpu(tmp_path, *words, timeout=120):
    """The table's rows, by name: (result, text)."""
    (tmp_path / 'sitecustomize.py').write_text(HIDE)
    done = script(
        'tests/gpu_check.py',
        '--device=cpu',
        f'--out_dir={tmp_path / "out"}',
        *words,
        timeout=timeout,
        PYTHONPATH=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / 'out' / 'table.txt').read_text() == done.stdout
    lines = done.stdout.splitlines()[1:-1]
    return {line[:30].strip(): (line[30:39].strip(), line[49:]) for line in lines}


def test_every_row_with_the_packages_of_a_gpu_machine(tmp_path):
    names = [
        name for name, _, _ in ROWS if not (name.startswith('train') and name.endswith('compiled'))
    ]  # half a minute each: below
    found = check_on_cpu(tmp_path, f'--rows={",".join(names)}')
    assert list(found) == names
    not_here = {name for name, (result, _) in found.items() if result == 'not here'}
    assert not_here <= {
        'train float16 eager',
        'speed: Tiny Shakespeare',
        'speed: decoding compiled',
        'speed: decoding compiled int8',
    }
    assert all(result == 'ok' for name, (result, _) in found.items() if name not in not_here), found
    assert found['train float32 eager'][1].endswith('off by 0.0000 at most (0.02 allowed)')
    assert found['generate eager'][1].startswith(
        "360 of 360 tokens are the CPU's, logits off by 0.0e+00"
    )
    assert found['server: batch invariance'][1].startswith('12 of 12')
    hidden = subprocess.run(
        [sys.executable, '-c', 'import fastapi'],
        env=os.environ | {'PYTHONPATH': str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert 'No module named' in hidden.stderr


@pytest.mark.long
def test_all_rows_within_five_minutes(tmp_path):
    started = time.monotonic()
    found = check_on_cpu(tmp_path, timeout=330)
    assert len(found) == len(ROWS) and {result for result, _ in found.values()} <= {
        'ok',
        'not here',
    }
    assert time.monotonic() - started < 300


def test_rows_for_which_no_time_is_left(tmp_path):
    found = check_on_cpu(tmp_path, '--minutes=0.01')
    assert set(found.values()) == {('not run', 'the 0.01 minutes are over')} and len(found) == len(
        ROWS
    )


# Rows that break; the worker's process finds them by their names
def good(check):
    return str(os.getpid())


def not_here(check):
    raise NotHere('no such thing')


def wrong(check):
    raise Failed('1 is not 2')


def broken(check):
    raise RuntimeError('CUDA error: an illegal memory access was encountered\nmore')


def crashes(check):
    os._exit(9)


def hangs(check):
    subprocess.Popen(
        [
            sys.executable,
            '-c',
            f'import time; time.sleep(30); open({check.folder!r} + "/late", "w")',
        ]
    )
    time.sleep(60)


def test_no_failure_stops_the_check(tmp_path):
    worker = Worker(Check(CheckConfig(device='cpu'), str(tmp_path)), str(tmp_path / 'log.txt'))
    try:
        first = worker.run('good', good, 60)
        assert first[0] == 'ok'
        assert worker.run('not here', not_here, 60) == ('not here', 'no such thing')
        assert worker.run('wrong', wrong, 60) == ('FAIL', '1 is not 2')
        assert worker.run('good', good, 60) == first  # a wrong result breaks nothing
        assert worker.run('broken', broken, 60) == (
            'ERROR',
            'RuntimeError: CUDA error: an illegal memory access was encountered',
        )
        second = worker.run('good', good, 60)
        assert second[0] == 'ok' and second != first  # after an error, another process
        assert worker.run('crashes', crashes, 60) == (
            'CRASH',
            'the process ended with exit status 9',
        )
        assert worker.run('hangs', hangs, 20) == ('TIMEOUT', 'took more than 20 s')
    finally:
        worker.close()
    assert 'illegal memory access' in (tmp_path / 'log.txt').read_text()


def test_what_was_not_compiled_is_no_compiled_row(tmp_path, monkeypatch):
    check = Check(CheckConfig(device='cpu'), str(tmp_path))
    cpu_reference(check)
    monkeypatch.setattr(trial, 'can_compile', lambda device: 'no compiler today')
    monkeypatch.setattr('tests.gpu_check.can_compile', lambda device: '')
    with pytest.raises(Failed, match='it was not compiled: machine: .*no compiler today'):
        training(check, 'float32', compiled=True)


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='needs Linux')
def test_the_worker_ends_with_the_check(tmp_path):
    words = ['tests/gpu_check.py', '--device=cpu', f'--out_dir={tmp_path}']
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    while not process.stdout.readline().startswith('environment'):
        pass
    workers = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    process.terminate()
    assert process.wait(20) == 143
    deadline = time.monotonic() + 20
    while (
        any(os.path.exists(f'/proc/{worker}') for worker in workers) and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    assert workers and not any(os.path.exists(f'/proc/{worker}') for worker in workers)


def test_without_a_gpu_one_line():
    if torch.cuda.is_available():
        pytest.skip('there is a GPU')
    done = script('tests/gpu_check.py')
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'no such device' in done.stderr


# -----------------------------------------------------------------------------
# A GPU's answers, made up


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that there are two GPUs, of the compute capability that the test sets."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)

    def capability(major, minor):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: (major, minor))

    capability(9, 0)
    return capability


def test_devices_by_name(gpu):
    assert device.pick_device('auto') == torch.device('cuda')
    assert device.pick_device('cuda:1') == torch.device('cuda:1')
    with pytest.raises(ValueError, match='device=cuda:2'):
        device.pick_device('cuda:2')


def test_a_gpu_whose_driver_is_too_old_is_not_picked(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    assert device.pick_device('auto') == torch.device('cpu')
    with pytest.raises(ValueError, match='no such device'):
        device.pick_device('cuda')


@pytest.mark.parametrize(
    'capability, dtype',
    [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16)],
)
def test_dtype_by_capability(gpu, capability, dtype):
    gpu(*capability)
    cuda = torch.device('cuda')
    assert (
        device.pick_dtype('auto', cuda, large=True)
        == device.pick_dtype('auto', cuda, large=False)
        == dtype
    )
    assert device.pick_dtype('float32', cuda) == torch.float32


def test_what_compiling_needs(gpu, monkeypatch):
    cuda = torch.device('cuda')
    monkeypatch.setitem(sys.modules, 'triton', None)
    assert device.can_compile(cuda) == 'Triton is not installed'
    monkeypatch.setitem(sys.modules, 'triton', sys)
    monkeypatch.setenv('CC', 'cc')
    assert device.can_compile(cuda) == ''
    gpu(6, 1)
    assert device.can_compile(cuda) == 'this GPU is too old for Triton'
    gpu(7, 0)
    monkeypatch.delenv('CC')
    monkeypatch.setenv('PATH', '/nonexistent')
    assert device.can_compile(cuda) == 'no C compiler found'


class OnGPU(torch.Tensor):
    """A CPU tensor that says it is on a GPU: what our code does there, computed here."""

    is_cuda = True
    device = torch.device('cuda', 0)


def test_int8_on_a_gpu_converts_the_weights():
    torch.manual_seed(1)
    layer, x = torch.nn.Linear(48, 30), torch.randn(2, 3, 48)
    with torch.inference_mode():
        exact = layer(x)
        int8 = Int8Linear(layer)
        int8.round_activations, int8.weight = False, int8.weight[:, :48]
        error = float((int8(x.as_subclass(OnGPU)) - exact).norm() / exact.norm())
    assert 0 < error < 0.01


def test_windows_that_fit_a_gpu(monkeypatch):
    """Peaks of 3 and 5 GB for one and two sequences, and 80 GB free.

    12 bytes a parameter are left for gradients and optimizer states.
    """

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = torch.nn.Linear(1, 1, bias=False)
            self.lm_head.weight = torch.nn.Parameter(torch.zeros(10**6).as_subclass(OnGPU))
            self.config = type('Config', (), {'block_size': 8})

        def forward(self, x, y):
            return torch.zeros((), requires_grad=True)

    allocated, peaks = 10**9, iter((4 * 10**9, 6 * 10**9))
    zeros = torch.zeros
    monkeypatch.setattr(torch, 'zeros', lambda *shape, device=None, **more: zeros(*shape, **more))
    for name, value in {
        'memory_allocated': lambda: allocated,
        'memory_reserved': lambda: allocated,
        'reset_peak_memory_stats': lambda: None,
        'max_memory_allocated': lambda: next(peaks),
        'mem_get_info': lambda device: (80 * 10**9, 141 * 10**9),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    fit = 1 + int((0.9 * 80e9 - 12e6 - 3e9) / 2e9)
    assert fit == 35
    assert (
        trial.sequences_that_fit(Model(), 1000, nullcontext()) == 35
    )  # 29 passes of at most 35: equal parts
    peaks = iter((4 * 10**9, 6 * 10**9))
    assert trial.sequences_that_fit(Model(), 40, nullcontext()) == 20
