"""Threads and number formats follow the machine: quotas, idle CPUs, and what it multiplies fast."""

import ast
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample
from lyregpt import checkpoint, generate, threads
from tests.conftest import ROOT, mistake, script, tiny
from train import main, train

ENTRY_POINTS = (
    'examples/seq2seq/train_seq2seq.py',
    'lyregpt/api.py',
    'sample.py',
    'lyregpt/serve.py',
    'train.py',
)


@pytest.fixture
def threads_restored():
    """The number of threads, as it was before the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_policy(monkeypatch):
    """An environment that says nothing of threads."""
    for name in (*threads.POLICY_VARIABLES, 'OMP_NUM_THREADS', 'LOCAL_WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)


def group(root: Path, folder: str, **files: str):
    """A control group's folder below `root`, with its files; __ stands for the dot in a name."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / folder / name.replace('__', '.')).write_text(text)


def test_quota_of_control_groups(tmp_path):
    assert threads.cpu_quota(str(tmp_path)) == math.inf  # no control groups at all
    group(tmp_path, 'proc/self', cgroup='0::/jobs/mine\n')
    group(tmp_path, 'sys/fs/cgroup/jobs/mine', cpu__max='max 100000\n')
    assert threads.cpu_quota(str(tmp_path)) == math.inf
    group(tmp_path, 'sys/fs/cgroup/jobs', cpu__max='250000 100000\n')
    assert threads.cpu_quota(str(tmp_path)) == 2.5  # the limit of the group around it
    group(tmp_path, 'sys/fs/cgroup/jobs/mine', cpu__max='50000 100000\n')
    assert threads.cpu_quota(str(tmp_path)) == 0.5


def test_quota_of_control_groups_version_1(tmp_path):
    group(tmp_path, 'proc/self', cgroup='4:memory:/a\n1:cpu,cpuacct:/docker/abc\n0::/\n')
    group(tmp_path, 'sys/fs/cgroup/cpu', cpu__cfs_quota_us='-1\n', cpu__cfs_period_us='100000\n')
    assert threads.cpu_quota(str(tmp_path)) == math.inf
    group(
        tmp_path, 'sys/fs/cgroup/cpu', cpu__cfs_quota_us='150000\n'
    )  # a container sees its own group as the root
    assert threads.cpu_quota(str(tmp_path)) == 1.5


@pytest.mark.parametrize(
    'text', ['', 'max', 'max 100000', 'lots 100000', '100000', '100000 0', '0 100000', '1 2 3']
)
def test_no_quota_in_odd_files(tmp_path, text):
    group(
        tmp_path,
        'proc/self',
        cgroup='no colons\n0::/a b:c/\udce9\n'.encode('utf-8', 'surrogateescape').decode('latin-1'),
    )
    group(tmp_path, 'sys/fs/cgroup', cpu__max=text)
    assert threads.cpu_quota(str(tmp_path)) == math.inf


@pytest.mark.parametrize(
    'text, number', [('', 7), ('0', 7), ('two', 7), ('1.0', 7), ('²', 7), (' 2', 2), ('4,2', 4)]
)
def test_numbers_in_the_environment(monkeypatch, text, number):
    monkeypatch.setenv('OMP_NUM_THREADS', text)
    assert threads.positive_number('OMP_NUM_THREADS', 7) == number


def test_cores_follow_quota_and_affinity(monkeypatch):
    monkeypatch.setattr(threads, 'usable_cpus', lambda: {0, 1, 2, 3})
    monkeypatch.setattr(threads, 'read', lambda path: '')  # no topology: each CPU counts as a core
    for quota, cores in (math.inf, 4), (2.5, 3), (0.5, 1):
        monkeypatch.setattr(threads, 'cpu_quota', lambda quota=quota: quota)
        assert threads.usable_cores() == cores
    monkeypatch.setattr(threads, 'cpu_quota', lambda: math.inf)
    monkeypatch.setattr(
        threads, 'read', lambda path: '0,2' if 'cpu0' in path or 'cpu2' in path else '1,3'
    )
    assert threads.usable_cores() == 2  # two threads of a core are one core


@pytest.mark.parametrize(
    'idle, environment, variables, words',
    [
        (4.0, {}, {}, 'spin while waiting (4.0 of 4 CPUs idle)'),
        (3.6, {}, {}, 'spin while waiting (3.6 of 4 CPUs idle)'),
        (3.0, {}, {'OMP_WAIT_POLICY': 'PASSIVE'}, 'sleep while waiting (3.0 of 4 CPUs idle)'),
        (3.0, {'OMP_NUM_THREADS': '2'}, {}, 'spin while waiting (3.0 of 4 CPUs idle)'),
        (
            4.0,
            {'OMP_NUM_THREADS': '3,2', 'LOCAL_WORLD_SIZE': '2'},
            {'OMP_WAIT_POLICY': 'PASSIVE'},
            'sleep while waiting (4.0 of 4 CPUs idle)',
        ),
        (
            3.0,
            {'OMP_NUM_THREADS': '2', 'LOCAL_WORLD_SIZE': '2'},
            {},
            'spin while waiting (4.0 of 4 CPUs idle)',
        ),  # the other one is importing
        (0.0, {'OMP_NUM_THREADS': '1'}, {}, ''),
        (0.0, {'GOMP_SPINCOUNT': '7'}, {}, 'follow GOMP_SPINCOUNT=7'),
        (0.0, {'OMP_WAIT_POLICY': 'ACTIVE'}, {}, 'follow OMP_WAIT_POLICY=ACTIVE'),
    ],
)
def test_waiting_follows_idle_cpus(monkeypatch, no_policy, idle, environment, variables, words):
    monkeypatch.setattr(threads, 'usable_cpus', lambda: {0, 1, 2, 3})
    monkeypatch.setattr(threads, 'usable_cores', lambda: 4)
    monkeypatch.setattr(threads, 'cpu_quota', lambda: math.inf)
    monkeypatch.setattr(threads, 'idle_cpus', lambda: idle)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert threads.choose_waiting() == (variables, words)


def test_a_busy_moment_does_not_decide(monkeypatch, no_policy):
    monkeypatch.setattr(threads, 'usable_cpus', lambda: {0, 1})
    monkeypatch.setattr(threads, 'usable_cores', lambda: 2)
    monkeypatch.setattr(threads, 'cpu_quota', lambda: math.inf)
    for idle, variables in ([0.5, 1.0, 2.0], {}), ([0.5, 1.0, 1.4], {'OMP_WAIT_POLICY': 'PASSIVE'}):
        moments = iter(idle)
        monkeypatch.setattr(threads, 'idle_cpus', lambda moments=moments: next(moments))
        assert threads.choose_waiting()[0] == variables


@pytest.mark.skipif(not os.path.exists('/proc/stat'), reason='needs Linux')
def test_idle_cpus_counts_a_busy_process():
    busy = [
        subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in threads.usable_cpus()
    ]
    try:
        assert threads.idle_cpus(0.3) < 0.5
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_torch_that_was_loaded_before_keeps_its_threads():
    code = """
import torch
torch.set_num_threads(3)
from lyregpt import threads
print(threads.WAITING, torch.get_num_threads())"""
    assert script('-c', code).stdout.split() == ['3']


def test_the_policy_is_set_while_torch_loads_and_not_inherited(tmp_path):
    (tmp_path / 'torch.py').write_text('import os\npolicy = os.environ.get("OMP_WAIT_POLICY")\n')
    code = """
from lyregpt import threads
import os, torch
print(torch.policy, os.environ.get("OMP_WAIT_POLICY"))"""
    environment = {k: v for k, v in os.environ.items() if k not in threads.POLICY_VARIABLES}
    environment |= {
        'PYTHONPATH': str(tmp_path),
        'OMP_NUM_THREADS': '1000',
    }  # more than any machine has idle
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ['PASSIVE', 'None'], done.stderr


def test_a_log_names_threads_and_cores(monkeypatch, threads_restored):
    monkeypatch.setattr(threads, 'WAITING', 'spin while waiting (2.0 of 2 CPUs idle)')
    monkeypatch.setattr(threads, 'usable_cores', lambda: 2)
    for number, text in (
        (1, '1 thread on 2 usable cores'),
        (2, '2 threads that spin while waiting (2.0 of 2 CPUs idle)'),
        (3, '3 threads on 2 usable cores that spin while waiting (2.0 of 2 CPUs idle)'),
    ):
        threads.set_threads(number)
        assert threads.describe_threads() == text


def test_every_entry_point_imports_threads_before_torch():
    """What imports torch, itself or through a module of ours, comes after `import threads`."""

    def imported(path: Path) -> list[str]:
        found = []
        for node in ast.parse(path.read_text(encoding='utf-8')).body:
            if isinstance(node, ast.Import):
                found += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module == 'lyregpt':
                found += [f'lyregpt.{alias.name}' for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found.append(str(node.module))
        return found

    ours = {path.stem: imported(path) for path in ROOT.glob('*.py')}
    ours |= {f'lyregpt.{path.stem}': imported(path) for path in (ROOT / 'lyregpt').glob('*.py')}

    def brings_torch(name: str) -> bool:
        if name.partition('.')[0] == 'torch':
            return True
        return name != 'lyregpt.threads' and any(map(brings_torch, ours.get(name, [])))

    for name in ENTRY_POINTS:
        order = imported(ROOT / name)
        first = next(i for i, module in enumerate(order) if brings_torch(module))
        assert 'lyregpt.threads' in order[:first], name


def threads_in(folder: Path) -> tuple[int, int]:
    """The threads and processes that a run's checkpoint names."""
    state = checkpoint.load_from(str(folder), best=False)[1]
    return state['config']['threads'], state['processes']


def test_resuming_keeps_the_threads(chars, tmp_path, threads_restored):
    threads.set_threads(2)
    train(tiny(chars, tmp_path, '--max_iters=2', '--threads=1'))
    assert threads_in(tmp_path) == (1, 1)
    assert torch.get_num_threads() == 2  # what comes after is as before
    train(tiny(chars, tmp_path, '--max_iters=4', '--init_from=resume'))
    assert threads_in(tmp_path) == (1, 1)
    assert (
        json.loads((tmp_path / 'config.json').read_text())['threads'] == 'auto'
    )  # nobody asked for a number
    train(
        tiny(chars, tmp_path, '--max_iters=6', '--init_from=resume', '--threads=3')
    )  # asked for, it counts
    assert threads_in(tmp_path) == (3, 1)
    assert json.loads((tmp_path / 'config.json').read_text())['threads'] == 3
    train(tiny(chars, tmp_path, '--max_iters=8', '--init_from=resume', '--threads=auto'))
    assert threads_in(tmp_path) == (2, 1)


def test_other_numbers_of_processes_do_not_keep_the_threads(chars, tmp_path, threads_restored):
    threads.set_threads(2)
    train(tiny(chars, tmp_path, '--max_iters=2', '--threads=1'))
    path, state = checkpoint.load_from(str(tmp_path), best=False, optimizer=True)
    checkpoint.save(path, state | {'processes': 4}, keep_previous=False)
    train(tiny(chars, tmp_path, '--max_iters=4', '--init_from=resume'))
    assert threads_in(tmp_path) == (2, 1)


def test_resume_is_exact_whatever_the_load(chars, tmp_path):
    """A run of 20 steps, and one resumed at 10 with threads that wait in another way."""
    options = vars(tiny(chars, tmp_path, '--threads=2', '--lr_decay_iters=20'))
    words = [
        'train.py',
        *(
            f'--{k}={v}'
            for k, v in options.items()
            if v is not None and k not in ('given', 'out_dir', 'max_iters')
        ),
    ]
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    assert (
        'done'
        in script(*words, f'--out_dir={whole}', '--max_iters=20', OMP_WAIT_POLICY='ACTIVE').stdout
    )
    assert (
        'done'
        in script(*words, f'--out_dir={parts}', '--max_iters=10', OMP_WAIT_POLICY='ACTIVE').stdout
    )
    words = [word for word in words if not word.startswith('--threads')]
    command = [*words, f'--out_dir={parts}', '--max_iters=20', '--init_from=resume']
    done = script(*command, OMP_WAIT_POLICY='PASSIVE', OMP_NUM_THREADS='1')
    assert 'cpu, 2 threads' in done.stdout, (
        done.stderr
    )  # the environment's number counts for new runs only
    states = [
        checkpoint.load_from(str(out), best=False, optimizer=True)[1] for out in (whole, parts)
    ]
    for name, weight in states[0]['model'].items():
        assert torch.equal(weight, states[1]['model'][name]), name


@pytest.mark.parametrize(
    'words, message',
    [
        ('--threads=0', 'expected auto, or 1 to 1024'),
        ('--threads=all', 'expected one of auto or a whole number'),
    ],
)
def test_threads_that_cannot_be(capsys, words, message):
    assert message in mistake(capsys, main, words)
    assert message in mistake(capsys, sample.main, words)


# -----------------------------------------------------------------------------
# Number formats

ASK = """
from lyregpt import threads
import torch
from lyregpt.device import fast_bf16, fast_int8
from lyregpt.quantize import Int8Linear
torch.manual_seed(1)
worst = 0.0
for columns, rows in (96, 65), (768, 96), (33, 50):
    layer, x = torch.nn.Linear(columns, rows), torch.randn(5, columns)
    with torch.inference_mode():
        exact = layer(x)
        worst = max(worst, float((Int8Linear(layer)(x) - exact).norm() / exact.norm()))
print(fast_bf16(torch.device('cpu')), fast_int8(), worst)
"""
FLAGS = threads.read('/proc/cpuinfo').partition('\nflags')[2].partition('\n')[0].split()


def ask(**environment) -> tuple[bool, bool, float]:
    """Are bfloat16 and int8 fast in this environment, and how large is the error of int8 layers?"""
    bf16, int8, error = script('-c', ASK, **environment).stdout.split()
    return bf16 == 'True', int8 == 'True', float(error)


@pytest.mark.skipif(not FLAGS, reason='needs Linux on x86')
def test_fast_formats_are_those_the_processor_has_instructions_for():
    bf16, int8, error = ask()
    assert bf16 == bool({'avx512_bf16', 'amx_bf16'} & set(FLAGS))
    assert int8 == bool({'avx512_vnni', 'avx_vnni', 'amx_int8'} & set(FLAGS))
    assert error < 0.02


@pytest.mark.skipif(platform.machine() not in ('x86_64', 'AMD64'), reason='needs x86')
def test_no_fast_formats_without_instructions_for_them():
    """Limited to AVX2, oneDNN's int8 products overflow (an error of 0.13), bfloat16 is emulated."""
    bf16, int8, error = ask(ONEDNN_MAX_CPU_ISA='AVX2', ATEN_CPU_CAPABILITY='avx2')
    assert (bf16, int8) == (False, False)
    assert error < 0.02


def test_a_note_where_int8_is_no_faster(trained, capsys, monkeypatch):
    options = dict(device='cpu', quantize='int8', batch_sizes=(1, 3))
    monkeypatch.setattr(generate, 'int8_speedup', lambda model, dtype, size: {1: 1.5, 3: 0.5}[size])
    generate.load_model(str(trained), **options)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith('note')]
    assert said == [
        'note: quantize=int8 saves memory, but brings little or no speedup over float32 here: '
        '0.50 times as fast for 3 at once'
    ]
    monkeypatch.setattr(generate, 'int8_speedup', lambda model, dtype, size: 1.5)
    generate.load_model(str(trained), **options)
    assert 'note' not in capsys.readouterr().err
