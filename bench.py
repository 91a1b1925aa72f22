"""Measure: training and sampling speed, time to a loss, start-up, memory; beside a nanoGPT checkout if you have one.

    python bench.py                                        (a short round of everything on this machine)
    python bench.py --mode=loss --peer=../nanoGPT --input=shakespeare.txt
    python bench.py --mode=sample --peer=../nanoGPT --rounds=5

Every figure comes from a process of its own. With --peer, ours and theirs run in turn (A B A B …) and the table gives
medians, the range, and the ratio pair by pair: on a noisy machine the ratios hold where the seconds do not.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from configurator import UserError, configure, run

HERE = os.path.dirname(os.path.abspath(__file__))
CPU_SIZE = [
    '--n_layer=4',
    '--n_head=4',
    '--n_embd=128',
    '--block_size=64',
    '--batch_size=12',
    '--dropout=0.0',
]  # nanoGPT's README, for a CPU


@dataclass
class BenchConfig:
    mode: Literal['all', 'train', 'sample', 'loss', 'start'] = 'all'  # loss: seconds to a validation loss; start: import to the first step
    peer: str = ''  # a nanoGPT checkout to measure beside
    rounds: int = 3  # times that each side runs
    input: str = ''  # for loss: Tiny Shakespeare's text, if it is not prepared or cannot be downloaded
    target: float = 1.88  # for loss: the validation loss over the whole split
    tokens: int = 300  # for sample: new tokens
    batch: int = 1  # for sample: samples at once
    size: Literal['small', 'gpt2'] = 'gpt2'  # for sample: 2M or GPT-2's 124M parameters, random ones: their values do not change the speed
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # for sample: ours; auto as in sample.py. nanoGPT knows float32 only on a CPU
    device: str = 'auto'  # auto, cpu, cuda, mps
    json: str = ''  # write the figures to this file too

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f'rounds={self.rounds}: expected at least 1')


def child(code: str, cwd: str = HERE, **values: Any) -> dict[str, float]:
    """Run Python code in a process of its own; it prints one JSON object last. Adds wall seconds and peak memory in MB."""
    values |= {'HERE': HERE, 'started': time.time()}
    tail = """
memory = 0.0
try:
    import resource
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == 'darwin' else 1e3)
except ImportError:
    pass  # Windows has no such figure
if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
    memory = torch.cuda.max_memory_allocated() / 1e6
print('\\n' + json.dumps(result | {'memory_mb': round(memory)}))
"""
    before = ''.join(f'{name} = {value!r}\n' for name, value in values.items())
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, '-c', f'import json, sys, time\nsys.path.insert(0, {cwd!r})\n{before}{code}{tail}'],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(
            f'a measured process failed: {(done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1][:300]}'
        )
    return json.loads(done.stdout.strip().splitlines()[-1]) | {'wall_s': time.perf_counter() - began}


OURS_TRAIN = """
import csv, os, statistics, tempfile
from configurator import configure
from train import TrainConfig, torch, train
with tempfile.TemporaryDirectory() as out:
    end = train(configure(TrainConfig, words + ['--out_dir=' + out]))
    with open(os.path.join(out, 'metrics.csv')) as f:
        rows = [r for r in csv.DictReader(f) if r['tokens_per_second']]
result = {'train_s': end['train_seconds'], 'val_loss': end['val_loss'], 'tokens_per_s': statistics.median(float(r['tokens_per_second']) for r in rows),
          'share_of_ceiling': statistics.median(float(r['mfu']) for r in rows),
          'first_step_s': end['first_step_at'] - started}
"""

OURS_SAMPLE = """
import sample, torch
from model import GPT, GPTConfig, pick_device
torch.manual_seed(1337)
device = pick_device(device)
model = GPT(GPTConfig(**shape)).to(device).eval()
if dtype != 'float32':
    model.to(getattr(torch, dtype))
options = dict(temperature=0.8, top_k=200)
list(model.generate([prompt] * batch, 8, **options))
t = time.perf_counter()
written = [x.tolist() for x in model.generate([prompt] * batch, tokens, **options)]
result = {'tokens_per_s': batch * len(written) / (time.perf_counter() - t)}
"""

PEER_SAMPLE = """
import torch
from model import GPT, GPTConfig
torch.manual_seed(1337)
model = GPT(GPTConfig(**shape)).to(device).eval()
start = torch.tensor([prompt] * batch, device=device)
with torch.no_grad():
    model.generate(start, 2, temperature=0.8, top_k=200)
    t = time.perf_counter()
    model.generate(start, tokens, temperature=0.8, top_k=200)[0].tolist()
result = {'tokens_per_s': batch * tokens / (time.perf_counter() - t)}
"""


def peer_train(peer: str, data: str, device: str) -> dict[str, float]:
    """nanoGPT's README settings for a CPU, 2,000 iterations; its seconds without evaluations, and its loss by our whole-split measure."""
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        words = [
            'config/train_shakespeare_char.py',
            f'--device={device}',
            '--compile=False',
            '--eval_iters=20',
            '--log_interval=1',
            *CPU_SIZE,
            '--max_iters=2000',
            '--lr_decay_iters=2000',
            f'--dataset={data}',
            f'--out_dir={out}',
        ]
        done = subprocess.run([sys.executable, 'train.py', *words], cwd=peer, capture_output=True, text=True, check=False)
        wall = time.perf_counter() - began
        if done.returncode:
            raise UserError(f'{peer}: its train.py failed: {done.stderr.strip().splitlines()[-1][:300]}')
        times = {int(n): float(ms) / 1e3 for n, ms in re.findall(r'^iter (\d+): .* time ([\d.]+)ms', done.stdout, re.M)}
        plain = [s for n, s in times.items() if n % 250]  # every 250th line holds an evaluation's time too
        seconds = sum(plain) + statistics.median(plain) * (len(times) - len(plain))
        own = float(re.findall(r'^step \d+: .* val loss ([\d.]+)', done.stdout, re.M)[-1])
        loss = child(
            OURS_TRAIN.split('with tempfile')[0]
            + 'result = {k: v for k, v in train(configure(TrainConfig, words)).items() if k == "val_loss"}\n',
            words=[
                f'--init_from={os.path.join(out, "ckpt.pt")}',
                f'--dataset={data}',
                '--eval_only',
                f'--device={device}',
                f'--out_dir={os.path.join(out, "eval")}',
            ],
        )
    return {'train_s': seconds, 'wall_s': wall, 'val_loss': loss['val_loss'], 'own_estimate': own}


class Table:
    """Collects runs of ours and the peer's, and prints a line for each figure."""

    def __init__(self) -> None:
        self.figures: dict[str, dict[str, list[float]]] = {}

    def measure(self, title: str, rounds: int, ours: Callable[[], dict[str, float]], theirs: Callable[[], dict[str, float]] | None) -> None:
        for number in range(rounds):
            for side, call in (('ours', ours), ('peer', theirs)):
                if call:
                    print(f'  {title}: {side}, round {number + 1} of {rounds} …', file=sys.stderr, flush=True)
                    for name, value in call().items():
                        self.figures.setdefault(f'{title} {name}', {}).setdefault(side, []).append(value)

    def show(self) -> None:
        print(f'\n{"figure":<34}{"ours: median (min–max)":>32}{"peer: median (min–max)":>32}{"ours/peer":>12}')
        for name, sides in self.figures.items():
            cells = [
                f'{number(statistics.median(v))} ({number(min(v))}–{number(max(v))})' if (v := sides.get(side)) else '–'
                for side in ('ours', 'peer')
            ]
            pairs = [a / b for a, b in zip(sides.get('ours', []), sides.get('peer', [])) if b]
            print(f'{name:<34}{cells[0]:>32}{cells[1]:>32}{f"{statistics.median(pairs):.3f}" if pairs else "–":>12}')
            if any(len(v) > 2 and max(v) > 1.5 * min(v) for v in sides.values()) and 'memory' not in name:
                print(f'{"":<34}  this machine was too noisy for this figure: its runs differ by more than half')


def number(value: float) -> str:
    return f'{value:,.0f}' if abs(value) >= 100 else f'{value:.3g}' if abs(value) < 1 else f'{value:.2f}'


def main() -> None:
    config = configure(BenchConfig, description='Measure speed, time to a loss, and memory.')
    import torch

    from model import pick_device

    try:
        device = str(pick_device(config.device))
    except ValueError as error:
        raise UserError(str(error)) from None
    if config.peer:
        for name in ('train.py', 'model.py', 'config/train_shakespeare_char.py'):
            if not os.path.isfile(os.path.join(config.peer, name)):
                raise UserError(f'peer={config.peer}: not a nanoGPT checkout (it has no {name})')
    table, everything = Table(), config.mode == 'all'
    print(f'torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {config.rounds} round{"s" * (config.rounds > 1)}')

    if everything or config.mode in ('train', 'start'):
        words = [
            'config/train_darklyrics.py',
            f'--device={device}',
            '--max_iters=30',
            '--log_interval=10',
            '--eval_iters=1',
            '--warmup_iters=2',
        ]
        if config.mode == 'start':
            words = [w.replace('=30', '=1').replace('log_interval=10', 'log_interval=1') for w in words]
        table.measure('train', config.rounds, lambda: child(OURS_TRAIN, words=words), None)
    if everything or config.mode == 'sample':
        small = dict(n_layer=4, n_head=5, n_embd=160, block_size=256, vocab_size=4096)
        gpt2 = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257)
        bf16 = device.startswith('cuda') or device == 'cpu' and config.size == 'gpt2' and torch.cpu._is_avx512_bf16_supported()
        dtype = ('bfloat16' if bf16 else 'float32') if config.dtype == 'auto' else config.dtype
        tokens = min(config.tokens, 100) if everything and not config.peer else config.tokens
        common = dict(
            shape={'bias': True} | (small if config.size == 'small' else gpt2), device=device, tokens=tokens, prompt=[1], batch=config.batch
        )
        theirs = (lambda: child(PEER_SAMPLE, cwd=config.peer, **common)) if config.peer else None
        table.measure(f'sample {dtype}', config.rounds, lambda: child(OURS_SAMPLE, dtype=dtype, **common), theirs)
    if config.mode == 'loss':
        with tempfile.TemporaryDirectory() as data:
            made = subprocess.run(
                [
                    sys.executable,
                    'data/shakespeare_char/prepare.py',
                    f'--out_dir={data}',
                    f'--input={os.path.abspath(config.input) if config.input else ""}',
                ],
                cwd=HERE,
                capture_output=True,
                text=True,
                check=False,
            )
            if made.returncode:
                raise UserError(made.stderr.strip())
            words = [
                'config/train_shakespeare_char.py',
                'config/tiny.py',
                f'--device={device}',
                '--eval_interval=360',
                f'--target_val_loss={config.target}',
                f'--dataset={data}',
            ]
            table.measure(
                'loss',
                config.rounds,
                lambda: child(OURS_TRAIN, words=words),
                (lambda: peer_train(config.peer, data, device)) if config.peer else None,
            )
        losses = table.figures['loss val_loss']['ours']
        print(
            f'validation loss over the whole split ≤ {config.target}: reached in {sum(v <= config.target for v in losses)} of {len(losses)} runs'
        )
    table.show()
    if config.json:
        with open(config.json, 'w', encoding='utf-8') as f:
            json.dump(
                {'torch': torch.__version__, 'device': device, 'threads': torch.get_num_threads(), 'figures': table.figures}, f, indent=1
            )


if __name__ == '__main__':
    run(main)
