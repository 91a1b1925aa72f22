"""Import torch with threads that suit this machine: how many compute on a CPU, and how they wait.

Every script that computes imports this module before torch, because OpenMP reads its waiting
policy once, when torch loads it. Waiting threads either spin, which is faster while each has a
core to itself, or sleep, which is more than twice as fast while other programs need the cores
(measured in docs/concepts/what-we-tried.md). So the choice follows from how many CPUs are idle now.
OMP_WAIT_POLICY, GOMP_SPINCOUNT or KMP_BLOCKTIME overrides it; OMP_NUM_THREADS sets the number.
"""

import contextlib
import itertools
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

POLICY_VARIABLES = ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME')

# -----------------------------------------------------------------------------
# What this process may use


def read(path: str) -> str:
    """The file's text without surrounding blanks, or '' if it cannot be read."""
    try:
        return Path(path).read_text(encoding='utf-8', errors='replace').strip()
    except OSError:
        return ''


def positive_number(variable: str, default: int) -> int:
    """The environment variable's number, the first one of a list, or `default` if it holds none."""
    text = os.environ.get(variable, '').split(',')[0].strip()
    return int(text) if text.isdecimal() and int(text) > 0 else default


def usable_cpus() -> set[int]:
    """The logical CPUs that this process may run on."""
    if hasattr(os, 'sched_getaffinity'):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def cpu_quota(root: str = '/') -> float:
    """CPUs that this process's control groups (a container's limit, say) let it use at once.

    Infinity without a limit. Reads cgroup versions 1 and 2 below `root`. A group's limit holds for
    the groups inside it, so all of them count.
    """
    quota = math.inf
    for line in read(f'{root}/proc/self/cgroup').splitlines():
        controllers, _, group = line.partition(':')[2].partition(':')
        if controllers and 'cpu' not in controllers.split(','):
            continue
        mounts = ['cpu', controllers] if controllers else ['']  # version 1, version 2
        for mount in mounts:
            names = [f'{root}/sys/fs/cgroup', mount, *group.strip('/').split('/')]
            folders = itertools.accumulate(names, os.path.join)
            quota = min(quota, *map(group_quota, folders))
    return quota


def group_quota(folder: str) -> float:
    """CPUs that one control group allows, quota ÷ period; infinity if it sets no limit."""
    names = ('cpu.max', 'cpu.cfs_quota_us', 'cpu.cfs_period_us')  # version 2; version 1
    text = ' '.join(read(f'{folder}/{name}') for name in names)
    try:
        quota, period = map(int, text.split())
    except ValueError:  # no such files, or "max"
        return math.inf
    return quota / period if quota > 0 and period > 0 else math.inf


def usable_cores() -> int:
    """Physical cores that this process may use, within its CPU quota.

    Where the system does not tell which logical CPUs share a core, each counts as one.
    """
    cores = {
        read(f'/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list') or str(cpu)
        for cpu in usable_cpus()
    }
    return max(1, math.ceil(min(len(cores), cpu_quota())))


def cpu_ticks(cpus: set[int]) -> tuple[int, int]:
    """Clock ticks that these logical CPUs were idle since the start of the system, and all ticks.

    Both are 0 where there is no /proc/stat.
    """
    rows = [line.split() for line in read('/proc/stat').splitlines()]
    names = {f'cpu{cpu}' for cpu in cpus}
    ticks = [[int(number) for number in row[1:9]] for row in rows if row[0] in names]
    idle = sum(row[3] + row[4] for row in ticks)  # idle, and idle while waiting for a disk
    return idle, sum(map(sum, ticks))


def idle_cpus(seconds: float = 0.1) -> float:
    """How many of this process's logical CPUs are idle.

    Measured by the kernel's counters over `seconds`; without those, by the load average.
    """
    cpus = usable_cpus()
    idle_before, total_before = cpu_ticks(cpus)
    time.sleep(seconds)
    idle, total = cpu_ticks(cpus)
    if total > total_before:
        return len(cpus) * (idle - idle_before) / (total - total_before)
    if hasattr(os, 'getloadavg'):  # macOS
        return max(0.0, len(cpus) - os.getloadavg()[0])
    return len(cpus)


# -----------------------------------------------------------------------------
# Torch's threads


def choose_waiting() -> tuple[dict[str, str], str]:
    """How OpenMP's threads should wait from now on.

    Returns the variables to set before torch is loaded, and the choice in words. Without variables
    threads spin: 300,000 rounds with GNU's library, 200 ms with LLVM's and Intel's.
    """
    for name in POLICY_VARIABLES:
        if name in os.environ:
            return {}, f'follow {name}={os.environ[name]}'
    processes = positive_number('LOCAL_WORLD_SIZE', 1)  # that torchrun started here
    threads = processes * positive_number('OMP_NUM_THREADS', usable_cores())
    if threads == 1:
        return {}, ''
    cpus = min(len(usable_cpus()), cpu_quota())
    for _ in range(3):  # the choice holds for the whole run, so a busy moment should not decide it
        # The other processes of this run are busy importing.
        idle = min(idle_cpus() + processes - 1, cpus)
        if idle > threads - 0.5:
            return {}, f'spin while waiting ({idle:.1f} of {cpus:g} CPUs idle)'
    return {'OMP_WAIT_POLICY': 'PASSIVE'}, f'sleep while waiting ({idle:.1f} of {cpus:g} CPUs idle)'


TORCH_IS_NEW = 'torch' not in sys.modules
variables, WAITING = choose_waiting() if TORCH_IS_NEW else ({}, '')
os.environ |= variables

import torch  # noqa: E402  with the policy in effect

for variable in variables:  # no longer needed: a script that this one starts chooses for itself
    del os.environ[variable]
if TORCH_IS_NEW and not positive_number('OMP_NUM_THREADS', 0):
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))


def check_threads(threads: int | str) -> None:
    """Raises ValueError unless `threads` is 'auto' or 1 to 1024."""
    if threads != 'auto' and not (isinstance(threads, int) and 1 <= threads <= 1024):
        raise ValueError(f'threads={threads}: expected auto, or 1 to 1024')


def set_threads(threads: int | str) -> int:
    """Compute with this many threads from now on; 'auto' changes nothing. Returns the number."""
    torch.set_num_threads(torch.get_num_threads() if threads == 'auto' else int(threads))
    return torch.get_num_threads()


@contextlib.contextmanager
def threads_restored() -> Iterator[None]:
    """Compute with as many threads afterwards as before, whatever was set in between."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe_threads() -> str:
    """For a log, as in "2 threads that spin while waiting (2.0 of 2 CPUs idle)"."""
    number, cores = torch.get_num_threads(), usable_cores()
    text = '1 thread' if number == 1 else f'{number} threads'
    if number != cores:
        text += ' on 1 usable core' if cores == 1 else f' on {cores} usable cores'
    if number > 1 and WAITING:
        text += f' that {WAITING}'
    return text
