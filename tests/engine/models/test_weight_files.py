"""A closed file's tensors stay, but not in this process's memory."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from loramux.engine.models.weight_files import WeightFile


def resident_kib(path: Path) -> int:
    """Of the mapped file, in this process."""
    found, is_of_it = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            is_of_it = line.endswith(str(path))
        elif is_of_it and name == "Rss:":
            found += int(values[0])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for its memory")
def test_what_was_read_leaves_memory_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {name: torch.randn(1 << 20) for name in "abc"}
    save_file(tensors, path)
    file = WeightFile(path)
    taken = {name: file.mapped(name) for name in "abc"}
    assert all(torch.equal(taken[name], tensors[name]) for name in "abc")
    assert resident_kib(path) >= 12 << 10

    file.close()

    assert resident_kib(path) < 1 << 10
    assert all(torch.equal(taken[name], tensors[name]) for name in "abc")


def test_a_file_may_be_closed_unread(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    WeightFile(tmp_path / "model.safetensors").close()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for its memory")
def test_memory_that_is_not_the_files_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1 << 20)}, path)
    file = WeightFile(path)
    other = torch.ones(1 << 20)
    file._mapped = SimpleNamespace(get_tensor=lambda name: other)  # as a reader that copies
    file.mapped("a")

    file.close()

    assert bool((other == 1).all())
