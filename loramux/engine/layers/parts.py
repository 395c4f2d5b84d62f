"""What the decoder's layers are made of, for one kind of device.

On a CPU a linear site yields its whole output. On a GPU it may leave part of its LoRA work to the kernel
that reads the output; what it yields is then more than a tensor, and only the parts below, made together
with it, read it. `TorchParts` serve every device; `kernels/gpu/parts.py` holds the fused ones.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from loramux.engine.kernels.lora import SiteLanes
from loramux.engine.layers.activation import Activation
from loramux.engine.layers.fp8_linear import quantize_rows
from loramux.engine.layers.linear import BaseLinear, LoraLinear
from loramux.engine.layers.norm import Norm
from loramux.engine.parallel.peers import Peers

SiteOutput = Any  # what a site yields: a tensor, or with it what is still to be added
SiteLora = Any  # a step's LoRA work as these parts read it; None = no adapter


class LinearSite(Protocol):
    """A fused site of the base model with the lanes of the resident adapters."""

    def __call__(self, x: Tensor, lora: SiteLora) -> SiteOutput:
        """x: [num_tokens, in_features]."""
        ...


class ResidualNorm(Protocol):
    """A normalisation that takes what is to be added first as a site yields it."""

    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_tokens, features]."""
        ...

    def after_add(self, x: Tensor, delta: SiteOutput) -> Tensor:
        """x += delta in place; returns the norm of the new x."""
        ...


class Gate(Protocol):
    """What stands between the two products of an MLP."""

    def __call__(self, x: SiteOutput) -> Tensor:
        """The second product's input."""
        ...


class Parts(Protocol):
    """Makes the parts of layers."""

    def site(self, name: str, linear: BaseLinear, lanes: SiteLanes | None, peers: Peers | None) -> LinearSite:
        """Args:
        name: qkv | attn_out | mlp_in | mlp_out
        lanes: None on a server without LoRA
        peers: ranks that hold the other input features; None = all are here
        """
        ...

    def norm(self, norm: Norm) -> ResidualNorm:
        """The same normalisation for what these sites yield."""
        ...

    def activation(self, name: str, *, is_gated: bool) -> Gate:
        """Between `mlp_in` and `mlp_out`."""
        ...

    def quantize_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input of an fp8 product, see `layers/fp8_linear.py`."""
        ...

    def whole(self, output: SiteOutput) -> Tensor:
        """A site's output, [num_tokens, out_features], with nothing left to add."""
        ...


class TorchParts:
    """Each site adds its LoRA part itself."""

    def site(self, name: str, linear: BaseLinear, lanes: SiteLanes | None, peers: Peers | None) -> LinearSite:
        """See `Parts.site`."""
        return LoraLinear(linear, lanes, peers)

    def norm(self, norm: Norm) -> ResidualNorm:
        """The norm itself."""
        return norm

    def activation(self, name: str, *, is_gated: bool) -> Gate:
        """See `Parts.activation`."""
        return Activation(name, is_gated=is_gated)

    def quantize_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Parts.quantize_rows`."""
        return quantize_rows(x)

    def whole(self, output: SiteOutput) -> Tensor:
        """The output itself."""
        whole: Tensor = output
        return whole
