"""Check the installation: packages, device, a short training, an exact resume, generating.

    python -m lyregpt doctor
    python -m lyregpt doctor --device=cuda

Prints one line per check: ok, note (works, but may matter to you), or FAIL with what to do. Exits
with status 1 if a check FAILs. Takes half a minute, on CUDA up to a minute more to compile. Needs
no dataset and no network, and leaves nothing behind.
"""

import contextlib
import importlib
import io
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import lyregpt  # loads PyTorch on first use, after `packages` and `imports` have looked for it
from configurator import UserError, configure

MODULES = (
    'train sample bench lyregpt.serve lyregpt.repl lyregpt.export lyregpt.originality'
    ' lyregpt.report lyregpt.api scrapers.darklyrics_scraper scrapers.build_dataset'
).split()
INSTALL = 'pip install -r requirements.txt'


@dataclass
class DoctorConfig:
    """The options."""

    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = (
        'auto'  # for training and generating, as in train.py
    )


# Each check takes the options and a temporary folder, and returns its status and a line of text.


def packages(config: DoctorConfig, folder: str) -> tuple[str, str]:
    """Python, and the packages in requirements.txt, which may list several versions of one."""
    text = Path(lyregpt.ROOT, 'requirements.txt').read_text(encoding='utf-8')
    tested = re.findall(r'^([\w-]+)==([\w.]+)', text, re.MULTILINE)
    installed = {}
    for name, _ in tested:
        with contextlib.suppress(metadata.PackageNotFoundError):
            # +cpu and +cu130 are builds of the same version.
            installed[name] = metadata.version(name).partition('+')[0]
    missing = dict(tested).keys() - installed.keys()
    if missing:
        return 'FAIL', f'not installed: {", ".join(sorted(missing))}. {INSTALL}'
    others = [f'{name} {found}' for name, found in installed.items() if (name, found) not in tested]
    if others:
        return 'note', f'not the tested version: {", ".join(others)}; if something fails: {INSTALL}'
    return 'ok', f'Python {platform.python_version()}, and all {len(installed)} packages'


def disk(config: DoctorConfig, folder: str) -> tuple[str, str]:
    """Whether out_dir can be created in the current directory."""
    if not os.access('.', os.W_OK):
        return 'FAIL', f'{os.getcwd()} is not writable: use another directory, or set --out_dir'
    return 'ok', f'{shutil.disk_usage(".").free / 1e9:,.0f} GB free in {os.getcwd()}'


def imports(config: DoctorConfig, folder: str) -> tuple[str, str]:
    """Whether each script can be imported, with all that it needs."""
    for name in MODULES:
        importlib.import_module(name)
    return 'ok', ', '.join(MODULES)


def device(config: DoctorConfig, folder: str) -> tuple[str, str]:
    """The device, a matrix product on it, and on CUDA torch.compile.

    Raises UserError for a device that is not available.
    """
    import torch

    from lyregpt.device import can_compile, matmul_ceiling, pick_device, pick_dtype

    try:
        where = pick_device(config.device)
        dtype = pick_dtype(config.dtype, where)
    except ValueError as error:
        raise UserError(str(error)) from None
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = a.double() @ b.double()
    wrong = float(((a.to(where) @ b.to(where)).cpu() - exact).abs().max() / exact.abs().max())
    text = f'{where}, {matmul_ceiling(where, dtype) / 1e12:.2f} TFLOP/s in {dtype}'
    if not wrong < 0.01:
        return 'FAIL', f'{text}, but a matrix product is wrong by {wrong:.0%}; try --device=cpu'
    if where.type == 'cuda':
        reason = can_compile(where)
        if reason:
            return 'note', f'{text}, but without torch.compile: {reason}'
        torch.compile(torch.sin)(a.to(where))
    return 'ok', text


def training(config: DoctorConfig, folder: str) -> tuple[str, str]:
    """Whether a few steps on some of the embedded songs lower the loss."""
    model = train(config, f'{folder}/whole', max_iters=20)
    before = math.log(model.tokenizer.vocab_size)
    after = model.loss('The night is dark and cold').nats_per_token
    if not after < before - 0.2:
        return 'FAIL', f'the loss did not fall: {before:.3f} to {after:.3f}; try --device=cpu'
    return 'ok', f'loss {before:.2f} before, {after:.2f} after 20 steps'


def resuming(config: DoctorConfig, folder: str) -> tuple[str, str]:
    """Whether the same run, stopped halfway and resumed, ends with the same weights."""
    from lyregpt import checkpoint
    from lyregpt.device import pick_device

    train(config, f'{folder}/parts', max_iters=10)
    train(config, f'{folder}/parts', max_iters=20, init_from='resume')
    whole = checkpoint.load(f'{folder}/whole/ckpt.pt')['model']
    parts = checkpoint.load(f'{folder}/parts/ckpt.pt')['model']
    difference = max(float((whole[name] - parts[name]).abs().max()) for name in whole)
    # Other devices than a CPU may add in another order.
    allowed = {'cpu': 0}.get(pick_device(config.device).type, 0.05)
    if difference > allowed:
        return 'FAIL', f'weights differ by up to {difference:.1e}; check the disk and the memory'
    return 'ok', f'stopped at step 10 and resumed: weights differ by at most {difference:.1g}'


def generating(config: DoctorConfig, folder: str) -> tuple[str, str]:
    """Whether the trained model generates the same text twice with the same seed."""
    model = lyregpt.load(f'{folder}/whole', device=config.device, dtype=config.dtype)
    first, second = (model.generate('The ', max_new_tokens=60, seed=1) for _ in range(2))
    if first != second or len(first) <= len('The '):
        return 'FAIL', f'the same seed did not generate the same text: {first!r} and {second!r}'
    return 'ok', f'{first[:60]!r} … (20 steps are too few for sense)'


def train(config: DoctorConfig, out_dir: str, **options: Any) -> Any:
    """Train a small model on forty of the embedded songs."""
    demo = Path(lyregpt.ROOT, 'data', 'darklyrics', 'demo.jsonl').read_text(encoding='utf-8')
    return lyregpt.train(
        [json.loads(line)['lyrics'] for line in demo.splitlines()[:40]],
        out_dir,
        device=config.device,
        dtype=config.dtype,
        compile=False,
        report=False,
        lr_decay_iters=20,
        warmup_iters=2,
        eval_interval=10,
        **options,
    )


def main() -> None:
    """Run the checks, one after another."""
    config = configure(DoctorConfig, description='Check the installation.')
    statuses = []
    with tempfile.TemporaryDirectory(prefix='lyregpt-', ignore_cleanup_errors=True) as folder:
        # Importing PyTorch's compilers is enough to create their folders.
        os.environ |= {'TORCHINDUCTOR_CACHE_DIR': folder, 'TRITON_CACHE_DIR': folder}
        for check in (packages, disk, imports, device, training, resuming, generating):
            try:
                with (
                    contextlib.redirect_stdout(io.StringIO()),
                    contextlib.redirect_stderr(io.StringIO()),
                ):
                    status, text = check(config, folder)
            except UserError:
                raise
            except Exception as error:  # a damaged package may raise anything
                text = f'{type(error).__name__}: {error}'.partition('\n')[0]
                status, text = 'FAIL', f'{text}. {INSTALL}, or try --device=cpu'
            statuses.append(status)
            print(f'{status:<5} {check.__name__:<10} {text}', flush=True)
            if check is imports and status == 'FAIL':
                break  # the other checks need all of them
    print(', '.join(f'{statuses.count(status)} {status}' for status in ('ok', 'note', 'FAIL')))
    sys.exit(int('FAIL' in statuses))
