"""Train a GPT: one file, read from top to bottom.

    python train.py config/train_darklyrics.py
    python train.py config/train_darklyrics.py --init_from=resume              (go on where it stopped)
    torchrun --standalone --nproc_per_node=2 train.py config/train_gpt2.py     (several processes or GPUs)

Or from Python: `from train import TrainConfig, train; train(TrainConfig(dataset='darklyrics', max_iters=100))`.

What a step does depends on the knobs, the seed and the step's number alone: batches and dropout are drawn from
(seed, step), so there is no loader or dice to save, and a resumed run takes the very steps that the unbroken one would.
(With max_minutes the clock has a say in the learning rate.)
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from lyregpt import threads  # before torch: it decides how torch's threads wait

# isort: split
import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from configurator import UserError, configure, given, run
from lyregpt import checkpoint, report
from lyregpt.dataset import Split, bytes_per_token, folder_of, read_meta, read_tokenizer
from lyregpt.device import (
    can_compile,
    environment,
    fast_bf16,
    is_sharded,
    keep_freed_memory,
    local,
    matmul_ceiling,
    memory_by_part,
    pick_dtype,
    put,
)
from lyregpt.distributed import Distributed, init_sharded_weights, lost_contact, shard, shares
from lyregpt.logger import Log
from lyregpt.optim import configure_optimizers
from lyregpt.originality import Index
from lyregpt.pretrained import GPT2_NAMES, from_pretrained, is_pretrained
from lyregpt.tokenizer import CharTokenizer, Tokenizer, file_of_pretrained, of_pretrained
from model import GPT, GPTConfig


@dataclass
class TrainConfig:
    """The knobs; the comment behind each is its help. Raises ValueError for a bad one."""

    # Where things are
    out_dir: str = 'out'  # checkpoints, metrics.csv, train.log, config.json and report.html go here
    dataset: str = 'openwebtext'  # a folder, or a name under data/
    prepare: str = ''  # the script and options that make the dataset, if they are not data/<dataset>/prepare.py
    init_from: str = 'scratch'  # scratch, resume; or tune gpt2 … gpt2-xl, a Hugging Face folder, a checkpoint; auto (or auto:gpt2 …): resume if it can
    # Model (see model.py); None leaves it to arch
    arch: Literal['modern', 'gpt2'] = 'modern'  # RoPE, RMSNorm, QK-norm, SwiGLU; or GPT-2 as it was
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads a block
    n_embd: int = 768  # width
    block_size: int = 1024  # tokens of context
    dropout: float = 0.0  # 0 is good for big data, 0.1 and more for small data seen many times
    bias: bool = False  # biases in linear layers and LayerNorms
    n_kv_head: int | None = None  # key and value heads (grouped-query attention); None: n_head
    head_dim: int | None = None  # width of a head; None: n_embd / n_head
    n_ff: int | None = None  # width inside the MLP
    position: Literal['learned', 'rope', 'sinusoidal'] | None = (
        None  # how the model knows where a token stands
    )
    norm: Literal['layernorm', 'rmsnorm'] | None = None  # which normalization
    mlp: Literal['gelu', 'swiglu', 'relu2'] | None = None  # which MLP
    qk_norm: bool | None = None  # normalize queries and keys
    tie_weights: bool | None = None  # one matrix for embedding and head
    # Batch
    batch_size: int | Literal['auto'] = (
        12  # windows a process works on at once; auto: as 1 in what is computed, but as many at once as fit
    )
    gradient_accumulation_steps: int = (
        5 * 8
    )  # times batch_size: the windows of one step, shared among all processes
    shard_groups: int = 1  # deal the dataset's shards into so many groups, each the source of its part of every batch: a node needs only its groups
    # Optimizer
    optimizer: Literal['muon', 'adamw'] = (
        'muon'  # Muon for the blocks' matrices and AdamW for the rest, or AdamW for all
    )
    learning_rate: float = (
        6e-4  # the highest; Muon's update has AdamW's size, so one rate serves both
    )
    max_iters: int = 600000  # steps in all
    max_minutes: float | None = (
        None  # train this long instead: the schedule is bent to the clock; max_iters and lr_decay_iters do not count
    )
    weight_decay: float = 1e-1  # of matrices
    beta1: float = 0.9  # AdamW's
    beta2: float = 0.95  # AdamW's
    grad_clip: float = 1.0  # the gradient's longest norm; 0 is off
    # Learning rate over time
    decay_lr: bool = True  # False: constant, and no warm-up
    lr_schedule: Literal['cosine', 'linear'] = (
        'cosine'  # cosine from the start, or constant and then straight down (a warm-down)
    )
    warmdown: float = 0.5  # for linear: the share of lr_decay_iters that goes down
    warmup_iters: int = 2000  # steps of straight rise at the start
    lr_decay_iters: int | None = None  # the step at which min_lr is reached; None: max_iters
    min_lr: float | None = None  # the lowest; None: a tenth of learning_rate
    # Watching
    eval_interval: int = 2000  # steps between evaluations (and checkpoints)
    eval_iters: int | None = (
        None  # None: the whole validation split; N: about N batches of it, the same ones every time
    )
    eval_only: bool = False  # evaluate once and stop
    log_interval: int = 10  # steps between log lines
    sample_interval: int = (
        0  # steps between samples written into the log, taken at evaluations; 0 is off
    )
    sample_start: str = ''  # what those samples continue; '': the beginning of a document
    originality: bool = False  # beside each of those samples, how much of it stands in the training split (see lyregpt/originality.py)
    wandb_log: bool = False  # log to Weights & Biases (pip install wandb)
    wandb_project: str = 'lyregpt'  # the project there
    wandb_run_name: str | None = None  # the run's name there; None: out_dir
    tensorboard_log: bool = False  # log to out_dir for TensorBoard (pip install tensorboard)
    report: bool = True  # end with out_dir/report.html: the run on one page, and what to try next (see lyregpt/report.py)
    # Stopping and saving
    patience: int = 0  # stop after this many evaluations without a better validation loss; 0 is off
    target_val_loss: float | None = None  # stop once the validation loss is this low
    always_save_checkpoint: bool = (
        True  # False: at evaluations save ckpt.pt only when the validation loss improved
    )
    checkpoint_interval: int = 0  # save ckpt.pt every so many steps, beside evaluations; 0 is off. SIGUSR1 asks for one at any time
    checkpoint_minutes: float = 10  # save ckpt.pt when the last one is older than this; 0 is off
    checkpoint_async: bool | Literal['auto'] = (
        'auto'  # write checkpoints while training goes on, from a copy in the host's memory; auto: on a GPU
    )
    # Machine
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = (
        'auto'  # auto: bfloat16 where it is fast (on a CPU: large models), else float16 or 32
    )
    threads: int | Literal['auto'] = (
        'auto'  # CPU threads; auto: OMP_NUM_THREADS, or one per usable core. Resuming keeps it: another number rounds differently
    )
    compile: bool | Literal['auto'] = (
        'auto'  # torch.compile the model; auto: on CUDA, where a compiler is at hand
    )
    remat: bool = False  # compute each block again in the backward pass instead of keeping what it made: less memory, a quarter more time
    parallel: Literal['ddp', 'fsdp'] = (
        'ddp'  # several processes: each has the whole model; or its part of every weight, for models that do not fit
    )
    cpu_offload: bool = False  # with fsdp on a GPU: weights, gradients and optimizer states lie in the host's memory
    backend: Literal['auto', 'nccl', 'gloo'] = (
        'auto'  # of torch.distributed; auto, and nccl without a GPU: what works here
    )
    timeout_minutes: float = 10  # a process that waits this long for the others gives up
    seed: int = 1337  # of initialization, data order and dropout

    def __post_init__(self) -> None:
        threads.check_threads(self.threads)
        for names, ok, expected in (
            ('batch_size', lambda v: v == 'auto' or v >= 1, 'auto or at least 1'),
            (
                'gradient_accumulation_steps eval_interval log_interval shard_groups',
                lambda v: v >= 1,
                'at least 1',
            ),
            ('max_minutes', lambda v: v is None or v > 0, 'None or more than 0'),
            (
                'max_iters warmup_iters sample_interval patience weight_decay grad_clip checkpoint_interval checkpoint_minutes',
                lambda v: v >= 0,
                '0 or more',
            ),
            ('learning_rate timeout_minutes', lambda v: v > 0, 'more than 0'),
            ('beta1 beta2', lambda v: 0 <= v < 1, 'from 0 to below 1'),
            ('warmdown', lambda v: 0 <= v <= 1, 'a share from 0 to 1'),
            ('eval_iters lr_decay_iters', lambda v: v is None or v >= 1, 'None or at least 1'),
            ('min_lr', lambda v: v is None or v >= 0, 'None, or 0 or more'),
        ):
            for name in names.split():
                if not ok(getattr(self, name)):
                    raise ValueError(f'{name}={getattr(self, name)}: expected {expected}')
        if self.parallel == 'fsdp' and self.dtype == 'float16':
            raise ValueError('dtype=float16 does not go with parallel=fsdp: use bfloat16')
        if self.cpu_offload and (self.parallel != 'fsdp' or self.sample_interval):
            raise ValueError('cpu_offload=True needs parallel=fsdp, and sample_interval=0')
        if self.originality and not self.sample_interval:
            raise ValueError(
                'originality=True tells about the samples in the log: it needs a sample_interval'
            )
        self.model_config(vocab_size=1)

    def model_config(self, vocab_size: int) -> GPTConfig:
        """The model that these knobs describe. Raises ValueError if they contradict one another."""
        return GPTConfig(
            vocab_size=vocab_size,
            **{
                f.name: getattr(self, f.name)
                for f in dataclasses.fields(GPTConfig)
                if hasattr(self, f.name)
            },
        )


MACHINE_KNOBS = tuple(
    'init_from out_dir device dtype compile remat parallel cpu_offload backend timeout_minutes wandb_log tensorboard_log report eval_only '
    'checkpoint_interval checkpoint_minutes checkpoint_async prepare'.split()  # prepare: a checkpoint must not name a script to be run
)
BEST_KEYS = ('model', 'model_args', 'iter_num', 'best_val_loss', 'config', 'tokenizer', 'meta')


@threads.threads_restored()
def train(config: TrainConfig) -> dict[str, Any]:
    """Train as `config` says; returns step, val_loss, best_val_loss, train_seconds (in training steps alone), first_step_at (a time).

    Raises UserError for what the user can mend. Ctrl-C or SIGTERM saves a checkpoint and raises SystemExit 130 or 143.
    """
    # -------------------------------------------------------------------------
    # Who are we: one process, or one of several that torchrun started
    fsdp = config.parallel == 'fsdp'
    distributed = Distributed(config.device, config.backend, config.timeout_minutes, alone=fsdp)
    main, device = distributed.is_main, distributed.device
    if device.type == 'cpu':
        keep_freed_memory()

    # -------------------------------------------------------------------------
    # Where do we start: from nothing, from a checkpoint, from GPT-2
    state: dict[str, Any] = {}
    source = changes = ''

    def read(where: str, best: bool) -> tuple[str, dict[str, Any]]:
        """The checkpoint that the first process finds whole; the others read the same."""
        found: dict[str, Any] = {}

        def find() -> str:
            path, found['state'] = checkpoint.load_from(where, best, optimizer=True, lazy=fsdp)
            return path

        path = distributed.broadcast(find)
        return path, found['state'] if main else checkpoint.load(
            path, optimizer=True, lazy=fsdp, checked=True
        )

    def resumable() -> bool:
        """Is there something to resume? For words that began a run anew, and that torchrun repeats at a restart: by this very job?"""
        if not os.path.isdir(config.out_dir) or not checkpoint.candidates(config.out_dir):
            return False
        return (
            auto == 'auto'
            or checkpoint.load_from(config.out_dir, best=False, lazy=True)[1].get('job')
            == job_name()
        )

    auto, _, otherwise = config.init_from.partition(':')
    if auto == 'auto' or distributed.restarted:
        otherwise = (otherwise or 'scratch') if auto == 'auto' else config.init_from
        config = with_knobs(config, {'init_from': 'resume' if distributed.broadcast(resumable) else otherwise})
    began_from = config.init_from  # of a resumed run, too: what its first steps began from
    if config.init_from == 'resume' and not os.path.isdir(config.out_dir):
        raise UserError(
            f'{config.out_dir}: nothing to resume there; to begin, say --init_from=scratch (a config file may say resume)'
        )
    if config.init_from == 'resume':
        source, state = read(config.out_dir, best=False)
        if main and not config.eval_only:
            checkpoint.set_aside_damaged(config.out_dir, source)
        config = resume_config(config, state, source, distributed.size)
        before = state.get('config', {})
        began_from = state.get('meta', {}).get('began_from', before.get('init_from'))
        names = [
            n
            for n in sorted(given(config) - set(MACHINE_KNOBS))
            if n in before and before[n] != getattr(config, n)
        ]
        changes = ', '.join(f'{n}={getattr(config, n)} (was {before[n]})' for n in names)
    elif config.init_from != 'scratch' and not is_pretrained(config.init_from):
        if not os.path.exists(config.init_from):
            raise UserError(
                f'init_from={config.init_from}: no such folder or file, and none of scratch, resume, auto, {", ".join(GPT2_NAMES)}'
            )
        source, state = read(config.init_from, best=True)
    n_threads = threads.set_threads(config.threads)
    if 'threads' not in given(
        config
    ):  # the number is this machine's; a config that is used again should not bring it along
        config = with_knobs(config, {'threads': 'auto'})
    folder = prepared_folder(config, distributed)
    tokenizer = read_tokenizer(folder)
    if state and tokenizer.state() != checkpoint.tokenizer_of(state, folder=folder).state():
        raise UserError(
            f'{folder} was prepared with another tokenizer than {source} was trained with: prepare it with '
            f'--tokenizer={os.path.join(os.path.dirname(source), "tokenizer.json")}'
        )
    if (
        is_pretrained(config.init_from)
        and tokenizer.fingerprint() != (theirs := of_pretrained(config.init_from)).fingerprint()
    ):
        name = 'gpt2' if theirs.kind == 'gpt2' else file_of_pretrained(config.init_from)
        raise UserError(
            f'{folder} has {tokenizer.vocab_size:,} {tokenizer.kind} tokens, which are not those of {config.init_from}: prepare it with --tokenizer={name}'
        )

    torch.manual_seed(config.seed)
    try:
        crop = config.block_size if 'block_size' in given(config) else None
        if state:
            model = (checkpoint.empty_model if fsdp else checkpoint.build_model)(
                state, source, dropout=config.dropout
            )
        elif config.init_from == 'scratch':
            # a large vocabulary is rounded up to a multiple of 64: GPUs multiply such matrices faster; the spare ids are never drawn
            size = tokenizer.vocab_size
            with torch.device('meta') if fsdp else contextlib.nullcontext():
                model = GPT(
                    config.model_config(vocab_size=size if size < 1024 else -(-size // 64) * 64)
                )
        else:
            model = from_pretrained(config.init_from, dropout=config.dropout)
            if fsdp:
                state['model'] = model.state_dict()
                with torch.device('meta'):
                    model = GPT(model.config)
        if crop and crop < model.config.block_size:
            if fsdp and model.config.position == 'learned':
                raise ValueError(
                    f'block_size={crop}: learned positions ({model.config.block_size} now) cannot be cropped under parallel=fsdp'
                )
            model.crop_block_size(crop)
        shape = {
            f.name: getattr(model.config, f.name)
            for f in dataclasses.fields(GPTConfig)
            if hasattr(config, f.name)
        }
        if config.init_from != 'scratch':
            for name, value in shape.items():
                longer = (
                    name == 'block_size' and config.init_from != 'resume'
                )  # a config for longer texts takes what the weights have
                if (
                    name in given(config)
                    and getattr(config, name) not in (value, None)
                    and name != 'dropout'
                    and not longer
                ):
                    raise UserError(
                        f'{name}={getattr(config, name)}, but {source or config.init_from} has {name}={value}: '
                        f'leave {name} out, or start from scratch'
                    )
            config = with_knobs(config, shape)
        dtype = pick_dtype(config.dtype, device, large=model.num_params() > 1_000_000)
    except ValueError as error:
        raise UserError(str(error)) from None
    if fsdp and dtype == torch.float16:
        dtype = torch.float32  # an older GPU: its gradients' scaler does not know sharded ones
    autocast = (
        torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    )
    model.remat = config.remat
    compiled = (
        config.compile is True or config.compile == 'auto' and device.type == 'cuda'
    ) and not config.eval_only
    why = can_compile(device) if compiled else ''
    if fsdp:  # no process ever holds the whole
        if compiled and not why:
            for block in model.transformer.h:
                block.compile()
        shard(model, distributed, dtype, config.cpu_offload)
        model.materialize(torch.device('cpu') if config.cpu_offload else device)
        if model.positions is not None:
            model.positions = model.positions.to(device)
        with torch.no_grad():
            if state.get('model'):
                for name, tensor in model.state_dict().items():
                    put(tensor, state['model'][name])
            elif source:
                state = checkpoint.read_folder(source, config.init_from == 'resume', into=model)
            else:
                init_sharded_weights(model)
    else:
        model.to(device)
    block_size = model.config.block_size

    # -------------------------------------------------------------------------
    # Data: this process's share of each step's windows
    batch_size = 1 if config.batch_size == 'auto' else config.batch_size
    rows = batch_size * config.gradient_accumulation_steps  # windows a step, over all processes
    if rows % config.shard_groups:
        raise UserError(
            f'the {rows} windows of a step cannot be shared equally among shard_groups={config.shard_groups}'
        )
    share = -(-rows // distributed.size)  # the largest
    micro = min(batch_size, share)
    if (
        config.batch_size == 'auto' and not config.eval_only
    ):  # a resumed run takes what was found before: other sizes add up in another order
        found = state.get('micro') if config.init_from == 'resume' else None
        micro = -int(distributed.all_reduce_max(-min(found or sequences_that_fit(model, share, autocast), share))[0])
    parts = shares(rows, distributed.rank, distributed.size, micro)
    tokens_per_step = rows * block_size
    per_group = rows // config.shard_groups
    train_splits = {
        group: Split(
            folder,
            'train',
            block_size,
            model.config.vocab_size,
            config.seed,
            group,
            config.shard_groups,
        )
        for group in range(parts[0][0] // per_group, (parts[-1][1] - 1) // per_group + 1)
    }
    val_split = Split(folder, 'val', block_size, model.config.vocab_size)
    n_tokens = (
        sum(s.n_tokens for s in train_splits.values()) * config.shard_groups // len(train_splits)
    )
    ratio, splits = bytes_per_token(folder), read_meta(folder).get('splits', {})
    pool = ThreadPoolExecutor(1)  # reads the next batch while the GPU works on this one

    def load_batch(step: int, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        start, stop = (
            parts[part][0],
            max(parts[part][1], parts[part][0] + 1),
        )  # of none, one is read and weighs nothing
        arrays = [
            split.batch(step * per_group + lo - group * per_group, hi - lo)
            for group, split in train_splits.items()
            if (lo := max(start, group * per_group)) < (hi := min(stop, (group + 1) * per_group))
        ]
        x, y = (torch.from_numpy(np.concatenate(a) if len(a) > 1 else a[0]) for a in zip(*arrays))
        if device.type == 'cuda':  # from pinned memory the copy does not make this thread wait
            x, y = x.pin_memory(), y.pin_memory()
        return x.to(device, non_blocking=True), y.to(device, non_blocking=True)

    # -------------------------------------------------------------------------
    # Optimizers and precision
    muon_dtype = (
        torch.bfloat16 if fast_bf16(device) and config.dtype != 'float32' else torch.float32
    )  # asked for by name, float32 holds here too
    optimizers = configure_optimizers(
        model,
        config.weight_decay,
        config.learning_rate,
        (config.beta1, config.beta2),
        config.optimizer,
        muon_dtype,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')  # TF32 for what stays in fp32
    step, best_val_loss, bad_evals, last_eval, seconds_before = 0, math.inf, 0, -1, 0.0
    losses: list[
        torch.Tensor
    ] = []  # since the last log line; read together, so that the GPU need not wait for us
    if config.init_from == 'resume':
        load_optimizers(optimizers, state['optimizer'], source)
        if state.get('scaler'):
            scaler.load_state_dict(state['scaler'])
        step, best_val_loss = int(state['iter_num']), float(state['best_val_loss'])
        bad_evals, last_eval, seconds_before = (
            state.get('bad_evals', 0),
            state.get('last_eval', -1),
            state.get('seconds', 0.0),
        )
        losses = [
            torch.tensor(loss if main else 0.0, device=device) for loss in state.get('losses', [])
        ]
    del state
    if compiled and not why:
        why = cannot_compile(
            model if fsdp else torch.compile(model),
            None if fsdp else model,
            load_batch(step, 0),
            autocast,
        )
        if why and fsdp:
            for block in model.transformer.h:
                block._compiled_call_impl = None
    compiled = compiled and not why
    forward: Any = torch.compile(model) if compiled and not fsdp else model
    if distributed.size > 1 and not fsdp:
        if compiled:
            torch._dynamo.reset()  # to compile again in parts, whose gradients are exchanged while the next are computed
        forward = torch.nn.parallel.DistributedDataParallel(
            forward,
            broadcast_buffers=False,
            device_ids=[device.index] if device.type == 'cuda' else None,
        )

    # -------------------------------------------------------------------------
    # What the outside sees: a log, a table of figures, checkpoints
    eval_rows = max(micro, 16384 // block_size)
    reserve = 0.0  # of max_minutes: seconds that an evaluation takes
    if config.max_minutes:
        most = 0.05 * 60 * config.max_minutes * distributed.size
        (reserve,) = distributed.all_reduce_max(time_to_evaluate(model, val_split, eval_rows, autocast))
        if (
            config.eval_iters is None and reserve * val_split.eval_sequences() > most
        ):  # from now on, also in resumed runs
            config = with_knobs(config, {'eval_iters': max(1, int(most / reserve / batch_size))})
    logs_: list[Log] = []
    if not config.eval_only:
        distributed.broadcast(lambda: logs_.append(Log(config, step, tokenizer)))
    log = logs_[0] if logs_ else None
    say = log.say if log else print if main else lambda text: None
    windows = val_split.eval_sequences(config.eval_iters and config.eval_iters * batch_size)
    reserve *= windows / distributed.size
    say(
        f'model: {config.arch if config.init_from == "scratch" else model.config.arch}, {model.num_params():,} parameters, {model.config.n_layer} layers, '
        f'{model.config.n_head} heads, {model.config.n_embd} wide, context {block_size}, vocabulary {model.config.vocab_size:,}'
    )
    say(
        f'data: {folder}, {n_tokens:,} training tokens; a step reads {tokens_per_step:,}, '
        + (
            f'for {config.max_minutes:g} minutes'
            if config.max_minutes
            else f'all {config.max_iters:,} steps read it {config.max_iters * tokens_per_step / n_tokens:.1f} times'
        )
        + f'; validation on {windows:,} of {val_split.eval_sequences():,} windows'
    )
    say(
        f'machine: {device.type}{f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else f", {threads.describe_threads()}"}, '
        f'{str(dtype).removeprefix("torch.")}, {"compiled" if compiled else "eager"}{f" ({why})" if why else ""}, {distributed.size} process{"es" * (distributed.size > 1)}'
        + ' (fsdp)' * fsdp
        + (f', {micro} windows at once' if config.batch_size == 'auto' else '')
    )
    if config.init_from == 'resume':
        no_more = (
            ''
            if config.max_minutes or step < config.max_iters
            else f'; max_iters={config.max_iters} leaves nothing to do, more is needed to go on'
        )
        say(
            f'resuming {source} at step {step:,}'
            + (f', with {changes}' if changes else '')
            + no_more
        )
    indexes: list[Index] = []
    if config.originality and not config.eval_only:
        distributed.broadcast(lambda: indexes.append(Index.open(folder)))
    ceiling = matmul_ceiling(device, dtype)
    took = {'training': 0.0, 'evaluation': 0.0, 'saving': 0.0, 'samples': 0.0}  # seconds
    if log:
        first = b''.join(
            shard.read(0, min(len(shard), 1 << 16)).tobytes() for shard in val_split.shards
        )
        log.note(
            began=time.strftime('%Y-%m-%d %H:%M:%S'),
            command=shlex.join(['python', *sys.argv])
            if os.path.basename(sys.argv[0]) == 'train.py'
            else '',
            from_step=step,
            began_from=began_from,
            changed=[
                f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default
            ],
            environment=environment(device)
            | {
                'numbers': str(dtype).removeprefix('torch.'),
                'model is': 'compiled' if compiled else 'eager',
                'processes': distributed.size,
            },
            model={
                'parameters': model.num_params(),
                'vocabulary': model.config.vocab_size,
                'arch': model.config.arch,
            },
            data={
                'folder': folder,
                'tokenizer': tokenizer.kind,
                'training tokens': n_tokens,
                'tokens a step': tokens_per_step,
                'windows at once': micro,
            }
            | {
                'validation tokens': val_split.n_tokens,
                'validation windows read': windows,
                'validation windows': val_split.eval_sequences(),
            }
            | {
                f'{word} bytes': splits.get(name, {}).get('bytes')
                for word, name in (('training', 'train'), ('validation', 'val'))
            }
            | {'validation fingerprint': hashlib.sha256(first).hexdigest()[:16]},
        )

    def costs() -> dict[str, Any]:
        return {
            'step': step,
            'seconds': took | {'training': train_seconds},
            'memory': memory_by_part(model, optimizers.values(), device),
        }

    @torch.no_grad()
    def evaluate() -> float:
        """Mean loss in nats per token over the validation windows, each read once by one of the processes."""
        model.eval()
        total = torch.zeros(2, dtype=torch.float64)
        for x, y in val_split.eval_batches(eval_rows, windows, distributed.rank, distributed.size):
            with autocast:
                loss = model(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device))
            count = int((y >= 0).sum())
            total += torch.tensor([loss.item() * count, count], dtype=torch.float64)
        model.train()
        total = distributed.all_reduce_sum(total.to(device) if distributed.size > 1 else total)  # MPS has no float64
        return float(total[0] / total[1])

    def enough() -> str:
        """Why the last evaluation ends the run, if it does."""
        if config.target_val_loss is not None and best_val_loss <= config.target_val_loss:
            return f'reached the target validation loss of {config.target_val_loss}'
        return (
            f'no better validation loss for {bad_evals} evaluations (patience)'
            if 0 < config.patience <= bad_evals
            else ''
        )

    def bits(loss: float) -> str:
        return f', {loss / ratio / math.log(2):.3f} bits per byte' if ratio else ''

    saved_at, saved_when = step if config.init_from == 'resume' else -1, time.perf_counter()

    def save(best: bool = False) -> None:
        """Write ckpt.pt, and with `best` best.pt. A full disk does not end a long run: it is said, and the last good files stay."""
        nonlocal saved_at, saved_when
        saving = time.perf_counter()
        settle()
        so_far = distributed.all_reduce_sum(torch.stack(losses)).tolist() if losses else []
        if losses and not main:
            losses[:] = [torch.zeros_like(loss) for loss in losses]
        elif losses:
            losses[:] = [torch.tensor(loss, device=device) for loss in so_far]
        saved_at, saved_when = step, time.perf_counter()
        if not main and not fsdp:
            return
        if log:
            log.note(**costs())
        state = {
            'model': model.state_dict(),
            'model_args': model.config.to_dict(),
            'iter_num': step,
            'best_val_loss': best_val_loss,
            'config': dataclasses.asdict(config) | {'threads': n_threads},
            'tokenizer': tokenizer.state(),
            'meta': {'bytes_per_token': ratio, 'splits': splits, 'began_from': began_from},
            'optimizer': {k: o.state_dict() for k, o in optimizers.items()},
            'scaler': scaler.state_dict(),
            'bad_evals': bad_evals,
            'last_eval': last_eval,
            'losses': so_far,
            'job': job_name(),
            'processes': distributed.size,
            'micro': micro if config.batch_size == 'auto' else None,
            'seconds': seconds_before + time.perf_counter() - began,
        }
        writer.submit(state, lambda copy: write(copy, best))
        took['saving'] += time.perf_counter() - saving

    def write(state: dict[str, Any], best: bool) -> None:
        """The part of saving that runs beside the training."""
        finite = torch.tensor(
            all(bool(local(w).isfinite().all()) for w in state['model'].values()), dtype=torch.int32
        )
        if fsdp:  # each looks at its parts
            dist.all_reduce(finite, dist.ReduceOp.MIN, distributed.files)
        if not finite:
            raise FloatingPointError('weights')
        if log:
            log.sync()  # its rows up to this step are on the disk before the checkpoint that counts on them
        for name in (['best'] if best else []) + ['ckpt']:
            name += '' if fsdp else '.pt'
            path = os.path.join(config.out_dir, name)
            part = state if name.startswith('ckpt') else {k: state[k] for k in BEST_KEYS}
            try:
                if fsdp:
                    checkpoint.save_folder(path, part, name == 'ckpt', distributed.files)
                else:
                    checkpoint.save(path, part, name == 'ckpt.pt')
                unsaved.pop(name, None)
                saved[name] = state['iter_num']
            except OSError as error:
                unsaved[name] = str(error.strerror or error)
                say(
                    f'WARNING: {path} could not be saved at step {state["iter_num"]} ({unsaved[name]}); the last good one is kept. '
                    'Make room: saving is tried again.'
                )

    def settle(seconds: float | None = None) -> None:
        """Wait for the writing of the last checkpoint, or (`seconds=0`) see whether it came to an end."""
        try:
            writer.wait(seconds)
        except FloatingPointError as error:
            distributed.fail(went_wrong(str(error), saved_at))

    def went_wrong(what: str, at: int) -> str:
        if log:
            log.note(end=f'the {what} became NaN or infinite at step {at}')
        return (
            f'the {what} became NaN or infinite at step {at}; '
            + (
                f'{config.out_dir}/{ckpt} keeps the last good state, of step {saved[ckpt]}. '
                if ckpt in saved
                else 'nothing was saved yet. '
            )
            + f'Try a lower learning_rate (now {config.learning_rate}), more warmup_iters, or dtype=float32'
        )

    ckpt = 'ckpt' if fsdp else 'ckpt.pt'
    saved: dict[str, int] = (
        {ckpt: step} if config.init_from == 'resume' else {}
    )  # file: step it holds
    unsaved: dict[str, str] = {}
    writer = checkpoint.Writer(
        config.checkpoint_async is True
        or config.checkpoint_async == 'auto'
        and device.type == 'cuda',
        device,
        distributed.cpu_mesh,
    )
    if config.eval_only:
        pool.shutdown()
        val_loss = evaluate()
        say(f'validation loss {val_loss:.4f} nats per token{bits(val_loss)}')
        distributed.close()
        return {
            'step': step,
            'val_loss': val_loss,
            'best_val_loss': min(val_loss, best_val_loss),
            'train_seconds': 0.0,
        }

    # -------------------------------------------------------------------------
    # The loop
    asked: dict[str, Any] = {
        'signal': 0,
        'save': 0,
        'at': 0,
    }  # what this process was asked for by signals
    stopping = 0  # the signal that all processes agreed to stop for
    restore = catch_signals(asked)
    total, quiet = (
        None if config.max_minutes else config.max_iters,
        not main or not sys.stderr.isatty(),
    )
    bar = tqdm(
        total=total, initial=step, disable=quiet, unit='step', dynamic_ncols=True, smoothing=0.05
    )
    began = last_log = time.perf_counter()
    train_seconds, first_step_at, val_loss, train_loss, told = 0.0, 0.0, math.nan, math.nan, False
    outcome = (
        enough() if step == last_eval else ''
    )  # of a run that had ended: it has not begun anew by being resumed
    grad_norm: Any = 0.0
    progress = (
        seconds_before / (60 * config.max_minutes) if config.max_minutes else None
    )  # the same on all processes
    evaluated_at = progress or 0.0
    over = (
        step >= config.max_iters if progress is None else progress >= 1
    )  # nothing left to do
    if over and progress:
        say(f'the {config.max_minutes:g} minutes are spent: give a larger --max_minutes to go on')
    model.train()
    wanted = False  # a checkpoint, by signal or by the clock
    upcoming = pool.submit(load_batch, step, 0)
    try:
        while True:
            settle(0)
            # Evaluate, and save what we have; on a budget, evaluations take about a tenth of it at most
            due = step > 0 and step % config.eval_interval == 0
            if progress is not None and config.max_minutes:
                due = due and (progress - evaluated_at) * 60 * config.max_minutes >= 9 * reserve
            if step != last_eval and (over or due) and not stopping:
                evaluating = time.perf_counter()
                val_loss, last_eval = evaluate(), step
                took['evaluation'] += time.perf_counter() - evaluating
                if not math.isfinite(val_loss):
                    distributed.fail(went_wrong('validation loss', step))
                better = val_loss < best_val_loss
                best_val_loss, bad_evals = (
                    min(val_loss, best_val_loss),
                    0 if better else bad_evals + 1,
                )
                if log:
                    log.row(
                        step=step,
                        tokens=step * tokens_per_step,
                        seconds=seconds_before + time.perf_counter() - began,
                        val_loss=val_loss,
                        val_bpb=val_loss / ratio / math.log(2) if ratio else None,
                    )
                    remark = 'the best so far' if better else f'best {best_val_loss:.4f}'
                    say(f'step {step:,}: validation loss {val_loss:.4f}{bits(val_loss)} ({remark})')
                    if bad_evals >= 3 and not told and train_loss < best_val_loss:
                        say(
                            f'The validation loss has not improved for {bad_evals} evaluations while the training loss fell to {train_loss:.3f}: the model is '
                            'learning this text by heart. best.pt keeps the best weights; more text, more dropout or a smaller model would help.'
                        )
                        told = True
                if better or config.always_save_checkpoint:
                    save(best=better)
                if config.sample_interval and step % config.sample_interval == 0 and (main or fsdp):
                    writing = time.perf_counter()
                    say(
                        write_sample(
                            model,
                            tokenizer,
                            config.sample_start,
                            index=indexes[0] if indexes else None,
                        )
                    )
                    took['samples'] += time.perf_counter() - writing
                outcome = enough()
                last_log = time.perf_counter()
                if distributed.size == 1:
                    reserve = last_log - evaluating
                evaluated_at = progress or 0.0
            if (
                saved_at != step > 0
                and not stopping
                and (
                    wanted or config.checkpoint_interval and step % config.checkpoint_interval == 0
                )
            ):
                save()
            wanted = False
            if stopping or outcome or over:
                break

            # One step: forward and backward over this process's windows, then the update
            started = time.perf_counter()
            lr = learning_rate(config, step, progress)
            for optimizer in optimizers.values():
                for group in optimizer.param_groups:
                    group['lr'] = lr
                    if (
                        'momentum' in group
                    ):  # Muon's begins lower: the first updates should follow the first gradients (Jordan et al. 2024)
                        group['momentum'] = 0.85 + 0.1 * min(1.0, step / 300)
            step_loss = torch.zeros((), device=device)
            for part, (start, stop) in enumerate(parts):
                if asked['signal'] and part and distributed.size == 1:
                    break  # in a long step: what is done of it counts for nothing, and resuming does it again
                x, y = upcoming.result()
                last = part == len(parts) - 1
                upcoming = pool.submit(load_batch, step + last, 0 if last else part + 1)
                if config.dropout:  # its dice are a function of the pass's first window
                    torch.manual_seed((config.seed * 1_000_003 + step * rows + start) % 2**63)
                with (
                    forward.no_sync()
                    if distributed.size > 1 and not last and not fsdp
                    else contextlib.nullcontext()
                ):
                    with autocast:
                        loss = forward(x, y) * (
                            (stop - start) * distributed.size / rows
                        )  # the processes' gradients are averaged
                    scaler.scale(loss).backward()
                step_loss += loss.detach() / distributed.size
            if not last:
                stopping = asked['signal']
                continue
            for optimizer in optimizers.values():
                scaler.unscale_(optimizer)
            if config.grad_clip or scaler.is_enabled():
                grad_norm = torch.nn.utils.clip_grad_norm_(
                    model.parameters(), config.grad_clip or math.inf
                )
                if fsdp:
                    grad_norm = grad_norm.full_tensor()
            writer.before_update()
            skip = scaler.is_enabled() and not math.isfinite(
                float(grad_norm)
            )  # by all optimizers or none: each would look at its own
            for optimizer in optimizers.values():
                if not skip:
                    scaler.step(optimizer)
                optimizer.zero_grad(set_to_none=True)
            scaler.update()
            losses.append(step_loss)
            step += 1
            bar.update(1)

            # Read the figures, and look whether we should stop, every log_interval steps: each look makes a GPU wait
            logs = (
                step % config.log_interval == 0
                or step % config.eval_interval == 0
                or step == config.max_iters
            )
            spent = seconds_before + time.perf_counter() - began
            looks = distributed.size == 1 or logs or device.type == 'cpu'
            if looks:
                wanted, asked['save'] = (
                    asked['save']
                    or 0 < 60 * config.checkpoint_minutes < time.perf_counter() - saved_when,
                    0,
                )
                signaled, spent, save_now = distributed.all_reduce_max(asked['signal'], spent, wanted)
                stopping, wanted = int(signaled), bool(save_now)
            if config.max_minutes is None:
                over = step >= config.max_iters
            elif looks:
                progress = spent / max(1e-9, 60 * config.max_minutes - reserve)
                over = progress >= 1
            logs = logs or over
            if logs:
                figures = distributed.all_reduce_sum(torch.stack(losses))
                if len(bad := (~figures.isfinite()).nonzero()):
                    distributed.fail(went_wrong('loss', step - len(losses) + int(bad[0]) + 1))
                if not scaler.is_enabled() and not math.isfinite(float(grad_norm)):
                    distributed.fail(went_wrong('gradient', step))
                train_loss, steps = float(figures.mean()), len(losses)
                losses.clear()
                now = time.perf_counter()
                speed, last_log = steps * tokens_per_step / (now - last_log), now
                mfu = speed / distributed.size * model.flops_per_token() / ceiling
                if log:
                    log.row(
                        step=step,
                        tokens=step * tokens_per_step,
                        seconds=seconds_before + now - began,
                        train_loss=train_loss,
                        lr=lr,
                        grad_norm=float(grad_norm) if config.grad_clip else None,
                        tokens_per_second=round(speed),
                        mfu=mfu,
                    )
                    bar.set_postfix_str(f'loss {train_loss:.3f}, {speed:,.0f} tokens/s')
                    if not bar.disable:
                        log.say(
                            f'step {step:,}: loss {train_loss:.4f}, lr {lr:.2e}, {speed:,.0f} tokens/s',
                            console=False,
                        )
                    elif step % (10 * config.log_interval) == 0 or step <= 10 * config.log_interval:
                        left = (
                            60 * config.max_minutes - spent
                            if config.max_minutes
                            else (config.max_iters - step) * tokens_per_step / speed
                        )
                        log.say(
                            f'step {step:,}{"" if config.max_minutes else f"/{config.max_iters:,}"}: loss {train_loss:.4f}, lr {lr:.2e}, '
                            f'{speed:,.0f} tokens/s, {100 * mfu:.0f}% of the measured ceiling, {clock(max(0, left))} left'
                        )
            train_seconds += time.perf_counter() - started
            first_step_at = first_step_at or time.time()
        if saved_at != step:
            save()
        settle()
    except RuntimeError as error:
        raise out_of_memory(error, config) or error from None
    finally:
        bar.close()
        restore()
        pool.shutdown(cancel_futures=True)
        if log and sys.exc_info()[0] is not None:
            log.close()

    # -------------------------------------------------------------------------
    # The end
    if outcome:
        say(f'stopped at step {step:,}: {outcome}')
    if distributed.all_reduce_max(bool(unsaved))[0]:
        if log:
            log.close()
        distributed.fail(
            '; '.join(
                f'{config.out_dir}/{name} was not saved ({why})' for name, why in unsaved.items()
            )
            + ': make room and resume'
        )
    if log:
        if stopping:
            log.note(
                end=f'stopped by {signal.Signals(stopping).name}'
            )  # and no report: who stops a run may not wait for one
            say(
                f'{signal.Signals(stopping).name}: saved {config.out_dir}/{ckpt} at step {step:,}; go on with --init_from=resume'
            )
        else:
            log.note(end=f'stopped: {outcome}' if outcome else 'done', **costs())
            say(
                f'done: {step:,} steps in {clock(seconds_before + time.perf_counter() - began)}, best validation loss {best_val_loss:.4f}; '
                f'write with: python sample.py --out_dir={config.out_dir}'
                + (f'; {write_report(config.out_dir)}' if config.report else '')
            )
        log.close()
    distributed.close()
    if stopping:
        sys.exit(128 + stopping)
    return {
        'step': step,
        'val_loss': val_loss,
        'best_val_loss': best_val_loss,
        'train_seconds': train_seconds,
        'first_step_at': first_step_at,
    }


# -----------------------------------------------------------------------------
# The parts that the loop calls


def learning_rate(config: TrainConfig, step: int, progress: float | None = None) -> float:
    """The rate of the step from `step` to `step + 1` updates; with max_minutes, `progress` of the budget takes the place of the steps."""
    if not config.decay_lr:
        return config.learning_rate
    end = max(1, config.lr_decay_iters or config.max_iters)
    rise, done, warm = (step + 1) / (config.warmup_iters + 1), step / end, config.warmup_iters / end
    if progress is not None:
        rise, done, warm = (
            max(rise, progress / 0.05),
            progress,
            0.0,
        )  # the warm-up takes a twentieth of the time at most
    if rise < 1:
        return config.learning_rate * rise
    low = config.learning_rate / 10 if config.min_lr is None else config.min_lr
    if config.lr_schedule == 'linear':
        left = (1 - done) / max(1e-9, 1 - max(1 - config.warmdown, warm))
        return low + (config.learning_rate - low) * min(1.0, max(0.0, left))
    done = min(1.0, (done - warm) / max(1e-9, 1 - warm))
    return low + 0.5 * (1 + math.cos(math.pi * done)) * (config.learning_rate - low)


def one_pass(model: Any, x: torch.Tensor, y: torch.Tensor, autocast: Any) -> None:
    """Forward and backward. x and y (B, T); the gradients are added to those that are there."""
    with autocast:
        loss = model(x, y)
    loss.backward()


def gradient_norms(model: Any, x: torch.Tensor, y: torch.Tensor, autocast: Any) -> list[float]:
    """Each parameter's gradient norm for B copies of one sequence, x and y (B, T), divided by B. Clears the gradients."""
    try:
        with autocast:
            loss = (
                model(x, y) * y.numel()
            )  # the sum: gradients of the mean could underflow in float16
        loss.backward()
        return [
            0.0 if p.grad is None else float(p.grad.norm()) / len(y) for p in model.parameters()
        ]
    finally:
        model.zero_grad(set_to_none=True)


def cannot_compile(
    compiled: Any, eager: GPT | None, batch: tuple[torch.Tensor, torch.Tensor], autocast: Any
) -> str:
    """Compile a `torch.compile`d model by a pass over a batch like those to come. '' if it works, else one line that says why not.

    A miscompilation can go unnoticed: torch 2.11 gave this model zero gradients. So the norm of each parameter's gradient is
    compared with the `eager` model's, if given, over one sequence; the compiled model gets a batch of copies of that sequence.
    """
    x, y = (ids[:1].expand_as(ids).contiguous() for ids in batch)
    zeros = [] if eager is None else [p for p in eager.parameters() if p.dim() > 1 and not p.any()]
    try:
        with torch.no_grad():
            for p in zeros:  # matrices that begin at zero let no gradient through
                p.normal_(std=0.02)
        expected = [] if eager is None else gradient_norms(eager, x[:1], y[:1], autocast)
        found = gradient_norms(compiled, x, y, autocast)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler's errors have no common class
        return f'compiling failed: {(str(error).strip() or type(error).__name__).splitlines()[0][:200]}'
    finally:
        with torch.no_grad():
            for p in zeros:
                p.zero_()
    wrong = [
        f'{b:.3g} instead of {a:.3g}' for a, b in zip(expected, found) if not a / 10 <= b <= a * 10
    ]  # dropout makes them differ, too
    return f'compiled gradients are wrong: a norm of {wrong[0]}' if wrong else ''


def sequences_that_fit(model: GPT, share: int, autocast: Any) -> int:
    """How many windows at once: on CUDA what its memory holds beside weights, gradients and optimizer states; elsewhere about 4,096 tokens."""
    device = model.lm_head.weight.device
    if device.type != 'cuda':
        return max(1, min(share, 4096 // model.config.block_size))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # from the second micro-batch on they are there
    before, peaks = torch.cuda.memory_allocated(), []
    try:
        for rows in (1, 2):
            x = torch.zeros(rows, model.config.block_size, dtype=torch.long, device=device)
            torch.cuda.reset_peak_memory_stats()
            one_pass(model, x, x, autocast)
            peaks.append(torch.cuda.max_memory_allocated() - before)
    except torch.OutOfMemoryError:
        if not peaks or is_sharded(
            model.lm_head.weight
        ):  # one that gave up alone would leave the others waiting
            raise
        return 1  # one window fits, two do not
    finally:
        model.zero_grad(set_to_none=True)
    one_more = max(
        peaks[1] - peaks[0], peaks[0] // 8, 1
    )  # what all passes share may hide what a window takes
    needed = 12 * sum(
        local(p).numel() for p in model.parameters()
    )  # the gradients, and AdamW's two states, in fp32
    free = (
        torch.cuda.mem_get_info(device)[0]
        + torch.cuda.memory_reserved()
        - torch.cuda.memory_allocated()
    )
    fit = max(1, min(share, 1 + int((0.9 * free - needed - peaks[0]) / one_more)))
    return -(-share // -(-share // fit))  # equal parts


@torch.no_grad()
def time_to_evaluate(model: GPT, split: Split, rows: int, autocast: Any) -> float:
    """Seconds per window of an evaluation, by one batch (after another one that warms up)."""
    for x, y in split.eval_batches(rows, min(rows, split.eval_sequences())):
        for _ in range(2):
            started = time.perf_counter()
            with autocast:
                model(*(torch.from_numpy(a).to(model.lm_head.weight.device) for a in (x, y))).item()
    return (time.perf_counter() - started) / len(x)


def prepared_folder(config: TrainConfig, distributed: Distributed) -> str:
    """The dataset's folder, made first by its prepare.py if that works without network. Raises UserError that names the command."""
    folder = folder_of(config.dataset)
    script, *options = shlex.split(config.prepare) or [os.path.join(folder, 'prepare.py')]
    if not any(
        name.startswith('train') or '_train_' in name
        for name in (os.listdir(folder) if os.path.isdir(folder) else [])
        if name.endswith('.bin')
    ):
        command = shlex.join(['python', script, *options])
        if not os.path.isfile(script):
            raise UserError(
                f'dataset={config.dataset}: neither {folder}/train.bin nor {script} is there; data/text/prepare.py makes a dataset of your own files'
            )
        if config.init_from == 'resume' and not {'dataset', 'prepare'} & given(
            config
        ):  # whose words name the script? a checkpoint's run nothing
            raise UserError(
                f'{folder}, which the checkpoint was trained on, is not prepared; prepare it first, or name another with --dataset'
            )
        if distributed.local_rank == 0:
            with open(script, encoding='utf-8') as f:
                answers = 'offline:' in f.read()  # does it declare the knob that forbids downloads?
            print(f'{folder} is not prepared yet: running {command}', flush=True)
            if (
                not answers
                or subprocess.run(
                    [sys.executable, script, *options, '--offline'], check=False
                ).returncode
            ):
                raise UserError(f'{folder} is not prepared; prepare it first: {command}')
    distributed.all_reduce_max(0)  # the others wait
    return folder


def resume_config(
    config: TrainConfig, state: dict[str, Any], path: str, processes: int
) -> TrainConfig:
    """The checkpoint's options, except those that the user sets and those of the machine; `threads` only for as many processes.

    Raises UserError if there is nothing to resume, or they contradict one another.
    """
    if 'optimizer' not in state or 'iter_num' not in state:
        raise UserError(
            f'{path}: holds weights only, nothing to resume; fine-tune it with --init_from={path}'
        )
    names = {f.name for f in dataclasses.fields(TrainConfig)} - set(MACHINE_KNOBS) - given(config)
    if state.get('processes') != processes:
        names.discard('threads')
    known = {k: v for k, v in state.get('config', {}).items() if k in names}
    if 'param_groups' in state['optimizer']:  # nanoGPT's: one AdamW, and a model of GPT-2's kind
        known |= {'optimizer': 'adamw', 'arch': 'gpt2'}
    try:
        return with_knobs(
            config, known | {k: v for k, v in state['model_args'].items() if k in names}
        )
    except (ValueError, TypeError) as error:
        raise UserError(f'{path} cannot go on with these knobs: {error}') from None


def with_knobs(config: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    """The config with other values; what the user set stays known."""
    changed = dataclasses.replace(config, **values)
    object.__setattr__(changed, 'given', given(config))
    return changed


def load_optimizers(
    optimizers: dict[str, torch.optim.Optimizer], saved: dict[str, Any], path: str
) -> None:
    """Put the saved states in. Positions cropped since then are cropped in the states too.

    Raises UserError if they are of other optimizers.
    """
    saved = {'adamw': saved} if 'param_groups' in saved else saved
    if saved.keys() != optimizers.keys():
        raise UserError(
            f'{path}: was trained with {" and ".join(saved)}, now asked to go on with {" and ".join(optimizers)}: leave optimizer out'
        )
    for name, optimizer in optimizers.items():
        knobs = [
            {k: v for k, v in group.items() if k != 'params'} for group in optimizer.param_groups
        ]
        try:
            if is_sharded(optimizer.param_groups[0]['params'][0]):
                checkpoint.shard_like(optimizer, saved[name])
            optimizer.load_state_dict(saved[name])
            for group, now in zip(optimizer.param_groups, knobs):
                group.update(now)  # the checkpoint brings the state; the knobs are this run's
        except (ValueError, KeyError) as error:
            raise UserError(
                f'{path}: its optimizer state does not fit this model ({error})'
            ) from None
        for p, values in optimizer.state.items():
            for key, value in values.items():
                if (
                    torch.is_tensor(value)
                    and value.dim() == p.dim()
                    and value.dim()
                    and value.size(0) > p.size(0)
                ):
                    values[key] = value[: p.size(0)].clone()


def write_sample(
    model: GPT, tokenizer: Tokenizer, start: str, tokens: int = 200, index: Index | None = None
) -> str:
    """A short text by the model as it is now, and with `index` how new it is; draws nothing from training's dice."""
    known = ''.join(
        c for c in start if not isinstance(tokenizer, CharTokenizer) or c in tokenizer.chars
    )
    end = [] if tokenizer.eot is None else [tokenizer.eot]
    ids = [
        int(t)
        for t in model.generate(
            [end + tokenizer.encode(known) or [0]],
            tokens,
            temperature=0.8,
            vocab_size=tokenizer.vocab_size,
            stop_tokens=end,
        )
    ]
    text = known + tokenizer.decode(ids[:-1] if ids[-1:] == end else ids)
    lines = text.count('\n') + 1  # told, because a text may hold a line that looks like its end
    return f'--- sample of {lines} line{"s" * (lines > 1)}\n{text}\n---' + (
        f' {index.compare(text, since=len(known))}' if index else ''
    )


def write_report(out_dir: str) -> str:
    """Make report.html; returns where it is, or why there is none: nothing that goes wrong here may fail a training that came to its end."""
    try:
        return f'look at: {report.write(out_dir)}'
    except Exception as error:
        return f'no report ({(str(error) or type(error).__name__).splitlines()[0]}); make it with: python -m lyregpt report --out_dir={out_dir}'


def catch_signals(asked: dict[str, Any]) -> Any:
    """Let Ctrl-C, SIGTERM and a terminal that closes (SIGHUP) ask for a stop at the end of the step, SIGUSR1 for a checkpoint.

    A second Ctrl-C or SIGTERM stops at once. Returns what undoes this.
    """

    def ask(number: int, frame: Any) -> None:
        if not asked['signal'] and 'TORCHELASTIC_RUN_ID' not in os.environ:
            signal.signal(number, old[number])
        elif (
            asked['signal'] and time.monotonic() - asked['at'] > 5
        ):  # sooner: torchrun passes on what the terminal or Slurm sent to all
            signal.signal(number, old[number])
            signal.raise_signal(number)
        asked['signal'], asked['at'] = asked['signal'] or number, asked['at'] or time.monotonic()
        if number in hangup:  # nobody is there to read on; a file or a pipe still is
            for stream in terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

    old: dict[int, Any] = {}
    terminals = [
        stream for stream in (1, 2) if os.isatty(stream)
    ]  # asked now: one that is gone is none any more
    hangup = (
        [signal.SIGHUP]
        if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
        else []
    )  # not on Windows, nor under nohup
    try:
        old |= {
            number: signal.signal(number, ask)
            for number in (signal.SIGINT, signal.SIGTERM, *hangup)
        }
        if hasattr(signal, 'SIGUSR1'):  # not on Windows
            old[signal.SIGUSR1] = signal.signal(
                signal.SIGUSR1, lambda number, frame: asked.update(save=1)
            )
    except ValueError:  # not in the main thread (some notebooks): signals are someone else's
        return lambda: None
    return lambda: [signal.signal(number, handler) for number, handler in old.items()]


def clock(seconds: float) -> str:
    """1:02:03, or 02:03."""
    hours, rest = divmod(int(seconds), 3600)
    return (
        f'{hours}:{rest // 60:02d}:{rest % 60:02d}'
        if hours
        else f'{rest // 60:02d}:{rest % 60:02d}'
    )


def job_name() -> str:
    """What tells this torchrun from every other one, and is the same after a restart; '' without torchrun."""
    return ' '.join(
        os.environ.get(name, '') for name in ('TORCHELASTIC_RUN_ID', 'MASTER_ADDR', 'MASTER_PORT')
    ).strip()


def out_of_memory(error: RuntimeError, config: TrainConfig) -> UserError | None:
    """What to say if the error is one of memory; torch.OutOfMemoryError is, and the CPU's allocator has no class of its own."""
    text = str(error)
    if (
        not isinstance(error, torch.OutOfMemoryError)
        and 'not enough memory' not in text
        and 'allocate memory' not in text
    ):
        return None
    wanted = re.search(r'ried to allocate ([\d.]+ [KMG]?i?B|\d+ bytes)', text)
    free = re.search(r'of which ([\d.]+ [KMG]?i?B) is free', text)
    amount = (
        (f' ({wanted[1]} more wanted' + (f', {free[1]} free)' if free else ')')) if wanted else ''
    )
    windows = config.gradient_accumulation_steps * (
        config.batch_size if isinstance(config.batch_size, int) else 1
    )
    fewer = f'--batch_size=auto --gradient_accumulation_steps={windows} takes as many windows at once as fit, for the same steps; '
    return UserError(
        f'out of memory{amount}: '
        + (
            f'batch_size is {config.batch_size}; {fewer}'
            if config.batch_size not in ('auto', 1)
            else ''
        )
        + ('' if config.remat else '--remat=True needs less for a quarter more time; ')
        + 'or use a shorter block_size or a smaller model'
    )


def main() -> None:
    """Train as the command line says; lost processes and lack of memory get one line."""
    config = configure(TrainConfig, description='Train a GPT.')
    if hasattr(signal, 'SIGUSR1'):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until there is something to save
    try:
        train(config)
    except RuntimeError as error:
        if reason := lost_contact(error):
            rank = os.environ.get('RANK')
            print(
                f'train.py: process {rank} lost the others, or waited {config.timeout_minutes:g} minutes for them: {reason}',
                file=sys.stderr,
            )
            sys.exit(1)
        raise out_of_memory(error, config) or error from None
    except UserError:
        if int(os.environ.get('LOCAL_RANK', 0)):
            time.sleep(
                10
            )  # a mistake that all processes found is said by the first one, at whose end torchrun ends the rest
        raise


if __name__ == '__main__':
    run(main)
