"""How many compute threads a CPU engine may keep busy.

Threads of one step wait for each other, spinning. One that shares a physical core with another, or that the
system stops because a container has used up its CPU time, holds up all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from loramux.engine.background import CORES


def num_compute_threads(logical: frozenset[int] = CORES, root: Path = Path("/")) -> int:
    """One a physical core, and no more than whole cores of the CPU time of the process's control groups.

    Args:
        logical: numbers of the logical CPUs that the process may run on; none where the system has no such
        root: where the system's `proc` and `sys` are
    """
    if not logical:
        return os.cpu_count() or 1
    physical = {_siblings(cpu, root) for cpu in logical}
    limits = [int(limit) for limit in _limits(root)]
    return max(1, min([len(physical), *limits]))


def _siblings(cpu: int, root: Path) -> str:
    """What all logical CPUs of one physical core have in common."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    return _read(topology) or str(cpu)


def _limits(root: Path) -> Iterator[float]:
    """CPU seconds a second, of each control group above the process that has a limit.

    Sources: the kernel's cgroup-v2 (`cpu.max`) and cgroup-v1 (`cpu.cfs_quota_us`) documents. In a container
    the named group may lie outside what is mounted: then the mount's own top is the container's group.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        group = PurePosixPath(path)
        folders = [str(folder).lstrip("/") for folder in (group, *group.parents)]
        if not controllers:
            for folder in folders:
                quota, _, period = _read(root / "sys/fs/cgroup" / folder / "cpu.max").partition(" ")
                yield from _ratio(quota, period)
        elif "cpu" in controllers.split(","):
            for folder in folders:
                place = root / "sys/fs/cgroup/cpu" / folder
                yield from _ratio(_read(place / "cpu.cfs_quota_us"), _read(place / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> Iterator[float]:
    """Nothing for `max`, -1 or no such file."""
    if quota.isdigit() and period.isdigit() and int(period):
        yield int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
