"""Import torch with threads that suit this machine: how many compute on a CPU, and how they wait.

Every script that computes imports this module before torch, because OpenMP reads its waiting
policy once, when torch loads it. Waiting threads either spin, which is faster while each has a
core to itself, or sleep, which is more than twice as fast while other programs need the cores
(measured in docs/concepts/what-we-tried.md). So the choice follows from how many CPUs are idle now.
OMP_WAIT_POLICY, GOMP_SPINCOUNT or KMP_BLOCKTIME overrides it; OMP_NUM_THREADS sets the number.
"""

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator

POLICY_VARIABLES = ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME')

# -----------------------------------------------------------------------------
# What this process may use


def read(path: str) -> str:
    """The file's text without surrounding blanks, or '' if it cannot be read."""
    try:
        with open(path, encoding='utf-8', errors='replace') as f:
            return f.read().strip()
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
    for line in read(os.path.join(root, 'proc/self/cgroup')).splitlines():
        controllers, _, path = line.partition(':')[2].partition(':')
        if controllers == '':  # version 2
            mounts, names = ['sys/fs/cgroup'], ['cpu.max']
        elif 'cpu' in controllers.split(','):
            mounts, names = (
                ['sys/fs/cgroup/cpu', f'sys/fs/cgroup/{controllers}'],
                ['cpu.cfs_quota_us', 'cpu.cfs_period_us'],
            )
        else:
            continue
        groups = path.strip('/').split('/')
        for mount in mounts:
            for depth in range(len(groups) + 1):
                folder = os.path.join(root, mount, *groups[:depth])
                quota = min(quota, group_quota([os.path.join(folder, name) for name in names]))
    return quota


def group_quota(paths: list[str]) -> float:
    """CPUs that one control group allows: quota ÷ period, both in microseconds, in these files.

    Infinity if they set no limit.
    """
    try:
        quota, period = (int(word) for path in paths for word in read(path).split())
    except ValueError:  # no such files, or "max"
        return math.inf
    return quota / period if quota > 0 and period > 0 else math.inf


def usable_cores() -> int:
    """Physical cores that this process may use, within its CPU quota.

    Where the system does not tell which logical CPUs share a core, each counts as one.
    """
    siblings = '/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list'
    cores = {read(siblings.format(cpu)) or str(cpu) for cpu in usable_cpus()}
    return max(1, math.ceil(min(len(cores), cpu_quota())))


def idle_cpus(seconds: float = 0.1) -> float:
    """How many of this process's logical CPUs are idle.

    Measured by the kernel's counters over `seconds`; without those, by the load average.
    """
    cpus = usable_cpus()

    def idle_and_total() -> tuple[int, int]:
        rows = [line.split() for line in read('/proc/stat').splitlines()]
        mine = [
            [int(n) for n in row[1:9]]
            for row in rows
            if row[0][:3] == 'cpu' and row[0][3:].isdecimal() and int(row[0][3:]) in cpus
        ]
        return sum(row[3] + row[4] for row in mine), sum(
            map(sum, mine)
        )  # idle, and idle with a disk to wait for

    before = idle_and_total()
    time.sleep(seconds)
    after = idle_and_total()
    if after[1] > before[1]:
        return len(cpus) * (after[0] - before[0]) / (after[1] - before[1])
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
    for _ in range(
        3
    ):  # the choice holds for a whole run, so what is busy for a moment should not decide
        idle = min(
            idle_cpus() + processes - 1, cpus
        )  # the other processes of this run are busy importing
        if idle > threads - 0.5:
            return {}, f'spin while waiting ({idle:.1f} of {cpus:g} CPUs idle)'
    return {'OMP_WAIT_POLICY': 'PASSIVE'}, f'sleep while waiting ({idle:.1f} of {cpus:g} CPUs idle)'


def import_torch() -> str:
    """Load torch with the chosen waiting policy; returns the policy as text.

    Without OMP_NUM_THREADS it gets at most one thread per usable core.
    """
    if 'torch' in sys.modules:  # too late to choose
        return ''
    variables, policy = choose_waiting()
    os.environ |= variables
    import torch

    for name in variables:  # no longer needed: a script that this one starts chooses for itself
        del os.environ[name]
    if not positive_number('OMP_NUM_THREADS', 0):
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    return policy


WAITING = import_torch()


def check_threads(threads: int | str) -> None:
    """Raises ValueError unless `threads` is 'auto' or 1 to 1024."""
    if threads != 'auto' and not (isinstance(threads, int) and 1 <= threads <= 1024):
        raise ValueError(f'threads={threads}: expected auto, or 1 to 1024')


def set_threads(threads: int | str) -> int:
    """Compute with this many threads from now on; 'auto' changes nothing. Returns the number."""
    import torch

    torch.set_num_threads(torch.get_num_threads() if threads == 'auto' else int(threads))
    return torch.get_num_threads()


@contextlib.contextmanager
def threads_restored() -> Iterator[None]:
    """Compute with as many threads afterwards as before, whatever was set in between."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe_threads() -> str:
    """For a log, as in "2 threads that spin while waiting (2.0 of 2 CPUs idle)"."""
    import torch

    number, cores = torch.get_num_threads(), usable_cores()
    text = f'{number} thread' + ('s' if number > 1 else '')
    if number != cores:
        text += f' on {cores} usable core' + ('s' if cores > 1 else '')
    if number > 1 and WAITING:
        text += f' that {WAITING}'
    return text
