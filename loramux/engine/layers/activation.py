"""What stands between the two products of an MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from loramux.engine.kernels.cpu.dtypes import TAGS, split_evenly, takes
from loramux.engine.kernels.cpu.operations import silu_code
from loramux.engine.kernels.cpu.recording import Operation, arguments
from loramux.engine.kernels.cpu.rows import silu_mul, silu_mul_parallel
from loramux.engine.kernels.cpu.threads import is_alone

_FUNCTIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "silu": functional.silu,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
_PARALLEL_ROWS = 16  # from here on a second thread is worth its waking


class Activation:
    """act(x), or act(gate) · up where the first product yields both side by side."""

    def __init__(self, name: str, *, is_gated: bool) -> None:
        self._function = _FUNCTIONS[name]
        self._is_gated = is_gated
        self._is_silu = name == "silu"

    @property
    def is_silu_gate(self) -> bool:
        """True if it is silu(gate) · up."""
        return self._is_gated and self._is_silu

    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_tokens, width], or [num_tokens, 2 * width] when gated; → [num_tokens, width]."""
        if not self._is_gated:
            return self._function(x)
        rows, width = x.shape[0], x.shape[1] // 2
        if not (self._is_silu and takes(x, width) and x.is_contiguous()):
            gate, up = x.chunk(2, dim=-1)
            return self._function(gate) * up
        out = torch.empty((rows, width), dtype=x.dtype)
        if rows < _PARALLEL_ROWS or is_alone(rows):
            silu_mul(TAGS[x.dtype], x.data_ptr(), out.data_ptr(), width, 0, rows)
        else:
            bounds = split_evenly(rows, torch.get_num_threads())
            silu_mul_parallel(TAGS[x.dtype], x.data_ptr(), out.data_ptr(), width, bounds)
        return out

    def operation(self, gate_up: Tensor, out: Tensor) -> Operation:
        """A silu gate of as many rows as a step has."""
        values = (gate_up.data_ptr(), out.data_ptr(), out.shape[1])
        return Operation("activation", silu_code(), arguments(*values))
