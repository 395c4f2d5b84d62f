"""Which tensors the compiled kernels take, and how they name dtypes."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loramux.engine.kernels.cpu.intrinsics import BFLOAT16, FLOAT32, Dtype
from loramux.engine.kernels.cpu.vector_ir import LANES

Ints = npt.NDArray[np.int64]

TAGS: Final[dict[torch.dtype, Dtype]] = {torch.bfloat16: BFLOAT16, torch.float32: FLOAT32}


def takes(x: Tensor, *widths: int) -> bool:
    """True if the kernels compute on tensors like `x`, with rows of these widths."""
    return x.device.type == "cpu" and x.dtype in TAGS and all(width % LANES == 0 for width in widths)


def split_evenly(count: int, parts: int) -> Ints:
    """[parts + 1] bounds from 0 to count."""
    return np.linspace(0, count, parts + 1).astype(np.int64)
