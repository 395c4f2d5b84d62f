"""Folders of compiled kernels: which of them go, and which stay for others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loramux.engine.kernel_cache import KEPT_S, hold, remove_unused

LONG_AGO = KEPT_S + 3600.0
HOLDER = """
import sys; from pathlib import Path; from loramux.engine.kernel_cache import hold
hold(Path(sys.argv[1])); print("held", flush=True); sys.stdin.read()
"""
REMOVER = """
import sys; from pathlib import Path; from loramux.engine.kernel_cache import remove_unused
sys.stdin.read(); print(*remove_unused(Path(sys.argv[1])))
"""


@contextmanager
def process(program: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Runs until its standard input is closed."""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def version(home: Path, letter: str) -> Path:
    return home / f"kernels-{letter * 16}"


def used(folder: Path, seconds_ago: float) -> Path:
    """A folder as a process leaves it that ended, and how long ago it started."""
    with process(HOLDER, folder) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "held\n"
    (folder / "kernel.nbc").write_bytes(b"code")
    age(folder, seconds_ago)
    return folder


def age(folder: Path, seconds: float) -> None:
    then = time.time() - seconds
    for path in (*folder.iterdir(), folder):
        os.utime(path, (then, then))


def test_only_folders_that_were_long_unused_go(tmp_path: Path) -> None:
    own, old = version(tmp_path, "a"), used(version(tmp_path, "b"), LONG_AGO)
    recent = used(version(tmp_path, "c"), KEPT_S - 3600.0)
    unmarked, new = version(tmp_path, "d"), version(tmp_path, "e")
    others = [tmp_path / name for name in ("cache", "kernels-mine", "loramux-kernels-x")]
    for folder in (unmarked, new, *others):
        folder.mkdir()
    for folder in (unmarked, *others):
        age(folder, LONG_AGO)
    hold(own)
    age(own, LONG_AGO)

    assert remove_unused(own) == [old.name, unmarked.name]
    assert sorted(tmp_path.iterdir()) == sorted([own, recent, new, *others])
    assert remove_unused(own) == []


def test_a_folder_that_a_process_uses_stays_however_old(tmp_path: Path) -> None:
    own, other = version(tmp_path, "a"), version(tmp_path, "b")
    with process(HOLDER, other) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "held\n"
        age(other, LONG_AGO)

        assert remove_unused(own) == []
        assert (other / "in-use").exists()

    assert remove_unused(own) == [other.name]


def test_who_comes_back_to_an_old_folder_keeps_it(tmp_path: Path) -> None:
    own, other = version(tmp_path, "a"), used(version(tmp_path, "b"), LONG_AGO)

    used(other, 0.0)

    assert remove_unused(own) == []
    assert (other / "kernel.nbc").read_bytes() == b"code"


def test_several_processes_share_the_work(tmp_path: Path) -> None:
    old = [used(version(tmp_path, letter), LONG_AGO).name for letter in "bcd"]
    (tmp_path / f"removed-{version(tmp_path, 'e').name}-7").mkdir()  # of a process that was killed

    with process(REMOVER, version(tmp_path, "a")) as one, process(REMOVER, version(tmp_path, "f")) as two:
        for running in (one, two):
            assert running.stdin is not None
            running.stdin.close()
        removed = [name for running in (one, two) if running.stdout for name in running.stdout.read().split()]

    assert sorted(removed) == old
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_made_again_for_who_wants_it(tmp_path: Path) -> None:
    wanted = used(version(tmp_path, "b"), LONG_AGO)
    assert remove_unused(version(tmp_path, "a")) == [wanted.name]

    hold(wanted)

    assert [path.name for path in wanted.iterdir()] == ["in-use"]


def test_nothing_goes_beside_a_temporary_folder(tmp_path: Path) -> None:
    used(version(tmp_path, "b"), LONG_AGO)

    assert remove_unused(tmp_path / "loramux-kernels-x") == []
    assert version(tmp_path, "b").exists()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(OSError, match="file"):
        hold(tmp_path / "file" / "kernels")
