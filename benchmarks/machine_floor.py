"""What this machine can do at best: the floor that a step's time is held against."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_READ_BYTES = 256 << 20  # far beyond any cache
_GEMM_SIZE = 1536
_TRIES = 12


@dataclass(frozen=True, slots=True)
class MachineFloor:
    """Best of several tries, with torch's present number of threads."""

    bytes_per_s: float  # reading memory
    flops_per_s: float  # multiplying square matrices in the model's dtype

    def best_of(self, other: MachineFloor) -> MachineFloor:
        """The faster of two measurements, each way; a busy moment spoils only one."""
        return MachineFloor(
            max(self.bytes_per_s, other.bytes_per_s), max(self.flops_per_s, other.flops_per_s)
        )

    def seconds(self, read_bytes: float, flops: float) -> float:
        """Nothing that reads and computes this much can be faster."""
        return max(read_bytes / self.bytes_per_s, flops / self.flops_per_s)


def measure_floor(dtype: torch.dtype) -> MachineFloor:
    """Read a large array, multiply two matrices; about a second."""
    numbers = torch.ones(_READ_BYTES // 8, dtype=torch.int64)
    matrix = torch.ones((_GEMM_SIZE, _GEMM_SIZE), dtype=dtype)
    return MachineFloor(
        bytes_per_s=_READ_BYTES / _best(numbers.sum),
        flops_per_s=2 * _GEMM_SIZE**3 / _best(lambda: matrix @ matrix),
    )


def _best(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_TRIES):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
