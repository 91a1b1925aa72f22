"""Is this installation sound? Half a minute at most, on CUDA up to a minute more, to compile. It needs no dataset and no network;
all it writes goes into a temporary folder that it removes.

    python -m lyregpt doctor
    python -m lyregpt doctor --device=cuda

A line for each check: ok, note (works, but look), or FAIL with what to do. Exit status 1 if anything FAILs.
"""

import contextlib
import csv
import importlib
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if sys.version_info < (3, 10):  # noqa: UP036  the scripts below could not even be read
    sys.exit(
        f'FAIL  python     {platform.python_version()} is too old: install Python 3.10 or later'
    )
sys.dont_write_bytecode = True  # beside the scripts nothing is left either
from configurator import UserError, configure, run  # noqa: E402  nothing here may need a package before that is checked

HERE = Path(__file__).resolve().parent.parent
SCRIPTS = 'train sample bench lyregpt.serve lyregpt.repl lyregpt.export lyregpt.originality lyregpt.report lyregpt.api scrapers.darklyrics_scraper scrapers.build_dataset'.split()
INSTALL = 'pip install -r requirements.txt'


@dataclass
class QuickConfig:
    """The knobs; the comment behind each is its help."""

    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = (
        'auto'  # of training and writing, as in train.py
    )


class Note(Exception):
    """It works, but somebody may want to know this."""


class Fail(Exception):
    """It does not work: why, and what to do."""


def python() -> str:
    """The version, and on what."""
    return f'{platform.python_version()}, {platform.system()} {platform.machine()}'


def packages() -> str:
    """What requirements.txt names: all there? in the versions that the project is tested with?"""
    missing, others, n = [], [], 0
    for line in (HERE / 'requirements.txt').read_text(encoding='utf-8').splitlines():
        name, version, sign, minor = re.match(
            r'([\w-]+)==([\w.]+)(?:; python_version (>=|<) "3\.(\d+)")?', line
        ).groups()  # type: ignore[union-attr]
        if sign and (sys.version_info >= (3, int(minor))) != (sign == '>='):
            continue
        n += 1
        try:
            found = importlib.metadata.version(name)
            if found.partition('+')[0] != version:  # +cpu, +cu130: a build of the same version
                others.append(f'{name} {found} (tested with {version})')
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise Fail(f'not installed: {", ".join(missing)}. {INSTALL}')
    if others:
        raise Note(f'{", ".join(others)}; if something fails: {INSTALL}')
    return f'{n}, all as in requirements.txt'


def scripts() -> str:
    """Import each script, and with it all that it needs."""
    for name in SCRIPTS:
        try:
            importlib.import_module(name)
        except Exception as error:  # a damaged library raises what it likes
            missing = (
                f' {error.name}: not installed, or damaged.'
                if isinstance(error, ImportError) and error.name
                else ''
            )
            raise Fail(
                f'{name.replace(".", "/")}.py cannot start: {first_line(error)}.{missing} {INSTALL}'
            ) from None
    return ', '.join(name.rpartition('.')[2] for name in SCRIPTS)


def disk() -> str:
    """Can runs write where they write by default?"""
    free = shutil.disk_usage('.').free / 1e9
    if not os.access('.', os.W_OK):
        raise Fail(
            f'{os.getcwd()} cannot be written: go to a folder of yours, or give each script an --out_dir'
        )
    if free < 1:
        raise Note(f"{free:.1f} GB free in {os.getcwd()}: a large model's checkpoints need more")
    return f'{free:,.0f} GB free in {os.getcwd()}'


def device(config: QuickConfig) -> str:
    """What is computed on. Raises UserError for a device that is not there."""
    import torch

    from lyregpt.device import pick_device, pick_dtype

    try:
        where = pick_device(config.device)
        numbers = [
            str(pick_dtype(config.dtype, where, large)).removeprefix('torch.')
            for large in (True, False)
        ]
    except ValueError as error:
        raise UserError(str(error)) from None
    name = (
        torch.cuda.get_device_name(where)
        if where.type == 'cuda'
        else f'{torch.get_num_threads()} threads'
        if where.type == 'cpu'
        else 'Apple'
    )
    return f'{where.type} ({name}), {" for large models, for small ones ".join(dict.fromkeys(numbers))}'


def products(config: QuickConfig) -> str:
    """A matrix product: right, and how fast?"""
    import torch

    from lyregpt.device import matmul_ceiling, pick_device, pick_dtype

    where = pick_device(config.device)
    dtype = pick_dtype(config.dtype, where)
    a, b = (
        torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)).to(dtype)
        for seed in (1, 2)
    )
    exact, got = a.double() @ b.double(), (a.to(where) @ b.to(where)).cpu().double()
    wrong = float((got - exact).abs().max() / exact.abs().max())
    if not wrong < 0.01:
        raise Fail(
            f'a matrix product on {where} is wrong by {wrong:.0%}: PyTorch {torch.__version__} does not fit the machine or driver; try --device=cpu'
        )
    return f'right; {matmul_ceiling(where, dtype) / 1e12:.2f} TFLOP/s in {str(dtype).removeprefix("torch.")}'


COMPILES = """
import torch
x = torch.arange(8.0, device={device!r})
assert torch.equal(torch.compile(lambda x: x * 2 + 1)(x), x * 2 + 1)
"""


def compiling(config: QuickConfig) -> str:
    """torch.compile, which is on by itself on CUDA alone: a small function there, in a process that a time limit can end."""
    from lyregpt.device import can_compile, pick_device

    where = pick_device(config.device)
    if where.type != 'cuda':
        return f'not needed on {where.type}, where it is off by default'
    why = can_compile(where)
    if why:
        raise Note(f'{why}: training runs without torch.compile, more slowly')
    try:
        done = subprocess.run(
            [sys.executable, '-c', COMPILES.format(device=str(where))],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except subprocess.TimeoutExpired:
        raise Note('a small function took over a minute: train with --compile=False') from None
    if done.returncode:
        raise Note(
            f'does not work ({(done.stderr.strip().splitlines() or ["no reason given"])[-1][:200]}): training runs without it, more slowly'
        )
    return 'works'


def training(config: QuickConfig, folder: str) -> str:
    """A few steps on some of the embedded songs: does it learn?"""
    learn(config, f'{folder}/whole', max_iters=20)
    with open(f'{folder}/whole/metrics.csv', encoding='utf-8') as f:
        losses = [float(row['train_loss']) for row in csv.DictReader(f) if row['train_loss']]
    if not losses[-1] < losses[0] - 0.2:
        raise Fail(
            f'the loss did not fall: {losses[0]:.3f} after 5 steps, {losses[-1]:.3f} after 20; try --device=cpu, or --dtype=float32'
        )
    return f'loss {losses[0]:.2f} after 5 steps, {losses[-1]:.2f} after 20'


def resuming(config: QuickConfig, folder: str) -> str:
    """The same run stopped halfway and resumed: the same weights?"""
    import torch

    from lyregpt import checkpoint

    learn(config, f'{folder}/parts', max_iters=10)
    learn(config, f'{folder}/parts', max_iters=20, init_from='resume')
    whole, parts = (
        checkpoint.load(f'{folder}/{run}/ckpt.pt')['model'] for run in ('whole', 'parts')
    )
    apart = max(float((whole[name] - parts[name]).abs().max()) for name in whole)
    if all(torch.equal(whole[name], parts[name]) for name in whole):
        return 'stopped at step 10 and resumed: the same weights to the last bit'
    if (
        whole['transformer.wte.weight'].is_floating_point()
        and apart < 0.05
        and not device(config).startswith('cpu')
    ):
        raise Note(
            f'stopped at step 10 and resumed: weights differ by {apart:.1e} at most; on a CPU they would not at all'
        )
    raise Fail(
        f'stopped at step 10 and resumed: weights differ by {apart:.1e}, and should not at all; is the disk or the memory sound?'
    )


def writing(config: QuickConfig, folder: str) -> str:
    """A text by the model just trained, twice with the same seed."""
    import lyregpt

    model = lyregpt.load(f'{folder}/whole', device=config.device, dtype=config.dtype)
    first, second = (model.generate('The ', max_new_tokens=60, seed=1) for _ in range(2))
    if first != second or len(first) <= len('The '):
        raise Fail(f'the same seed should write the same text; it wrote {first!r} and {second!r}')
    return f'{first[:60]!r} … (sense takes longer)'


def learn(config: QuickConfig, out_dir: str, **knobs: Any) -> Any:
    """Train a small model on forty of the embedded songs."""
    import lyregpt

    lines = (HERE / 'data' / 'darklyrics' / 'demo.jsonl').read_text(encoding='utf-8').splitlines()
    texts = [json.loads(line)['lyrics'] for line in lines[:40]]
    steps = {'lr_decay_iters': 20, 'warmup_iters': 2, 'eval_interval': 10, 'log_interval': 5}
    return lyregpt.train(
        texts,
        out_dir,
        device=config.device,
        dtype=config.dtype,
        compile=False,
        report=False,
        **steps | knobs,
    )


def first_line(error: BaseException) -> str:
    """What the error says first."""
    return next(iter(str(error).strip().splitlines()), '') or type(error).__name__


def main() -> None:
    """Check one thing after another."""
    config = configure(QuickConfig, description='Is this installation sound?')
    started, counts = time.perf_counter(), {'ok': 0, 'note': 0, 'FAIL': 0}
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')

    with tempfile.TemporaryDirectory(prefix='lyregpt-', ignore_cleanup_errors=True) as folder:
        os.environ |= {
            'TORCHINDUCTOR_CACHE_DIR': folder,
            'TRITON_CACHE_DIR': folder,
        }  # importing them is enough to have folders made
        checks: list[tuple[str, Callable[[], str]]] = [
            ('python', python),
            ('packages', packages),
            ('disk', disk),
            ('scripts', scripts),
            ('device', lambda: device(config)),
            ('products', lambda: products(config)),
            ('compiling', lambda: compiling(config)),
            ('training', lambda: training(config, folder)),
            ('resuming', lambda: resuming(config, folder)),
            ('writing', lambda: writing(config, folder)),
        ]
        for name, check in checks:
            try:
                with (
                    contextlib.redirect_stdout(io.StringIO()),
                    contextlib.redirect_stderr(io.StringIO()),
                ):
                    status, text = 'ok', check()
            except (Note, Fail) as outcome:
                status, text = 'note' if isinstance(outcome, Note) else 'FAIL', str(outcome)
            except Exception as error:
                if name == 'device' and isinstance(error, UserError):
                    raise
                status, text = (
                    'FAIL',
                    f'{type(error).__name__}: {first_line(error)}. Try --device=cpu, and {INSTALL}',
                )
            counts[status] += 1
            print(f'{status:<5} {name:<10} {text}', flush=True)
            if status == 'FAIL' and name == 'scripts':
                break  # nothing else could start
    tried, seconds = sum(counts.values()), time.perf_counter() - started
    if counts['FAIL']:
        print(
            f'{counts["FAIL"]} of {tried} checks FAILed in {seconds:.0f} s'
            + f', {len(checks) - tried} could not be tried' * (tried < len(checks))
        )
        sys.exit(1)
    notes = f', {counts["note"]} with a note' if counts['note'] else ''
    print(f'sound: {tried} checks in {seconds:.0f} s{notes}; try: make demo')


if __name__ == '__main__':
    run(main)
