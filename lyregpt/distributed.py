"""Process group and collectives, DDP's shares of a batch, and FSDP2's sharding.

torchrun starts the processes; PyTorch's own DDP and FSDP2 do the work. A single process uses the
same class, whose collectives then cost nothing, so that the training loop is the same for both.
"""

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import UserError
from lyregpt.device import pick_device, put
from model import GPT, ceil_div


class Distributed:
    """The processes of this run: `rank` of `size`, and `local_rank` on this machine.

    They are known from torchrun's environment. `minutes` is how long a process waits for the
    others before it gives up. With `alone` a single process initializes a process group, too, as
    FSDP2 requires. Raises UserError for a device that this machine lacks.
    """

    def __init__(
        self, device: str = 'auto', backend: str = 'auto', minutes: float = 10, alone: bool = False
    ):
        self.size = int(os.environ.get('WORLD_SIZE', 1))
        self.rank = int(os.environ.get('RANK', 0))
        self.local_rank = int(os.environ.get('LOCAL_RANK', 0))
        self.is_main = self.rank == 0  # this process writes the files and the messages
        self.cpu_mesh: Any = None  # for copies of sharded tensors in the host's memory
        self.files: Any = None  # a separate group for the writing of checkpoints
        if torch.cuda.is_available() and device in ('auto', 'cuda'):
            device = f'cuda:{self.local_rank}'
        self.device = pick_device(device)
        if self.device.type == 'cuda':
            torch.cuda.set_device(self.device)
        if self.size > 1 or alone:
            options: dict[str, Any] = {'timeout': timedelta(minutes=minutes)}
            if self.size == 1 or os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
                store = (
                    rendezvous(self.rank, self.size, minutes) if self.size > 1 else dist.HashStore()
                )
                options |= {'store': store, 'rank': self.rank, 'world_size': self.size}
            if dist.is_initialized():  # by a run in the same Python session that ended by an error
                dist.destroy_process_group()
            nccl = self.device.type == 'cuda' and dist.is_nccl_available() and backend != 'gloo'
            dist.init_process_group('cpu:gloo,cuda:nccl' if nccl else 'gloo', **options)
            # Writing a checkpoint may take longer than a step: disks can be slow.
            self.files = dist.new_group(backend='gloo', timeout=timedelta(minutes=minutes + 60))
        # After the loss of a machine, the processes of the others count no restart.
        (restarts,) = self.all_reduce_max(int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)))
        self.restarted = restarts > 0

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, summed over all processes in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, *numbers: float) -> list[float]:
        """The largest value of each number on any process; the same on all of them."""
        if self.size == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def broadcast(self, work: Callable[[], Any]) -> Any:
        """The result of `work()` on the first process, on all of them.

        If it raises a UserError, so does this on the first process; the others exit with its
        status.
        """
        message: list[Any] = [None, '']  # the result, and the error
        if self.is_main:
            try:
                message[0] = work()
            except UserError as error:
                message[1] = str(error)
        if self.size > 1:
            dist.broadcast_object_list(message, src=0, group=self.files)
        if message[1]:
            self.fail(message[1])
        return message[0]

    def fail(self, message: str) -> None:
        """Raise UserError on the first process; the others, which call this too, exit silently."""
        if self.is_main:
            raise UserError(message)
        time.sleep(2)  # torchrun ends all processes after the first exit: it should be the main one
        raise SystemExit(2)

    def close(self) -> None:
        """Wait for the others and leave the process group."""
        if dist.is_initialized():
            dist.barrier(self.files)
            dist.destroy_process_group()


def shares(
    sequences_per_step: int, rank: int, size: int, micro_batch_size: int
) -> list[tuple[int, int]]:
    """(start, stop) of this process's micro-batches, among the sequences of a step.

    The shares of the processes are in the order of the ranks and equal but for one sequence. A
    micro-batch has at most `micro_batch_size` sequences, or none: all processes have the same
    number of them, as each may need a collective. Raises UserError if there are fewer sequences
    than processes.
    """
    if sequences_per_step < size:
        raise UserError(
            f'batch_size × gradient_accumulation_steps = {sequences_per_step} sequences per step '
            f'are fewer than the {size} processes'
        )
    first = sequences_per_step * rank // size
    share = sequences_per_step * (rank + 1) // size - first
    n = ceil_div(ceil_div(sequences_per_step, size), micro_batch_size)
    return [(first + share * i // n, first + share * (i + 1) // n) for i in range(n)]


def rendezvous(rank: int, size: int, minutes: float) -> dist.Store:
    """A store that only the processes of this attempt share.

    torchrun keeps one store for all attempts, and what the processes of an earlier attempt left
    there (addresses, ports) misleads those of the next: they wait for processes that are gone
    (github.com/pytorch/pytorch/issues/135712). Counting attempts does not help, as every node
    counts its own. So each process stores a new random name, the first one publishes the list of
    all names, and each process that finds its own name there confirms the list; once all have, the
    list is the prefix of the new store. Raises UserError after `minutes`.
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
            prefix = uuid.uuid5(uuid.NAMESPACE_OID, ' '.join(names)).hex
            store.set(f'{prefix}/confirmed/{rank}', '')
            if store.check([f'{prefix}/confirmed/{r}' for r in ranks]):
                return dist.PrefixStore(prefix, store)
        time.sleep(0.02)
    raise UserError(
        f'process {rank} waited {minutes:g} minutes, and not all {size} processes have started'
    )


def lost_contact(error: BaseException) -> str:
    """The first line of an error that means that another process is gone or hangs, else ''."""
    text = str(error)
    if isinstance(error, dist.DistError) or any(
        word in text for word in ('gloo', 'NCCL', 'Connection closed by peer', 'Socket Timeout')
    ):
        return (text.strip() or type(error).__name__).splitlines()[0][:200]
    return ''


def shard(
    model: GPT, distributed: Distributed, dtype: torch.dtype, cpu_offload: bool = False
) -> None:
    """Shard the weights over the processes, in place.

    This is FSDP2 (Zhao et al. 2023; ZeRO stage 3, Rajbhandari et al. 2020). `model` is on the meta
    device, and holds only this process's parts after `materialize`. Blocks are gathered one at a
    time, in `dtype`; gradients are summed in float32; with `cpu_offload` the parts are kept in the
    host's memory.
    """
    from torch.distributed import fsdp

    # On CPUs it reports how it does an all-to-all.
    logging.getLogger('torch.distributed.tensor._collective_utils').setLevel(logging.ERROR)
    distributed.cpu_mesh = dist.init_device_mesh('cpu', (distributed.size,))
    options: dict[str, Any] = {
        'mesh': dist.init_device_mesh(distributed.device.type, (distributed.size,)),
        'mp_policy': fsdp.MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        ),
    }
    if cpu_offload and distributed.device.type == 'cuda':
        options['offload_policy'] = fsdp.CPUOffloadPolicy()
    for block in model.transformer.h:
        fsdp.fully_shard(block, **options)
    fsdp.fully_shard(model, **options)
    fsdp.register_fsdp_forward_method(model, 'next_logits')  # generate calls this one


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
    """For a pass through `forward`: DDP exchanges gradients after the last micro-batch only."""
    if is_last or not isinstance(forward, DistributedDataParallel):
        return contextlib.nullcontext()
    return forward.no_sync()


def job_name() -> str:
    """A name of this torchrun job, the same after a restart; '' without torchrun."""
    names = ('TORCHELASTIC_RUN_ID', 'MASTER_ADDR', 'MASTER_PORT')
    return ' '.join(os.environ.get(name, '') for name in names).strip()
