"""Checkpoints: training state on disk, complete or absent, verified when read, exact to resume.

In out_dir, `ckpt.pt` is the latest state, `ckpt.prev.pt` the one before it, `best.pt` the weights
with the lowest validation loss: `torch.save` files with nanoGPT's keys and some of ours, and a
SHA-256 in the zip comment. nanoGPT's own files load too. With parallel='fsdp' they are folders
(`ckpt`, …) of safetensors files, `state.json` and `SHA256SUMS`. Reading runs no code. By hand:

    python -m lyregpt checkpoint inspect|verify out/ckpt.pt
    python -m lyregpt checkpoint merge out/ckpt out/ckpt.pt     (or split, for the reverse)
"""

import argparse
import contextlib
import difflib
import glob
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import threading
import time
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist

from configurator import UserError
from lyregpt.dataset import read_meta
from lyregpt.device import is_sharded, local
from lyregpt.optim import configure_optimizers
from lyregpt.text import atomic_write, sync_folder
from lyregpt.tokenizer import Tokenizer, from_state
from model import GPT, GPTConfig

SUMS, REST = 'SHA256SUMS', 'state.json'  # in a folder: the digests, and all that is no tensor
END, MARK = b'PK\x05\x06', b'sha256:'  # of a zip file's last record; of the comment after it
COMMENT = len(MARK) + 64
CHUNK = 2**20  # bytes read at once
TRAIN_FIRST = 'train a model first: python train.py config/train_darklyrics.py'

# DCP warns whenever a single process reads or writes.
warnings.filterwarnings('ignore', message='torch.distributed is disabled')


class CorruptCheckpointError(UserError):
    """A checkpoint that differs from what was written: truncated, a flipped bit, a part missing."""


def reason_of(error: BaseException) -> str:
    """The line of an error's message that says most: the refused name in a pickle, or the first."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line.strip() for line in lines if 'GLOBAL' in line), lines[0])[:120]


# -----------------------------------------------------------------------------
# Writing


class HashingFile(io.BufferedRandom):
    """A new file that computes the SHA-256 of what is written to it."""

    def __init__(self, path: str):
        super().__init__(io.FileIO(path, 'w+'))
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write, and add to the digest; returns the number of bytes."""
        self.digest.update(data)
        return super().write(data)


def save(path: str, state: dict[str, Any], keep_previous: bool = False) -> None:
    """Write `state` to `path`; a reader, or a crash at any instant, finds the old or the new file.

    With `keep_previous` the old one stays beside it, as ckpt.prev.pt. Raises OSError (the disk is
    full, say) with the old file unchanged and nothing left behind.
    """
    part = path + '.tmp'
    try:
        with HashingFile(part) as f:
            torch.save(state, f)
            digest = f.digest.hexdigest().encode()
            f.seek(-22, os.SEEK_END)
            if f.read(4) != END:
                raise OSError('the zip file has an unknown ending')
            f.seek(-2, os.SEEK_END)
            f.write(COMMENT.to_bytes(2, 'little') + MARK + digest)
            f.flush()
            os.fsync(f.fileno())
        atomic_replace(part, path, keep_previous)
    except RuntimeError as error:  # torch's zip writer hides the system's error behind its own
        remove(part)
        raise error.__context__ or OSError(f'writing failed ({reason_of(error)})') from error
    except Exception:
        remove(part)
        raise


def save_folder(
    path: str, state: dict[str, Any], keep_previous: bool = False, group: Any = None
) -> None:
    """`save` for a state of sharded tensors: every process of `group` calls it and writes its part.

    Without a group it is this process alone. Raises OSError on all of them if it fails on one.
    """
    from torch.distributed import checkpoint as dcp

    part = path + '.tmp'
    rank = dist.get_rank(group) if group else 0
    tensors, rest = flatten_state(state)
    with raised_on_all(group, part):
        if rank == 0:
            remove(part)
            os.makedirs(part)
    with raised_on_all(group, part):
        writer = dcp.HuggingFaceStorageWriter(part, save_distributed=True)
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=not group)
        mine = glob.glob(f'shard-{rank + 1:05d}-*.safetensors', root_dir=part)  # DCP's names
        lines = digest_lines(part, mine)
    of_all = [lines]
    if group:
        of_all *= dist.get_world_size(group)
        dist.all_gather_object(of_all, lines, group)
    with raised_on_all(group, part):
        if rank == 0:
            atomic_write(os.path.join(part, REST), json.dumps(rest, default=float).encode())
            lines = sorted(set().union(digest_lines(part, [REST]), *of_all))
            atomic_write(os.path.join(part, SUMS), ''.join(lines).encode())
            atomic_replace(part, path, keep_previous)


@contextlib.contextmanager
def raised_on_all(group: Any, part: str) -> Iterator[None]:
    """An error on one process is raised on all of them, as an OSError; `part` is removed then."""
    from torch.distributed.checkpoint import CheckpointException

    failure = ''
    try:
        yield
    except (Exception, CheckpointException) as error:  # safetensors and DCP wrap the disk's errors
        failure = (str(error) or repr(error)).splitlines()[-1][:200]
    failures = [failure]
    if group:
        failures *= dist.get_world_size(group)
        dist.all_gather_object(failures, failure, group)
    if any(failures):
        if not group or dist.get_rank(group) == 0:
            remove(part)
        raise OSError(max(failures))


def atomic_replace(part: str, path: str, keep_previous: bool) -> None:
    """Rename the finished file or folder `part` to `path`.

    With `keep_previous` the old one becomes ckpt.prev.pt for ckpt.pt, ckpt.prev for ckpt.
    """
    before = '.prev'.join(os.path.splitext(path))
    if os.path.isdir(path):  # two folders cannot be exchanged: for an instant only `before` exists
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


def remove(path: str) -> None:
    """Remove a file or folder, if it exists."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


class Writer:
    """Writes states while training continues: a thread copies the tensors, then writes the copy.

    Tensors change only in the optimizers' steps, so the copying overlaps with the next forward and
    backward pass; `before_update()` waits until it is done. With `background=False` `submit`
    writes at once, without a copy.
    """

    def __init__(
        self, background: bool = True, device: torch.device | None = None, mesh: Any = None
    ):
        self.background, self.device = background, device
        self.mesh = mesh  # of CPUs, for the copies of sharded tensors
        self.job: Future[None] | None = None
        self.copied = threading.Event()

    def submit(self, state: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
        """Call `write(state)`, after the write before it has ended. Raises what that one raised."""
        self.wait()
        # On CUDA the thread copies in a stream of its own, once the work queued so far is done.
        ready = None
        if torch.cuda.is_initialized():
            ready = torch.cuda.current_stream().record_event()
        self.copied.clear()
        self.job = Future()
        work = (self.job, state, write, ready)
        if self.background:
            threading.Thread(target=self.work, args=work).start()
        else:
            self.work(*work)

    def work(self, job: Future[None], state: dict[str, Any], write: Any, ready: Any) -> None:
        """Copy the state, on CUDA after the event `ready`, and write the copy."""
        try:
            try:
                if self.background:
                    state = self.copy(state, ready)
            finally:
                self.copied.set()  # before the job ends: the next one clears it
            job.set_result(write(state))
        except Exception as error:
            job.set_exception(error)

    def copy(self, state: dict[str, Any], ready: Any) -> dict[str, Any]:
        """The state in the host's memory, copied by this thread, which yields to training."""
        torch.set_num_threads(1)  # OpenMP threads of its own would halve the speed of training
        if ready:
            stream = torch.cuda.Stream(self.device)
            stream.wait_event(ready)
            with torch.cuda.stream(stream):
                return on_cpu(state, {}, self.mesh)
        state = on_cpu(state, {}, self.mesh)
        if sys.platform == 'linux':  # the writing can wait until a CPU is idle
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        return state

    def before_update(self) -> None:
        """Wait until the tensors are copied: they are about to change."""
        if self.job:
            self.copied.wait()

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the write in progress, or (`seconds=0`) see whether it has ended.

        Raises what it raised.
        """
        if self.job and (seconds is None or self.job.done()):
            job, self.job = self.job, None
            job.result()


def on_cpu(value: Any, copies: dict[Any, torch.Tensor], mesh: Any) -> Any:
    """A copy of nested dicts and lists with their tensors in the host's memory.

    Tensors that share memory (a tied head) share it in the copy, too, by the dictionary `copies`.
    """
    if isinstance(value, dict):
        return {k: on_cpu(v, copies, mesh) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_cpu(v, copies, mesh) for v in value)
    if not torch.is_tensor(value):
        return value
    mine = local(value.detach())
    key = (mine.data_ptr(), mine.shape, mine.stride(), mine.device)
    if key not in copies or not mine.numel():
        copies[key] = torch.empty_like(mine, device='cpu').copy_(mine)
    if not is_sharded(value):
        return copies[key]
    from torch.distributed.tensor import DTensor

    assert isinstance(value, DTensor)
    return DTensor.from_local(
        copies[key],
        mesh,
        value.placements,
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
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
    """(path, state) of the checkpoint to use: `where` itself, or the newest intact one of a folder.

    With `best` a folder's best one comes first. A damaged one is skipped with a warning on stderr.
    Raises UserError if none can be used, or, without `any_model`, if it holds no GPT.
    """
    paths = candidates(where, best)
    for path, fallback in zip(paths, [*paths[1:], None]):
        try:
            state = load(path, optimizer, lazy)
        except CorruptCheckpointError as error:
            if fallback is None:
                raise
            print(f'WARNING: {error}; going back to {fallback}', file=sys.stderr, flush=True)
            continue
        if not any_model and 'norm_first' in state['model_args']:
            raise UserError(
                f'{path}: is an encoder–decoder written by examples/seq2seq/train_seq2seq.py, not '
                f'a GPT; run it with: python examples/seq2seq/train_seq2seq.py --out_dir={path} '
                '--line="…"'
            )
        return path, state
    earlier = os.path.join(where, 'earlier')
    hint = TRAIN_FIRST
    if os.path.isdir(earlier):
        hint = f'the run before it is in {earlier}'
    raise UserError(f'{where}: holds no checkpoint; {hint}')


def candidates(where: str, best: bool = False) -> list[str]:
    """The checkpoints of an out_dir, the first choice first; or `where`, if it is a checkpoint.

    Raises UserError if there is no such file or folder.
    """
    if os.path.isfile(where) or os.path.isfile(os.path.join(where, REST)):
        return [where]
    if not os.path.isdir(where):
        folder, name = os.path.split(where.rstrip('/'))
        names = os.listdir(folder or '.') if os.path.isdir(folder or '.') else []
        near = difflib.get_close_matches(name, names, 1, 0.8)
        hint = f'did you mean {os.path.join(folder, near[0])}?' if near else TRAIN_FIRST
        raise UserError(f'{where}: no such folder or file; {hint}')
    # best.prev is left by a kill between the two renames of a folder.
    roles = ['best', 'best.prev', 'ckpt', 'ckpt.prev']
    found: list[str] = []
    for role in roles if best else roles[2:]:
        both = [os.path.join(where, role + '.pt'), os.path.join(where, role)]
        found += sorted(filter(os.path.exists, both), key=os.path.getmtime, reverse=True)
    return found


def set_aside_damaged(out_dir: str, used: str) -> None:
    """Rename the checkpoints that were skipped for `used`.

    Otherwise the next save would replace the good previous one with a damaged one.
    """
    for path in candidates(out_dir):
        if path == used:
            return
        remove(path + '.damaged')
        os.rename(path, path + '.damaged')


def load(
    path: str, optimizer: bool = False, lazy: bool = False, checked: bool = False
) -> dict[str, Any]:
    """The state in a file or folder, on the CPU; `_orig_mod.` and `module.` removed from names.

    No code in it is run. Of a folder, the optimizer states are read if `optimizer`. With `lazy` a
    file is mapped into memory, and a folder's tensors are not read. `checked`: its digest was just
    verified. Raises UserError if it is missing, holds code, or is no model; CorruptCheckpointError
    if it differs from what was written.
    """
    if not os.path.exists(path):
        raise UserError(f'{path}: no such checkpoint; {TRAIN_FIRST}')
    is_zip = False
    try:
        if not checked:
            verify(path)
        is_zip = zipfile.is_zipfile(path)
        if os.path.isdir(path):
            state = read_folder(path, optimizer, lazy)
        else:
            state = torch.load(path, map_location='cpu', weights_only=True, mmap=lazy and is_zip)
    except CorruptCheckpointError:
        raise
    except OSError as error:
        if error.errno is not None and not isinstance(error, FileNotFoundError):
            raise  # of the machine (permission, network, too many open files), not of the file
        raise CorruptCheckpointError(f'{path}: damaged ({error})') from None
    except Exception as error:  # a damaged file can fail anywhere in the reader
        # An intact zip file is as it was written.
        holds_code = is_zip and isinstance(error, pickle.UnpicklingError)
        kind = UserError if holds_code else CorruptCheckpointError
        raise kind(
            f'{path}: refused, because it is damaged, or holds more than weights and plain values '
            f'({type(error).__name__}: {reason_of(error)})'
        ) from None
    if not isinstance(state, dict) or not all(
        isinstance(state.get(key), dict) for key in ('model', 'model_args')
    ):
        raise UserError(f'{path}: not a GPT checkpoint (no model and model_args in it)')
    for key in ('config', 'meta', 'tokenizer'):
        if not isinstance(state.get(key, {}), dict):
            raise UserError(f'{path}: its {key} is not a dictionary: damaged, or not by train.py')
    state['model'] = {
        name.removeprefix('module.').removeprefix('_orig_mod.'): weight
        for name, weight in state['model'].items()
        if not name.endswith('.attn.bias')
    }
    return state


def verify(path: str) -> None:
    """Check the digest of a file, or those of a folder's files; raises ValueError or OSError.

    Of a zip file by another program the checksums of zip are checked.
    """
    if os.path.isdir(path):
        names = {name for name in os.listdir(path) if name.endswith('.safetensors')} | {REST}
        with open(os.path.join(path, SUMS), encoding='utf-8') as f:
            wrong = sorted(set(f) ^ set(digest_lines(path, names)))
        if wrong:
            raise ValueError(f'the checksum of {wrong[0].split()[-1]} is wrong')
        return
    with open(path, 'rb') as f:
        f.seek(max(0, os.path.getsize(path) - COMMENT - 22))
        tail = f.read()
    if tail.startswith(END):
        digest = file_digest(path, COMMENT + 2)
        digest.update(b'\0\0')  # of the file before it had a comment, whose length was 0 then
        if tail[20:] != COMMENT.to_bytes(2, 'little') + MARK + digest.hexdigest().encode():
            raise ValueError('its checksum is wrong')
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if archive.comment or archive.testzip():
                raise ValueError('a checksum in the zip file is wrong')


def digest_lines(folder: str, names: Iterable[str]) -> list[str]:
    """The lines of SHA256SUMS, in the format of sha256sum, for these files."""
    return [f'{file_digest(os.path.join(folder, name)).hexdigest()}  {name}\n' for name in names]


def file_digest(path: str, omitted: int = 0) -> Any:
    """SHA-256, as a hashlib object, of the file without this many bytes at its end."""
    size = os.path.getsize(path) - omitted
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        for start in range(0, size, CHUNK):
            digest.update(f.read(min(CHUNK, size - start)))
    return digest


def read_folder(
    path: str, optimizer: bool = True, lazy: bool = False, into: GPT | None = None
) -> dict[str, Any]:
    """The state in a folder; with `lazy`, without its tensors.

    With `into`, a sharded model, the weights are read into it, and the optimizer states are
    sharded like them: all processes of the default group call this, and each reads its part.
    Raises CorruptCheckpointError.
    """
    from torch.distributed import checkpoint as dcp

    tensors: dict[str, torch.Tensor] = {}
    try:
        with open(os.path.join(path, REST), encoding='utf-8') as f:
            rest = json.load(f)
        if lazy:
            return unflatten_state({}, rest)
        reader = dcp.HuggingFaceStorageReader(path)
        own: dict[str, Any] = into.state_dict() if into else {}
        described: Any
        for name, described in reader.read_metadata().state_dict_metadata.items():
            new = torch.empty(described.size, dtype=described.properties.dtype)
            if name.startswith('model.'):
                tensors[name] = own.get(name.removeprefix('model.'), new)
            elif optimizer:
                weight = own.get(name.split('.', 2)[2].rpartition('.')[0])
                if weight is not None and weight.shape == new.shape:
                    new = torch.zeros_like(weight)
                tensors[name] = new
        dcp.load(tensors, storage_reader=reader, no_dist=into is None)
    except (Exception, dcp.CheckpointException) as error:  # it can fail anywhere in the reader
        raise CorruptCheckpointError(
            f'{path}: damaged or not a checkpoint ({type(error).__name__}: {reason_of(error)})'
        ) from None
    return unflatten_state(tensors, rest)


def flatten_state(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A state as tensors by name, and the rest, which JSON can hold.

    The names are like `model.NAME` and `optimizer.adamw.NAME.exp_avg`.
    """
    rest = {k: v for k, v in state.items() if k not in ('model', 'optimizer')} | {'tied': {}}
    tensors = {f'model.{name}': weight for name, weight in state['model'].items()}
    if 'model.lm_head.weight' in tensors and GPTConfig(**state['model_args']).tie_weights:
        del tensors['model.lm_head.weight']  # safetensors does not store a weight twice
        rest['tied'] = {'lm_head.weight': 'transformer.wte.weight'}
    for kind, saved in by_name(state.get('optimizer', {})).items():
        groups = saved['param_groups']
        if not all('param_names' in g for g in groups):  # by nanoGPT, or an earlier version
            named = parameter_names(state, kind)
            groups = [g | {'param_names': names} for g, names in zip(groups, named, strict=True)]
        names = names_by_index(groups)
        scalars: dict[str, dict[str, float]] = defaultdict(dict)
        for i, values in saved['state'].items():
            for key, value in values.items():
                if torch.is_tensor(value) and value.dim():
                    tensors[f'optimizer.{kind}.{names[i]}.{key}'] = value
                else:
                    scalars[str(i)][key] = float(value)
        rest.setdefault('optimizer', {})[kind] = {'param_groups': groups, 'state': scalars}
    return {name: tensor.detach() for name, tensor in tensors.items()}, rest


def unflatten_state(tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """The state that `flatten_state` took; without tensors, its model is empty."""
    model = {k.removeprefix('model.'): t for k, t in tensors.items() if k.startswith('model.')}
    if model:
        model |= {name: model[same] for name, same in rest.get('tied', {}).items()}
    state = {k: v for k, v in rest.items() if k != 'tied'} | {'model': model}
    for kind, optimizer in rest.get('optimizer', {}).items():
        index = {name: i for i, name in names_by_index(optimizer['param_groups']).items()}
        values: dict[int, dict[str, Any]] = defaultdict(dict)
        for i, scalars in optimizer['state'].items():
            values[int(i)] = {key: torch.tensor(value) for key, value in scalars.items()}
        for name, tensor in tensors.items():
            if name.startswith(f'optimizer.{kind}.'):
                parameter, key = name.split('.', 2)[2].rsplit('.', 1)
                values[index[parameter]][key] = tensor
        optimizer['state'] = dict(values)
    return state


def by_name(saved: dict[str, Any]) -> dict[str, Any]:
    """The states of the optimizers by their names; nanoGPT stores one AdamW without a name."""
    return {'adamw': saved} if 'param_groups' in saved else saved


def names_by_index(groups: list[dict[str, Any]]) -> dict[int, str]:
    """The parameters' names by their numbers in an optimizer's state."""
    return {
        i: name
        for group in groups
        for i, name in zip(group['params'], group['param_names'], strict=True)
    }


def parameter_names(state: dict[str, Any], kind: str) -> list[list[str]]:
    """The names of the parameters in each group of an optimizer that was saved without them."""
    nanogpt = 'param_groups' in state['optimizer']
    chosen = 'adamw' if nanogpt else state.get('config', {}).get('optimizer', 'muon')
    with torch.device('meta'):
        model = GPT(GPTConfig(**state['model_args']))
    optimizers = configure_optimizers(model, 0.1, 1e-3, (0.9, 0.95), chosen)
    return [group['param_names'] for group in optimizers[kind].param_groups]


def shard_like(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Replace whole tensors in an optimizer's saved state by shards, cut as its parameters are."""
    from torch.distributed.tensor import distribute_tensor

    params: list[Any] = [p for group in optimizer.param_groups for p in group['params']]
    for i, values in saved['state'].items():
        p = params[i]
        for key, value in values.items():
            if torch.is_tensor(value) and value.shape == p.shape and not is_sharded(value):
                values[key] = distribute_tensor(
                    value, p.device_mesh, p.placements, src_data_rank=None
                )


def load_optimizers(
    optimizers: dict[str, torch.optim.Optimizer], saved: dict[str, Any], path: str
) -> None:
    """Load the states of the checkpoint at `path`; options such as the learning rate do not change.

    States of positions that were cropped since then are cropped, too. Raises UserError if the
    states are of other optimizers.
    """
    saved = by_name(saved)
    if saved.keys() != optimizers.keys():
        before, now = ' and '.join(saved), ' and '.join(optimizers)
        raise UserError(
            f'{path}: was trained with {before}, but this run uses {now}: leave optimizer out'
        )
    for name, optimizer in optimizers.items():
        options = [
            {k: v for k, v in group.items() if k != 'params'} for group in optimizer.param_groups
        ]
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
    """The model of a loaded checkpoint, with its weights. `overrides` (dropout) change its config.

    Raises UserError if they do not fit.
    """
    model = empty_model(state, path, **overrides)
    model.materialize(torch.device('cpu'))
    model.load_state_dict(state['model'])
    return model


def empty_model(state: dict[str, Any], path: str, **overrides: Any) -> GPT:
    """`build_model` on the meta device, without memory for the weights. Raises UserError."""
    try:
        with torch.device('meta'):
            model = GPT(GPTConfig(**state['model_args'] | overrides))
        own = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        found = {name: tuple(weight.shape) for name, weight in state['model'].items()}
        if found and found != own:  # a folder that was read lazily has none
            name = min(set(found.items()) ^ set(own.items()))[0]
            raise ValueError(
                f'{name} is {found.get(name, "missing")} in the file, '
                f'{own.get(name, "missing")} in the model'
            )
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f'{path}: its weights do not fit its model_args: {error}') from None
    return model


def tokenizer_of(state: dict[str, Any], data_dir: str = 'data', folder: str = '') -> Tokenizer:
    """The tokenizer of a checkpoint.

    nanoGPT's checkpoints have none: then it is that of the dataset in `folder`, or in its config,
    else GPT-2's. Raises UserError if that one does not fit.
    """
    if state.get('tokenizer'):
        return from_state(state['tokenizer'])
    folder = folder or os.path.join(data_dir, str(state.get('config', {}).get('dataset', '')))
    vocab_size = state['model_args']['vocab_size']
    tokenizer = from_state(read_meta(folder).get('tokenizer') or {'kind': 'gpt2'})
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f'the checkpoint holds no tokenizer, and the one of {folder} ({tokenizer.vocab_size} '
            f"tokens) is not its own ({vocab_size}): put its dataset's meta.pkl or meta.json there"
        )
    return tokenizer


# -----------------------------------------------------------------------------
# The command


def inspect(path: str, state: dict[str, Any]) -> str:
    """What is in a checkpoint, in a few lines."""
    args, optimizers = state['model_args'], by_name(state.get('optimizer', {}))
    kind = 'encoder–decoder, ' if 'norm_first' in args else ''
    weights = {weight.data_ptr(): weight.numel() for weight in state['model'].values()}
    files = glob.glob(os.path.join(glob.escape(path), '*')) or [path]
    size = sum(map(os.path.getsize, files)) / 1e6
    changed = time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(os.path.getmtime(path)))
    best = float(state.get('best_val_loss', 'nan'))
    lines = {
        'file': f'{path}, {size:,.1f} MB, files: {len(files)}, saved {changed}; OK',
        'step': f'{state.get("iter_num", "unknown")}, best validation loss {best:.4f}',
        'model': f'{kind}{sum(weights.values()):,} parameters; '
        + ', '.join(f'{k}={v}' for k, v in args.items()),
        'tokenizer': (state.get('tokenizer') or {'kind': 'none in it (nanoGPT)'})['kind'],
        'data': state.get('config', {}).get('dataset', 'unknown'),
        'to resume': f'yes, with {" and ".join(optimizers)}' if optimizers else 'no: weights only',
    }
    return '\n'.join(f'{name:<10} {text}' for name, text in lines.items())


def convert(command: str, path: str, to: str) -> None:
    """Merge a folder of shards into one file, or split a file into a folder. Raises UserError."""
    if os.path.exists(to):
        raise UserError(f'{to}: already exists; choose another path')
    path, state = load_from(path, best=False, optimizer=True)
    if os.path.isdir(path) != (command == 'merge'):
        raise UserError(f'{path}: merge reads a folder of shards, split reads a file')
    write = {'merge': save, 'split': save_folder}[command]
    write(to, state)
    print(f'{to}: written')


def main() -> None:
    """Inspect, verify, merge or split, as the command line says."""
    parser = argparse.ArgumentParser(
        prog=sys.argv[0],
        description='inspect: print what is in a checkpoint. verify: check it against its digests; '
        'the exit status is 2 if it is damaged. merge: make one file from a folder of shards. '
        'split: make a folder, for parallel=fsdp, from one file.',
    )
    parser.add_argument('command', choices=('inspect', 'verify', 'merge', 'split'))
    parser.add_argument('path', help='a checkpoint, or an out_dir')
    parser.add_argument('to', nargs='?', help='the path of the result of merge or split')
    args = parser.parse_args()
    if (args.to is None) == (args.command in ('merge', 'split')):
        raise UserError('merge and split need a path for the result; inspect and verify take none')
    if args.to:
        convert(args.command, args.path, args.to)
        return
    paths = candidates(args.path, best=True)
    if not paths:
        raise UserError(f'{args.path}: holds no checkpoint')
    damaged = []
    for path in paths:
        try:
            state = load(path)
            print(inspect(path, state) if args.command == 'inspect' else f'{path}: OK')
        except CorruptCheckpointError as error:
            damaged.append(str(error))
    if damaged:
        raise UserError('; '.join(damaged))
