"""Number of torch threads: as many as there are cores to spare."""

from __future__ import annotations

import math
import os
from pathlib import Path

import psutil
import torch

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # limit of a container, where it has one: microseconds of each period
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # torch reads them itself


def choose_threads() -> int:
    """Return the number of torch threads that suits the machine as it is now, at least 1.

    It is one thread for each usable core on which nothing else runs. Threads wait for each other at every operator, so
    a single one that has to share its core makes all of them slow: on busy cores, one thread is faster than several.

    A number that the user chose stays: by `OMP_NUM_THREADS` or `MKL_NUM_THREADS`, or by `torch.set_num_threads`, which
    shows if it is below torch's own number. The result is never above what torch has now.

    The load is the mean over the last minute. It counts this process, too, if it has been working.

    Example:
        >>> choose_threads() >= 1
        True
    """
    ours = torch.get_num_threads()
    if any(os.environ.get(name) for name in VARIABLES) or ours < own_threads():
        return ours
    idle = (os.cpu_count() or 1) - psutil.getloadavg()[0]
    return max(min(ours, usable_cores(), round(idle)), 1)


def usable_cores(limit: Path = CPU_MAX) -> int:
    """Return the number of cores that this process may use, at least 1: those of its affinity and of its container.

    Args:
        limit: file with the limit of a container, in the format of cgroup v2: "200000 100000" is two cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = limit.read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no such limit, or "max"
        pass
    return max(cores, 1)


def own_threads() -> int:
    """Return the least number of threads that torch takes by itself: one per physical core of its affinity."""
    logical = os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or logical
    affine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    return max(affine * physical // logical, 1)
