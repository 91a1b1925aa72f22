"""Several processes as one run: who we are, how we agree, and FSDP2. torchrun starts them; PyTorch's own DDP and FSDP2 do the work.

One process is a team too, whose agreements cost nothing, so that the training loop reads the same for one and for many.
"""

import contextlib
import hashlib
import logging
import math
import os
import sys
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import UserError
from lyregpt.device import pick_device, put
from model import GPT

T = TypeVar('T')


class Distributed:
    """The processes of this run, by torchrun's environment: `rank` of `size`, and `local_rank` on this machine.

    `minutes` is how long one waits for the others before it gives up. `alone` makes one process a group too, which FSDP2 needs.
    Raises UserError for a device that is not there.
    """

    def __init__(
        self, device: str = 'auto', backend: str = 'auto', minutes: float = 10, alone: bool = False
    ):
        self.size, self.rank, self.local_rank = (
            int(os.environ.get(k, d))
            for k, d in (('WORLD_SIZE', 1), ('RANK', 0), ('LOCAL_RANK', 0))
        )
        self.is_main = self.rank == 0  # this one writes files and speaks
        # said by whoever knows: after the loss of a machine the others count no restart
        self.restarted = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0
        try:
            self.device = pick_device(
                f'cuda:{self.local_rank}'
                if torch.cuda.is_available() and device in ('auto', 'cuda')
                else device
            )
        except ValueError as error:
            raise UserError(str(error)) from None
        if self.device.type == 'cuda':
            torch.cuda.set_device(self.device)
        self.cpu_mesh: Any = None  # of sharded tensors' copies in the host's memory
        self.files: Any = None  # a group of its own for what the writing of checkpoints says, beside the training's
        if self.size > 1 or alone:
            nccl = self.device.type == 'cuda' and dist.is_nccl_available() and backend != 'gloo'
            where: dict[str, Any] = {'timeout': timedelta(minutes=minutes)}
            if self.size == 1 or os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
                store = (
                    dist.HashStore()
                    if self.size == 1
                    else rendezvous(self.rank, self.size, minutes)
                )
                where |= {'store': store, 'rank': self.rank, 'world_size': self.size}
            if (
                dist.is_initialized()
            ):  # a run before, in the same Python session, that ended by an error
                dist.destroy_process_group()
            dist.init_process_group('cpu:gloo,cuda:nccl' if nccl else 'gloo', **where)
            self.files = dist.new_group(
                backend='gloo', timeout=timedelta(minutes=minutes + 60)
            )  # disks may be slow
        self.restarted = bool(self.all_reduce_max(self.restarted)[0])

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, added up over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, *numbers: float) -> list[float]:
        """The largest value of each number on any process; the same on all of them."""
        if self.size == 1:
            return list(numbers)
        agreed = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return agreed.tolist()

    def broadcast(self, work: Callable[[], T]) -> T:
        """What `work()` gives on the first process, told to all. If it raises a UserError, the others exit with its status."""
        box: list[Any] = [None, '']
        if self.is_main:
            try:
                box[0] = work()
            except UserError as error:
                box[1] = str(error)
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, group=self.files)
        if box[1]:
            self.fail(box[1])
        return box[0]

    def fail(self, message: str) -> None:
        """Raise UserError on the first process; the others, which know the same, exit without repeating it."""
        if self.is_main:
            raise UserError(message)
        time.sleep(
            2
        )  # torchrun ends all when the first one ends: that should be the one that speaks
        sys.exit(2)

    def close(self) -> None:
        """Leave together."""
        if dist.is_initialized():
            dist.barrier(self.files)
            dist.destroy_process_group()


def shares(rows: int, rank: int, size: int, micro: int) -> list[tuple[int, int]]:
    """This process's part of a step's `rows` windows, cut into passes of at most `micro`: (start, stop) of each.

    The parts of all processes are equal but for one window, in the order of the ranks. All have the same number of passes,
    as each pass may exchange something; a pass can be empty. Raises UserError if there are fewer windows than processes.
    """
    if rows < size:
        raise UserError(
            f'batch_size × gradient_accumulation_steps = {rows} windows a step are fewer than the {size} processes'
        )
    first, end = rows * rank // size, rows * (rank + 1) // size
    passes = math.ceil(math.ceil(rows / size) / micro)
    return [
        (first + (end - first) * i // passes, first + (end - first) * (i + 1) // passes)
        for i in range(passes)
    ]


def rendezvous(rank: int, size: int, minutes: float) -> dist.Store:
    """A store that the processes of this very attempt share, and nobody else.

    torchrun keeps one store for all attempts, and what the processes of an earlier one left there (addresses, ports) leads
    those of the next astray: they wait for the dead (github.com/pytorch/pytorch/issues/135712). Counting attempts does not
    help, as every node counts its own. So each process leaves a new name, the first one writes all names down as the list of
    the attempt, and whoever finds its own on the list agrees; when all have, the list names the place where they meet.
    Raises UserError when the time is over.
    """
    store = dist.TCPStore(
        os.environ['MASTER_ADDR'],
        int(os.environ['MASTER_PORT']),
        is_master=False,
        timeout=timedelta(minutes=minutes),
    )
    name, ranks, deadline = uuid.uuid4().hex, range(size), time.monotonic() + 60 * minutes
    store.set(f'name/{rank}', name)
    while time.monotonic() < deadline:
        if rank == 0 and store.check([f'name/{r}' for r in ranks]):
            store.set('list', ' '.join(store.get(f'name/{r}').decode() for r in ranks))
        names = store.get('list').decode().split() if store.check(['list']) else []
        if len(names) == size and names[rank] == name:
            place = hashlib.sha256(' '.join(names).encode()).hexdigest()
            store.set(f'{place}/agreed/{rank}', '')
            if store.check([f'{place}/agreed/{r}' for r in ranks]):
                return dist.PrefixStore(place, store)
        time.sleep(0.02)
    raise UserError(
        f'process {rank} waited {minutes:g} minutes, and not all {size} processes have come'
    )


def lost_contact(error: BaseException) -> str:
    """The first line of an error that says that another process is gone or hangs; '' for any other error."""
    text = str(error)
    ours = isinstance(error, dist.DistError) or any(
        word in text for word in ('gloo', 'NCCL', 'Connection closed by peer', 'Socket Timeout')
    )
    return (text.strip().splitlines() or [type(error).__name__])[0][:200] if ours else ''


def shard(model: GPT, team: Distributed, dtype: torch.dtype, cpu_offload: bool = False) -> None:
    """Cut the weights, in place, over the team (FSDP2, Zhao et al. 2023; ZeRO stage 3, Rajbhandari et al. 2020).

    `model` is on the meta device, and has memory for this process's parts alone after `materialize`. Blocks are gathered one
    at a time, in `dtype`; gradients are summed in fp32; with `cpu_offload` the parts lie in the host's memory.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    logging.getLogger('torch.distributed.tensor._collective_utils').setLevel(
        logging.ERROR
    )  # on CPUs: how they do an all-to-all
    team.cpu_mesh = init_device_mesh('cpu', (team.size,))
    knobs: dict[str, Any] = {
        'mesh': init_device_mesh(team.device.type, (team.size,)),
        'mp_policy': MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        ),
        'offload_policy': CPUOffloadPolicy()
        if cpu_offload and team.device.type == 'cuda'
        else OffloadPolicy(),
    }
    for block in model.transformer.h:
        fully_shard(block, **knobs)
    fully_shard(model, **knobs)
    register_fsdp_forward_method(model, 'next_logits')  # generate calls this one


@torch.no_grad()
def init_sharded_weights(model: GPT) -> None:
    """Draw the weights of a sharded model: the same ones for any number of processes.

    Each process draws every whole parameter, and keeps its own part.
    """
    for name, parameter in model.named_parameters():
        whole = torch.empty(parameter.shape, dtype=parameter.dtype)
        model.init_weight(name, whole)
        put(parameter, whole)


def gradient_sync(forward: Any, is_last: bool) -> contextlib.AbstractContextManager[Any]:
    """For a pass through `forward`: DDP exchanges gradients after a step's last micro-batch only."""
    if is_last or not isinstance(forward, DistributedDataParallel):
        return contextlib.nullcontext()
    return forward.no_sync()


def job_name() -> str:
    """A name of this torchrun job, the same after a restart; '' without torchrun."""
    names = ('TORCHELASTIC_RUN_ID', 'MASTER_ADDR', 'MASTER_PORT')
    return ' '.join(os.environ.get(name, '') for name in names).strip()
