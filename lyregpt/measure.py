"""What bench.py measures with: programs in processes of their own, and a table of their figures."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from configurator import UserError
from lyregpt import ROOT, report
from lyregpt.text import atomic_write

Figures = dict[str, float]
Measured = Callable[[], Figures]
SHAKESPEARE = os.path.join(ROOT, 'data', 'shakespeare_char')


def run_python(
    words: list[str], cwd: str = ROOT, env: dict[str, str] | None = None
) -> tuple[str, Figures]:
    """Run `python WORDS` to its end; returns its output and costs. Raises UserError if it fails.

    The memory is the peak of the process or of a child of it; Windows does not report it.
    """
    costs = {'memory_mb': 0.0}
    began = time.perf_counter()
    output = ''
    with tempfile.TemporaryFile('w+') as errors:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=cwd,
            env=os.environ | {'PYTHONPATH': ROOT} | (env or {}),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        for line in process.stdout or ():
            output += line
            if re.match(r'step [\d,]+/', line):  # train.py logged a step
                costs.setdefault('first_step_s', time.perf_counter() - began)
        if hasattr(os, 'wait4'):
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            costs['memory_mb'] = usage.ru_maxrss / (1e6 if sys.platform == 'darwin' else 1e3)
        if process.wait():
            errors.seek(0)
            said = errors.read().strip() or output.strip() or f'status {process.returncode}'
            raise UserError(f'a measured process failed: {said.splitlines()[-1][:300]}')
    return output, costs | {'wall_s': time.perf_counter() - began}


def run_program(name: str, module: str = 'benchmarks', cwd: str = ROOT, **values: Any) -> Figures:
    """The figures of a program in lyregpt/benchmarks.py or peer_benchmarks.py."""
    output, costs = run_python(['-m', f'lyregpt.{module}', name, json.dumps(values)], cwd)
    return costs | json.loads(output.splitlines()[-1])


# -----------------------------------------------------------------------------
# Training, ours and nanoGPT's


def as_options(**options: Any) -> list[str]:
    """Options as words of a command line."""
    return [f'--{name}={value}' for name, value in options.items()]


def random_dataset(folder: str) -> None:
    """Write token files of random GPT-2 tokens."""
    import numpy as np

    rng = np.random.default_rng(1337)
    for name, count in (('train', 2**20), ('val', 2**12)):
        rng.integers(0, 50257, count).astype('<u2').tofile(os.path.join(folder, f'{name}.bin'))


def train(words: list[str], skip: int = 0, **env: str) -> Figures:
    """Figures of our training, `python WORDS`, without the first `skip` rows that have a speed."""
    with tempfile.TemporaryDirectory() as out:
        _, costs = run_python([*words, f'--out_dir={out}'], env=env)
        rows: list[dict[str, Any]] = report.read_rows(out)
        session = report.read_sessions(out)[-1]
    training = [row for row in rows if row['tokens_per_second']]
    speed = statistics.median(row['tokens_per_second'] for row in training[skip:])
    tokens_per_step = training[-1]['tokens'] / training[-1]['step']
    return (
        costs
        | {
            'memory_mb': session['memory'].get('peak', 0),  # on a GPU that is its memory
            'train_s': session['seconds']['training'],
            'val_loss': [row['val_loss'] for row in rows if row['val_loss']][-1],
            'tokens_per_s': speed,
            'ms_per_step': 1e3 * tokens_per_step / speed,
            'share_of_ceiling': statistics.median(row['mfu'] for row in training[skip:]),
        }
    )


def train_peer(words: list[str], peer: str, skip: int) -> Figures:
    """Figures of nanoGPT's training, from what it prints; the first `skip` steps do not count."""
    output, costs = run_python(words, peer)
    if '--device=cuda' in words:
        costs['memory_mb'] = 0  # not known from outside
    tokens_per_step = re.findall(r'tokens per iteration will be: ([\d,]+)', output)[0]
    losses = dict(re.findall(r'^step (\d+): .* val loss ([\d.]+)', output, re.M))
    times = re.findall(r'^iter (\d+): .* time ([\d.]+)ms', output, re.M)
    # a step with an evaluation takes longer
    step_s = statistics.median(
        float(ms) / 1e3 for n, ms in times if int(n) >= skip and n not in losses
    )
    best = min(losses, key=lambda n: float(losses[n]))
    return costs | {
        'train_s': step_s * int(times[-1][0]),
        'train_s_to_its_best': step_s * int(best),
        'ms_per_step': 1e3 * step_s,
        'tokens_per_s': int(tokens_per_step.replace(',', '')) / step_s,
        'its_own_best': float(losses[best]),
    }


def train_peer_to_loss(words: list[str], peer: str, skip: int) -> Figures:
    """`train_peer`, and its checkpoint's loss over the whole validation split by our measure."""
    with tempfile.TemporaryDirectory() as out:
        figures = train_peer([*words, f'--out_dir={out}'], peer, skip)
        same = [word for word in words if word.startswith(('--device', '--dataset'))]
        options = [f'--init_from={out}/ckpt.pt', f'--out_dir={out}/eval', '--eval_only', *same]
        output, _ = run_python(['train.py', *options])
    return figures | {'val_loss': float(re.findall(r'validation loss ([\d.]+)', output)[-1])}


def shakespeare_is_prepared() -> bool:
    """Whether data/shakespeare_char has token files."""
    return os.path.isfile(os.path.join(SHAKESPEARE, 'train.bin'))


def prepare_shakespeare(folder: str, text: str) -> None:
    """Write Tiny Shakespeare's characters into `folder`, from the file `text` if it is given.

    Raises UserError if the text is not available.
    """
    if shakespeare_is_prepared() and not text:
        shutil.copytree(SHAKESPEARE, folder, dirs_exist_ok=True)
    else:
        text = text and os.path.abspath(text)
        run_python([f'{SHAKESPEARE}/prepare.py', *as_options(out_dir=folder, input=text)])


def train_twice(words: list[str]) -> Figures:
    """Our training with an empty compile cache, then with a full one."""
    with tempfile.TemporaryDirectory() as cache:
        first = train(words, TORCHINDUCTOR_CACHE_DIR=cache)
        again = train(words, TORCHINDUCTOR_CACHE_DIR=cache)
    return first | {'warm_wall_s': again['wall_s'], 'warm_train_s': again['train_s']}


def seconds_a_step(words: list[str], env: dict[str, str]) -> Figures:
    """The time of a step of our training, without the first two."""
    return {'s_a_step': train(words, 2, **env)['ms_per_step'] / 1e3}


def train_and_save(words: list[str]) -> Figures:
    """What saving a checkpoint at steps 6 and 12 adds to 17 steps of our training."""
    with tempfile.TemporaryDirectory() as out:
        random_dataset(out)
        run_python([*words, *as_options(dataset=out, out_dir=out)])
        rows: list[dict[str, Any]] = report.read_rows(out)
        saving = report.read_sessions(out)[-1]['seconds']['saving'] / 3  # one is at the end
        size = os.path.getsize(os.path.join(out, 'ckpt.pt'))
    tokens_per_step = rows[-1]['tokens'] / rows[-1]['step']
    speeds = [row['tokens_per_second'] for row in rows if row['tokens_per_second']][1:]
    usual = tokens_per_step / statistics.median(speeds)
    return {
        'step_s': usual,
        'checkpoint_mb': size / 1e6,
        'training_thread_held_s_a_save': saving,
        'held_share_of_step': saving / usual,
        'steps_longer_by_s_a_save': sum(tokens_per_step / speed - usual for speed in speeds) / 2,
    }


def prepare(words: list[str], cwd: str, megabytes: float) -> Figures:
    """MB per second of a script that reads `megabytes`."""
    _, costs = run_python(words, cwd)
    return {'mb_per_s': megabytes / costs['wall_s']}


# -----------------------------------------------------------------------------
# The table


class Table:
    """Collects the figures of ours and of the peer, and prints a line for each.

    `ceiling` measures the speed of the machine in FLOP/s.
    """

    def __init__(self, ceiling: Callable[[], float], rounds: int):
        self.ceiling, self.rounds = ceiling, rounds
        self.figures: dict[str, dict[str, list[float]]] = {}

    def measure(self, title: str, ours: Measured, theirs: Measured | None = None) -> None:
        """Call `ours` and `theirs` in turn and keep their figures, with the machine's speed."""
        calls = {'ours': ours, 'peer': theirs} if theirs else {'ours': ours}
        for n in range(1, self.rounds + 1):
            for side, call in calls.items():
                about = f'  {title}: {side}, round {n} of {self.rounds} …'
                print(about, file=sys.stderr, flush=True)
                machine = {'machine_gflop_per_s': self.ceiling() / 1e9}
                for name, value in (machine | call()).items():
                    sides = self.figures.setdefault(f'{title} {name}', {})
                    sides.setdefault(side, []).append(value)

    def show(self) -> None:
        """Print each figure's median and range, the ratio of the pairs, and what is too noisy."""
        what = 'median (min–max)'
        print(f'\n{"figure":<46}{"ours: " + what:>30}{"peer: " + what:>30}{"ours/peer":>22}')
        for name, sides in self.figures.items():
            ours, peer = sides.get('ours', []), sides.get('peer', [])
            pairs = [a / b for a, b in zip(ours, peer) if b]
            print(f'{name:<46}{spread(ours):>30}{spread(peer):>30}{spread(pairs):>22}')
            if name.endswith('machine_gflop_per_s'):
                if varied(ours + peer):
                    print(
                        '  too noisy: the speed of the machine itself changed by more than half '
                        'between these runs; run them again on a quiet one'
                    )
            elif varied(pairs):
                print('  too noisy to say: the pairs differ by more than half')
            elif not pairs and (varied(ours) or varied(peer)):
                print('  too noisy to say: the runs differ by more than half')


def varied(values: list[float]) -> bool:
    """Whether the largest value is more than 1.5 times the smallest."""
    return len(values) > 1 and max(values) > 1.5 * min(values) > 0


def spread(values: list[float]) -> str:
    """Median, smallest and largest value; a dash if there are none."""
    if not values:
        return '–'
    low, high = number(min(values)), number(max(values))
    return f'{number(statistics.median(values))} ({low}–{high})'


def number(value: float) -> str:
    """Three digits at most, thousands with commas."""
    if abs(value) >= 100:
        return f'{value:,.0f}'
    return f'{value:.3g}' if abs(value) < 1 else f'{value:.2f}'


def save_json(path: str, figures: dict[str, Any]) -> None:
    """Write figures as JSON, if there is a path. Raises UserError."""
    if path:
        try:
            atomic_write(path, json.dumps(figures, indent=1).encode())
        except OSError as error:
            raise UserError(f'json={path}: cannot be written ({error.strerror})') from None
