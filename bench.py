"""Measure training, time to a loss, sampling, data and memory, also beside a nanoGPT checkout.

    python bench.py                                                       (a short round of all)
    python bench.py --mode=loss --peer=../nanoGPT --input=shakespeare.txt
    python bench.py --mode=sample --peer=transformers
    python bench.py --compare out-a out-b                                 (two finished runs)

Every figure comes from a process of its own. With --peer, ours and theirs run in turn, and the
table has medians, ranges, and the ratio of each pair. The speed of a matrix product is taken before
each run; the table says where that, or a ratio, varied by more than half.
"""

import asyncio
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from configurator import UserError, configure, run
from lyregpt import ROOT, measure, report
from lyregpt.load_test import complete, load_test, serving
from lyregpt.measure import Table, as_options, random_dataset, run_program

SHAPES: dict[str, dict[str, int]] = {
    'small': dict(n_layer=4, n_head=4, n_embd=128, block_size=64),  # nanoGPT's README, for a CPU
    'gpt2': dict(n_layer=12, n_head=12, n_embd=768, block_size=1024),
}
TRAIN = {  # (size, on CUDA): sequences at once, steps
    ('small', False): (12, 100), ('small', True): (12, 60),
    ('gpt2', False): (1, 8), ('gpt2', True): (16, 60),
}  # fmt: skip
Mode = Literal[
    'all', 'ceiling', 'start', 'train', 'memory', 'sample', 'data', 'loss', 'tokens', 'save',
    'scaling', 'serve',
]  # fmt: skip
OPTIMIZER = {'gpt2': 'adamw', 'modern': 'muon'}


@dataclass
class BenchConfig:
    """The options; the comment after each is its help. Raises ValueError for a bad one."""

    mode: Mode = 'all'  # ceiling start train memory sample data loss tokens save scaling serve
    peer: str = ''  # a nanoGPT checkout to measure beside; for sample also: transformers
    rounds: int = 3  # times that each side runs
    input: str = ''  # for loss and data: a text (for loss Tiny Shakespeare, if not prepared)
    dataset: str = ''  # for tokens: a folder with train.bin and val.bin of GPT-2's tokens
    target: float | None = None  # for loss: validation loss (None: nanoGPT's, CPU 1.88, GPU 1.4697)
    out_dir: str = 'out-darklyrics'  # for serve: the trained model
    seconds: float = 20  # for serve: how long clients keep asking
    tokens: int = 300  # for sample and serve: new tokens
    batch: int | None = None  # sequences at once; None: 1, and 16 for train on a GPU
    size: Literal['small', 'gpt2'] = 'gpt2'  # nanoGPT's CPU size, or GPT-2's 124M; random weights
    arch: Literal['gpt2', 'modern'] = 'gpt2'  # the peer's model with AdamW, or ours with Muon
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # ours; nanoGPT on a CPU: float32
    quantize: Literal['int8'] | None = None  # for sample: as in sample.py
    remat: bool = False  # for train: as in train.py
    compile: bool | Literal['auto'] = 'auto'  # as in train.py; for sample auto is CUDA
    device: str = 'auto'  # auto, cpu, cuda, mps
    json: str = ''  # write the figures to this file too
    compare: list[str] | None = None  # only compare two runs, as in --compare out-a out-b

    def __post_init__(self) -> None:
        for name in ('rounds', 'tokens'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: expected at least 1')
        if self.compare is not None and len(self.compare) != 2:
            folders = ','.join(self.compare)
            raise ValueError(f'compare={folders}: expected two folders, as in out-a out-b')


# -----------------------------------------------------------------------------
# The modes


def measure_ceiling(table: Table, config: BenchConfig) -> None:
    """What the machine can do: matrix products and copies."""
    table.measure('ceiling', partial(run_program, 'ceiling', device=config.device))


def measure_start(table: Table, config: BenchConfig) -> None:
    """Seconds until the first step of the main example."""
    words = 'train.py config/train_darklyrics.py --max_iters=1 --log_interval=1 --eval_iters=1'
    table.measure('start', partial(measure.train, [*words.split(), f'--device={config.device}']))


def measure_train(table: Table, config: BenchConfig) -> None:
    """Steps on random tokens: nanoGPT's model or our defaults, beside nanoGPT's train.py."""
    shape, cuda = SHAPES[config.size], 'cuda' in config.device
    batch, steps = TRAIN[config.size, cuda]
    batch = config.batch or batch
    log_interval, micro_batches = (10, 4) if cuda else (1, 1)
    words = f'--device={config.device} --max_iters={steps} --batch_size={batch} --decay_lr=False'
    words += f' --gradient_accumulation_steps={micro_batches} --weight_decay=0.1'
    ours = f'train.py --dtype={config.dtype} --log_interval={log_interval} --remat={config.remat}'
    ours += f' --arch={config.arch} --optimizer={OPTIMIZER[config.arch]} --compile={config.compile}'
    peer = f'train.py --log_interval=1 --eval_iters=1 --compile={cuda}'
    with tempfile.TemporaryDirectory() as data:
        random_dataset(data)
        common = [*words.split(), *as_options(**shape, dataset=data, eval_interval=10**6)]
        theirs = [*peer.split(), *common, f'--out_dir={data}']
        table.measure(
            f'train {config.size} {batch}x{shape["block_size"]}',
            partial(measure.train, ours.split() + common, skip=2),
            partial(measure.train_peer, theirs, config.peer, skip=2) if config.peer else None,
        )


def measure_loss(table: Table, config: BenchConfig) -> None:
    """Seconds to a validation loss, beside nanoGPT's whole training."""
    words = ['train.py', 'config/train_shakespeare_char.py', f'--device={config.device}']
    target, ours, peer = 1.4697, [], ['--log_interval=1']
    if 'cuda' not in config.device:
        target, ours = 1.88, ['config/tiny.py', '--eval_interval=270']
        peer += as_options(**SHAPES['small'], batch_size=12, dropout=0.0, compile=False)
        peer += as_options(max_iters=2000, lr_decay_iters=2000, eval_iters=20)
    target = config.target or target
    ours += as_options(target_val_loss=target, compile=config.compile, dtype=config.dtype)
    with tempfile.TemporaryDirectory() as data:
        measure.prepare_shakespeare(data, config.input)
        words.append(f'--dataset={data}')
        theirs = partial(measure.train_peer_to_loss, words + peer, config.peer, skip=10)
        train_twice = partial(measure.train_twice, words + ours)
        table.measure('loss', train_twice, theirs if config.peer else None)
    losses = table.figures['loss val_loss']['ours']
    reached = f'reached in {sum(loss <= target for loss in losses)} of {len(losses)} runs'
    print(f'validation loss over the whole split ≤ {target}: {reached}')


def measure_tokens(table: Table, config: BenchConfig) -> None:
    """Our loss with a half and a third of the tokens of 300 steps of nanoGPT's, on a real corpus.

    Raises UserError without a dataset of GPT-2 tokens.
    """
    if not os.path.isfile(os.path.join(config.dataset, 'train.bin')):
        raise UserError(
            f'dataset={config.dataset}: give a folder with train.bin and val.bin '
            '(python data/text/prepare.py --tokenizer=gpt2 makes one)'
        )
    data, sizes = os.path.abspath(config.dataset), as_options(**SHAPES[config.size])
    words = ['train.py', *sizes, f'--device={config.device}', f'--dataset={data}']
    words += as_options(batch_size=config.batch or 16, gradient_accumulation_steps=8)
    ours = '--eval_interval=1000000 --learning_rate=2e-3 --lr_schedule=linear --min_lr=0'
    ours += ' --warmdown=0.7 --tie_weights=True'
    peer = '--max_iters=300 --lr_decay_iters=300 --warmup_iters=20 --eval_interval=300'
    peer += ' --log_interval=10 --eval_iters=20 --always_save_checkpoint=True'
    peer += f' --compile={"cuda" in config.device}'
    theirs = partial(measure.train_peer_to_loss, words + peer.split(), config.peer, skip=20)
    for steps, title in ((150, 'ours 150 steps, peer 300'), (100, 'ours 100 steps')):
        schedule = as_options(max_iters=steps, warmup_iters=steps // 15)
        train = partial(measure.train, [*words, *ours.split(), *schedule])
        table.measure(f'tokens: {title}', train, theirs if config.peer and steps == 150 else None)


def measure_memory(table: Table, config: BenchConfig) -> None:
    """Peak memory of a training step by what holds it."""
    shape, batch = SHAPES[config.size], config.batch or 1
    values: dict[str, Any] = dict(device=config.device, arch=config.arch, dtype=config.dtype)
    values |= dict(optimizer=OPTIMIZER[config.arch], shape=shape | {'vocab_size': 50304})
    title = f'memory {config.size} {batch}x{shape["block_size"]}'
    table.measure(title, partial(run_program, 'memory', batch=batch, **values))


def measure_save(table: Table, config: BenchConfig) -> None:
    """How long a checkpoint holds up training, in the background and not."""
    words = 'train.py --max_iters=17 --checkpoint_interval=6 --log_interval=1 --eval_iters=1'
    words += ' --gradient_accumulation_steps=1 --eval_interval=1000000'
    words += f' --batch_size={config.batch or 1} --device={config.device} --dtype={config.dtype}'
    words += f' --arch={config.arch} --optimizer={OPTIMIZER[config.arch]}'
    for name, background in (('async', True), ('sync', False)):
        options = as_options(**SHAPES[config.size], checkpoint_async=background)
        train_and_save = partial(measure.train_and_save, words.split() + options)
        table.measure(f'save {config.size} {name}', train_and_save)


def measure_sample(table: Table, config: BenchConfig) -> None:
    """Tokens per second of `generate`, beside nanoGPT's or transformers'."""
    import torch

    from lyregpt.device import can_compile, pick_dtype

    on, batch = torch.device(config.device), config.batch or 1
    large = config.size == 'gpt2' and not config.quantize
    dtype = str(pick_dtype(config.dtype, on, large)).removeprefix('torch.')
    compiled = config.compile
    if compiled == 'auto':
        compiled = on.type == 'cuda' and not can_compile(on)
    shape = SHAPES[config.size] | {'vocab_size': 50257, 'bias': True}
    values: dict[str, Any] = dict(device=config.device, shape=shape, prompt=[1])
    values |= dict(batch=batch, tokens=config.tokens)
    theirs = None
    if config.peer == 'transformers':
        theirs = partial(run_program, 'sample_transformers', 'peer_benchmarks', **values)
    elif config.peer:
        theirs = partial(run_program, 'sample_nanogpt', 'peer_benchmarks', config.peer, **values)
    title = f'sample {config.size} {config.quantize or dtype} x{batch}'
    values |= dict(dtype=dtype, quantize=config.quantize, compile=compiled)
    table.measure(title, partial(run_program, 'sample', **values), theirs)


def measure_data(table: Table, config: BenchConfig) -> None:
    """MB of text prepared per second, and the time of a batch from small and huge files."""
    table.measure('data', partial(run_program, 'batches'))
    source = config.input or os.path.join(ROOT, 'data', 'darklyrics', 'demo.jsonl')
    with open(source, encoding='utf-8') as f:
        text = f.read()
    datasets = (('characters', 'shakespeare_char', 20_000_000), ('gpt2', 'shakespeare', 10_000_000))
    for kind, name, size in datasets:
        script = os.path.join('data', name, 'prepare.py')
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, 'input.txt')  # where nanoGPT's prepare.py looks for it
            with open(path, 'w', encoding='utf-8') as f:
                f.write((text * math.ceil(size / len(text)))[:size])
            megabytes = os.path.getsize(path) / 1e6
            words = [script, f'--input={path}', f'--out_dir={folder}/ours']
            theirs = None
            if config.peer:
                peer = [shutil.copy(os.path.join(config.peer, script), folder)]
                theirs = partial(measure.prepare, peer, folder, megabytes)
            table.measure(f'data {kind}', partial(measure.prepare, words, ROOT, megabytes), theirs)


def measure_scaling(table: Table, config: BenchConfig) -> None:
    """A step of train.py, 4,096 tokens, by model size, context and number of processes."""
    runs = [(layers, width, 512, 1, 'process') for layers, width in ((4, 128), (6, 384), (12, 768))]
    runs += [(6, 384, context, 1, 'process') for context in (128, 2048)]
    runs += [(6, 384, 512, processes, kind) for processes in (2, 4) for kind in ('ddp', 'fsdp')]
    for layers, width, context, processes, parallel in runs:
        words = f'--n_layer={layers} --n_embd={width} --n_head={width // 64} --block_size={context}'
        words += f' --batch_size={max(1, 4096 // context // processes)} --checkpoint_minutes=0'
        words += f' --gradient_accumulation_steps={processes} --dtype={config.dtype} --max_iters=8'
        words += (
            f' --device={config.device} --eval_interval=1000000 --eval_iters=1 --log_interval=1'
        )
        words = f'train.py {words} --warmup_iters=0'
        env = {}
        if processes > 1:
            launcher = f'-m torch.distributed.run --standalone --nproc_per_node={processes}'
            words = f'{launcher} {words} --parallel={parallel}'
        if 'cuda' not in config.device:  # the processes share the cores
            env['OMP_NUM_THREADS'] = str(max(1, (os.cpu_count() or 1) // processes))
        with tempfile.TemporaryDirectory() as data:
            random_dataset(data)
            step = partial(measure.seconds_a_step, [*words.split(), f'--dataset={data}'], env)
            table.measure(f'{layers}x{width} context {context}, {processes} {parallel}', step)


def measure_serve(table: Table, config: BenchConfig) -> None:
    """`lyregpt serve` with 1, 8 and 64 clients that stream, beside generating one by one.

    Raises UserError if the server does not start.
    """
    common: dict[str, Any] = dict(max_tokens=config.tokens, temperature=1.0)
    prompts = ('The rain', 'A stone in the', '', 'We sang until the lamp went out', 'Nobody')
    requests = [common | dict(prompt=prompts[i % 5], seed=i) for i in range(64)]
    loading = {name: getattr(config, name) for name in ('out_dir', 'device', 'dtype', 'quantize')}
    with serving(['--port=0', *as_options(**loading)]) as (server, port):
        expected = [asyncio.run(complete(port, request)).text for request in requests]
        for clients in (1, 8, 64):
            few, seconds = requests[:clients], config.seconds
            table.measure(
                f'serve {clients} clients',
                lambda: asyncio.run(load_test(server, port, few, expected, seconds)),
                partial(run_program, 'one_by_one', seconds=seconds, requests=few, **loading),
            )


MODES = {  # in the order of --mode=all, which measures the first six, and loss if there is a text
    'ceiling': measure_ceiling, 'start': measure_start, 'train': measure_train,
    'memory': measure_memory, 'sample': measure_sample, 'data': measure_data,
    'loss': measure_loss, 'tokens': measure_tokens, 'save': measure_save,
    'scaling': measure_scaling, 'serve': measure_serve,
}  # fmt: skip


def compare_runs(config: BenchConfig, *folders: str) -> None:
    """Two runs side by side. The page of `lyregpt serve` has their curves, under Watch."""
    a, b = map(report.read_run, folders)
    rows, remarks = report.compare(a, b)
    table = [('', a.out_dir, b.out_dir), *rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    for name, left, right in table:
        print(f'{name:<{widths[0]}}  {left:>{widths[1]}}  {right:>{widths[2]}}')
    for remark in remarks:
        print(remark)
    measure.save_json(config.json, {'runs': folders, 'figures': rows, 'remarks': remarks})


def check_peer(config: BenchConfig) -> None:
    """Make the path to nanoGPT absolute. Raises UserError if it is none, or serves no purpose."""
    if config.peer == 'transformers':
        if config.mode != 'sample':
            raise UserError('peer=transformers: serves --mode=sample only')
    elif config.peer:
        for name in ('train.py', 'model.py', 'config/train_shakespeare_char.py'):
            if not os.path.isfile(os.path.join(config.peer, name)):
                raise UserError(f'peer={config.peer}: not a nanoGPT checkout (it has no {name})')
        config.peer = os.path.abspath(config.peer)


def main() -> None:
    """Measure what the command line asks for."""
    config = configure(BenchConfig, description='Measure speed, time to a loss, data and memory.')
    if config.compare:
        compare_runs(config, *config.compare)
        return
    from lyregpt import threads  # before torch

    # isort: split
    import torch

    from lyregpt.device import matmul_ceiling, pick_device

    try:
        device = pick_device(config.device)
    except ValueError as error:
        raise UserError(str(error)) from None
    check_peer(config)
    config.device = str(device)
    modes: list[str] = [config.mode]
    if config.mode == 'all':
        modes = list(MODES)[:6]
        if config.input or measure.shakespeare_is_prepared():
            modes.append('loss')
        if not config.peer:
            config.tokens = min(config.tokens, 100)

    rounds = '1 round' if config.rounds == 1 else f'{config.rounds} rounds'
    print(f'torch {torch.__version__}, {device}, {threads.describe_threads()}; {rounds}')
    table = Table(lambda: matmul_ceiling(device, torch.float32), config.rounds)
    try:
        for mode in modes:
            MODES[mode](table, config)
    finally:  # show what was measured, even after an error
        if table.figures:
            table.show()
        machine = dict(torch=torch.__version__, device=config.device)
        threads_used = torch.get_num_threads()
        measure.save_json(
            config.json, machine | {'threads': threads_used, 'figures': table.figures}
        )


if __name__ == '__main__':
    run(main)
