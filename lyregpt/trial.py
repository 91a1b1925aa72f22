"""Trial passes before training: is compiled code right, what fits, how long is an evaluation?"""

import time
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from lyregpt.dataset import Split
from lyregpt.device import can_compile, is_sharded, local
from model import GPT, ceil_div

CPU_TOKENS = 4096  # tokens at once on a device whose free memory cannot be asked for
BYTES_PER_PARAMETER = 12  # the gradient and AdamW's two states in fp32


def gradient_norms(model: Any, x: torch.Tensor, y: torch.Tensor, autocast: Any) -> list[float]:
    """Each parameter's gradient norm for B copies of one sequence, x and y (B, T), divided by B.

    Clears the gradients.
    """
    try:
        with autocast:
            # the sum over tokens: gradients of the mean could underflow in float16
            loss = model(x, y) * y.numel()
        loss.backward()
        norms = []
        for p in model.parameters():
            norms.append(0.0 if p.grad is None else float(p.grad.norm()) / len(y))
        return norms
    finally:
        model.zero_grad(set_to_none=True)


def compile_error(
    compiled: Any, eager: GPT | None, batch: tuple[torch.Tensor, torch.Tensor], autocast: Any
) -> str:
    """Compile a `torch.compile`d model by a pass over a batch like those to come.

    Returns '' if it works, else one line that says why not. A miscompilation can go unnoticed
    (torch 2.11 gave this model zero gradients), so the norm of each parameter's gradient is
    compared with the `eager` model's, if given, over one sequence. The compiled model gets a batch
    of copies of that sequence.
    """
    x, y = (ids[:1].expand_as(ids).contiguous() for ids in batch)
    expected = []
    zeros = []
    if eager is not None:  # matrices that start at zero pass no gradient on: fill them for now
        zeros = [p for p in eager.parameters() if p.dim() > 1 and not p.any()]
    try:
        with torch.no_grad():
            for p in zeros:
                p.normal_(std=0.02)
        if eager is not None:
            expected = gradient_norms(eager, x[:1], y[:1], autocast)
        found = gradient_norms(compiled, x, y, autocast)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler's errors have no common class
        message = str(error).strip() or type(error).__name__
        return f'compiling failed: {message.splitlines()[0][:200]}'
    finally:
        with torch.no_grad():
            for p in zeros:
                p.zero_()
    for a, b in zip(expected, found):
        if not a / 10 <= b <= a * 10:  # dropout makes them differ somewhat
            return f'compiled gradients are wrong: a norm of {b:.3g} instead of {a:.3g}'
    return ''


class Compiler:
    """torch.compile for a run: `enabled` if the options ask for it and it works, else `problem`."""

    def __init__(self, config: Any, device: torch.device) -> None:
        wanted = config.compile is True or config.compile == 'auto' and device.type == 'cuda'
        wanted = wanted and not config.eval_only
        self.problem = can_compile(device) if wanted else ''
        self.enabled = wanted and not self.problem

    def wrap(self, model: GPT, start: Any, batches: Any, step: int, autocast: Any) -> Any:
        """The callable of the forward pass: compiled if that works, and synchronized by DDP.

        The blocks of a sharded model are compiled already: here they are tried.
        """
        forward: Any = model
        if self.enabled:
            eager = None if start.fsdp else model
            if not start.fsdp:
                forward = torch.compile(model)
            self.problem = compile_error(forward, eager, batches.load(step, 0), autocast)
            self.enabled = not self.problem
            if self.problem:
                forward = model
                for block in model.transformer.h:
                    block._compiled_call_impl = None
        if start.distributed.size > 1 and not start.fsdp:
            if self.enabled:
                # compile again in parts, whose gradients are exchanged while the next are computed
                torch._dynamo.reset()
            device = start.distributed.device
            ids = [device.index] if device.type == 'cuda' else None
            forward = DistributedDataParallel(forward, broadcast_buffers=False, device_ids=ids)
        return forward


def sequences_that_fit(model: GPT, sequences_per_rank: int, autocast: Any) -> int:
    """The micro-batch size: how many of a rank's sequences can be processed at once.

    On CUDA that is what its memory holds beside weights, gradients and optimizer states, measured
    with one and with two sequences; elsewhere about 4,096 tokens. The micro-batches of a step are
    made equal.
    """
    device = model.lm_head.weight.device
    block_size = model.config.block_size
    if device.type != 'cuda':
        return max(1, min(sequences_per_rank, CPU_TOKENS // block_size))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # from the second micro-batch on, gradients exist
    before = torch.cuda.memory_allocated()
    peaks = []
    try:
        for batch_size in (1, 2):
            x = torch.zeros(batch_size, block_size, dtype=torch.long, device=device)
            torch.cuda.reset_peak_memory_stats()
            with autocast:
                loss = model(x, x)
            loss.backward()
            peaks.append(torch.cuda.max_memory_allocated() - before)
    except torch.OutOfMemoryError:
        # with sharded weights, a process that continued alone would leave the others waiting
        if not peaks or is_sharded(model.lm_head.weight):
            raise
        return 1
    finally:
        model.zero_grad(set_to_none=True)
    # memory that all passes share may hide part of what a sequence takes
    per_sequence = max(peaks[1] - peaks[0], peaks[0] // 8, 1)
    states = BYTES_PER_PARAMETER * sum(local(p).numel() for p in model.parameters())
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    free = torch.cuda.mem_get_info(device)[0] + cached
    fit = 1 + int((0.9 * free - states - peaks[0]) / per_sequence)
    passes = ceil_div(sequences_per_rank, max(1, min(sequences_per_rank, fit)))
    return ceil_div(sequences_per_rank, passes)


@torch.no_grad()
def seconds_per_sequence(model: GPT, split: Split, batch_size: int, autocast: Any) -> float:
    """Seconds per sequence of an evaluation, from one batch after a warm-up."""
    device = model.lm_head.weight.device
    limit = min(batch_size, split.eval_sequences())
    x, y = next(split.eval_batches(batch_size, limit))
    for _ in range(2):
        started = time.perf_counter()
        with autocast:
            model(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)).item()
    return (time.perf_counter() - started) / len(x)
