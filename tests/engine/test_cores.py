"""How many compute threads an engine starts with, on machines and in containers of all kinds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loramux.engine.cores import num_compute_threads

FOUR = frozenset(range(4))


def write(folder: Path, **texts: str) -> None:
    """Files of these names and texts."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text + "\n")


def test_a_bare_machine_has_a_thread_for_each_cpu(tmp_path: Path) -> None:
    assert num_compute_threads(FOUR, tmp_path) == 4
    assert num_compute_threads(frozenset({2, 7}), tmp_path) == 2


def test_siblings_of_a_core_share_a_thread(tmp_path: Path) -> None:
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        write(tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology", thread_siblings_list=siblings)

    assert num_compute_threads(FOUR, tmp_path) == 2
    assert num_compute_threads(frozenset({0, 2}), tmp_path) == 1
    assert num_compute_threads(frozenset({0, 1}), tmp_path) == 2


@pytest.mark.parametrize(
    ("limit", "threads"),
    [
        ("max 100000", 4),
        ("300000 100000", 3),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("900000 100000", 4),
    ],
)
def test_a_container_has_whole_cores_of_its_limit(tmp_path: Path, limit: str, threads: int) -> None:
    write(tmp_path / "proc/self", cgroup="0::/")
    write(tmp_path / "sys/fs/cgroup", **{"cpu.max": limit})

    assert num_compute_threads(FOUR, tmp_path) == threads


def test_a_group_above_may_be_the_one_with_a_limit(tmp_path: Path) -> None:
    write(tmp_path / "proc/self", cgroup="0::/kubepods/pod1/engine")
    write(tmp_path / "sys/fs/cgroup/kubepods/pod1/engine", **{"cpu.max": "max 100000"})
    write(tmp_path / "sys/fs/cgroup/kubepods/pod1", **{"cpu.max": "200000 100000"})

    assert num_compute_threads(FOUR, tmp_path) == 2


@pytest.mark.parametrize(
    ("folder", "quota", "threads"), [("docker/abc", "200000", 2), ("", "100000", 1), ("docker/abc", "-1", 4)]
)
def test_control_groups_of_the_first_version(tmp_path: Path, folder: str, quota: str, threads: int) -> None:
    write(tmp_path / "proc/self", cgroup="4:memory:/m\n3:cpu,cpuacct:/docker/abc\n2:cpuset:/\n0::/")
    group = tmp_path / "sys/fs/cgroup/cpu" / folder
    write(group, **{"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": "100000"})

    assert num_compute_threads(FOUR, tmp_path) == threads


def test_this_machine() -> None:
    assert 1 <= num_compute_threads() <= (os.cpu_count() or 1)
