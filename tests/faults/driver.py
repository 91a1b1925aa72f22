"""Break training runs in every way we could think of, and count the results.

    python tests/faults/driver.py                     (a short round, a few minutes)
    python tests/faults/driver.py --kills=50 --damages=200 --fall_backs=10 --signals=20 \\
        --restarts=5 --nans=5 --full_disks=3 --stops=2     (the long one)

Runs are real processes of train.py, on real files. A fault is survived if the run, or the one that
resumes it, ends with exactly the weights, optimizer states and metrics.csv of an undisturbed run,
or, where nothing can be resumed, with one clear line and exit status 2. Anything else is a wrong
result. Lost steps are those that had to be repeated.
"""

import contextlib
import csv
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from configurator import UserError, configure, run  # noqa: E402
from lyregpt import checkpoint  # noqa: E402
from lyregpt.dataset import write_dataset  # noqa: E402
from lyregpt.text import split_text  # noqa: E402
from lyregpt.tokenizer import CharTokenizer  # noqa: E402

STEPS = 240
SHAPE = (
    '--n_layer=2 --n_head=2 --n_embd=128 --block_size=32 --batch_size=4 '
    '--gradient_accumulation_steps=1 --learning_rate=3e-3 --dropout=0.1 '
    f'--max_iters={STEPS} --warmup_iters=10 --eval_interval=60 --eval_iters=4 '
    '--log_interval=7 --checkpoint_interval=9 --device=cpu'
).split()
EXACT = (
    'step',
    'tokens',
    'train_loss',
    'val_loss',
    'val_bpb',
    'lr',
    'grad_norm',
)  # the columns of metrics.csv that do not depend on time


@dataclass
class FaultsConfig:
    kills: int = 4  # kill -9 at a random instant, then resume
    fall_backs: int = (
        2  # a damaged checkpoint, and a kill in the run that goes on from the one before
    )
    damages: int = 40  # checkpoints cut off or with a bit turned, files and folders in turn
    signals: int = 3  # SIGTERM, SIGINT and SIGUSR1 at random instants
    restarts: int = 1  # one of two processes killed under torchrun --max_restarts=3
    stops: int = 1  # one of two processes stopped (it hangs): the others must give up
    full_disks: int = 1  # a small disk that fills up under the checkpoints (root on Linux only)
    nans: int = 1  # a learning rate that blows the weights up
    data: int = 4  # token files cut off or with bits turned
    code: int = 2  # checkpoints that ask for code to be run
    jobs: int = 2  # runs side by side
    seed: int = 0  # of the faults


@dataclass
class Tally:
    tried: int = 0
    survived: int = 0
    lost: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    remark: str = ''


class Bench:
    """A folder with a dataset and the undisturbed runs that the others are compared with."""

    def __init__(self, folder: Path):
        self.folder = folder
        words = random.Random(1)
        text = '\n'.join(
            ' '.join(
                ''.join(words.choices('abcdefghijklmnop', k=words.randint(1, 9))) for _ in range(7)
            )
            for _ in range(900)
        )
        with contextlib.redirect_stdout(io.StringIO()):
            write_dataset(
                str(folder / 'data'),
                split_text([text], len(text), 0.1),
                CharTokenizer.train([text]),
            )
        self.whole: dict[int, Path] = {}
        self.seconds = 0.0  # from the first step to the last

    def command(
        self, out: Path, *more: str, processes: int = 1, launcher: tuple[str, ...] = ()
    ) -> list[str]:
        torchrun = [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            f'--nproc_per_node={processes}',
            *launcher,
        ]
        start = [sys.executable] if processes == 1 and not launcher else torchrun
        return [
            *start,
            str(ROOT / 'train.py'),
            f'--dataset={self.folder / "data"}',
            f'--out_dir={out}',
            *SHAPE,
            *more,
        ]

    def start(self, *words: Any, **more: Any) -> subprocess.Popen:
        environment = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'}
        return subprocess.Popen(
            self.command(*words, **more),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self, *words: Any, **more: Any) -> subprocess.CompletedProcess:
        process = self.start(*words, **more)
        try:
            out, err = process.communicate(timeout=300)
        finally:
            end_group(process)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def undisturbed(self, processes: int = 1) -> Path:
        """The out_dir of such a run."""
        if processes not in self.whole:
            out = self.folder / f'whole-{processes}'
            done = self.finish(out, processes=processes)
            assert done.returncode == 0, done.stderr
            self.whole[processes] = out
            with open(out / 'metrics.csv', encoding='utf-8') as f:
                self.seconds = max(self.seconds, float(list(csv.DictReader(f))[-1]['seconds']))
        return self.whole[processes]


def differs(a: Path, b: Path) -> str:
    """'' if two out_dirs hold the same weights, states and metrics, else what differs."""
    one, two = (checkpoint.load(str(p / 'ckpt.pt')) for p in (a, b))
    tensors = [checkpoint.flatten_state(s) for s in (one, two)]
    if tensors[0][0].keys() != tensors[1][0].keys():
        return 'names of tensors'
    for name, tensor in tensors[0][0].items():
        if not torch.equal(tensor, tensors[1][0][name]):
            return name
    for key in ('iter_num', 'best_val_loss', 'bad_evals', 'last_eval', 'optimizer', 'losses'):
        if tensors[0][1][key] != tensors[1][1][key]:
            return key
    rows = []
    for path in (a, b):
        with open(path / 'metrics.csv', encoding='utf-8', newline='') as f:
            rows.append([[row[c] for c in EXACT] for row in csv.DictReader(f)])
    return '' if rows[0] == rows[1] else 'metrics.csv'


def step_of(out: Path) -> int:
    """The step that a resumed run begins at; 0 if there is nothing to resume."""
    return (
        int(checkpoint.load_from(str(out), best=False)[1]['iter_num'])
        if out.is_dir() and checkpoint.candidates(str(out))
        else 0
    )


def reached(out: Path) -> int:
    """The last step that metrics.csv knows of."""
    if not (out / 'metrics.csv').exists():
        return 0
    with open(out / 'metrics.csv', encoding='utf-8', newline='') as f:
        return max(
            (int(row['step']) for row in csv.DictReader(f) if (row['step'] or '').isdigit()),
            default=0,
        )


def wait_for(process: subprocess.Popen, start: str) -> None:
    """Read what it says until a line begins so, or it ends."""
    assert process.stdout
    next((line for line in process.stdout if line.startswith(start)), '')


def end_group(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def ended_badly(done: subprocess.CompletedProcess) -> str:
    return f'exit {done.returncode}: {done.stderr[-600:]}' if done.returncode else ''


def one_line(done: subprocess.CompletedProcess, status: int = 2) -> str:
    """'' if the run ended with the exit status and one clear line, else what it did."""
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith('WARNING')]
    return (
        ''
        if done.returncode == status and len(lines) == 1 and 'error: ' in lines[0]
        else f'exit {done.returncode}: {done.stderr[-300:]}'
    )


# -----------------------------------------------------------------------------
# The faults: each breaks one run, and gives (lost steps, '' or what went wrong, a remark)


def kill(bench: Bench, rng: random.Random, out: Path) -> tuple[int, str, str]:
    bench.undisturbed()
    process = bench.start(out, f'--checkpoint_async={rng.random() < 0.5}')
    wait_for(process, 'machine:')
    time.sleep(rng.random() * 1.2 * bench.seconds)
    over = process.poll() is not None
    end_group(process)
    process.communicate()
    writing = any(p.name.endswith('.tmp') for p in out.iterdir()) if out.exists() else False
    lost = reached(out) - step_of(out)
    done = bench.finish(out, '--init_from=auto')
    wrong = ended_badly(done) or differs(bench.undisturbed(), out)
    return (
        max(0, lost),
        wrong,
        'over before' if over else 'while a checkpoint was written' if writing else 'in between',
    )


def ask(bench: Bench, rng: random.Random, out: Path) -> tuple[int, str, str]:
    number = rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    bench.undisturbed()
    process = bench.start(out, '--checkpoint_interval=0')
    wait_for(process, 'machine:')
    time.sleep(0.1 + rng.random() * 0.7 * bench.seconds)
    process.send_signal(number)
    if number == signal.SIGUSR1:
        time.sleep(0.5)
        saved = [int(checkpoint.load(path)['iter_num']) for path in checkpoint.candidates(str(out))]
        if process.poll() is None and not any(
            step % 60 for step in saved
        ):  # but for those of evaluations
            end_group(process)
            return 0, 'SIGUSR1 brought no checkpoint', ''
        end_group(process)
    out_text, err = process.communicate(timeout=60)
    if number != signal.SIGUSR1 and process.returncode not in (128 + number, 0):
        return 0, f'{number!r}: exit {process.returncode}: {err[-300:]}', ''
    lost = max(0, reached(out) - step_of(out))
    done = bench.finish(out, '--init_from=resume')
    return lost, ended_badly(done) or differs(bench.undisturbed(), out), number.name


def restart(bench: Bench, rng: random.Random, out: Path) -> tuple[int, str, str]:
    bench.undisturbed(2)
    process = bench.start(out, processes=2, launcher=('--max_restarts=3',))
    wait_for(process, 'machine:')
    time.sleep(rng.random() * bench.seconds)
    victims = children(process.pid)
    lost = 0
    if len(victims) == 2:
        os.kill(rng.choice(victims), signal.SIGKILL)
        lost = max(0, reached(out) - step_of(out))
    try:
        _, err = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        end_group(process)
        return 0, 'hangs', ''
    again = 'resuming' in (out / 'train.log').read_text(encoding='utf-8')
    wrong = (
        f'exit {process.returncode}: {err[-600:]}'
        if process.returncode
        else differs(bench.undisturbed(2), out)
    )
    return lost, wrong, 'resumed' if again else 'began anew, or was over'


def stop(bench: Bench, rng: random.Random, out: Path) -> tuple[int, str, str]:
    process = bench.start(out, '--timeout_minutes=0.15', '--max_iters=100000', processes=2)
    wait_for(process, 'step 7')
    victims = children(process.pid)
    os.kill(rng.choice(victims), signal.SIGSTOP)
    started = time.monotonic()
    try:
        _, err = process.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        end_group(process)
        return 0, 'hangs', ''
    finally:
        for victim in victims:
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                pass
    told = 'lost the others' in err
    return (
        0,
        '' if process.returncode and told else f'exit {process.returncode}: {err[-400:]}',
        f'given up after {time.monotonic() - started:.0f} s',
    )


def children(pid: int) -> list[int]:
    """The processes that torchrun started."""
    text = subprocess.run(
        ['ps', '-o', 'pid=', '--ppid', str(pid)], capture_output=True, text=True, check=False
    ).stdout
    return [int(word) for word in text.split()]


def fall_back(bench: Bench, rng: random.Random, out: Path) -> tuple[int, str, str]:
    """A damaged checkpoint, a run resumed from the one before, killed, and resumed again."""
    shutil.copytree(bench.undisturbed(), out)
    with open(out / 'ckpt.pt', 'r+b') as f:
        f.truncate(rng.randrange(os.path.getsize(out / 'ckpt.pt')))
    good = step_of(out)
    process = bench.start(out, '--init_from=resume', '--checkpoint_interval=1')
    wait_for(process, 'resuming')
    time.sleep(0.5 * rng.random())
    end_group(process)
    process.communicate()
    if step_of(out) < good:
        return 0, 'the good checkpoint is lost', ''
    done = bench.finish(out, '--init_from=resume')
    return STEPS - good, ended_badly(done) or differs(bench.undisturbed(), out), ''


def damage(bench: Bench, rng: random.Random, out: Path) -> tuple[int, str, str]:
    """Truncate the latest checkpoint or flip a bit; reading must give the one before it."""
    folder = rng.random() < 0.5
    source = bench.undisturbed()
    out.mkdir()
    names = {True: ('ckpt', 'ckpt.prev'), False: ('ckpt.pt', 'ckpt.prev.pt')}[folder]
    for name, origin in zip(names, ('ckpt.pt', 'ckpt.prev.pt')):
        if folder:
            checkpoint.save_folder(str(out / name), checkpoint.load(str(source / origin)))
        else:
            shutil.copy(source / origin, out / name)
    victim = rng.choice(sorted((out / 'ckpt').iterdir())) if folder else out / 'ckpt.pt'
    size = victim.stat().st_size
    kind = rng.choice(['cut', 'bit', 'bit', 'bytes'])
    with open(victim, 'r+b') as f:
        at = rng.randrange(size)
        if kind == 'cut':
            f.truncate(at)
        else:
            f.seek(at)
            some = f.read(1 if kind == 'bit' else 100)
            f.seek(at)
            f.write(
                bytes([some[0] ^ 1 << rng.randrange(8)])
                if kind == 'bit'
                else bytes(b ^ 0x5A for b in some)
            )
    try:
        path, state = checkpoint.load_from(str(out), best=False, optimizer=True)
    except UserError as error:
        return 0, f'nothing could be read: {error}', ''
    if not path.endswith(names[1]):
        return 0, f'{victim.name}: {kind} at {at} of {size} was not noticed', ''
    expected = checkpoint.flatten_state(checkpoint.load(str(source / 'ckpt.prev.pt')))[0]
    found = checkpoint.flatten_state(state)[0]
    same = expected.keys() == found.keys() and all(
        torch.equal(a, found[k]) for k, a in expected.items()
    )
    return (
        STEPS - state['iter_num'],
        '' if same else 'another state was read',
        'folders' if folder else 'files',
    )


def fill(bench: Bench, rng: random.Random, out: Path) -> tuple[int, str, str]:
    """A disk that fills up after the first checkpoints; then it has room again."""
    out.mkdir()
    size = rng.randrange(9000, 14000)
    if subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', f'size={size}k', 'tmpfs', str(out)],
        capture_output=True,
        check=False,
    ).returncode:
        return 0, '', 'skipped: mounting is not allowed here'
    process = bench.start(out)
    try:
        time.sleep(rng.random())
        while process.poll() is None and not (out / 'ckpt.pt').exists():
            time.sleep(0.05)
        with open(out / 'ballast', 'wb', buffering=0) as f:
            try:
                for _ in range(size):
                    f.write(b'\1' * 1024)
            except OSError:
                pass
        _, err = process.communicate(timeout=120)
        filled = subprocess.CompletedProcess(process.args, process.returncode, '', err)
        wrong = one_line(filled)
        if process.returncode and wrong:
            return 0, wrong, ''
        lost = STEPS - step_of(out)
        os.remove(out / 'ballast')
        subprocess.run(['mount', '-o', 'remount,size=100m', str(out)], check=True)
        done = bench.finish(out, '--init_from=resume')
        wrong = ended_badly(done) or weights_differ(bench.undisturbed(), out)
        return lost, wrong, 'filled' if process.returncode else 'ended before'
    finally:
        end_group(process)
        process.wait()
        subprocess.run(['umount', str(out)], check=False)


def weights_differ(a: Path, b: Path) -> str:
    """As `differs`, but rows that no disk had room for may be missing in metrics.csv."""
    wrong = differs(a, b)
    return '' if wrong == 'metrics.csv' else wrong


def nan(bench: Bench, rng: random.Random, out: Path) -> tuple[int, str, str]:
    at = rng.choice([30, 60, 90])
    done = bench.finish(out, f'--max_iters={at}', f'--lr_decay_iters={STEPS}')
    good = step_of(out)
    done = bench.finish(
        out,
        '--init_from=resume',
        f'--max_iters={STEPS}',
        '--learning_rate=1e30',
        '--grad_clip=0',
        '--decay_lr=False',
    )
    wrong = one_line(done)
    if wrong:
        return 0, wrong, ''
    state = checkpoint.load_from(str(out), best=False)[1]
    finite = all(bool(w.isfinite().all()) for w in state['model'].values())
    return (
        max(0, reached(out) - state['iter_num']),
        '' if finite and state['iter_num'] >= good else 'the checkpoint is not finite',
        '',
    )


def spoil(bench: Bench, rng: random.Random, out: Path) -> tuple[int, str, str]:
    """Token files truncated or with flipped bits: one clear line, or a run on other valid ids."""
    folder = Path(f'{out}-data')
    shutil.copytree(bench.folder / 'data', folder)
    victim = folder / rng.choice(['train.bin', 'val.bin'])
    size = victim.stat().st_size
    kind = rng.choice(['cut', 'empty', 'bits'])
    with open(victim, 'r+b') as f:
        if kind == 'bits':
            for _ in range(20):
                at = rng.randrange(size)
                f.seek(at)
                byte = f.read(1)[0]
                f.seek(at)
                f.write(bytes([byte ^ 1 << rng.randrange(8)]))
        else:
            f.truncate(rng.randrange(1, size) if kind == 'cut' else 0)
    done = bench.finish(out, f'--dataset={folder}', '--max_iters=60')
    clear = not one_line(done) or kind == 'bits' and done.returncode == 0
    return (
        0,
        '' if clear else f'{kind}: {one_line(done)}',
        'noticed' if done.returncode else 'bits that stay in the vocabulary: trained on',
    )


def hide_code(bench: Bench, rng: random.Random, out: Path) -> tuple[int, str, str]:
    """A checkpoint whose pickle makes a folder, or whose config names a script that does."""
    shutil.copytree(bench.undisturbed(), out)
    mark = out / 'ran'
    if rng.random() < 0.5:
        (out / 'data').mkdir()
        (out / 'data' / 'prepare.py').write_text(
            f'import os\nos.mkdir({str(mark)!r})\n# offline: bool\n', encoding='utf-8'
        )
        state = checkpoint.load(str(out / 'ckpt.pt'))
        state['config'] |= {
            'dataset': str(out / 'data'),
            'prepare': str(out / 'data' / 'prepare.py'),
        }
        checkpoint.save(str(out / 'ckpt.pt'), state)
        done = subprocess.run(
            [sys.executable, str(ROOT / 'train.py'), f'--out_dir={out}', '--init_from=resume'],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )
        return 0, 'the script ran' if mark.exists() else one_line(done), 'scripts'

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(mark),)

    torch.save(
        checkpoint.load(str(out / 'ckpt.pt')) | {'extra': Evil()},
        out / 'ckpt.pt',
        _use_new_zipfile_serialization=rng.random() < 0.5,
    )
    for spare in ('ckpt.prev.pt', 'best.pt'):
        (out / spare).unlink()
    done = bench.finish(out, '--init_from=resume')
    return 0, 'its code ran' if mark.exists() else one_line(done), 'pickles'


FAULTS: dict[str, tuple[str, Callable[..., tuple[int, str, str]]]] = {
    'kills': ('kill -9, then resume', kill),
    'damages': ('damaged checkpoints', damage),
    'fall_backs': ('damaged, resumed, killed, resumed', fall_back),
    'signals': ('SIGTERM, SIGINT, SIGUSR1', ask),
    'restarts': ('a process of two killed, restarted', restart),
    'stops': ('a process of two hangs', stop),
    'full_disks': ('disk full', fill),
    'nans': ('weights blown up', nan),
    'data': ('damaged token files', spoil),
    'code': ('code in a checkpoint', hide_code),
}


def drive(config: FaultsConfig) -> dict[str, Tally]:
    """Commit the faults; what came of them, by kind."""
    tallies: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        bench.undisturbed()
        if config.restarts:
            bench.undisturbed(2)
        for kind, (_, fault) in FAULTS.items():
            tally = tallies[kind] = Tally()
            remarks: dict[str, int] = {}

            def one(
                number: int, kind: str = kind, fault: Callable[..., tuple[int, str, str]] = fault
            ) -> tuple[int, str, str]:
                out = Path(folder) / f'{kind}-{number}'
                try:
                    return fault(bench, random.Random(f'{config.seed} {kind} {number}'), out)
                except Exception as error:  # it counts as a wrong result
                    return 0, f'{type(error).__name__}: {error}', ''
                finally:
                    shutil.rmtree(out, ignore_errors=True)

            with ThreadPoolExecutor(
                config.jobs if kind not in ('restarts', 'stops') else 1
            ) as pool:
                for number, (lost, wrong, remark) in enumerate(
                    pool.map(one, range(getattr(config, kind)))
                ):
                    tally.tried += 1
                    tally.survived += not wrong
                    tally.lost.append(lost)
                    if wrong:
                        tally.wrong.append(f'{kind} {number}: {wrong}')
                    remarks[remark] = remarks.get(remark, 0) + 1
            tally.remark = ', '.join(
                f'{count} {remark}' for remark, count in remarks.items() if remark
            )
    return tallies


def row(name: str, tallies: list[Tally]) -> str:
    """A line of the table, of the sums over the tallies."""
    tried = sum(t.tried for t in tallies)
    survived = sum(t.survived for t in tallies)
    wrong = sum(len(t.wrong) for t in tallies)
    lost = sum(sum(t.lost) for t in tallies)
    return f'{name:<36}{tried:>6}{survived:>9}{wrong:>6}{lost:>11}'


def main() -> None:
    config = configure(FaultsConfig, description='Break training runs and count what came of it.')
    began = time.monotonic()
    with contextlib.redirect_stderr(
        io.StringIO()
    ):  # the warnings that reading damaged files brings
        tallies = drive(config)
    print(f'{"fault":<36}{"tried":>6}{"survived":>9}{"wrong":>6}{"lost steps":>11}')
    for kind, tally in tallies.items():
        if tally.tried:
            print(f'{row(FAULTS[kind][0], [tally])}  {tally.remark}')
    everything = list(tallies.values())
    print(f'{row("all", everything)}  in {time.monotonic() - began:.0f} s')
    for tally in everything:
        for wrong in tally.wrong:
            print(wrong, file=sys.stderr)
    sys.exit(1 if any(t.wrong for t in everything) else 0)


if __name__ == '__main__':
    run(main)
