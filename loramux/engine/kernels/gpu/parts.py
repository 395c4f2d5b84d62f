"""The parts of layers on a GPU: sites that leave their expand to the kernel that runs next.

A step without adapters reads the base weight only and launches nothing for LoRA. What no kernel here
serves (layer norms) takes the site's output completed and runs in torch.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from loramux.engine.kernels.gpu.activation import activate
from loramux.engine.kernels.gpu.fp8 import quantize_rows
from loramux.engine.kernels.gpu.lora import expanded, shrink
from loramux.engine.kernels.gpu.lora_input import GpuLoraInput
from loramux.engine.kernels.gpu.norm import rms_norm
from loramux.engine.kernels.gpu.site_output import Pending, SiteOutput
from loramux.engine.kernels.gpu.site_plan import PlanTable, Shrink, read_plans
from loramux.engine.kernels.lora import SiteLanes, scale_output
from loramux.engine.layers.linear import BaseLinear, Linear
from loramux.engine.layers.norm import LayerNorm, Norm, RMSNorm
from loramux.engine.layers.parts import Gate, LinearSite, ResidualNorm
from loramux.engine.parallel.peers import Peers


class GpuParts:
    """See `layers/parts.py`."""

    def __init__(self, plans: PlanTable | None = None) -> None:
        """Args:
        plans: None = the table of the package.
        """
        self._plans = plans or read_plans()

    def site(self, name: str, linear: BaseLinear, lanes: SiteLanes | None, peers: Peers | None) -> LinearSite:
        """See `Parts.site`; the lanes are those of a pool with joined parts."""
        return GpuSite(name, linear, lanes, peers, self._plans)

    def norm(self, norm: Norm) -> ResidualNorm:
        """RMS norms are fused with the addition, layer norms are torch's."""
        return GpuRMSNorm(norm) if isinstance(norm, RMSNorm) else GpuLayerNorm(norm)

    def activation(self, name: str, *, is_gated: bool) -> Gate:
        """See `Parts.activation`."""
        return GpuActivation(name, is_gated=is_gated)

    def quantize_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Parts.quantize_rows`."""
        return quantize_rows(x)

    def whole(self, output: SiteOutput) -> Tensor:
        """See `Parts.whole`."""
        return expanded(output).base


class GpuSite:
    """A linear site whose plan is looked up in every step; the look-up is part of a captured graph."""

    __slots__ = ("_bias", "_lanes", "_linear", "_name", "_peers", "_plans")

    def __init__(
        self,
        name: str,
        linear: BaseLinear,
        lanes: SiteLanes | None,
        peers: Peers | None,
        plans: PlanTable,
    ) -> None:
        self._name = name
        self._linear = linear
        self._lanes = lanes
        self._peers = peers
        self._plans = plans
        self._bias: Tensor | None = None  # [rows of the product], zero beyond the base output
        if lanes is not None and lanes.weight is not None and isinstance(linear, Linear):
            self._bias = _padded(linear.bias, lanes.weight.shape[0])

    def __call__(self, x: Tensor, lora: GpuLoraInput | None) -> SiteOutput:
        """x: [num_tokens, in_features]."""
        lanes = self._lanes
        if lora is None or lanes is None:
            out = self._linear(x)
            return SiteOutput(self._sum(out), out.shape[1])
        plan = self._plans.plan(self._name, lora.num_tokens, lora.num_lanes, lora.decode_only)
        width = lanes.offsets[-1]
        is_augmented = plan.shrink is Shrink.AUGMENTED and lanes.weight is not None
        if is_augmented:
            assert lanes.weight is not None
            rows = lanes.product_rows(lora.num_lanes)
            bias = None if self._bias is None else self._bias[:rows]
            out = functional.linear(x, lanes.weight[:rows], bias)
            shrunk = out[None, :, width:]
        else:
            out = self._linear(x)
            if plan.shrink is Shrink.TILES:
                shrunk = shrink(x, lanes, lora, plan.planes)
            else:
                shrunk = functional.linear(x, lanes.a[: lora.num_lanes].flatten(0, 1))[None]
        for g in lora.gains:
            if (own := g.gains.get(lanes.index)) is not None:
                scale_output(out[g.begin : g.end, :width], own)
        pending = Pending(shrunk, lanes, lora, plan.by_tile)
        if self._peers is not None and not is_augmented:  # such a shrink is one term of a sum, too
            return SiteOutput(self._sum(expanded(SiteOutput(out, width, pending)).out), width)
        output = SiteOutput(self._sum(out), width, pending)
        return output if plan.is_fused else expanded(output)

    def _sum(self, out: Tensor) -> Tensor:
        return out if self._peers is None else self._peers.add(out)


def _padded(bias: Tensor | None, rows: int) -> Tensor | None:
    return None if bias is None else functional.pad(bias, (0, rows - bias.shape[0]))


class GpuRMSNorm:
    """`RMSNorm`, fused with what is added before."""

    __slots__ = ("_norm",)

    def __init__(self, norm: RMSNorm) -> None:
        self._norm = norm

    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_tokens, features]."""
        return rms_norm(x, None, self._norm.weight, self._norm.eps)

    def after_add(self, x: Tensor, delta: SiteOutput) -> Tensor:
        """x += delta in place; returns the norm of the new x."""
        return rms_norm(x, delta, self._norm.weight, self._norm.eps)


class GpuLayerNorm:
    """`LayerNorm` in torch, after the site's output is complete."""

    __slots__ = ("_norm",)

    def __init__(self, norm: LayerNorm) -> None:
        self._norm = norm

    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_tokens, features]."""
        return self._norm(x)

    def after_add(self, x: Tensor, delta: SiteOutput) -> Tensor:
        """x += delta in place; returns the norm of the new x."""
        return self._norm.after_add(x, expanded(delta).base)


class GpuActivation:
    """`Activation`, fused with the expand of its input."""

    __slots__ = ("_is_gated", "_name")

    def __init__(self, name: str, *, is_gated: bool) -> None:
        self._name = name
        self._is_gated = is_gated

    def __call__(self, x: SiteOutput) -> Tensor:
        """→ [num_tokens, in_features of the second product]."""
        return activate(x, self._name, is_gated=self._is_gated)
