"""Large tensors of zeros that take no time and no memory until they are written.

`torch.zeros` writes every page: 1.5 of the 2.5 s that an engine needs to start on a CPU, for lanes and KV
blocks of which most are not used for long. Fresh pages of the system are zero anyway. A GPU's memory is
zeroed at once.
"""

from __future__ import annotations

import math
import mmap

import torch


def lazy_zeros(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of zeros; on a CPU its pages come with the first write to each. Page-aligned."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
