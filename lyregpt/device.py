"""The machine: its devices, the number formats that are fast on them, torch.compile, its memory.

Also three functions that treat plain tensors and tensors sharded over processes (DTensors) alike:
`is_sharded`, `local` and `put`.
"""

import contextlib
import ctypes
import functools
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from configurator import UserError
from lyregpt import ROOT, threads


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor; without importing their module, which takes half a second."""
    return hasattr(tensor, 'to_local')


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def put(tensor: Any, whole: torch.Tensor) -> None:
    """Copy `whole` into `tensor` in place; of a sharded tensor, into this process's part."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
    local(tensor).copy_(local(whole))


# -----------------------------------------------------------------------------
# What the machine can do


def pick_device(name: str) -> torch.device:
    """'auto' is CUDA, else Apple's MPS, else the CPU.

    Raises UserError for a device that this machine lacks.
    """
    # device_count() also counts GPUs whose driver is too old for this PyTorch
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    counts = {'cuda': n_gpus, 'mps': int(torch.backends.mps.is_available())}
    if name == 'auto':
        name = next((kind for kind, number in counts.items() if number), 'cpu')
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f'device={name}: expected auto, cpu, cuda, cuda:N or mps') from None
    if device.type in counts and (device.index or 0) >= counts[device.type]:
        raise UserError(
            f'device={name}: this machine (or this build of PyTorch {torch.__version__}) has no '
            'such device; use device=auto or device=cpu'
        )
    return device


def fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself, faster than float32.

    On a CPU this follows from the processor and oneDNN, not from a measurement: training in
    another format would end with other weights.
    """
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return (
        device.type == 'cpu'
        and torch.backends.mkldnn.is_available()
        and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
        # False as well if ONEDNN_MAX_CPU_ISA is below AVX-512
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@functools.cache
def fast_int8() -> bool:
    """Whether this CPU multiplies int8 exactly, and about as fast as float32 or faster (VNNI, AMX).

    Without such instructions oneDNN adds pairs of products in 16 bits, where large ones overflow,
    and PyTorch's own loop takes 30 times as long as a float32 product. With them a product takes a
    quarter to a half of float32's time. So a limit of 5 times tells them apart.
    """
    a, b = torch.full((256, 256), 127, dtype=torch.int8), torch.ones(256, 256)
    if (torch._int_mm(a, a) != 256 * 127 * 127).any():
        return False
    # In the thread's own CPU time, so that the choice is the same on a busy machine.
    enough = 0.02 if os.name == 'nt' else 0.002  # Windows counts in steps of 16 ms
    with threads.threads_restored():
        torch.set_num_threads(1)
        int8 = best_seconds(lambda: torch._int_mm(a, a), time.thread_time, enough)
        return int8 < 5 * best_seconds(lambda: b @ b, time.thread_time, enough)


def pick_dtype(name: str, device: torch.device, large: bool = True) -> torch.dtype:
    """'auto' is bfloat16 where that is fast, float16 on older GPUs, float32 elsewhere.

    On a CPU it is bfloat16 for `large` models only. Raises UserError for float16 without CUDA.
    """
    cuda = device.type == 'cuda'
    if name == 'auto':
        if fast_bf16(device) and (large or cuda):
            name = 'bfloat16'
        else:
            name = 'float16' if cuda else 'float32'
    if name == 'float16' and not cuda:
        raise UserError(
            f'dtype=float16 needs a GPU with CUDA to scale its gradients; on {device.type} use '
            'float32 or bfloat16'
        )
    return {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}[name]


def can_compile(device: torch.device) -> str:
    """'' if torch.compile works on this device, else why it does not.

    It needs a C++ compiler; on CUDA, Triton and a C compiler.
    """
    if device.type == 'cuda':
        try:
            import triton  # noqa: F401
        except ImportError:
            return 'Triton is not installed'
        if torch.cuda.get_device_capability(device) < (7, 0):
            return 'this GPU is too old for Triton'
        if not os.environ.get('CC') and not any(map(shutil.which, ('cc', 'gcc', 'clang'))):
            return 'no C compiler found'
    else:
        try:
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()
        except Exception:  # InvalidCxxCompiler moves between modules from version to version
            return 'no C++ compiler found'
    return ''


# -----------------------------------------------------------------------------
# Memory, and the machine in a report


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors instead of asking for fresh pages each time.

    On a CPU, those pages otherwise take a third of a large model's step
    (docs/concepts/what-we-tried.md). Other C libraries are left alone.
    """
    if sys.platform == 'linux' and 'MALLOC_MMAP_MAX_' not in os.environ:
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own for large blocks
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back


def megabytes(tensors: Iterable[torch.Tensor]) -> float:
    """The size of these tensors, of sharded ones this process's parts."""
    return sum(local(t).numel() * t.element_size() for t in tensors) / 1e6


def memory_by_part(
    model: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer], device: torch.device
) -> dict[str, float]:
    """This process's memory for the training so far, in MB.

    The parts are weights, gradients, optimizer states and, where the system tells it, the peak: on
    CUDA of what PyTorch allocated on the GPU, elsewhere of the whole process with its libraries.
    """
    states = [values for o in optimizers for state in o.state.values() for values in state.values()]
    weights = megabytes(model.parameters())
    parts = {
        'weights': weights,
        'gradients': weights,
        'optimizer states': megabytes(filter(torch.is_tensor, states)),
    }
    if device.type == 'cuda':
        return parts | {'peak': torch.cuda.max_memory_allocated(device) / 1e6}
    with contextlib.suppress(ImportError):  # Windows has no such figure
        import resource

        unit = 1e6 if sys.platform == 'darwin' else 1e3
        parts['peak'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return parts


def environment(device: torch.device) -> dict[str, Any]:
    """What a report says about the machine and the code, so that a run can be repeated."""
    known: dict[str, Any] = {
        'Python': platform.python_version(),
        'PyTorch': torch.__version__,
        'system': platform.platform(),
        'device': device.type,
        'processors': os.cpu_count(),
        'threads': torch.get_num_threads(),
    }
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows
        size = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
        known['memory'] = f'{size / 1e9:,.1f} GB'
    if device.type == 'cpu':
        known['device'] += f', {torch.backends.cpu.get_cpu_capability()}'
    if device.type == 'cuda':
        gpu = torch.cuda.get_device_properties(device)
        known['device'] += f', {gpu.name}'
        known['GPU memory'] = f'{gpu.total_memory / 1e9:,.1f} GB'
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        # With --git-dir git does not look at the folders above.
        known['commit'] = subprocess.check_output(
            ['git', '--git-dir=.git', 'describe', '--always', '--dirty'],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=5,
        ).strip()
    return known


# -----------------------------------------------------------------------------
# Measured peaks


def best_seconds(
    work: Callable[[], torch.Tensor],
    clock: Callable[[], float] = time.perf_counter,
    enough: float = 0.05,
) -> float:
    """Seconds that one `work()`, which returns a tensor, takes on the device.

    It is the best of three rounds of about `enough` seconds; two more come before them.
    """
    seconds: list[float] = []
    times = 2
    for _ in range(5):
        started = clock()
        for _ in range(times):
            result = work()
        float(result.flatten()[0])  # waits for the device
        seconds.append((clock() - started) / times)
        times = max(2, math.ceil(enough / max(seconds[-1], 1e-4)))
    return min(seconds[2:])


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Measured peak throughput: FLOP/s of a large matrix product, in about a fifth of a second."""
    n = 4096 if device.type == 'cuda' else 768
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / best_seconds(lambda: a @ b)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s of memory, reads plus writes, measured by copies larger than most caches."""
    a = torch.ones(2**30 if device.type == 'cuda' else 2**28, dtype=torch.uint8, device=device)
    b = torch.zeros_like(a)
    return 2 * a.numel() / best_seconds(lambda: b.copy_(a))
