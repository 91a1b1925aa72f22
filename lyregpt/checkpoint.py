"""Training state on disk: written whole or not at all, checked when read, read without running code, exact to resume.

In out_dir: `ckpt.pt` is the latest complete state, `ckpt.prev.pt` the one before it, `best.pt` the weights with the lowest
validation loss. All are `torch.save` files of plain values and tensors with nanoGPT's keys (`model`, `optimizer`, `model_args`,
`iter_num`, `best_val_loss`, `config`) and ours (`tokenizer`, `meta`, and what the loop needs to go on); nanoGPT's own load too.
A SHA-256 of each file stands in its zip comment, where other readers do not look.

A run with parallel='fsdp' writes folders instead (`ckpt`, `ckpt.prev`, `best`), each process its part: safetensors files by
PyTorch's Distributed Checkpoint, `state.json` with everything that is no tensor, and `SHA256SUMS`. They load wherever files do,
on any number of processes. To look at either kind, check it, or make one of the other:

    python -m lyregpt checkpoint inspect out/ckpt.pt
    python -m lyregpt checkpoint verify out
    python -m lyregpt checkpoint merge out/ckpt out/ckpt.pt
    python -m lyregpt checkpoint split out/ckpt.pt out/ckpt
"""

import argparse
import contextlib
import difflib
import glob
import hashlib
import json
import math
import os
import pickle
import shutil
import struct
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist

from configurator import UserError, run
from lyregpt.dataset import read_meta
from lyregpt.device import is_sharded, local
from lyregpt.optim import configure_optimizers
from lyregpt.text import atomic_write, sync_folder
from lyregpt.tokenizer import Tokenizer, from_state
from model import GPT, GPTConfig

SUMS, REST = 'SHA256SUMS', 'state.json'  # in a folder
END, MARK = b'PK\x05\x06', b'sha256:'  # of a zip's last record, and of our comment behind it
COMMENT = len(MARK) + 64

warnings.filterwarnings(
    'ignore', message='torch.distributed is disabled'
)  # DCP, whenever one process reads or writes alone


class CorruptCheckpointError(UserError):
    """A checkpoint that is not what was written: cut off, a bit turned, a part missing."""


# -----------------------------------------------------------------------------
# Writing


def save(path: str, state: dict[str, Any], keep_previous: bool = False) -> None:
    """Write `state` to `path` so that a reader, or a crash at any instant, finds the old file or the new one, never a torn one.

    With `keep_previous` the old one stays beside it, as `previous(path)`. Raises OSError (a full disk, say) with the old
    file untouched and nothing left behind.
    """
    part = path + '.tmp'
    try:
        with open(part, 'w+b') as f:
            hashed: Any = Hashed(f)
            torch.save(state, hashed)
            f.seek(-22, os.SEEK_END)
            if f.read(4) != END:
                raise OSError('the zip file ends in an unknown way')
            f.seek(-2, os.SEEK_END)
            f.write(struct.pack('<H', COMMENT) + MARK + hashed.digest.hexdigest().encode())
            f.flush()
            os.fsync(f.fileno())
        atomic_replace(part, path, keep_previous)
    except Exception as error:
        remove(part)
        reason: BaseException | None = error
        while reason and not isinstance(
            reason, OSError
        ):  # torch's zip writer hides the system's reason behind its own
            reason = reason.__cause__ or reason.__context__
        if reason or isinstance(error, RuntimeError):
            raise reason or OSError(
                f'writing stopped half-way ({str(error).splitlines()[0][:100]})'
            ) from error
        raise


class Hashed:
    """A file that takes the digest of what is written into it."""

    def __init__(self, file: Any):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write, and add to the digest; returns the number of bytes."""
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        """What torch.save calls at its end."""
        self.file.flush()


def save_folder(
    path: str, state: dict[str, Any], keep_previous: bool = False, group: Any = None
) -> None:
    """`save` for a state of sharded tensors: all processes of `group` (None: this one alone) call it, each writes its part.

    Raises OSError on all of them if it fails on one.
    """
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter
    from torch.distributed.checkpoint import save as write

    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    part = path + '.tmp'
    tensors, rest = flatten_state(state)

    def agreed(work: Callable[[], Any]) -> list[Any]:
        """What `work()` gave on each process; OSError on all of them if it failed on one."""
        result, failed = None, ''
        try:
            result = work()
        except (
            Exception,
            CheckpointException,
        ) as error:  # the disk's errors come wrapped by safetensors and DCP, as several kinds
            text = str(getattr(error, 'strerror', None) or error)
            failed = (
                'No space left on device'
                if 'No space left' in text or 'os error 28' in text
                else (text.splitlines() or [repr(error)])[-1][:200]
            )
        told: list[Any] = [(result, failed)] * size
        if group:
            dist.all_gather_object(told, (result, failed), group)
        if any(f for _, f in told):
            if rank == 0:
                remove(part)
            raise OSError(next(f for _, f in told if f))
        return [r for r, _ in told]

    def prepare() -> None:
        if rank == 0:
            remove(part)
            os.makedirs(part)

    def write_tensors() -> None:
        write(
            tensors,
            storage_writer=HuggingFaceStorageWriter(part, save_distributed=True),
            process_group=group,
            no_dist=not group,
        )

    def hash_mine() -> dict[str, str]:
        files = glob.glob(
            os.path.join(glob.escape(part), f'shard-{rank + 1:05d}-*.safetensors')
        )  # DCP's names
        return {os.path.basename(file): file_digest(file) for file in files}

    def finish() -> None:
        if rank == 0:
            atomic_write(os.path.join(part, REST), json.dumps(rest).encode())
            digests = {REST: file_digest(os.path.join(part, REST))} | {
                name: digest for mine in sums for name, digest in mine.items()
            }
            atomic_write(
                os.path.join(part, SUMS),
                ''.join(f'{digest}  {name}\n' for name, digest in sorted(digests.items())).encode(),
            )
            atomic_replace(part, path, keep_previous)

    agreed(prepare)
    agreed(write_tensors)
    sums = agreed(hash_mine)
    agreed(finish)


def atomic_replace(part: str, path: str, keep_previous: bool) -> None:
    """Rename the finished file or folder `part` to `path`; what was there becomes `previous(path)`, or goes."""
    before = previous(path)
    if os.path.isdir(
        path
    ):  # folders cannot be exchanged in one step: for an instant only the previous one is there
        remove(before)
        os.rename(path, before)
    elif keep_previous and os.path.exists(path):
        remove(before + '.tmp')
        try:
            os.link(path, before + '.tmp')
            os.replace(before + '.tmp', before)
        except OSError:  # a file system without links
            os.replace(path, before)
    os.replace(part, path)
    sync_folder(os.path.dirname(path) or '.')  # the rename itself must reach the disk
    if not keep_previous:
        remove(before)


def previous(path: str) -> str:
    """ckpt.prev.pt for ckpt.pt, ckpt.prev for the folder ckpt."""
    stem, dot = os.path.splitext(path)
    return f'{stem}.prev{dot}'


def remove(path: str) -> None:
    """Remove a file or folder, if it is there."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


class Writer:
    """Writes states while training goes on: a thread copies the tensors, then writes the copy.

    Tensors change in the optimizers' steps alone, so the copying runs beside the next forward and backward pass; `before_update()`
    waits for its end, which has mostly come. With `background=False` `submit` does it all at once, without a copy.
    """

    def __init__(
        self, background: bool = True, device: torch.device | None = None, mesh: Any = None
    ):
        self.background, self.device = background, device
        self.mesh = mesh  # of CPUs, for the copies of sharded tensors
        self.job: Future[None] | None = None
        self.copied = threading.Event()

    def submit(self, state: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
        """Have `write(state)` done; first waits for the one before. Raises what that one raised."""
        self.wait()
        self.copied.clear()
        ready = None
        if torch.cuda.is_initialized():
            ready = torch.cuda.Event()
            ready.record()

        def work() -> None:
            copy = state
            try:
                if self.background:
                    # one OpenMP thread for ours: with threads of its own too, the training would run at half its speed from the first copy on
                    torch.set_num_threads(1)
                    if ready:
                        torch.cuda.set_device(self.device)
                    with (
                        torch.cuda.stream(torch.cuda.Stream())
                        if ready
                        else contextlib.nullcontext()
                    ):
                        if ready:
                            ready.wait()
                        copy = on_cpu(state, {}, self.mesh)
            finally:
                self.copied.set()
            if (
                self.background and not ready and sys.platform == 'linux'
            ):  # what the training leaves idle is enough for the rest
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
            write(copy)

        if self.background:
            pool = ThreadPoolExecutor(1)  # a thread for each: none can raise its priority again
            self.job = pool.submit(work)
            pool.shutdown(wait=False)
        else:
            self.job = Future()
            try:
                work()
                self.job.set_result(None)
            except Exception as error:
                self.job.set_exception(error)

    def before_update(self) -> None:
        """The tensors are about to change: wait until they are copied."""
        if self.job:
            self.copied.wait()

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the end of what is under way, if any, or see whether it has come (`seconds=0`). Raises what it raised."""
        if self.job and (seconds is None or self.job.done()):
            job, self.job = self.job, None
            job.result()


def on_cpu(value: Any, seen: dict[Any, torch.Tensor], mesh: Any) -> Any:
    """A copy of nested dicts and lists with their tensors, those that share memory (a tied head) sharing it in the copy too."""
    if isinstance(value, dict):
        return {k: on_cpu(v, seen, mesh) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_cpu(v, seen, mesh) for v in value)
    if not torch.is_tensor(value):
        return value
    mine = local(value.detach())
    key = (mine.data_ptr(), mine.shape, mine.stride(), mine.device)
    if key not in seen or not mine.numel():
        seen[key] = torch.empty_like(mine, device='cpu').copy_(mine)
    if not is_sharded(value):
        return seen[key]
    from torch.distributed.tensor import DTensor

    assert isinstance(value, DTensor)
    return DTensor.from_local(
        seen[key], mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
    )


# -----------------------------------------------------------------------------
# Reading


def load_from(
    where: str,
    best: bool = True,
    optimizer: bool = False,
    lazy: bool = False,
    any_model: bool = False,
) -> tuple[str, dict[str, Any]]:
    """(path, state) of the checkpoint to use: `where` itself, or the newest whole one of an out_dir, with `best` the best one.

    One that is damaged is passed over for the one before it, with a warning on stderr. Raises UserError if none can be used, or, without
    `any_model`, if it is no GPT's.
    """
    paths = candidates(where, best)
    for i, path in enumerate(paths):
        try:
            state = load(path, optimizer, lazy)
            if not any_model:
                check_gpt(state, path)
            return path, state
        except CorruptCheckpointError as error:
            if i + 1 == len(paths):
                raise
            print(f'WARNING: {error}; going back to {paths[i + 1]}', file=sys.stderr, flush=True)
    earlier = os.path.join(where, 'earlier')
    what = (
        f'the run before it is in {earlier}'
        if os.path.isdir(earlier)
        else 'train one first: python train.py config/train_darklyrics.py'
    )
    raise UserError(f'{where}: holds no checkpoint; {what}')


def candidates(where: str, best: bool = False) -> list[str]:
    """The checkpoints of an out_dir in the order in which they would be used; a path to a checkpoint stands for itself alone.

    Raises UserError if there is no such place.
    """
    if os.path.isfile(where) or os.path.isfile(os.path.join(where, REST)):
        return [where]
    if not os.path.isdir(where):
        parent, name = os.path.split(where.rstrip('/'))
        near = difflib.get_close_matches(
            name, os.listdir(parent or '.') if os.path.isdir(parent or '.') else [], 1, 0.8
        )
        hint = (
            f'did you mean {os.path.join(parent, near[0])}?'
            if near
            else 'train a model first: python train.py config/train_darklyrics.py'
        )
        raise UserError(f'{where}: no such folder or file; {hint}')
    found = []
    for role in (['best', 'best.prev'] if best else []) + [
        'ckpt',
        'ckpt.prev',
    ]:  # best.prev: a kill came between two renames of folders
        both = [
            p
            for p in (os.path.join(where, role + '.pt'), os.path.join(where, role))
            if os.path.exists(p)
        ]
        found += sorted(
            both, key=os.path.getmtime, reverse=True
        )  # of file and folder the newer one
    return found


def set_aside_damaged(out_dir: str, used: str) -> None:
    """Rename the checkpoints that were passed over for `used`: the next save must not put a damaged one in the place of the good one."""
    for path in candidates(out_dir):
        if path == used:
            return
        remove(path + '.damaged')
        os.rename(path, path + '.damaged')


def load(
    path: str, optimizer: bool = False, lazy: bool = False, checked: bool = False
) -> dict[str, Any]:
    """The state in `path`, a file or folder, on the CPU, the weights' names clean of `_orig_mod.` and `module.`.

    Nothing in it is run. A folder's optimizer states are read if `optimizer`. `lazy` leaves the tensors where they are: a file
    is mapped, of a folder the rest is read alone. `checked`: somebody has just done that. Raises UserError if it is missing,
    asks for code, or holds no model; CorruptCheckpointError if it is not as it was written.
    """
    if not checked and os.path.exists(path):
        verify(path)
    if os.path.isdir(path):
        state = read_folder(path, optimizer, lazy)
    elif os.path.isfile(path):
        try:
            state = torch.load(
                path, map_location='cpu', weights_only=True, mmap=lazy and zipfile.is_zipfile(path)
            )
        except pickle.UnpicklingError as error:
            reason = next(
                (line for line in str(error).splitlines() if 'GLOBAL' in line), 'not a checkpoint'
            ).strip()
            kind = (
                UserError if zipfile.is_zipfile(path) else CorruptCheckpointError
            )  # a whole zip holds what was put into it
            raise kind(
                f'{path}: refused, because it holds more than weights and plain values, or is damaged ({reason[:120]})'
            ) from None
        except Exception as error:  # a damaged file can fail anywhere in the reader
            raise CorruptCheckpointError(
                f'{path}: damaged or not a checkpoint ({type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ""})'
            ) from None
    else:
        raise UserError(
            f'{path}: no such checkpoint; train one first: python train.py config/train_darklyrics.py'
        )
    if (
        not isinstance(state, dict)
        or not isinstance(state.get('model'), dict)
        or not isinstance(state.get('model_args'), dict)
    ):
        raise UserError(f'{path}: not a GPT checkpoint (no model and model_args in it)')
    if wrong := [
        key for key in ('config', 'meta', 'tokenizer') if not isinstance(state.get(key, {}), dict)
    ]:
        raise UserError(f'{path}: its {wrong[0]} is no dictionary: damaged, or not by train.py')
    state['model'] = {
        name.removeprefix('module.').removeprefix('_orig_mod.'): w
        for name, w in state['model'].items()
        if not name.endswith('.attn.bias')
    }
    return state


def check_gpt(state: dict[str, Any], path: str) -> None:
    """Raises UserError if the checkpoint is examples/seq2seq/train_seq2seq.py's."""
    if 'norm_first' in state['model_args']:
        raise UserError(
            f'{path}: is an encoder–decoder by examples/seq2seq/train_seq2seq.py, not a GPT; ask it with: python examples/seq2seq/train_seq2seq.py --out_dir={path} --line="…"'
        )


def verify(path: str) -> None:
    """Check the digest of a file, or those of a folder's files. Raises CorruptCheckpointError."""
    if os.path.isdir(path):
        try:
            with open(os.path.join(path, SUMS), encoding='utf-8') as f:
                sums = {
                    name: digest
                    for digest, name in (line.rstrip('\n').split('  ', 1) for line in f)
                }
        except (OSError, ValueError, UnicodeDecodeError):
            raise CorruptCheckpointError(f'{path}: damaged, its {SUMS} cannot be read') from None
        there = {name for name in os.listdir(path) if name.endswith('.safetensors')} | {REST}
        if there != set(sums):
            raise CorruptCheckpointError(
                f'{path}: damaged, {", ".join(sorted(there ^ set(sums)))[:200]} should not be there, or is missing'
            )
        for name in sorted(sums):
            if file_digest(os.path.join(path, name)) != sums[name]:
                raise CorruptCheckpointError(f'{path}: damaged, the checksum of {name} is wrong')
        return
    with open(path, 'rb') as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(-min(size, 22 + COMMENT), os.SEEK_END)
        tail = f.read()
        if tail[:4] == END and len(tail) == 22 + COMMENT:
            f.seek(0)
            digest, left = hashlib.sha256(), size - COMMENT - 2
            while left and (block := f.read(min(left, 2**20))):
                digest.update(block)
                left -= len(block)
            digest.update(b'\0\0')  # as it was hashed: before there was a comment
            if tail[20:] != struct.pack('<H', COMMENT) + MARK + digest.hexdigest().encode():
                raise CorruptCheckpointError(f'{path}: damaged, its checksum is wrong')
            return
        f.seek(0)
        start = f.read(4)
    if not start.startswith(b'PK'):
        return  # torch.save's older format, which carries no checksum
    try:
        with zipfile.ZipFile(path) as archive:  # by others: every record carries a checksum
            if archive.comment or (bad := archive.testzip()):
                raise ValueError(
                    f'the checksum of {"the file" if archive.comment else bad} is wrong'
                )
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise CorruptCheckpointError(f'{path}: damaged, or cut off ({str(error)[:100]})') from None


def file_digest(path: str) -> str:
    """SHA-256 of the file."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read_folder(
    path: str, optimizer: bool = True, lazy: bool = False, into: GPT | None = None
) -> dict[str, Any]:
    """The state in a folder; `lazy`: without its tensors. `into` a sharded model: its weights are read in place, and optimizer
    states cut likewise; all processes of the default group call it then, and each reads its part. Raises CorruptCheckpointError."""
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader
    from torch.distributed.checkpoint import load as read

    try:
        with open(os.path.join(path, REST), encoding='utf-8') as f:
            rest = json.load(f)
        if lazy:
            return unflatten_state({}, rest)
        reader = HuggingFaceStorageReader(path)
        own: dict[str, Any] = {} if into is None else into.state_dict()
        tensors: dict[str, torch.Tensor] = {}
        described: Any
        for name, described in reader.read_metadata().state_dict_metadata.items():
            if name.startswith('model.'):
                tensors[name] = own.get(
                    name.removeprefix('model.'),
                    torch.empty(described.size, dtype=described.properties.dtype),
                )
            elif optimizer:
                like: Any = own.get(
                    name.removeprefix('optimizer.').partition('.')[2].rpartition('.')[0]
                )
                alike = like is not None and like.shape == described.size
                tensors[name] = (
                    torch.zeros_like(like)
                    if alike
                    else torch.empty(described.size, dtype=described.properties.dtype)
                )
        read(tensors, storage_reader=reader, no_dist=into is None)
    except (
        Exception,
        CheckpointException,
    ) as error:  # a damaged or foreign folder can fail anywhere in the reader
        raise CorruptCheckpointError(
            f'{path}: damaged or not a checkpoint ({type(error).__name__}: {(str(error).splitlines() or [""])[0][:100]})'
        ) from None
    return unflatten_state(tensors, rest)


def flatten_state(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A state as tensors by name (`model.NAME`, `optimizer.adamw.NAME.exp_avg`) and the rest, which JSON can hold.

    Raises UserError if the optimizer states belong to no parameter of the model.
    """
    rest = {k: v for k, v in state.items() if k not in ('model', 'optimizer')} | {'tied': {}}
    tensors: dict[str, torch.Tensor] = {}
    for name, w in state['model'].items():
        if (
            name == 'lm_head.weight' and GPTConfig(**state['model_args']).tie_weights
        ):  # safetensors would not have one weight twice
            rest['tied'][name] = 'transformer.wte.weight'
        else:
            tensors[f'model.{name}'] = w
    saved = state.get('optimizer')
    if saved is not None:
        rest['optimizer'] = {}
        for kind, optimizer in ({'adamw': saved} if 'param_groups' in saved else saved).items():
            groups = optimizer['param_groups']
            if not all(
                'param_names' in g for g in groups
            ):  # by nanoGPT, or an earlier version: the order is known
                groups = [
                    g | {'param_names': n}
                    for g, n in zip(groups, parameter_names(state, kind), strict=True)
                ]
            names = {
                i: name
                for g in groups
                for i, name in zip(g['params'], g['param_names'], strict=True)
            }
            scalars: dict[str, dict[str, float]] = {}
            for i, values in optimizer['state'].items():
                for key, value in values.items():
                    if torch.is_tensor(value) and value.dim():
                        tensors[f'optimizer.{kind}.{names[i]}.{key}'] = value
                    else:
                        scalars.setdefault(str(i), {})[key] = float(value)
            rest['optimizer'][kind] = {'param_groups': groups, 'state': scalars}
    if torch.is_tensor(rest.get('best_val_loss')):
        rest['best_val_loss'] = float(rest['best_val_loss'])
    return {k: t.detach() for k, t in tensors.items()}, rest


def unflatten_state(tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """The state that `apart` took apart."""
    model = {k.removeprefix('model.'): t for k, t in tensors.items() if k.startswith('model.')}
    model |= {name: model[same] for name, same in rest.get('tied', {}).items() if model}
    state = {k: v for k, v in rest.items() if k != 'tied'} | {'model': model}
    for kind, optimizer in rest.get('optimizer', {}).items():
        index = {
            name: i
            for g in optimizer['param_groups']
            for i, name in zip(g['params'], g['param_names'])
        }
        values: dict[int, dict[str, Any]] = {}
        for i, scalars in optimizer['state'].items():
            values[int(i)] = {k: torch.tensor(v) for k, v in scalars.items()}
        for name, tensor in tensors.items():
            if name.startswith(start := f'optimizer.{kind}.'):
                parameter, _, key = name.removeprefix(start).rpartition('.')
                values.setdefault(index[parameter], {})[key] = tensor
        optimizer['state'] = values
    return state


def parameter_names(state: dict[str, Any], kind: str) -> list[list[str]]:
    """The names of the parameters in each group of an optimizer that was saved without them."""
    with torch.device('meta'):
        model = GPT(GPTConfig(**state['model_args']))
    chosen = (
        'adamw'
        if 'param_groups' in state['optimizer']
        else state.get('config', {}).get('optimizer', 'muon')
    )
    made = configure_optimizers(model, 0.1, 1e-3, (0.9, 0.95), chosen)
    return [g['param_names'] for g in made[kind].param_groups]


def shard_like(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Replace the whole tensors in an optimizer's saved state by this process's parts of them, cut as its parameters are."""
    from torch.distributed.tensor import distribute_tensor

    order = [p for group in optimizer.param_groups for p in group['params']]
    for i, values in saved['state'].items():
        p: Any = order[i]
        for key, value in values.items():
            if torch.is_tensor(value) and value.shape == p.shape and not is_sharded(value):
                values[key] = distribute_tensor(
                    value, p.device_mesh, p.placements, src_data_rank=None
                )


def load_optimizers(
    optimizers: dict[str, torch.optim.Optimizer], saved: dict[str, Any], path: str
) -> None:
    """Load the optimizer states of the checkpoint at `path`; options such as the rate do not change.

    nanoGPT stores one AdamW without a name. States of positions that were cropped since then are
    cropped, too. Raises UserError if the states are of other optimizers.
    """
    if 'param_groups' in saved:
        saved = {'adamw': saved}
    if saved.keys() != optimizers.keys():
        before, now = ' and '.join(saved), ' and '.join(optimizers)
        raise UserError(
            f'{path}: was trained with {before}, but this run uses {now}: leave optimizer out'
        )
    for name, optimizer in optimizers.items():
        options = []
        for group in optimizer.param_groups:
            options.append({k: v for k, v in group.items() if k != 'params'})
        try:
            if is_sharded(optimizer.param_groups[0]['params'][0]):
                shard_like(optimizer, saved[name])
            optimizer.load_state_dict(saved[name])
        except (ValueError, KeyError) as error:
            raise UserError(
                f'{path}: its optimizer state does not fit this model ({error})'
            ) from None
        for group, option in zip(optimizer.param_groups, options):
            group.update(option)
        for p, values in optimizer.state.items():
            for key, value in values.items():
                matrix = torch.is_tensor(value) and value.dim() == p.dim() > 0
                if matrix and value.size(0) > p.size(0):
                    values[key] = value[: p.size(0)].clone()


def build_model(state: dict[str, Any], path: str, **overrides: Any) -> GPT:
    """The model of a loaded checkpoint with its weights in. `overrides` (dropout) change the config.

    Raises UserError if they do not fit.
    """
    model = empty_model(state, path, **overrides)
    model.materialize(torch.device('cpu'))
    model.load_state_dict(state['model'])
    return model


def empty_model(state: dict[str, Any], path: str, **overrides: Any) -> GPT:
    """`build_model` without memory for the weights, on the meta device. Raises UserError."""
    try:
        with torch.device('meta'):
            model = GPT(GPTConfig(**state['model_args'] | overrides))
        own, found = model.state_dict(), state['model']
        for name in sorted(set(own) ^ set(found)) if found else []:  # none in a lazily read folder
            raise ValueError(f'{name} is in the {"file" if name in found else "model"} only')
        for name, weight in found.items():
            if own[name].shape != weight.shape:
                raise ValueError(
                    f'{name} is {tuple(weight.shape)} in the file, {tuple(own[name].shape)} in the model'
                )
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f'{path}: its weights do not fit its model_args: {error}') from None
    return model


def tokenizer_of(state: dict[str, Any], data_dir: str = 'data', folder: str = '') -> Tokenizer:
    """The tokenizer in the checkpoint; for nanoGPT's, which hold none, that of the dataset in `folder`, or under its run's name, else GPT-2's.

    Raises UserError if neither is at hand.
    """
    if state.get('tokenizer'):
        return from_state(state['tokenizer'])
    folder = folder or os.path.join(data_dir, str(state.get('config', {}).get('dataset', '')))
    vocab_size = state['model_args']['vocab_size']
    found = read_meta(folder).get('tokenizer') or {'kind': 'gpt2'}
    tokenizer = from_state(found)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f'the checkpoint holds no tokenizer, and the one of {folder} ({tokenizer.vocab_size} tokens) is not its own ({vocab_size}): '
            "put its dataset's meta.pkl or meta.json there"
        )
    return tokenizer


# -----------------------------------------------------------------------------
# By hand


def inspect(path: str) -> str:
    """What is in a checkpoint, in a few lines."""
    state = load(path)
    args, config = state['model_args'], state.get('config', {})
    weights = {w.data_ptr(): w.numel() for w in state['model'].values()}  # tied ones once
    files = (
        [os.path.join(path, name) for name in os.listdir(path)] if os.path.isdir(path) else [path]
    )
    changed = time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(os.path.getmtime(path)))
    optimizer = state.get('optimizer', {})
    kinds = ['adamw'] if 'param_groups' in optimizer else list(optimizer)
    lines = {
        'file': f'{path}, {sum(map(os.path.getsize, files)) / 1e6:,.1f} MB in {len(files)} file{"s" * (len(files) > 1)}, of {changed}; whole',
        'step': f'{state.get("iter_num", "unknown")}, best validation loss {float(state.get("best_val_loss", math.nan)):.4f}',
        'model': f'{"encoder–decoder, " * ("norm_first" in args)}{sum(weights.values()):,} parameters; '
        + ', '.join(f'{k}={v}' for k, v in args.items()),
        'tokenizer': state['tokenizer']['kind']
        if state.get('tokenizer')
        else 'none in it (nanoGPT)',
        'data': config.get('dataset', 'unknown'),
        'to resume': f'yes, with {" and ".join(kinds)}' if kinds else 'no: weights only',
    }
    return '\n'.join(f'{name:<10} {text}' for name, text in lines.items())


def main() -> None:
    """inspect, verify, merge or split, as the command line says."""
    parser = argparse.ArgumentParser(
        description='Look at a checkpoint, check it, or change its form.'
    )
    commands = parser.add_subparsers(dest='command', required=True)
    for name, what in (
        ('inspect', 'say what is in it'),
        ('verify', 'check it against its checksums; exit status 2 if it is damaged'),
        ('merge', 'make one file of a folder of shards'),
        ('split', 'make a folder, for parallel=fsdp, of one file'),
    ):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument(
            'path',
            help='a checkpoint, or an out_dir with several'
            if name in ('inspect', 'verify')
            else 'the checkpoint to read',
        )
        if name in ('merge', 'split'):
            command.add_argument('to', help='where the result goes')
    args = parser.parse_args()
    if args.command in ('inspect', 'verify'):
        paths = candidates(args.path, best=True)
        if not paths:
            raise UserError(f'{args.path}: holds no checkpoint')
        damaged = []
        for path in paths:
            try:
                print(
                    inspect(path)
                    if args.command == 'inspect'
                    else f'{path}: whole'
                    if load(path)
                    else ''
                )
            except CorruptCheckpointError as error:
                damaged.append(str(error))
        if damaged:
            raise UserError('; '.join(damaged))
        return
    if not os.path.exists(args.path):
        raise UserError(f'{args.path}: no such checkpoint')
    merging = args.command == 'merge'
    if os.path.isdir(args.path) != merging:
        raise UserError(
            f'{args.path}: {args.command} reads a {"folder of shards" if merging else "file"}'
        )
    if os.path.exists(args.to):
        raise UserError(f'{args.to}: is there already; name another place')
    state = load(args.path, optimizer=True)
    check_gpt(state, args.path)
    (save if merging else save_folder)(args.to, state)
    print(f'{args.to}: written')


if __name__ == '__main__':
    run(main)
