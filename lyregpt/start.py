"""Where a run starts: from scratch, from a checkpoint, or from pretrained weights."""

import contextlib
import dataclasses
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import torch

from configurator import UserError, given
from lyregpt import ROOT, checkpoint, threads
from lyregpt.dataset import folder_of, read_tokenizer
from lyregpt.device import put
from lyregpt.distributed import Distributed, init_sharded_weights, job_name, shard
from lyregpt.pretrained import GPT2_NAMES, from_pretrained, is_pretrained
from lyregpt.tokenizer import Tokenizer, file_of_pretrained, of_pretrained
from model import GPT, GPTConfig, ceil_div

# Options of this machine and this start, which a resumed run does not take from its checkpoint.
# `prepare` is one of them because a checkpoint must not name a script to be run.
MACHINE_OPTIONS = frozenset(
    (
        *('init_from', 'out_dir', 'device', 'dtype', 'compile', 'remat', 'parallel', 'cpu_offload'),
        *('backend', 'timeout_minutes', 'wandb_log', 'tensorboard_log', 'report', 'eval_only'),
        *('checkpoint_interval', 'checkpoint_minutes', 'checkpoint_async', 'prepare'),
    )
)


def with_options(config: Any, **values: Any) -> Any:
    """The config with other values. The names that the user set stay known."""
    changed = dataclasses.replace(config, **values)
    object.__setattr__(changed, 'given', given(config))
    return changed


@dataclass
class Start:
    """Where a run starts, and the config that follows from it."""

    config: Any
    distributed: Distributed
    source: str = ''  # the path of the checkpoint, '' without one
    state: dict[str, Any] = field(default_factory=dict)  # what is in it
    began_from: str = ''  # what the run's first steps began from, also of a resumed run
    changes: str = ''  # options that differ from the resumed run's
    n_threads: int = 1  # threads of torch's CPU code
    folder: str = ''  # the dataset's
    tokenizer: Tokenizer = field(default_factory=Tokenizer)

    @property
    def resumes(self) -> bool:
        """Whether this continues an earlier run."""
        return self.config.init_from == 'resume'

    @property
    def fsdp(self) -> bool:
        """Whether the weights are sharded: no process ever holds them all."""
        return self.config.parallel == 'fsdp'


def find_start(config: Any, distributed: Distributed) -> Start:
    """Read the checkpoint that `config.init_from` names, if any, and the dataset's tokenizer.

    `auto` (or `auto:gpt2` ...) resumes if there is something to resume, and so does a run that
    torchrun restarts. Raises UserError if the checkpoint is missing or does not fit.
    """
    automatic, _, otherwise = config.init_from.partition(':')
    if automatic == 'auto':
        otherwise = otherwise or 'scratch'
    else:
        otherwise = config.init_from
    if automatic == 'auto' or distributed.restarted:
        # a restarted command that began a new run resumes that run, not an older one
        job = None if automatic == 'auto' else job_name()
        resumes = distributed.broadcast(lambda: resumable(config.out_dir, job))
        config = with_options(config, init_from='resume' if resumes else otherwise)
    start = Start(config, distributed, began_from=config.init_from)
    if start.resumes:
        resume(start)
    elif config.init_from != 'scratch' and not is_pretrained(config.init_from):
        if not os.path.exists(config.init_from):
            raise UserError(
                f'init_from={config.init_from}: no such folder or file, and none of scratch, '
                f'resume, auto, {", ".join(GPT2_NAMES)}'
            )
        read_checkpoint(start, config.init_from, best=True)
    start.n_threads = threads.set_threads(start.config.threads)
    if 'threads' not in given(start.config):  # the number is this machine's, not the config's
        start.config = with_options(start.config, threads='auto')
    start.folder = prepared_folder(start)
    start.tokenizer = read_tokenizer(start.folder)
    check_tokenizer(start)
    return start


def resumable(out_dir: str, job: str | None) -> bool:
    """Whether out_dir holds a checkpoint, of this torchrun job if `job` names one."""
    if not os.path.isdir(out_dir) or not checkpoint.candidates(out_dir):
        return False
    if job is None:
        return True
    return checkpoint.load_from(out_dir, best=False, lazy=True)[1].get('job') == job


def resume(start: Start) -> None:
    """Read the latest checkpoint in out_dir and continue with its options."""
    config = start.config
    if not os.path.isdir(config.out_dir):
        raise UserError(
            f'{config.out_dir}: nothing to resume there; to start a new run, use '
            '--init_from=scratch (a config file may set resume)'
        )
    read_checkpoint(start, config.out_dir, best=False)
    if start.distributed.is_main and not config.eval_only:
        checkpoint.set_aside_damaged(config.out_dir, start.source)
    start.config = config = resumed_config(start)
    before = start.state.get('config', {})
    start.began_from = start.state.get('meta', {}).get('began_from', before.get('init_from'))
    changes = []
    for name in sorted(given(config) - MACHINE_OPTIONS):
        value = getattr(config, name)
        if name in before and before[name] != value:
            changes.append(f'{name}={value} (was {before[name]})')
    start.changes = ', '.join(changes)


def read_checkpoint(start: Start, where: str, best: bool) -> None:
    """Read the checkpoint that the first process finds complete; the others read the same one."""
    found: dict[str, Any] = {}

    def find() -> str:
        path, found['state'] = checkpoint.load_from(where, best, optimizer=True, lazy=start.fsdp)
        return path

    start.source = start.distributed.broadcast(find)
    if start.distributed.is_main:
        start.state = found['state']
    else:
        start.state = checkpoint.load(start.source, optimizer=True, lazy=start.fsdp, checked=True)


def resumed_config(start: Start) -> Any:
    """The checkpoint's options, except those that the user sets and those of the machine.

    `threads` is taken over only for as many processes: another number rounds differently. Raises
    UserError if there is nothing to resume, or the options contradict one another.
    """
    config, state = start.config, start.state
    if 'optimizer' not in state or 'iter_num' not in state:
        raise UserError(
            f'{start.source}: holds weights only, nothing to resume; fine-tune it with '
            f'--init_from={start.source}'
        )
    names = {f.name for f in dataclasses.fields(config)} - MACHINE_OPTIONS - given(config)
    if state.get('processes') != start.distributed.size:
        names.discard('threads')
    known = {k: v for k, v in state.get('config', {}).items() if k in names}
    if 'param_groups' in state['optimizer']:  # nanoGPT's: one AdamW, and GPT-2's architecture
        known |= {'optimizer': 'adamw', 'arch': 'gpt2'}
    known |= {k: v for k, v in state['model_args'].items() if k in names}
    try:
        return with_options(config, **known)
    except (ValueError, TypeError) as error:
        raise UserError(f'{start.source} cannot be resumed with these options: {error}') from None


def prepared_folder(start: Start) -> str:
    """The dataset's folder, made first by its prepare.py if that works without network.

    Raises UserError that names the command to run.
    """
    config = start.config
    folder = folder_of(config.dataset)
    script, *options = shlex.split(config.prepare) or [os.path.join(folder, 'prepare.py')]
    if not has_training_split(folder):
        in_repository = os.path.join(ROOT, script)
        if not os.path.isfile(script) and os.path.isfile(in_repository):
            script = in_repository
        if not os.path.isfile(script):
            raise UserError(
                f'dataset={config.dataset}: neither {folder}/train.bin nor {script} exists; '
                'data/text/prepare.py makes a dataset of your own files'
            )
        if start.resumes and not {'dataset', 'prepare'} & given(config):
            # the name of the script comes from the checkpoint: do not run it
            raise UserError(
                f'{folder}, which the checkpoint was trained on, is not prepared; prepare it '
                'first, or name another with --dataset'
            )
        if start.distributed.local_rank == 0:
            prepare(folder, script, options)
    start.distributed.all_reduce_max(0)  # the other processes wait
    return folder


def has_training_split(folder: str) -> bool:
    """Whether the folder holds train.bin, or shards of a training split."""
    if not os.path.isdir(folder):
        return False
    names = [name for name in os.listdir(folder) if name.endswith('.bin')]
    return any(name.startswith('train') or '_train_' in name for name in names)


def prepare(folder: str, script: str, options: list[str]) -> None:
    """Run the dataset's prepare.py with --offline. Raises UserError if it needs the network."""
    command = shlex.join(['python', script, *options])
    print(f'{folder} is not prepared yet: running {command}', flush=True)
    with open(script, encoding='utf-8') as f:
        has_offline_option = 'offline:' in f.read()
    failed = True
    if has_offline_option:
        words = [sys.executable, script, *options, '--offline']
        failed = subprocess.run(words, check=False).returncode != 0
    if failed:
        raise UserError(f'{folder} is not prepared; prepare it first: {command}')


def check_tokenizer(start: Start) -> None:
    """Raises UserError if the dataset's tokens are not those of the weights to start from."""
    folder, tokenizer = start.folder, start.tokenizer
    if start.state:
        theirs = checkpoint.tokenizer_of(start.state, folder=folder)
        if tokenizer.state() != theirs.state():
            file = os.path.join(os.path.dirname(start.source), 'tokenizer.json')
            raise UserError(
                f'{folder} was prepared with another tokenizer than {start.source} was trained '
                f'with: prepare it with --tokenizer={file}'
            )
    init_from = start.config.init_from
    if is_pretrained(init_from):
        theirs = of_pretrained(init_from)
        if tokenizer.fingerprint() != theirs.fingerprint():
            name = 'gpt2' if theirs.kind == 'gpt2' else file_of_pretrained(init_from)
            raise UserError(
                f'{folder} has {tokenizer.vocab_size:,} {tokenizer.kind} tokens, which are not '
                f'those of {init_from}: prepare it with --tokenizer={name}'
            )


def build_model(start: Start) -> GPT:
    """The model, with its weights unless they are sharded; adopts its shape into `start.config`.

    With FSDP it is on the meta device, and `place` fills in the weights. Raises UserError if an
    option that the user set contradicts the weights.
    """
    config, state = start.config, start.state
    vocab_size = start.tokenizer.vocab_size
    placement = torch.device('meta') if start.fsdp else contextlib.nullcontext()
    torch.manual_seed(config.seed)
    try:
        if state and start.fsdp:
            model = checkpoint.empty_model(state, start.source, dropout=config.dropout)
        elif state:
            model = checkpoint.build_model(state, start.source, dropout=config.dropout)
        elif config.init_from == 'scratch':
            if vocab_size >= 1024:  # GPUs multiply faster; the spare ids are never sampled
                vocab_size = 64 * ceil_div(vocab_size, 64)
            with placement:
                model = GPT(config.model_config(vocab_size))
        else:
            model = from_pretrained(config.init_from, dropout=config.dropout)
            if start.fsdp:
                state['model'] = model.state_dict()
                with placement:
                    model = GPT(model.config)
        crop(model, start)
        adopt_shape(start, model)
    except ValueError as error:
        raise UserError(str(error)) from None
    model.remat = config.remat
    return model


def crop(model: GPT, start: Start) -> None:
    """Cut the context to the block_size that the user sets. Raises ValueError if it cannot be."""
    config = start.config
    if 'block_size' not in given(config) or config.block_size >= model.config.block_size:
        return
    if start.fsdp and model.config.position == 'learned':
        raise ValueError(
            f'block_size={config.block_size}: learned positions ({model.config.block_size} now) '
            'cannot be cropped with parallel=fsdp'
        )
    model.crop_block_size(config.block_size)


def adopt_shape(start: Start, model: GPT) -> None:
    """Take the model's shape into the config. Raises UserError if the user set another one."""
    config = start.config
    if config.init_from == 'scratch':
        return
    names = [f.name for f in dataclasses.fields(GPTConfig) if hasattr(config, f.name)]
    shape = {name: getattr(model.config, name) for name in names}
    free = {'dropout'}
    if not start.resumes:  # a config for longer texts takes the context that the weights have
        free.add('block_size')
    for name in shape:
        if name not in given(config) or name in free:
            continue
        if getattr(config, name) not in (shape[name], None):
            raise UserError(
                f'{name}={getattr(config, name)}, but {start.source or config.init_from} has '
                f'{name}={shape[name]}: leave {name} out, or start from scratch'
            )
    start.config = with_options(config, **shape)


def place(model: GPT, start: Start, dtype: torch.dtype, compile_blocks: bool) -> None:
    """Move the model to the device, or with FSDP shard it and fill in the weights.

    With FSDP each block is compiled by itself, before it is sharded.
    """
    config, distributed = start.config, start.distributed
    if not start.fsdp:
        model.to(distributed.device)
        return
    if compile_blocks:
        for block in model.transformer.h:
            block.compile()
    shard(model, distributed, dtype, config.cpu_offload)
    model.materialize(torch.device('cpu') if config.cpu_offload else distributed.device)
    if model.positions is not None:
        model.positions = model.positions.to(distributed.device)
    with torch.no_grad():
        if start.state.get('model'):
            for name, tensor in model.state_dict().items():
                put(tensor, start.state['model'][name])
        elif start.source:
            start.state = checkpoint.read_folder(start.source, start.resumes, into=model)
        else:
            init_sharded_weights(model)
