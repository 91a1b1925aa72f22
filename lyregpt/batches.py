"""Training batches of one process: its part of every step, in micro-batches that are read ahead."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from configurator import UserError
from lyregpt.dataset import Split
from lyregpt.distributed import shares
from lyregpt.start import Start
from lyregpt.trial import sequences_that_fit
from model import GPT, ceil_div


@dataclass
class MicroBatch:
    """The sequences of one forward and backward pass."""

    x: torch.Tensor  # (B, T) token ids
    y: torch.Tensor  # (B, T) the next token of each
    first: int  # number of its first sequence among all sequences of the run
    weight: float  # factor of its mean loss; the gradients of the processes are averaged
    is_first: bool  # of the step
    is_last: bool  # of the step


class TrainingBatches:
    """The sequences of each step that belong to this process, as micro-batches.

    A step's sequences are a function of the seed and the step alone. With `shard_groups` each group
    of the dataset's shards is the source of its part of a step. The next micro-batch is read in a
    thread while the device works on this one. Raises UserError if the sequences cannot be divided.
    """

    def __init__(self, start: Start, model: GPT, autocast: Any) -> None:
        config, distributed, shape = start.config, start.distributed, model.config
        batch_size = 1 if config.batch_size == 'auto' else config.batch_size
        sequences_per_step = batch_size * config.gradient_accumulation_steps
        if sequences_per_step % config.shard_groups:
            raise UserError(
                f'the {sequences_per_step} sequences of a step cannot be divided equally among '
                f'shard_groups={config.shard_groups}'
            )
        self.device = distributed.device
        self.world_size = distributed.size
        self.sequences_per_step = sequences_per_step
        self.tokens_per_step = sequences_per_step * shape.block_size
        self.micro_batch_size = pick_micro_batch_size(start, model, sequences_per_step, autocast)
        self.parts = shares(
            sequences_per_step, distributed.rank, distributed.size, self.micro_batch_size
        )
        self.per_group = sequences_per_step // config.shard_groups
        first_group = self.parts[0][0] // self.per_group
        last_group = (self.parts[-1][1] - 1) // self.per_group
        self.splits = {}
        for group in range(first_group, last_group + 1):
            self.splits[group] = Split(
                start.folder,
                'train',
                shape.block_size,
                shape.vocab_size,
                config.seed,
                group,
                config.shard_groups,
            )
        here = sum(split.n_tokens for split in self.splits.values())
        self.n_tokens = here * config.shard_groups // len(self.splits)
        self.pool = ThreadPoolExecutor(1)
        self.upcoming: Future[tuple[torch.Tensor, torch.Tensor]]

    def load(self, step: int, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets (B, T) of a micro-batch, on the device.

        An empty part, which exists so that all processes have as many passes, reads one sequence.
        """
        start, stop = self.parts[part]
        stop = max(stop, start + 1)
        inputs, targets = [], []
        for group, split in self.splits.items():
            offset = group * self.per_group
            first = max(start, offset)
            count = min(stop, offset + self.per_group) - first
            if count > 0:
                x, y = split.batch(step * self.per_group + first - offset, count)
                inputs.append(x)
                targets.append(y)
        return self.to_device(inputs), self.to_device(targets)

    def to_device(self, arrays: list[np.ndarray]) -> torch.Tensor:
        """One tensor of the arrays. From pinned memory a copy to a GPU does not make us wait."""
        tensor = torch.from_numpy(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))
        if self.device.type == 'cuda':
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def read_ahead(self, step: int, part: int = 0) -> None:
        """Start to read a micro-batch."""
        self.upcoming = self.pool.submit(self.load, step, part)

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """The micro-batches of a step, in order; `read_ahead` has started to read the first one."""
        last = len(self.parts) - 1
        for i, (start, stop) in enumerate(self.parts):
            x, y = self.upcoming.result()
            if i < last:
                self.read_ahead(step, i + 1)
            else:
                self.read_ahead(step + 1)
            first = step * self.sequences_per_step + start
            weight = (stop - start) * self.world_size / self.sequences_per_step
            yield MicroBatch(x, y, first, weight, i == 0, i == last)

    def close(self) -> None:
        """Stop reading."""
        self.pool.shutdown(cancel_futures=True)


def pick_micro_batch_size(start: Start, model: GPT, sequences_per_step: int, autocast: Any) -> int:
    """Sequences per forward and backward pass, the same on all processes.

    With batch_size=auto a resumed run keeps the number that was found before: another one sums the
    gradients in another order.
    """
    config, distributed = start.config, start.distributed
    sequences_per_rank = ceil_div(sequences_per_step, distributed.size)
    if config.batch_size != 'auto':
        return min(config.batch_size, sequences_per_rank)
    if config.eval_only:
        return 1
    found = start.state.get('micro') if start.resumes else None
    if not found:
        found = sequences_that_fit(model, sequences_per_rank, autocast)
    return -int(distributed.all_reduce_max(-min(found, sequences_per_rank))[0])
