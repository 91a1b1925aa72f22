"""The machine at hand: its device, the number format that it multiplies fast, whether it can compile, its memory, its name in a report.

Also the three words that a weight cut over processes (a DTensor) and a plain one both understand: `is_sharded`, `local`, `put`.
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

from lyregpt import ROOT


def is_sharded(tensor: torch.Tensor) -> bool:
    """Is it a DTensor? Asked so because importing those takes half a second, which most runs need not spend."""
    return hasattr(tensor, 'to_local')


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def put(tensor: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy `whole` into `tensor` in place; into a tensor sharded over processes, the part that is this process's."""
    if is_sharded(tensor):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(tensor, DTensor)
        whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
    local(tensor).copy_(local(whole))


def pick_device(name: str) -> torch.device:
    """'auto' is CUDA, else Apple's MPS, else the CPU. Raises ValueError for a device that this machine lacks."""
    if name == 'auto':
        name = (
            'cuda'
            if torch.cuda.is_available()
            else 'mps'
            if torch.backends.mps.is_available()
            else 'cpu'
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f'device={name}: expected auto, cpu, cuda, cuda:N or mps') from None
    if (
        device.type == 'cuda'
        and (device.index or 0) >= torch.cuda.device_count()
        or device.type == 'mps'
        and not torch.backends.mps.is_available()
    ):
        raise ValueError(
            f'device={name}: this machine (or this build of PyTorch {torch.__version__}) has no such device; use device=auto or device=cpu'
        )
    return device


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Seconds that `work()` takes on one thread, by that thread's own CPU time.

    Other programs do not add to it, so a choice that follows from it is the same on a busy machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        work()  # the first call may prepare something
        first = started = time.thread_time()
        while started == first:
            started = time.thread_time()
        enough = max(0.002, 5 * (started - first))  # some systems count in steps of 10 ms and more
        times = 0
        while time.thread_time() - started < enough:
            work()
            times += 1
        return (time.thread_time() - started) / times
    finally:
        torch.set_num_threads(threads)


@functools.cache
def product_seconds(dtype: torch.dtype) -> float:
    """CPU seconds of one product of two 256 × 256 matrices."""
    a = torch.ones(256, 256, dtype=dtype)
    multiply = torch._int_mm if dtype == torch.int8 else torch.mm
    return cpu_seconds(lambda: multiply(a, a))


def fast_bf16(device: torch.device) -> bool:
    """Does this device multiply bfloat16 itself, faster than float32?

    On a CPU the processor and oneDNN are asked, not a clock: training in another format would end with other weights.
    """
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != 'cpu' or not torch.backends.mkldnn.is_available():
        return False
    instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return (
        instructions and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )  # False as well if ONEDNN_MAX_CPU_ISA is below AVX-512


@functools.cache
def fast_int8() -> bool:
    """Does this CPU multiply int8 by int8 exactly, and about as fast as float32 or faster (VNNI, AMX)?

    Without such instructions oneDNN adds pairs of products in 16 bits, where large ones overflow, and PyTorch's own loop takes 30
    times as long as a float32 product. With them a product takes a quarter to a half of float32's time. So 5 times is clear.
    """
    largest = torch.full((64, 64), 127, dtype=torch.int8)
    exact = bool((torch._int_mm(largest, largest) == 64 * 127 * 127).all())
    return exact and product_seconds(torch.int8) < 5 * product_seconds(torch.float32)


def pick_dtype(name: str, device: torch.device, large: bool = True) -> torch.dtype:
    """'auto' is bfloat16 where that is fast (on a CPU for large models only), float16 on older GPUs, float32 elsewhere.

    Raises ValueError for a pair that cannot work.
    """
    if name == 'auto':
        if fast_bf16(device) and (large or device.type == 'cuda'):
            name = 'bfloat16'
        else:
            name = 'float16' if device.type == 'cuda' else 'float32'
    if name == 'float16' and device.type != 'cuda':
        raise ValueError(
            f'dtype=float16 needs a GPU with CUDA to scale its gradients; on {device.type} use float32 or bfloat16'
        )
    return {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}[name]


def can_compile(device: torch.device) -> str:
    """'' if torch.compile can work on this device, else why not. What it needs: a C++ compiler; on CUDA, Triton and a C compiler."""
    if device.type == 'cuda':
        try:
            import triton  # noqa: F401
        except ImportError:
            return 'Triton is not installed'
        if torch.cuda.get_device_capability(device) < (7, 0):
            return 'this GPU is too old for Triton'
        return (
            ''
            if os.environ.get('CC') or any(map(shutil.which, ('cc', 'gcc', 'clang')))
            else 'no C compiler found'
        )
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception:  # InvalidCxxCompiler moves between modules from version to version
        return 'no C++ compiler found'
    return ''


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors for the next ones instead of asking for fresh pages each time.

    On a CPU, a third of a large model's step goes into those pages otherwise (docs/concepts/what-we-tried.md). Other C libraries are left alone.
    """
    if sys.platform == 'linux' and 'MALLOC_MMAP_MAX_' not in os.environ:
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own for large blocks
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back


def memory_by_part(
    model: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer], device: torch.device
) -> dict[str, float]:
    """This process's memory for the training so far, in MB: weights, gradients, optimizer states, and the peak, where the system tells it.

    On CUDA the peak is of what PyTorch allocated on the GPU, elsewhere of the whole process with its libraries.
    """
    weights = [local(p) for p in model.parameters()]
    states = [
        local(v)
        for o in optimizers
        for state in o.state.values()
        for v in state.values()
        if torch.is_tensor(v)
    ]
    held = sum(w.numel() * w.element_size() for w in weights) / 1e6
    parts = {
        'weights': held,
        'gradients': held,
        'optimizer states': sum(v.numel() * v.element_size() for v in states) / 1e6,
    }
    if device.type == 'cuda':
        return parts | {'peak': torch.cuda.max_memory_allocated(device) / 1e6}
    with contextlib.suppress(ImportError):  # Windows has no such figure
        import resource

        parts['peak'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            1e6 if sys.platform == 'darwin' else 1e3
        )
    return parts


def environment(device: torch.device) -> dict[str, Any]:
    """What a report names, so that a run can be made again: versions, system, device, processors, memory, and this code's commit if git tells it."""
    here = ROOT
    told: dict[str, Any] = {
        'Python': platform.python_version(),
        'PyTorch': torch.__version__,
        'system': platform.platform(),
    }
    told['device'] = (
        f'cuda, {torch.cuda.get_device_name(device)}' if device.type == 'cuda' else device.type
    )
    if device.type == 'cpu':
        told['device'] += f', {torch.backends.cpu.get_cpu_capability()}'
    told |= {'processors': os.cpu_count(), 'threads': torch.get_num_threads()}
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows
        told['memory'] = f'{os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9:,.1f} GB'
    if device.type == 'cuda':
        told['GPU memory'] = (
            f'{torch.cuda.get_device_properties(device).total_memory / 1e9:,.1f} GB'
        )
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if os.path.exists(os.path.join(here, '.git')):  # else git would look at the folders above
            told['commit'] = subprocess.check_output(
                ['git', '-C', here, 'describe', '--always', '--dirty'],
                stderr=subprocess.DEVNULL,
                text=True,
                timeout=5,
            ).strip()
    return told


def best_seconds(work: Callable[[], torch.Tensor], rounds: int = 3, enough: float = 0.05) -> float:
    """Seconds that the device takes for one `work()`, which returns a tensor: the best round, each of about `enough` seconds or more."""

    def seconds(times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            result = work()
        float(result.flatten()[0])  # waits for the device
        return (time.perf_counter() - started) / times

    seconds(2)
    times = max(1, math.ceil(enough / seconds(2)))
    return min(seconds(times) for _ in range(rounds))


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product here and now, the peak that `mfu` is a share of; takes about a fifth of a second."""
    n = 4096 if device.type == 'cuda' else 768
    a, b = (
        torch.randn(n, n, device=device, dtype=dtype),
        torch.randn(n, n, device=device, dtype=dtype),
    )
    return 2 * n**3 / best_seconds(lambda: a @ b)


def copy_bandwidth(device: torch.device) -> float:
    """Memory bandwidth in bytes/s, reads plus writes, measured by copies larger than most caches."""
    a = torch.ones(2**30 if device.type == 'cuda' else 2**28, dtype=torch.uint8, device=device)
    b = torch.zeros_like(a)
    return 2 * a.numel() / best_seconds(lambda: b.copy_(a))
