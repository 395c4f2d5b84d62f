"""Random weights of the right shapes: benchmarks of a model whose files nobody needs to have.

Drawn so that activations keep their size through the layers. Each tensor is seeded with its name, so it
does not depend on the order in which they are asked for; devices draw different numbers.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from loramux.engine.models.families import HEAD_MODULE, ModelConfig


class DummyWeights:
    """A `WeightSource` without files."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self._config = config
        self._dtype = dtype
        self._device = device
        self._seed = seed
        self._generator = torch.Generator(device)

    def __contains__(self, name: str) -> bool:
        return name != f"{HEAD_MODULE}.weight" or not self._config.tie_embeddings

    def take(self, name: str, shape: tuple[int, ...], *, dtype: torch.dtype | None = None) -> Tensor:
        """See `WeightSource`."""
        out = self.empty(shape)
        self.fill(out, name)
        return out if dtype is None else out.to(dtype)

    def fill(self, out: Tensor, name: str) -> None:
        """See `WeightSource`: biases are 0, norms are 1, the rest is uniform with variance 1 / columns."""
        if out.dim() == 1:
            out.fill_(0 if name.endswith(".bias") else 1)
            return
        bound = (3 / out.shape[1]) ** 0.5
        self._generator.manual_seed(self._seed ^ zlib.crc32(name.encode()))
        out.uniform_(-bound, bound, generator=self._generator)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """See `WeightSource`."""
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def check_all_used(self, *, may_remain: tuple[str, ...]) -> None:
        """See `WeightSource`: there is never more than was asked for."""
