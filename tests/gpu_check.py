"""Check training, resuming and generation on a GPU, and measure speed.

    python tests/gpu_check.py                                   (or: make gpu-check)
    python tests/gpu_check.py --minutes=10 --peer=../nanoGPT    (trains beside a nanoGPT checkout)
    python tests/gpu_check.py --device=cpu                      (the same rows, smaller)

Prints a table row by row; a failed row does not stop it. Rows run in a child process, which is
replaced when a row times out, raises an error or crashes. Results are compared with the CPU's. It
needs only torch 2.11 or later, numpy, tiktoken, tokenizers, transformers and safetensors, and no
network. Exit status 1 if a row failed.
"""

import contextlib
import csv
import importlib.metadata
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lyregpt import threads  # noqa: E402, F401  before torch

# isort: split
import torch  # noqa: E402

import bench  # noqa: E402
from configurator import UserError, configure, run  # noqa: E402
from lyregpt import checkpoint  # noqa: E402
from lyregpt.dataset import write_dataset  # noqa: E402
from lyregpt.device import (  # noqa: E402
    can_compile,
    fast_bf16,
    matmul_ceiling,
    pick_device,
    pick_dtype,
)
from lyregpt.engine import Engine, Request  # noqa: E402
from lyregpt.measure import Table  # noqa: E402
from lyregpt.quantize import quantize_model  # noqa: E402
from lyregpt.text import split_text  # noqa: E402
from lyregpt.tokenizer import CharTokenizer, Tokenizer  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from train import TrainConfig, train  # noqa: E402

STEPS = 20
SMALL = (
    '--n_layer=2 --n_head=2 --n_embd=64 --block_size=64 '
    '--batch_size=8 --gradient_accumulation_steps=2 --learning_rate=3e-3 --warmup_iters=2 '
    f'--max_iters={STEPS} --lr_decay_iters={STEPS} --eval_interval={STEPS} --eval_iters=2 '
    '--log_interval=1 --report=False'
).split()
PACKAGES = ('numpy', 'tiktoken', 'tokenizers', 'transformers', 'safetensors', 'triton')


@dataclass
class CheckConfig:
    """The options; the comment behind each is its help. Raises ValueError for a bad one."""

    device: str = 'cuda'  # cuda, cuda:1, mps; cpu runs the same rows with small sizes
    minutes: float = 5  # rows for which no time is left are not run
    peer: str = ''  # a nanoGPT checkout, to train GPT-2's size beside it
    input: str = ''  # Tiny Shakespeare's text, unless data/shakespeare_char is prepared already
    rows: list[str] | None = None  # run only the rows whose names begin with one of these
    out_dir: str = 'out-gpu-check'  # table.txt, and log.txt with what the rows printed

    def __post_init__(self) -> None:
        if self.minutes <= 0:
            raise ValueError(f'minutes={self.minutes}: expected more than 0')


class NotHere(Exception):
    """The row cannot run on this machine; says why."""


class Failed(Exception):
    """The row ran, and its result is wrong; says how."""


@dataclass
class Check:
    """What the rows work with: the options, and a folder for data and runs that all rows share."""

    config: CheckConfig
    folder: str

    @property
    def device(self) -> torch.device:
        return pick_device(self.config.device)

    def losses(self, name: str, *options: str, device: str = '') -> list[float]:
        """The training loss of each step of a small model, in nats; `name` is the run's folder."""
        out_dir = os.path.join(self.folder, name)
        words = [
            *SMALL,
            f'--dataset={self.folder}/data',
            f'--out_dir={out_dir}',
            f'--device={device or self.config.device}',
            *options,
        ]
        train(configure(TrainConfig, words))
        if '--compile=True' in options:
            with open(os.path.join(out_dir, 'train.log'), encoding='utf-8') as f:
                machine = next(line for line in f if line.startswith('machine:'))
            if ', compiled' not in machine:
                raise Failed(f'it was not compiled: {machine.strip()}')
        with open(os.path.join(out_dir, 'metrics.csv'), encoding='utf-8') as f:
            return [float(row['train_loss']) for row in csv.DictReader(f) if row['train_loss']]

    def load(self, device: torch.device, quantize: str | None = None) -> tuple[GPT, Tokenizer]:
        """The model that the row `CPU reference` trained, in float32, and its tokenizer."""
        path, state = checkpoint.load_from(os.path.join(self.folder, 'reference'))
        model = checkpoint.build_model(state, path, dropout=0.0).to(device).eval()
        if quantize:
            quantize_model(model, quantize)
        return model, checkpoint.tokenizer_of(state)

    def reference(self) -> list[float]:
        """The losses of the row `CPU reference`. Raises NotHere if it did not come to its end."""
        try:
            with open(os.path.join(self.folder, 'reference.json'), encoding='utf-8') as f:
                return json.load(f)
        except FileNotFoundError:
            raise NotHere('there is no CPU reference to compare with') from None


# -----------------------------------------------------------------------------
# Correctness


def environment(check: Check) -> str:
    """Versions, the device, what it can do."""
    device = check.device
    versions = {'torch': str(torch.__version__)}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    facts = [
        f'Python {sys.version.split()[0]}',
        *(f'{name} {version}' for name, version in versions.items()),
    ]
    if device.type == 'cuda':
        about = torch.cuda.get_device_properties(device)
        facts += [
            f'CUDA {torch.version.cuda}',
            about.name,
            f'compute capability {about.major}.{about.minor}',
            f'{about.total_memory / 1e9:.0f} GB',
        ]
    facts.append('bfloat16 is fast' if fast_bf16(device) else 'bfloat16 is not fast')
    facts.append(f'cannot compile: {can_compile(device)}' if can_compile(device) else 'can compile')
    return ', '.join(facts)


def cpu_reference(check: Check) -> str:
    """Make the dataset, and train on the CPU in float32: what the other rows are compared with."""
    lines = (ROOT / 'data' / 'darklyrics' / 'demo.jsonl').read_text(encoding='utf-8').splitlines()
    text = '\n\n'.join(json.loads(line)['lyrics'] for line in lines[:50])
    write_dataset(
        os.path.join(check.folder, 'data'),
        split_text([text], len(text), 0.1),
        CharTokenizer.train([text]),
    )
    losses = check.losses('reference', '--dtype=float32', '--compile=False', device='cpu')
    if not losses[-1] < losses[0] - 0.2:
        raise Failed(f'the loss did not fall: {losses[0]:.3f}, then {losses[-1]:.3f}')
    with open(os.path.join(check.folder, 'reference.json'), 'w', encoding='utf-8') as f:
        json.dump(losses, f)
    return f'loss {losses[0]:.4f} at step 1, {losses[-1]:.4f} at step {STEPS}'


def training(check: Check, dtype: str, compiled: bool = False, parallel: str = 'ddp') -> str:
    """Train as the CPU reference did, and compare the losses of all steps."""
    expected, device = check.reference(), check.device
    if dtype == 'float16' and device.type != 'cuda':
        raise NotHere('float16 is trained on CUDA only')
    if parallel == 'fsdp' and device.type not in ('cpu', 'cuda'):
        raise NotHere('FSDP2 works on cpu and cuda')
    if compiled and can_compile(device):
        raise NotHere(can_compile(device))
    allowed = (
        0.02 if dtype == 'float32' else 0.05
    )  # TF32 and bfloat16 round at every product, and steps add up
    options = (f'--dtype={dtype}', f'--compile={compiled}', f'--parallel={parallel}')
    losses = check.losses(''.join(options), *options)
    worst = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    said = f'loss {losses[-1]:.4f}; off by {worst:.4f} at most ({allowed} allowed)'
    if not worst <= allowed:
        raise Failed(said)
    return said


def exact_resume(check: Check) -> str:
    """With deterministic kernels, a stopped and resumed run ends exactly as an unbroken one.

    Compares all weights and optimizer states.
    """
    options = ('--compile=False', '--dropout=0.1', '--dtype=auto')
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            check.losses('whole', *options)
            check.losses('parts', *options, f'--max_iters={STEPS // 2}')
            check.losses('parts', *options, '--init_from=resume')
    finally:
        torch.use_deterministic_algorithms(False)
    whole, parts = (
        flat(checkpoint.load(os.path.join(check.folder, name, 'ckpt.pt'), optimizer=True))
        for name in ('whole', 'parts')
    )
    different = [name for name in whole if not torch.equal(whole[name], parts[name])]
    unsure = sorted(
        {str(w.message).splitlines()[0][:60] for w in caught if 'deterministic' in str(w.message)}
    )
    said = f'{len(whole) - len(different)} of {len(whole)} tensors equal' + (
        f'; not deterministic: {"; ".join(unsure)}' if unsure else ''
    )
    if different:
        raise Failed(f'{said}; different: {", ".join(different[:3])}')
    return said


def flat(state: Any, name: str = '') -> dict[str, torch.Tensor]:
    """All tensors in nested dictionaries and lists, by their paths."""
    if torch.is_tensor(state):
        return {name: state}
    items = (
        state.items()
        if isinstance(state, dict)
        else enumerate(state)
        if isinstance(state, list)
        else ()
    )
    return {k: v for key, value in items for k, v in flat(value, f'{name}.{key}').items()}


def generate(check: Check, compiled: bool = False, quantize: str | None = None) -> str:
    """Compare greedy and sampled tokens, and logits over the CPU's text, with the CPU's in float32.

    With int8 only the logits must agree, loosely.
    """
    check.reference()
    if quantize and check.device.type not in ('cpu', 'cuda'):
        raise NotHere('int8 works on cpu and cuda')
    if compiled and can_compile(check.device):
        raise NotHere(can_compile(check.device))
    torch.set_float32_matmul_precision('highest')
    here, _ = check.load(check.device, quantize)
    there, _ = check.load(torch.device('cpu'))
    prompts, equal, total = [[1, 2, 3], [4], [5, 6]], 0, 0
    for temperature in (0.0, 0.8):
        options: dict[str, Any] = dict(temperature=temperature, top_k=20, seed=7)
        mine = torch.stack(list(here.generate(prompts, 60, compile=compiled, **options))).cpu()
        theirs = torch.stack(list(there.generate(prompts, 60, **options)))
        equal, total = equal + int((mine == theirs).sum()), total + theirs.numel()
    with torch.inference_mode():
        expected = there(theirs.t())
        error = float(
            (here(theirs.t().to(check.device)).cpu().float() - expected).norm() / expected.norm()
        )
    said = f"{equal} of {total} tokens are the CPU's, logits off by {error:.1e}"
    if error > (0.05 if quantize else 1e-4) or not quantize and equal < total:
        raise Failed(said)
    return said


def batch_invariance(check: Check) -> str:
    """What the server's engine generates for a seeded request does not depend on other requests.

    The weights are random: they change no rounding.
    """
    check.reference()
    _, tokenizer = check.load(torch.device('cpu'))
    dtype = pick_dtype('auto', check.device)
    torch.manual_seed(1)
    shape = GPTConfig(
        n_layer=2, n_head=2, n_embd=64, block_size=256, vocab_size=tokenizer.vocab_size
    )  # a context of several key blocks
    # as lyregpt/serve.py has it: with packed weights on a CPU
    model = quantize_model(GPT(shape).to(check.device, dtype).eval())

    def generated(number: int, rows: list[Request]) -> list[list[int]]:
        done: set[int] = set()
        engine = Engine(
            model,
            tokenizer,
            lambda events: done.update(id(row) for row, piece in events if piece.finish),
            max_batch=8,
        )
        engine.submit(rows)
        with torch.inference_mode():
            while len(done) < number:
                engine.work()
        return [row.generated for row in rows]

    def request(i: int) -> Request:
        return Request(
            [1 + i % 5] * (1 + 15 * i), max_tokens=40 + i, temperature=(0.0, 1.0)[i % 2], seed=i
        )

    together = generated(12, [request(i) for i in range(12)])
    alone = [generated(1, [request(i)])[0] for i in range(12)]
    same = sum(a == b for a, b in zip(together, alone))
    name = str(dtype).removeprefix('torch.')
    said = f'{same} of 12 requests get the same answer alone and beside others, in {name}'
    if same < 12:
        raise Failed(said)
    return said


# -----------------------------------------------------------------------------
# Speed


def figures(check: Check, config: bench.BenchConfig) -> dict[str, dict[str, float]]:
    """What a mode of bench.py found, by the last word of the name and by side (ours, peer)."""
    table = Table(lambda: matmul_ceiling(check.device, torch.float32), config.rounds)
    try:
        bench.MODES[config.mode](table, config)
    except UserError:
        if not any(name.endswith('tokens_per_s') for name in table.figures):
            raise
        traceback.print_exc()  # the peer failed: ours are worth showing
    table.show()
    return {
        name.split()[-1]: {side: statistics.median(values) for side, values in sides.items()}
        for name, sides in table.figures.items()
    }


def measured(check: Check, **options: Any) -> bench.BenchConfig:
    """bench.py's options for one round: GPT-2's size on a GPU, nanoGPT's small one on a CPU."""
    small: dict[str, Any] = {'size': 'small', 'batch': 1} if check.device.type == 'cpu' else {}
    return bench.BenchConfig(rounds=1, device=str(check.device), **small, **options)


def size_name(check: Check) -> str:
    """The model that speed is measured with."""
    return '0.8M parameters' if check.device.type == 'cpu' else 'GPT-2 124M'


def training_speed(check: Check) -> str:
    """Tokens a second, share of the measured peak, and memory, beside nanoGPT if it is there."""
    peer = os.path.abspath(check.config.peer) if check.config.peer else ''
    found = figures(check, measured(check, mode='train', peer=peer))
    speed, share = found['tokens_per_s']['ours'], found['share_of_ceiling']['ours']
    said = f'{speed:,.0f} tokens/s, {100 * share:.0f}% of the measured peak, '
    said += f'{found["memory_mb"]["ours"]:,.0f} MB'
    if 'peer' in found['tokens_per_s']:
        peer = found['tokens_per_s']['peer']
        said += f'; nanoGPT {peer:,.0f} tokens/s, a ratio of {speed / peer:.2f}'
    elif check.config.peer:
        said += '; nanoGPT failed: see the log'
    return f'{size_name(check)}: {said}'


def time_to_loss(check: Check) -> str:
    """Seconds to nanoGPT's loss on Tiny Shakespeare, first and again with compiled code cached."""
    prepared = (ROOT / 'data' / 'shakespeare_char' / 'train.bin').is_file()
    if not prepared and not check.config.input:
        raise NotHere(
            'data/shakespeare_char is not prepared: prepare it, or give the text with --input'
        )
    config = measured(check, mode='loss', input='' if prepared else check.config.input)
    found = {name: sides['ours'] for name, sides in figures(check, config).items()}
    target = 1.4697 if check.device.type == 'cuda' else 1.88
    said = f'{found["train_s"]:.1f} s of training to {found["val_loss"]:.4f} '
    said += f'(whole command {found["wall_s"]:.0f} s, again {found["warm_wall_s"]:.0f} s)'
    if found['val_loss'] > target:
        raise Failed(f'{said}: expected {target}')
    return said


def decoding_speed(check: Check, compiled: bool = False, quantize: Any = None) -> str:
    """One text at a time: tokens a second, and weights read as a share of memory bandwidth."""
    if compiled and (check.device.type != 'cuda' or can_compile(check.device)):
        raise NotHere(
            can_compile(check.device)
            if check.device.type == 'cuda'
            else 'generation is compiled on CUDA only'
        )
    config = measured(check, mode='sample', compile=compiled, quantize=quantize, tokens=200)
    found = {name: sides['ours'] for name, sides in figures(check, config).items()}
    speed, share = found['tokens_per_s'], found['share_of_bandwidth']
    return f'{size_name(check)}: {speed:,.0f} tokens/s, {100 * share:.0f}% of the memory bandwidth'


Work = Callable[[Check], str]
# Name, work, and the seconds that it may take. Another process finds the work by its name.
ROWS: list[tuple[str, Work, float]] = [
    ('environment', environment, 60),
    ('CPU reference', cpu_reference, 60),
    ('train float32 eager', partial(training, dtype='float32'), 60),
    ('train bfloat16 eager', partial(training, dtype='bfloat16'), 60),
    ('train float16 eager', partial(training, dtype='float16'), 60),
    ('train float32 compiled', partial(training, dtype='float32', compiled=True), 120),
    ('train bfloat16 compiled', partial(training, dtype='bfloat16', compiled=True), 120),
    ('train float16 compiled', partial(training, dtype='float16', compiled=True), 120),
    ('resume byte for byte', exact_resume, 60),
    ('generate eager', generate, 60),
    ('generate compiled', partial(generate, compiled=True), 120),
    ('generate int8', partial(generate, quantize='int8'), 60),
    ('server: batch invariance', batch_invariance, 60),
    ('FSDP2 on one device', partial(training, dtype='float32', parallel='fsdp'), 60),
    ('speed: training', training_speed, 240),
    ('speed: Tiny Shakespeare', time_to_loss, 150),
    ('speed: decoding compiled', partial(decoding_speed, compiled=True), 120),
    ('speed: decoding eager', decoding_speed, 60),
    ('speed: decoding compiled int8', partial(decoding_speed, compiled=True, quantize='int8'), 120),
]


# -----------------------------------------------------------------------------
# Running the rows


def work(connection: Connection, check: Check, log: str) -> None:
    """The child process: gets rows' names and work, sends back status and text.

    What rows print goes into the log.
    """
    if hasattr(os, 'setsid'):  # not on Windows
        os.setsid()  # the processes that a row starts are ended with this one
    parent = os.getppid()

    def watch() -> None:
        """End this process and its children once its parent is gone: a row may hang."""
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(0, signal.SIGKILL)

    if hasattr(os, 'killpg'):
        threading.Thread(target=watch, daemon=True).start()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    while True:
        name, row = connection.recv()
        if row is None:
            return
        print(f'\n=== {name}', flush=True)
        try:
            answer = 'ok', row(check)
        except NotHere as reason:
            answer = 'not here', str(reason)
        except Failed as result:
            answer = 'FAIL', str(result)
        except BaseException as error:  # whatever it is, it is this row's result
            traceback.print_exc()
            message = str(error).strip() or 'no message'
            answer = 'ERROR', f'{type(error).__name__}: {message.splitlines()[0][:200]}'
        connection.send(answer)


class Worker:
    """Runs rows in another process, which is replaced after one that broke it or took too long."""

    def __init__(self, check: Check, log: str) -> None:
        self.check, self.log = check, log
        self.process: Any = None

    def run(self, name: str, row: Work, seconds: float) -> tuple[str, str]:
        """Status and text of a row that may take so many seconds."""
        if self.process is None:
            context = multiprocessing.get_context('spawn')
            self.connection, theirs = context.Pipe()
            self.process = context.Process(
                target=work, args=(theirs, self.check, self.log), daemon=False
            )
            self.process.start()
            theirs.close()
        try:
            self.connection.send((name, row))
            if self.connection.poll(seconds):
                answer = self.connection.recv()
            else:
                answer = 'TIMEOUT', f'took more than {seconds:.0f} s'
        except (EOFError, OSError):
            self.process.join(10)
            answer = 'CRASH', f'the process ended with exit status {self.process.exitcode}'
        if answer[0] in (
            'ERROR',
            'TIMEOUT',
            'CRASH',
        ):  # after some errors of CUDA nothing works in a process any more
            self.kill()
        return answer

    def kill(self) -> None:
        """End the process, and those that it started."""
        if hasattr(os, 'killpg'):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.process = None

    def close(self) -> None:
        """Let the process end."""
        if self.process is not None:
            with contextlib.suppress(OSError):
                self.connection.send(('', None))
            self.process.join(5)
            self.kill()


def main() -> None:
    """Run the rows, and print a line for each."""
    config = configure(
        CheckConfig,
        description='Check training, resuming and generation on a GPU, and measure speed.',
    )
    try:
        device = pick_device(config.device)
    except ValueError as error:
        raise UserError(str(error)) from None
    wanted = (
        None if config.rows is None else (*config.rows, 'CPU reference')
    )  # which the others compare with
    chosen = [row for row in ROWS if wanted is None or row[0].startswith(wanted)]
    if config.rows and not any(row[0].startswith(tuple(config.rows)) for row in ROWS):
        names = ', '.join(row[0] for row in ROWS)
        raise UserError(f'rows={",".join(config.rows)}: no such row; the rows: {names}')
    if config.peer and not os.path.isfile(os.path.join(config.peer, 'train.py')):
        raise UserError(f'peer={config.peer}: not a nanoGPT checkout (it has no train.py)')
    for number in (
        getattr(signal, name) for name in ('SIGTERM', 'SIGHUP') if hasattr(signal, name)
    ):
        signal.signal(
            number, lambda number, frame: sys.exit(128 + number)
        )  # the worker is ended, too
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS is deterministic with it
    sys.warnoptions.append(
        'ignore:resource_tracker:UserWarning'
    )  # a process that is killed cleans nothing up, as expected
    os.makedirs(config.out_dir, exist_ok=True)
    table_path, log = (os.path.join(config.out_dir, name) for name in ('table.txt', 'log.txt'))
    for path in (table_path, log):
        open(path, 'w', encoding='utf-8').close()
    started = time.monotonic()
    counts: dict[str, int] = {}

    def say(line: str) -> None:
        print(line, flush=True)
        with open(table_path, 'a', encoding='utf-8') as f:
            f.write(line + '\n')

    say(f'{"row":<30}{"result":<9}{"seconds":>8}  on {device}')
    with tempfile.TemporaryDirectory(prefix='lyregpt-', ignore_cleanup_errors=True) as folder:
        worker = Worker(Check(config, folder), log)
        try:
            for name, row, limit in chosen:
                began = time.monotonic()
                left = started + 60 * config.minutes - began
                if left < 5:
                    status, text = 'not run', f'the {config.minutes:g} minutes are over'
                else:
                    status, text = worker.run(name, row, min(limit, left))
                    if status == 'TIMEOUT' and left < limit:
                        status, text = (
                            'not run',
                            f'the {config.minutes:g} minutes ended while it ran',
                        )
                counts[status] = counts.get(status, 0) + 1
                say(f'{name:<30}{status:<9}{time.monotonic() - began:>8.1f}  {text}')
        finally:
            worker.close()
    summary = ', '.join(f'{number} {status}' for status, number in counts.items())
    say(f'{summary} in {time.monotonic() - started:.0f} s; details: {log}')
    if counts.keys() & {'FAIL', 'ERROR', 'TIMEOUT', 'CRASH'}:
        sys.exit(1)


if __name__ == '__main__':
    run(main)
