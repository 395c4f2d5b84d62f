"""Zeros that cost nothing until they are written."""

from __future__ import annotations

import gc
import mmap
from pathlib import Path

import pytest
import torch

from loramux.engine.kernels.cpu.lazy_zeros import lazy_zeros

CPU = torch.device("cpu")


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lazy_zeros_are_zeros_that_can_be_written(dtype: torch.dtype) -> None:
    zeros = lazy_zeros((3, 5, 7), dtype=dtype, device=CPU)

    assert torch.equal(zeros, torch.zeros((3, 5, 7), dtype=dtype))
    zeros[1] = 2
    assert zeros.sum() == 2 * 35
    assert zeros.data_ptr() % 64 == 0
    assert zeros.is_contiguous()


def test_an_empty_shape_is_fine() -> None:
    assert lazy_zeros((0, 4), dtype=torch.float32, device=CPU).shape == (0, 4)


def test_lazy_zeros_take_no_memory_before_they_are_written_nor_after_they_are_gone() -> None:
    before = resident_bytes()

    zeros = lazy_zeros((64 << 20,), dtype=torch.float32, device=CPU)
    unwritten = resident_bytes() - before
    zeros[: 16 << 20] = 1
    written = resident_bytes() - before
    del zeros
    gc.collect()

    assert unwritten < 8 << 20
    assert written >= 64 << 20
    assert resident_bytes() - before < 8 << 20
