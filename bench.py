"""Measure: training, time to a loss, sampling, data, memory; beside a nanoGPT checkout if you have one.

    python bench.py                                                       (a short round of everything on this machine)
    python bench.py --mode=loss --peer=../nanoGPT --input=shakespeare.txt
    python bench.py --mode=train --peer=../nanoGPT                        (GPT-2's 124M, one step of 1 × 1024 tokens)
    python bench.py --mode=sample --peer=../nanoGPT --batch=16 --tokens=200
    python bench.py --mode=sample --peer=transformers
    python bench.py --compare out-a out-b                                 (two runs that are there already, side by side)
    python bench.py --mode=serve --out_dir=out-darklyrics                 (lyregpt/serve.py with 1, 8 and 64 clients, beside generate's one text after another)

Every figure comes from a process of its own. With --peer, ours and theirs run in turn (A B A B …) and the table gives
medians, the range, and the ratio pair by pair: on a noisy machine the ratios hold where the seconds do not. Before each
run the speed of a matrix product is taken; where that, or a ratio, varied by more than half, the table says so.
"""

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from configurator import UserError, configure, run
from lyregpt import report
from lyregpt.text import atomic_write

HERE = os.path.dirname(os.path.abspath(__file__))
# nanoGPT's README, for a CPU
CPU_SIZE = [
    '--n_layer=4',
    '--n_head=4',
    '--n_embd=128',
    '--block_size=64',
    '--batch_size=12',
    '--dropout=0.0',
]
SHAPES = {
    'small': dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=50304),
    'gpt2': dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304),
}


@dataclass
class BenchConfig:
    """The knobs; the comment behind each is its help. Raises ValueError for a bad one."""

    mode: Literal[
        'all',
        'train',
        'loss',
        'tokens',
        'sample',
        'data',
        'memory',
        'save',
        'scaling',
        'serve',
        'ceiling',
        'start',
    ] = 'all'  # what is measured
    peer: str = ''  # a nanoGPT checkout to measure beside; for sample also: transformers
    rounds: int = 3  # times that each side runs
    input: str = ''  # for loss and data: a text (for loss Tiny Shakespeare's), if it is not prepared or cannot be downloaded
    dataset: str = ''  # for tokens: a folder with train.bin and val.bin of GPT-2's tokens
    target: float | None = (
        None  # for loss: the validation loss over the whole split; None: 1.88 on a CPU, 1.4697 on a GPU (nanoGPT's)
    )
    out_dir: str = 'out-darklyrics'  # for serve: the trained model
    seconds: float = 20  # for serve: how long clients go on asking
    tokens: int = 300  # for sample and serve: new tokens
    batch: int | None = (
        None  # windows or samples at once; None: 1, and 16 windows for train on a GPU
    )
    size: Literal['small', 'gpt2'] = (
        'gpt2'  # for train, memory and sample: nanoGPT's CPU size, or GPT-2's 124M; random weights: values change no speed
    )
    arch: Literal['gpt2', 'modern'] = (
        'gpt2'  # for train, memory and save: the peer's model with AdamW, or our defaults with Muon
    )
    dtype: Literal['auto', 'float32', 'bfloat16'] = (
        'auto'  # ours; auto as in train.py and sample.py. nanoGPT knows float32 only on a CPU
    )
    quantize: Literal['int8'] | None = None  # for sample: as in sample.py
    remat: bool = False  # for train: as in train.py
    compile: bool | Literal['auto'] = (
        'auto'  # for train and loss: as in train.py; for sample auto is CUDA
    )
    device: str = 'auto'  # auto, cpu, cuda, mps
    json: str = ''  # write the figures to this file too
    compare: list[str] | None = (
        None  # measure nothing: set two runs side by side, as in --compare out-a out-b
    )

    def __post_init__(self) -> None:
        for name in ('rounds', 'tokens'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: expected at least 1')
        if self.compare is not None and len(self.compare) != 2:
            raise ValueError(
                f'compare={",".join(self.compare)}: expected two folders, as in --compare out-a out-b'
            )


# -----------------------------------------------------------------------------
# Processes of their own


def child(
    code: str, cwd: str = HERE, env: dict[str, str] | None = None, **values: Any
) -> dict[str, float]:
    """Run Python code in a process of its own that sets `result`. Adds wall seconds and the peak memory of it and its children in MB.

    Raises UserError if it fails.
    """
    values |= {'HERE': HERE, 'started': time.time()}
    tail = """
memory = 0.0
try:
    import resource
    memory = max(resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / (1e6 if sys.platform == 'darwin' else 1e3)
except ImportError:
    pass  # Windows has no such figure
if 'torch' in sys.modules and sys.modules['torch'].cuda.is_available() and sys.modules['torch'].cuda.max_memory_allocated():
    memory = sys.modules['torch'].cuda.max_memory_allocated() / 1e6
print('\\n' + json.dumps({'memory_mb': round(memory)} | result))
"""
    before = ''.join(f'{name} = {value!r}\n' for name, value in values.items())
    began = time.perf_counter()
    done = subprocess.run(
        [
            sys.executable,
            '-c',
            f'import json, sys, time\nsys.path.insert(0, {cwd!r})\n{before}{code}{tail}',
        ],
        cwd=cwd,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(
            f'a measured process failed: {(done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1][:300]}'
        )
    return json.loads(done.stdout.strip().splitlines()[-1]) | {
        'wall_s': time.perf_counter() - began
    }


OURS_TRAIN = """
import csv, os, statistics, tempfile
from configurator import configure
from train import TrainConfig, torch, train
with tempfile.TemporaryDirectory() as out:
    end = train(configure(TrainConfig, words + ['--out_dir=' + out]))
    with open(os.path.join(out, 'metrics.csv')) as f:
        rows = [r for r in csv.DictReader(f) if r['tokens_per_second']][skip:]
speed = statistics.median(float(r['tokens_per_second']) for r in rows)
per_step = float(rows[-1]['tokens']) / int(rows[-1]['step'])
result = {'train_s': end['train_seconds'], 'val_loss': end['val_loss'], 'tokens_per_s': speed, 'ms_per_step': 1e3 * per_step / speed,
          'share_of_ceiling': statistics.median(float(r['mfu']) for r in rows), 'first_step_s': end['first_step_at'] - started}
"""

PEER_TRAIN = """
import re, statistics, subprocess
done = subprocess.run([sys.executable, 'train.py', *words], capture_output=True, text=True)
if done.returncode:
    sys.exit('its train.py failed: ' + (done.stderr.strip() or done.stdout.strip()).splitlines()[-1])
times = {int(n): float(ms) / 1e3 for n, ms in re.findall(r'^iter (\\d+): .* time ([\\d.]+)ms', done.stdout, re.M)}
plain = [s for n, s in times.items() if n >= skip and n % every]  # the others hold an evaluation, or a first compilation
step = statistics.median(plain)
losses = {int(n): float(v) for n, v in re.findall(r'^step (\\d+): .* val loss ([\\d.]+)', done.stdout, re.M)}
best = min(losses, key=losses.get)
result = {'train_s': step * steps, 'train_s_to_its_best': step * best, 'ms_per_step': 1e3 * step, 'tokens_per_s': tokens_per_step / step,
          'its_own_best': losses[best]}
if '--device=cpu' not in words:
    result['memory_mb'] = 0.0  # the GPU's is not known from outside
"""

OURS_SAMPLE = """
import torch
from lyregpt.device import copy_bandwidth, pick_device
from lyregpt.quantize import quantize_model
from model import GPT, GPTConfig
torch.manual_seed(1337)
device = pick_device(device)
model = GPT(GPTConfig(**shape)).to(device).eval()
if dtype != 'float32':
    model.to(getattr(torch, dtype))
read = sum(p.numel() * (1 if quantize and p.dim() > 1 else p.element_size()) for p in model.parameters())
quantize_model(model, quantize)
options = dict(temperature=0.8, top_k=200, compile=compile)
for _ in range(2):
    list(model.generate([prompt] * batch, 8, **options))
t = time.perf_counter()
written = torch.stack(list(model.generate([prompt] * batch, tokens, **options))).tolist()
speed = batch * len(written) / (time.perf_counter() - t)
result = {'tokens_per_s': speed, 'weights_read_gb_per_s': speed / batch * read / 1e9}
result['share_of_bandwidth'] = result['weights_read_gb_per_s'] / (copy_bandwidth(device) / 1e9)
"""

PEER_SAMPLE = """
import torch
from model import GPT, GPTConfig
torch.manual_seed(1337)
model = GPT(GPTConfig(**shape)).to(device).eval()
start = torch.tensor([prompt] * batch, device=device)
with torch.no_grad(), torch.autocast(device.split(':')[0], torch.bfloat16, enabled='cuda' in device):  # as its sample.py
    model.generate(start, 2, temperature=0.8, top_k=200)
    t = time.perf_counter()
    model.generate(start, tokens, temperature=0.8, top_k=200)[0].tolist()
result = {'tokens_per_s': batch * tokens / (time.perf_counter() - t)}
"""

TRANSFORMERS_SAMPLE = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel
torch.manual_seed(1337)
sizes = dict(n_layer=shape['n_layer'], n_head=shape['n_head'], n_embd=shape['n_embd'], n_positions=shape['block_size'], vocab_size=shape['vocab_size'])
model = GPT2LMHeadModel(GPT2Config(**sizes)).to(device, getattr(torch, dtype)).eval()
start = torch.tensor([prompt] * batch, device=device)
options = dict(do_sample=True, temperature=0.8, top_k=200, use_cache=True, pad_token_id=0, eos_token_id=None)
model.generate(start, max_new_tokens=8, **options)
t = time.perf_counter()
model.generate(start, max_new_tokens=tokens, min_new_tokens=tokens, **options)[0].tolist()
result = {'tokens_per_s': batch * tokens / (time.perf_counter() - t)}
"""

OURS_MEMORY = """
import train, torch
from lyregpt.device import pick_device, pick_dtype
from model import GPT, GPTConfig
from lyregpt.optim import configure_optimizers
device = pick_device(device)
def used():
    if device.type == 'cuda':
        return torch.cuda.memory_allocated() / 1e6
    if not sys.platform.startswith('linux'):
        return 0.0
    with open('/proc/self/statm') as f:
        return int(f.read().split()[1]) * 4096 / 1e6
marks = [used()]
model = GPT(GPTConfig(arch=arch, **shape)).to(device)
marks.append(used())
optimizers = configure_optimizers(model, 0.1, 1e-4, (0.9, 0.95), 'muon' if arch == 'modern' else 'adamw')
x = torch.randint(shape['vocab_size'], (batch, shape['block_size']), device=device)
dtype = pick_dtype(dtype, device)
for _ in range(2):
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = model(x, x)
    loss.backward()
    for o in optimizers.values():
        o.step()
gradients = sum(p.grad.numel() * 4 for p in model.parameters()) / 1e6
states = [v for o in optimizers.values() for s in o.state.values() for v in s.values() if torch.is_tensor(v)]
states = sum(v.numel() * v.element_size() for v in states) / 1e6
if device.type == 'cuda':
    peak = torch.cuda.max_memory_allocated() / 1e6
else:
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == 'darwin' else 1e3)
weights = sum(p.numel() * 4 for p in model.parameters()) / 1e6
result = {'before_mb': marks[0], 'weights_mb': weights, 'gradients_mb': gradients, 'optimizer_mb': states,
          'activations_and_rest_mb': peak - marks[0] - weights - gradients - states}
"""

OURS_SAVE = """
import os, tempfile, statistics
from lyregpt import threads
import torch
from lyregpt import checkpoint
from lyregpt.device import keep_freed_memory, pick_device, pick_dtype
from model import GPT, GPTConfig
from lyregpt.optim import configure_optimizers
device = pick_device(device)
if device.type == 'cpu':
    keep_freed_memory()
model = GPT(GPTConfig(arch=arch, **shape)).to(device)
optimizers = configure_optimizers(model, 0.1, 1e-4, (0.9, 0.95), 'muon' if arch == 'modern' else 'adamw')
x = torch.randint(shape['vocab_size'], (batch, shape['block_size']), device=device)
dtype = pick_dtype(dtype, device)
writer = checkpoint.Writer(background, device)
times, waits = [], []
with tempfile.TemporaryDirectory() as folder:
    def save(state):
        checkpoint.save(os.path.join(folder, 'ckpt.pt'), state, keep_previous=True)
    for step in range(steps):
        t, wait = time.perf_counter(), 0.0
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(x, x)
        loss.backward()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        w = time.perf_counter(); writer.before_update(); wait += time.perf_counter() - w
        for o in optimizers.values():
            o.step(); o.zero_grad()
        if step in (3, 3 + steps // 2):
            w = time.perf_counter()
            states = {k: o.state_dict() for k, o in optimizers.items()}
            writer.submit({'model': model.state_dict(), 'model_args': model.config.to_dict(), 'optimizer': states}, save)
            wait += time.perf_counter() - w
        loss.item()
        times.append(time.perf_counter() - t); waits.append(wait)
    writer.wait()
    size = os.path.getsize(os.path.join(folder, 'ckpt.pt'))
usual = statistics.median(times[1:])
result = {'step_s': usual, 'checkpoint_mb': size / 1e6, 'training_thread_held_s_a_save': sum(waits) / 2,
          'held_share_of_step': sum(waits) / 2 / usual, 'steps_longer_by_s_a_save': (sum(times[1:]) - usual * (steps - 1)) / 2}
"""

CEILING = """
from lyregpt import threads
import torch
from lyregpt.device import copy_bandwidth, matmul_ceiling, pick_device
device = pick_device(device)
result = {f'{name}_gflop_per_s': matmul_ceiling(device, getattr(torch, name)) / 1e9 for name in ('float32', 'bfloat16')}
result['copy_gb_per_s'] = copy_bandwidth(device) / 1e9
"""

BATCH_TIME = """
import os, tempfile, numpy as np, statistics
from lyregpt.dataset import Split
result = {}
with tempfile.TemporaryDirectory() as folder:
    for name, size in (('1_mb', 10**6), ('1_gb', 10**9), ('100_gb', 10**11 if os.name != 'nt' else 10**9)):  # NTFS would fill them
        with open(os.path.join(folder, 'train.bin'), 'wb') as f:
            f.truncate(size)  # sparse: takes no room
        split = Split(folder, 'train', 1024, 50304, 1337)
        times = []
        for i in range(60):
            t = time.perf_counter(); split.batch(12 * i, 12); times.append(time.perf_counter() - t)
        result[f'batch_of_12x1024_from_{name}_ms'] = 1e3 * statistics.median(times[10:])
"""


# -----------------------------------------------------------------------------
# The table


class Table:
    """Collects runs of ours and the peer's, and prints a line for each figure."""

    def __init__(self, ceiling: Callable[[], float]) -> None:
        self.figures: dict[str, dict[str, list[float]]] = {}
        self.ceiling = ceiling

    def measure(
        self,
        title: str,
        rounds: int,
        ours: Callable[[], dict[str, float]],
        theirs: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        """Run `ours` and `theirs` in turn, `rounds` times, and keep every figure that they return, with what the machine could do just before."""
        for number in range(rounds):
            for side, call in (('ours', ours), ('peer', theirs)):
                if call:
                    print(
                        f'  {title}: {side}, round {number + 1} of {rounds} …',
                        file=sys.stderr,
                        flush=True,
                    )
                    for name, value in (
                        {'machine_gflop_per_s': self.ceiling() / 1e9} | call()
                    ).items():
                        self.figures.setdefault(f'{title} {name}', {}).setdefault(side, []).append(
                            value
                        )

    def show(self) -> None:
        """Print median and range of each figure, the ratio of the pairs, and where the machine was too noisy to say."""
        print(
            f'\n{"figure":<46}{"ours: median (min–max)":>30}{"peer: median (min–max)":>30}{"ours/peer":>22}'
        )
        for name, sides in self.figures.items():
            cells = [
                f'{number(statistics.median(v))} ({number(min(v))}–{number(max(v))})'
                if (v := sides.get(side))
                else '–'
                for side in ('ours', 'peer')
            ]
            pairs = [a / b for a, b in zip(sides.get('ours', []), sides.get('peer', [])) if b]
            ratio = (
                f'{number(statistics.median(pairs))} ({number(min(pairs))}–{number(max(pairs))})'
                if pairs
                else '–'
            )
            print(f'{name:<46}{cells[0]:>30}{cells[1]:>30}{ratio:>22}')
            machine = (
                [v for values in sides.values() for v in values]
                if name.endswith('machine_gflop_per_s')
                else []
            )
            if machine and max(machine) > 1.5 * min(machine):
                print(
                    '  too noisy: the speed of the machine itself changed by more than half between these runs; run them again on a quiet one'
                )
            elif (
                len(pairs) > 1
                and max(pairs) > 1.5 * min(pairs)
                and not name.endswith('machine_gflop_per_s')
            ):
                print('  too noisy to say: the pairs differ by more than half')
            elif not pairs and any(
                len(v) > 1 and max(v) > 1.5 * min(v) > 0 for v in sides.values()
            ):
                print('  too noisy to say: the runs differ by more than half')


def number(value: float) -> str:
    """Three figures at most, thousands with commas."""
    return (
        f'{value:,.0f}'
        if abs(value) >= 100
        else f'{value:.3g}'
        if abs(value) < 1
        else f'{value:.2f}'
    )


# -----------------------------------------------------------------------------
# The rounds


def measure_train(table: Table, config: BenchConfig, device: str) -> None:
    """Steps of train.py on random tokens: the same model, or our defaults (arch=modern), beside the peer's train.py."""
    import numpy as np

    shape, cuda = SHAPES[config.size], device.startswith('cuda')
    batch = config.batch or (12 if config.size == 'small' else 16 if cuda else 1)
    steps = 60 if cuda else 8 if config.size == 'gpt2' else 100
    sizes = [f'--{k}={v}' for k, v in shape.items() if k != 'vocab_size']
    sizes += [f'--batch_size={batch}', f'--gradient_accumulation_steps={4 if cuda else 1}']
    with tempfile.TemporaryDirectory() as data:
        dice = np.random.default_rng(1337)
        for name, count in (('train', 2**20), ('val', shape['block_size'] + 1)):
            dice.integers(0, 50257, count).astype('<u2').tofile(os.path.join(data, f'{name}.bin'))
        common = [
            *sizes,
            f'--dataset={data}',
            f'--device={device}',
            f'--max_iters={steps}',
            '--eval_interval=1000000',
            '--weight_decay=0.1',
        ]
        ours = [
            *common,
            f'--arch={config.arch}',
            f'--optimizer={"muon" if config.arch == "modern" else "adamw"}',
            f'--dtype={config.dtype}',
        ]
        ours += [
            '--log_interval=10' if cuda else '--log_interval=1',
            f'--compile={config.compile}',
            f'--remat={config.remat}',
            '--decay_lr=False',
        ]
        peer = [
            *common,
            '--log_interval=1',
            '--eval_iters=1',
            '--decay_lr=False',
            f'--compile={cuda}',
            f'--out_dir={data}',
        ]
        table.measure(
            f'train {config.size} {batch}x{shape["block_size"]}',
            config.rounds,
            lambda: child(OURS_TRAIN, words=ours, skip=2),
            (
                lambda: child(
                    PEER_TRAIN, cwd=config.peer, words=peer, skip=2, every=10**9, steps=steps,
                    tokens_per_step=batch * shape['block_size'] * (4 if cuda else 1),
                )
            )
            if config.peer
            else None,
        )  # fmt: skip


def whole_split_loss(out: str, data: str, device: str) -> float:
    """The validation loss of the checkpoint in `out` by our measure, the whole split."""
    words = [
        f'--init_from={out}/ckpt.pt',
        f'--dataset={data}',
        '--eval_only',
        f'--device={device}',
        f'--out_dir={out}/eval',
    ]
    code = 'from configurator import configure\nfrom train import TrainConfig, train\n'
    return child(
        code + 'result = {"val_loss": train(configure(TrainConfig, words))["val_loss"]}\n',
        words=words,
    )['val_loss']


def prepared_shakespeare(config: BenchConfig, folder: str) -> None:
    """Tiny Shakespeare's characters in `folder`. Raises UserError if the text cannot be had."""
    here = os.path.join(HERE, 'data', 'shakespeare_char')
    if not config.input and os.path.isfile(os.path.join(here, 'train.bin')):
        for name in ('train.bin', 'val.bin', 'meta.json', 'meta.pkl'):
            shutil.copy(os.path.join(here, name), folder)
        return
    text = f'--input={os.path.abspath(config.input)}' if config.input else '--input='
    words = [sys.executable, 'data/shakespeare_char/prepare.py', f'--out_dir={folder}', text]
    made = subprocess.run(words, cwd=HERE, capture_output=True, text=True, check=False)
    if made.returncode:
        raise UserError(made.stderr.strip())


def measure_loss(table: Table, config: BenchConfig, device: str) -> None:
    """Seconds to a validation loss, with an empty compile cache and with a full one, beside the peer's whole training."""
    cuda = device.startswith('cuda')
    target = config.target or (1.4697 if cuda else 1.88)
    with tempfile.TemporaryDirectory() as data:
        prepared_shakespeare(config, data)
        words = [
            'config/train_shakespeare_char.py',
            f'--device={device}',
            f'--target_val_loss={target}',
            f'--dataset={data}',
        ]
        words += [f'--compile={config.compile}', f'--dtype={config.dtype}'] + (
            [] if cuda else ['config/tiny.py', '--eval_interval=270']
        )

        def ours() -> dict[str, float]:
            with tempfile.TemporaryDirectory() as cache:
                cold, warm = (
                    child(OURS_TRAIN, env={'TORCHINDUCTOR_CACHE_DIR': cache}, words=words, skip=0)
                    for _ in 'cw'
                )
            return cold | {'warm_wall_s': warm['wall_s'], 'warm_train_s': warm['train_s']}

        def theirs() -> dict[str, float]:
            steps = 5000 if cuda else 2000
            with tempfile.TemporaryDirectory() as out:
                peer = [
                    'config/train_shakespeare_char.py',
                    f'--device={device}',
                    f'--dataset={data}',
                    f'--out_dir={out}',
                    '--log_interval=1',
                ]
                if not cuda:
                    peer += [
                        *CPU_SIZE,
                        '--compile=False',
                        '--eval_iters=20',
                        f'--max_iters={steps}',
                        f'--lr_decay_iters={steps}',
                    ]
                result = child(
                    PEER_TRAIN,
                    cwd=config.peer,
                    words=peer,
                    skip=10,
                    every=250,
                    steps=steps,
                    tokens_per_step=64 * 256 if cuda else 12 * 64,
                )
                return result | {'val_loss': whole_split_loss(out, data, device)}

        table.measure('loss', config.rounds, ours, theirs if config.peer else None)
    losses = table.figures['loss val_loss']['ours']
    print(
        f'validation loss over the whole split ≤ {target}: reached in {sum(v <= target for v in losses)} of {len(losses)} runs'
    )


def measure_tokens(table: Table, config: BenchConfig, device: str) -> None:
    """GPT-2-size on a real corpus: the peer's loss after 300 steps, and ours after a half and a third of its tokens.

    Raises UserError without a dataset of GPT-2 tokens.
    """
    if not os.path.isfile(os.path.join(config.dataset, 'train.bin')):
        raise UserError(
            f'dataset={config.dataset}: give a folder with train.bin and val.bin (python data/text/prepare.py --tokenizer=gpt2 makes one)'
        )
    shape, batch = SHAPES[config.size], config.batch or 16
    sizes = [f'--{k}={v}' for k, v in shape.items() if k != 'vocab_size'] + [
        f'--batch_size={batch}',
        '--gradient_accumulation_steps=8',
    ]
    common = [
        *sizes,
        f'--dataset={os.path.abspath(config.dataset)}',
        f'--device={device}',
        '--eval_interval=1000000',
    ]

    def ours(steps: int) -> dict[str, float]:
        words = [
            *common,
            f'--max_iters={steps}',
            f'--warmup_iters={steps // 15}',
            '--learning_rate=2e-3',
            '--lr_schedule=linear',
            '--min_lr=0',
        ]
        return child(OURS_TRAIN, words=[*words, '--tie_weights=True', '--warmdown=0.7'], skip=0)

    def theirs() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as out:
            peer = [
                *common,
                f'--out_dir={out}',
                '--max_iters=300',
                '--lr_decay_iters=300',
                '--warmup_iters=20',
                '--eval_interval=300',
            ]
            peer += [
                '--log_interval=10',
                '--eval_iters=20',
                '--always_save_checkpoint=True',
                f'--compile={device.startswith("cuda")}',
            ]
            result = child(
                PEER_TRAIN,
                cwd=config.peer,
                words=peer,
                skip=20,
                every=300,
                steps=300,
                tokens_per_step=batch * 8 * shape['block_size'],
            )
            return result | {
                'val_loss': whole_split_loss(out, os.path.abspath(config.dataset), device)
            }

    table.measure(
        'tokens: ours 150 steps, peer 300',
        config.rounds,
        lambda: ours(150),
        theirs if config.peer else None,
    )
    table.measure('tokens: ours 100 steps', config.rounds, lambda: ours(100))


def measure_sample(table: Table, config: BenchConfig, device: str, tokens: int) -> None:
    """Tokens a second of `generate`, beside the peer's sample.py or transformers."""
    import torch

    from lyregpt.device import can_compile, pick_dtype

    large = config.size == 'gpt2' and not config.quantize
    dtype = str(pick_dtype(config.dtype, torch.device(device), large)).removeprefix('torch.')
    shape = {'bias': True} | SHAPES[config.size] | {'vocab_size': 50257}
    common: dict[str, Any] = dict(
        shape=shape, device=device, tokens=tokens, prompt=[1], batch=config.batch or 1
    )
    compiled = (
        device.startswith('cuda') and not can_compile(torch.device(device))
        if config.compile == 'auto'
        else config.compile
    )
    theirs: Callable[[], dict[str, float]] | None = None
    if config.peer == 'transformers':
        theirs = lambda: child(TRANSFORMERS_SAMPLE, dtype='bfloat16', **common)  # noqa: E731
    elif config.peer:
        theirs = lambda: child(PEER_SAMPLE, cwd=config.peer, **common)  # noqa: E731
    title = f'sample {config.size} {config.quantize or dtype} x{config.batch or 1}'
    table.measure(
        title,
        config.rounds,
        lambda: child(
            OURS_SAMPLE, dtype=dtype, quantize=config.quantize, compile=compiled, **common
        ),
        theirs,
    )


def measure_data(table: Table, config: BenchConfig) -> None:
    """MB of text prepared a second, by characters and with GPT-2's tokens, and the time of a batch from small and huge files."""
    table.measure('data', config.rounds, lambda: child(BATCH_TIME))
    source = config.input or os.path.join(HERE, 'data', 'darklyrics', 'demo.jsonl')
    with open(source, encoding='utf-8') as f:
        text = f.read()
    for kind, name, size in (
        ('characters', 'shakespeare_char', 20_000_000),
        ('gpt2', 'shakespeare', 10_000_000),
    ):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, 'input.txt')  # where nanoGPT's own prepare.py looks for it
            with open(path, 'w', encoding='utf-8') as f:
                f.write((text * (size // len(text) + 1))[:size])
            megabytes = os.path.getsize(path) / 1e6

            def ours() -> dict[str, float]:
                words = [f'data/{name}/prepare.py', f'--input={path}', f'--out_dir={folder}/ours']
                return run_timed(words, HERE, megabytes)

            def theirs() -> dict[str, float]:
                script = shutil.copy(
                    os.path.join(config.peer, 'data', name, 'prepare.py'),
                    os.path.join(folder, 'prepare.py'),
                )
                return run_timed([script], folder, megabytes)

            table.measure(f'data {kind}', config.rounds, ours, theirs if config.peer else None)


def measure_scaling(table: Table, config: BenchConfig, device: str) -> None:
    """A step of train.py (its defaults, about 4,096 tokens) by model size, by context, and by processes that share this machine's cores or GPUs.

    Raises UserError if one fails.
    """
    import csv

    import numpy as np

    sizes = {'4x128': (4, 128), '6x384': (6, 384), '12x768': (12, 768)}
    runs = [(size, 512, 1, 'ddp') for size in sizes] + [
        ('6x384', context, 1, 'ddp') for context in (128, 2048)
    ]
    runs += [
        ('6x384', 512, processes, parallel) for processes in (2, 4) for parallel in ('ddp', 'fsdp')
    ]
    with tempfile.TemporaryDirectory() as data:
        for name, count in (('train', 2**20), ('val', 2**12)):
            np.random.default_rng(1337).integers(0, 50257, count).astype('<u2').tofile(
                os.path.join(data, f'{name}.bin')
            )

        def steps(size: str, context: int, processes: int, parallel: str) -> dict[str, float]:
            layers, width = sizes[size]
            knobs: dict[str, Any] = dict(
                n_layer=layers, n_embd=width, n_head=width // 64, block_size=context
            )
            knobs |= dict(
                dataset=data,
                out_dir=os.path.join(data, 'out'),
                device=device,
                dtype=config.dtype,
                parallel=parallel,
            )
            knobs |= dict(
                batch_size=max(1, 4096 // context // processes),
                gradient_accumulation_steps=processes,
            )
            knobs |= dict(
                max_iters=8,
                eval_interval=10**6,
                eval_iters=1,
                log_interval=1,
                checkpoint_minutes=0,
                warmup_iters=0,
            )
            launch = (
                ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
                if processes > 1
                else []
            )
            threads = (
                {}
                if 'cuda' in device
                else {'OMP_NUM_THREADS': str(max(1, (os.cpu_count() or 1) // processes))}
            )
            words = [sys.executable, *launch, 'train.py', *(f'--{k}={v}' for k, v in knobs.items())]
            done = subprocess.run(
                words,
                cwd=HERE,
                env=os.environ | threads,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise UserError(
                    f'a measured process failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}'
                )
            with open(os.path.join(data, 'out', 'metrics.csv'), encoding='utf-8') as f:
                speeds = [
                    float(row['tokens_per_second'])
                    for row in csv.DictReader(f)
                    if row['tokens_per_second']
                ]
            shutil.rmtree(os.path.join(data, 'out'))
            return {'s_a_step': 4096 / statistics.median(speeds[2:])}

        for size, context, processes, parallel in runs:
            title = (
                f'{size} context {context}, {processes} {parallel if processes > 1 else "process"}'
            )
            table.measure(title, config.rounds, lambda: steps(size, context, processes, parallel))


GENERATE_ONE_BY_ONE = """
from lyregpt.generate import load_model
model, tokenizer, _ = load_model(out_dir, device=device, dtype=dtype, quantize=quantize)
written, firsts, started = 0, [], time.perf_counter()
while time.perf_counter() - started < seconds:
    for request in asked:
        prompt = ([] if tokenizer.eot is None else [tokenizer.eot]) + tokenizer.encode(request['prompt'])
        stop = [] if tokenizer.eot is None else [tokenizer.eot]
        asked_at, ids = time.perf_counter(), []
        for tokens in model.generate([prompt], request['max_tokens'], seed=request['seed'], vocab_size=tokenizer.vocab_size, stop_tokens=stop):
            ids.append(int(tokens[0]))
            if len(ids) == 1:
                firsts.append(time.perf_counter() - asked_at)
        written += len(ids)
        if time.perf_counter() - started > seconds:
            break
result = {'tokens_per_s': written / (time.perf_counter() - started), 'first_token_ms': 1e3 * sorted(firsts)[len(firsts) // 2]}
"""


async def ask(port: int, fields: dict[str, Any]) -> tuple[str, int, list[float]]:
    """One streamed completion: its text, its tokens, and when its pieces came. Raises OSError for any answer but a whole one."""
    reader, writer = await asyncio.open_connection('127.0.0.1', port)
    try:
        body = json.dumps(
            fields | {'stream': True, 'stream_options': {'include_usage': True}}
        ).encode()
        head = f'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n'
        writer.write(f'{head}Connection: close\r\n\r\n'.encode() + body)
        text, tokens, times, done = '', 0, [], False
        async for line in reader:
            done |= line == b'data: [DONE]\n'
            if line.startswith(b'data: {'):
                chunk = json.loads(line[6:])
                if 'error' in chunk:
                    raise OSError(chunk['error']['message'])
                tokens = chunk.get('usage', {}).get('completion_tokens', tokens)
                for choice in chunk['choices']:
                    text += choice['text']
                    times.append(time.perf_counter())
        if not done:
            raise OSError('the answer broke off')
        return text, tokens, times
    finally:
        writer.close()


async def load(
    port: int, asked: list[dict[str, Any]], expected: list[str], seconds: float
) -> dict[str, float]:
    """One client for each request asks it again and again for `seconds`; the figures, with how many answers failed or were not `expected`.

    Raises UserError if no answer was whole.
    """
    began, firsts, gaps, counts = (
        time.perf_counter(),
        list[float](),
        list[float](),
        [0] * len(asked),
    )
    failed = wrong = answers = 0

    async def client(i: int) -> None:
        nonlocal failed, wrong, answers
        while (at := time.perf_counter()) < began + seconds:
            try:
                text, tokens, times = await ask(port, asked[i])
            except (OSError, ValueError):
                failed += 1
                await asyncio.sleep(0.1)
                continue
            answers, wrong, counts[i] = (
                answers + 1,
                wrong + (text != expected[i]),
                counts[i] + tokens,
            )
            firsts.append(times[0] - at)
            gaps.append(max((b - a for a, b in zip(times, times[1:])), default=0))

    await asyncio.gather(*map(client, range(len(asked))))
    took = time.perf_counter() - began
    if not answers:
        raise UserError('the server gave no whole answer')
    return {
        'tokens_per_s': sum(counts) / took,
        'first_token_ms': 1e3 * statistics.median(firsts),
        'slowest_first_token_ms': 1e3 * max(firsts),
        'longest_pause_ms': 1e3 * max(gaps),
        'answers': answers,
        'failed': failed,
        'unlike_alone': wrong,
        'slowest_client_share': min(counts) / statistics.median(counts),
    }


def measure_serve(table: Table, config: BenchConfig, device: str) -> None:
    """lyregpt/serve.py with 1, 8 and 64 clients that stream, each answer compared with the same request's alone; its memory before and after.

    Raises UserError if it does not start.
    """
    starts = ('The rain', 'A stone in the', '', 'We sang until the lamp went out and', 'Nobody')
    asked = [
        dict(prompt=starts[i % len(starts)], max_tokens=config.tokens, temperature=1.0, seed=i)
        for i in range(64)
    ]
    words = [
        '-m',
        'lyregpt',
        'serve',
        f'--out_dir={config.out_dir}',
        f'--device={device}',
        f'--dtype={config.dtype}',
        '--port=0',
        f'--quantize={config.quantize}',
    ]
    log = tempfile.TemporaryFile('w+')
    server = subprocess.Popen(
        [sys.executable, *words], cwd=HERE, stdout=subprocess.PIPE, stderr=log, text=True
    )
    assert server.stdout
    try:
        if 'http' not in (line := server.stdout.readline()):
            server.wait()
            log.seek(0)
            raise UserError(f'lyregpt serve did not start: {log.read().strip()}')
        port = int(line.split(';')[0].split()[1].rsplit(':', 1)[1])
        expected = [asyncio.run(ask(port, request))[0] for request in asked]
        for clients in (1, 8, 64):

            def ours() -> dict[str, float]:
                before = resident(server.pid)
                figures = asyncio.run(load(port, asked[:clients], expected, config.seconds))
                return figures | {
                    'server_mb': resident(server.pid),
                    'server_grew_mb': resident(server.pid) - before,
                }

            values: dict[str, Any] = dict(
                out_dir=config.out_dir, device=device, dtype=config.dtype, quantize=config.quantize
            )
            values |= dict(seconds=config.seconds, asked=asked[:clients])
            table.measure(
                f'serve {clients} clients',
                config.rounds,
                ours,
                lambda: child(GENERATE_ONE_BY_ONE, **values),
            )
    finally:
        server.terminate()
        server.wait()
        log.close()


def resident(pid: int) -> float:
    """MB of memory that a process holds now; 0 where the system does not tell."""
    try:
        with open(f'/proc/{pid}/statm', encoding='ascii') as f:
            return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1e6
    except OSError:
        return 0.0


def run_timed(words: list[str], cwd: str, megabytes: float) -> dict[str, float]:
    """MB a second of a script that reads `megabytes`. Raises UserError if it fails."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(
            f'{words[0]} failed: {(done.stderr.strip() or "no message").splitlines()[-1][:300]}'
        )
    return {'mb_per_s': megabytes / (time.perf_counter() - began)}


def show_two(config: BenchConfig) -> None:
    """Two runs side by side. Their curves over one another are in lyregpt/serve.py's page, under Watch."""
    a, b = (report.read_run(out_dir) for out_dir in config.compare or ())
    rows, remarks = report.compare(a, b)
    wide = [max(len(row[i]) for row in [('', a.out_dir, b.out_dir), *rows]) for i in range(3)]
    for name, *values in [('', a.out_dir, b.out_dir), *rows]:
        print(f'{name:<{wide[0]}}  {values[0]:>{wide[1]}}  {values[1]:>{wide[2]}}')
    for remark in remarks:
        print(remark)
    if config.json:
        save(config.json, {'runs': [a.out_dir, b.out_dir], 'figures': rows, 'remarks': remarks})


def save(path: str, figures: dict[str, Any]) -> None:
    """Write figures as JSON, whole or not at all. Raises UserError."""
    try:
        atomic_write(path, json.dumps(figures, indent=1).encode())
    except OSError as error:
        raise UserError(f'json={path}: cannot be written ({error.strerror})') from None


def main() -> None:
    """Measure what the command line asks for."""
    config = configure(BenchConfig, description='Measure speed, time to a loss, data and memory.')
    if config.compare:
        show_two(config)
        return
    from lyregpt import threads  # before torch

    # isort: split
    import torch

    from lyregpt.device import matmul_ceiling, pick_device

    try:
        device = str(pick_device(config.device))
    except ValueError as error:
        raise UserError(str(error)) from None
    if config.peer and config.peer != 'transformers':
        for name in ('train.py', 'model.py', 'config/train_shakespeare_char.py'):
            if not os.path.isfile(os.path.join(config.peer, name)):
                raise UserError(f'peer={config.peer}: not a nanoGPT checkout (it has no {name})')
        config.peer = os.path.abspath(config.peer)
    if config.peer == 'transformers' and config.mode != 'sample':
        raise UserError('peer=transformers: serves --mode=sample only')
    batch, values = config.batch or 1, dict[str, Any]()
    table, everything = (
        Table(lambda: matmul_ceiling(torch.device(device), torch.float32)),
        config.mode == 'all',
    )
    print(
        f'torch {torch.__version__}, {device}, {threads.describe_threads()}; {config.rounds} round{"s" * (config.rounds > 1)}'
    )

    try:
        if everything or config.mode == 'ceiling':
            table.measure('ceiling', config.rounds, lambda: child(CEILING, device=device))
        if everything or config.mode == 'start':
            words = [
                'config/train_darklyrics.py',
                f'--device={device}',
                '--max_iters=1',
                '--log_interval=1',
                '--eval_iters=1',
            ]
            table.measure('start', config.rounds, lambda: child(OURS_TRAIN, words=words, skip=0))
        if everything or config.mode == 'train':
            measure_train(table, config, device)
        if everything or config.mode == 'memory':
            values = dict(
                device=device,
                arch=config.arch,
                shape=SHAPES[config.size],
                batch=batch,
                dtype=config.dtype,
            )
            table.measure(
                f'memory {config.size} {batch}x{SHAPES[config.size]["block_size"]}',
                config.rounds,
                lambda: child(OURS_MEMORY, **values),
            )
        if config.mode == 'scaling':
            measure_scaling(table, config, device)
        if config.mode == 'save':
            for name, background in ('async', True), ('sync', False):
                values = dict(
                    device=device,
                    arch=config.arch,
                    shape=SHAPES[config.size],
                    batch=batch,
                    dtype=config.dtype,
                    steps=16,
                    background=background,
                )
                table.measure(
                    f'save {config.size} {name}', config.rounds, lambda: child(OURS_SAVE, **values)
                )
        if everything or config.mode == 'sample':
            measure_sample(
                table,
                config,
                device,
                min(config.tokens, 100) if everything and not config.peer else config.tokens,
            )
        if everything or config.mode == 'data':
            measure_data(table, config)
        if (
            config.mode == 'loss'
            or everything
            and (
                config.input
                or os.path.isfile(os.path.join(HERE, 'data', 'shakespeare_char', 'train.bin'))
            )
        ):
            measure_loss(table, config, device)
        if config.mode == 'serve':
            measure_serve(table, config, device)
        if config.mode == 'tokens':
            measure_tokens(table, config, device)
    finally:  # what was measured is shown, whatever came after
        if table.figures:
            table.show()
        if config.json:
            save(
                config.json,
                {
                    'torch': torch.__version__,
                    'device': device,
                    'threads': torch.get_num_threads(),
                    'figures': table.figures,
                },
            )


if __name__ == '__main__':
    run(main)
