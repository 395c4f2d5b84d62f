"""Linear layers of the base model, and the sites where an adapter may attach."""

from __future__ import annotations

from functools import cache
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from loramux.engine.kernels.cpu.lora import product_code as lora_product_code
from loramux.engine.kernels.cpu.operations import product_code
from loramux.engine.kernels.cpu.product import PackedLinear, supports
from loramux.engine.kernels.cpu.recording import Operation, arguments
from loramux.engine.kernels.lora import LoraInput, SiteLanes, apply_lora
from loramux.engine.layers.fp8_linear import Fp8Linear, QuantizeRows, check_fp8, quantize_rows
from loramux.engine.layers.int8_linear import Int8Linear, check_int8
from loramux.engine.parallel.peers import Peers


class BaseLinear(Protocol):
    """y = x · Wᵀ + b of the base model, in whatever form its weight has."""

    can_hold_lanes: ClassVar[bool]  # whether the A rows of adapters may lie behind its weight

    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_tokens, in_features] → [num_tokens, out_features]."""
        ...


class Linear:
    """y = x · Wᵀ + b, with the weight in the layout that this device computes fastest.

    On a CPU in bfloat16 the weight is reordered once, for our own kernel or for oneDNN; the original is
    not kept.
    """

    __slots__ = ("_bias", "_prepacked", "_weight", "packed")

    can_hold_lanes: ClassVar[bool] = True

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Args:
        weight: [out_features, in_features], consumed
        bias: [out_features]
        """
        self.packed = PackedLinear(weight, bias) if supports(weight) else None
        if self.packed is not None:
            return
        self._bias = bias
        self._prepacked = weight.device.type == "cpu" and can_prepack(weight.dtype)
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None) if self._prepacked else weight
        )

    @property
    def bias(self) -> Tensor | None:
        """[out_features]"""
        return self._bias

    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_tokens, in_features] → [num_tokens, out_features]."""
        if self.packed is not None:
            return self.packed(x)
        if self._prepacked:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return y
        return functional.linear(x, self._weight, self._bias)


class LoraLinear:
    """A fused site of the base model with the lanes of the resident adapters beside it.

    Where a site is cut by its input features, each rank of a tensor-parallel engine has one term of the
    output, the adapters' part included, and what is returned is the sum.
    """

    __slots__ = ("lanes", "linear", "packed", "peers")

    def __init__(self, linear: BaseLinear, lanes: SiteLanes | None, peers: Peers | None = None) -> None:
        self.linear = linear
        self.lanes = lanes  # None on a server without LoRA
        self.packed: PackedLinear | None = None
        if isinstance(linear, Linear | Int8Linear):
            self.packed = linear.packed  # its code multiplies and adds the lanes' part in one
        self.peers = peers  # ranks that hold the other input features; None = all are here

    def __call__(self, x: Tensor, lora: LoraInput | None) -> Tensor:
        """The base output plus what each token's adapter adds; base-only steps pay nothing."""
        if lora is None or self.lanes is None:
            out = self.linear(x)
        elif self.packed is not None and lora.prompts is not None and not lora.gains:
            out = lora.prompts.multiply(self.packed, x, self.lanes.address)
            if lora.rows is not None:
                lora.rows.add(out, x, self.lanes.address)
        elif self.packed is not None and lora.rows is not None and not lora.gains:
            out = lora.rows.multiply(self.packed, x, self.lanes.address)
        else:
            out = self.linear(x)
            apply_lora(out, x, self.lanes, lora)
        return out if self.peers is None else self.peers.add(out)

    def operation(self, kind: str, x: Tensor, out: Tensor, *, with_lora: bool) -> Operation:
        """The call, for as many rows as a step has, from x into out.

        Args:
            kind: under which its time is counted
            with_lora: for steps with adapters
        """
        assert self.packed is not None
        values = (x.data_ptr(), out.data_ptr(), self.packed.address)
        if not with_lora:
            return Operation(kind, product_code(), arguments(*values))
        assert self.lanes is not None
        return Operation(kind, lora_product_code(), arguments(*values, self.lanes.address))


def make_linear(
    weight: Tensor,
    bias: Tensor | None,
    quantization: str | None,
    quantize: QuantizeRows = quantize_rows,
) -> BaseLinear:
    """A linear layer, its weight in the form that `--quantization` asks for.

    Args:
        weight, bias: as for `Linear`
        quantize: how activations are quantised on this device, if they are
    """
    if quantization == "fp8":
        return Fp8Linear(weight, bias, quantize)
    return Int8Linear(weight, bias) if quantization == "int8" else Linear(weight, bias)


def make_head(weight: Tensor, quantization: str | None) -> BaseLinear:
    """The output head, in int8 if the layers are; beside fp8 layers it keeps the model's dtype."""
    return Int8Linear(weight) if quantization == "int8" else Linear(weight)


def can_hold_lanes(quantization: str | None) -> bool:
    """Whether the A rows of adapters may lie behind weights of this form."""
    forms: dict[str | None, type[BaseLinear]] = {"fp8": Fp8Linear, "int8": Int8Linear}
    return forms.get(quantization, Linear).can_hold_lanes


def check_quantization(quantization: str | None, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a form of the weights that this device cannot compute with.

    Raises:
        InvalidConfig: says why.
    """
    if quantization == "fp8":
        check_fp8(dtype, device)
    if quantization == "int8":
        check_int8(device)


@cache
def can_prepack(dtype: torch.dtype) -> bool:
    """True if this torch has oneDNN's prepacked linear for `dtype` and it agrees with the plain one.

    The operators are private to torch (its compiler emits them), so they are tried, not assumed.
    """
    if dtype != torch.bfloat16 or not torch.backends.mkldnn.enabled:
        return False
    weight = torch.linspace(-1, 1, 64 * 32).reshape(64, 32).to(dtype)
    x = torch.linspace(-1, 1, 3 * 32).reshape(3, 32).to(dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        y = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.allclose(y.float(), functional.linear(x, weight).float(), rtol=1e-2, atol=1e-1)
