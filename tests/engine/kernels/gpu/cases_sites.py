"""The kernels of the linear sites at the shapes of Llama-3.1-8B and Qwen2.5-7B."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loramux.engine.kernels.gpu.activation import activation_kernel
from loramux.engine.kernels.gpu.lora import expand_kernel, shrink_kernel
from loramux.engine.kernels.gpu.norm import rms_norm_kernel
from loramux.engine.kernels.gpu.qkv import store_qkv_kernel
from loramux.engine.kernels.gpu.tiles import Tile, tile
from tests.engine.kernels.gpu.compile_cases import CompileCase

LORA_TYPES = {
    "h": "*bf16",
    "h_row": "i32",
    "h_plane": "i32",
    "b": "*bf16",
    "b_lane": "i32",
    "token_lane": "*i32",
    "token_rank": "*i32",
    "tiles": "*i32",
    "num_tokens": "i32",
}


@dataclass(frozen=True)
class Shape:
    """A model's layer."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    inner: int


LLAMA = Shape("Llama-3.1-8B", 4096, 32, 8, 14336)
QWEN = Shape("Qwen2.5-7B", 3584, 28, 4, 18944)
HEAD_DIM = 128


@dataclass(frozen=True)
class Form:
    """How a step of so many tokens launches the kernels."""

    name: str
    num_tokens: int
    num_lanes: int
    rows: int  # of a program; 0 = as the table says
    planes: int = 1

    def constants(self, cut: Tile, parts: int) -> dict[str, Any]:
        """Of the LoRA part."""
        rows = self.rows or cut.rows
        return {
            "M": rows,
            "LORA": self.num_lanes > 0,
            "R": cut.lanes,
            "PARTS": parts,
            "PLANES": self.planes,
        }

    def options(self, cut: Tile) -> dict[str, int]:
        """Of the launch."""
        return {"num_warps": cut.num_warps, "num_stages": 1 if self.planes > 1 else cut.num_stages}

    @property
    def types(self) -> dict[str, str]:
        """Of the LoRA part."""
        return LORA_TYPES | {"h": "*bf16" if self.planes == 1 else "*fp32"}


FORMS = [
    Form("base, 1 token", 1, 0, 0),
    Form("base, 8192 tokens", 8192, 0, 0),
    Form("8 tokens", 8, 128, 1),
    Form("64 tokens in tiles", 64, 256, 16),
    Form("64 tokens in tiles, planes", 64, 4096, 16, planes=8),
    Form("8 tokens, planes", 8, 1024, 1, planes=8),
    Form("1024 tokens", 1024, 512, 32),
    Form("8192 tokens", 8192, 512, 64),
]


def _qkv(shape: Shape, form: Form, cache: str = "*bf16") -> CompileCase:
    width = (shape.heads + 2 * shape.kv_heads) * HEAD_DIM
    cut = tile("qkv", (HEAD_DIM, width), form.num_lanes, form.num_tokens)
    types = dict.fromkeys(("qkv", "q_out", "cos", "sin", "q_norm", "k_norm"), "*bf16")
    types |= {"k_cache": cache, "v_cache": cache, "slots": "*i32", "qkv_row": "i32", "eps": "fp32"}
    constants: dict[str, Any] = {
        "HEADS": shape.heads,
        "KV_HEADS": shape.kv_heads,
        "D": HEAD_DIM,
        "HALF": HEAD_DIM // 2,
        "BLOCK": 16,
        "ROPE": True,
        "NORM": cache != "*bf16",
    }
    name = f"store_qkv {shape.name} {form.name} {cache}"
    return CompileCase(
        name,
        store_qkv_kernel,
        types | form.types,
        constants | form.constants(cut, 3),
        form.options(cut),
    )


def _activation(shape: Shape, form: Form, kind: str = "silu") -> CompileCase:
    cut = tile("activation", (shape.inner, 2 * shape.inner), form.num_lanes, form.num_tokens)
    constants: dict[str, Any] = {
        "WIDTH": shape.inner,
        "N": cut.columns,
        "KIND": kind,
        "GATED": kind == "silu",
    }
    return CompileCase(
        f"activation {shape.name} {form.name} {kind}",
        activation_kernel,
        {"x": "*bf16", "x_row": "i32", "out": "*bf16"} | form.types,
        constants | form.constants(cut, 2),
        form.options(cut),
    )


def _norm(shape: Shape, form: Form) -> CompileCase:
    cut = tile("norm", (shape.hidden, shape.hidden), form.num_lanes, form.num_tokens)
    types = {"x": "*bf16", "delta": "*bf16", "delta_row": "i32", "out": "*bf16", "weight": "*bf16"}
    constants: dict[str, Any] = {"WIDTH": shape.hidden, "N": 4096, "ADD": True}
    own = form.constants(cut, 1)
    return CompileCase(
        f"rms_norm {shape.name} {form.name}",
        rms_norm_kernel,
        types | {"eps": "fp32"} | form.types,
        constants | own | {"M": 1, "R": min(cut.lanes, 8)},
        form.options(cut) | {"num_stages": cut.num_stages},
    )


def _shrink(shape: Shape, form: Form, in_features: int, parts: int, out_features: int) -> CompileCase:
    cut = tile("shrink", (in_features, out_features), form.num_lanes, form.num_tokens)
    types = {"x": "*bf16", "x_row": "i32", "a": "*bf16", "h_row": "i32", "h_plane": "i32", "tiles": "*i32"}
    return CompileCase(
        f"shrink {shape.name} {form.name} {in_features} x {parts}",
        shrink_kernel,
        types | {"h": form.types["h"]},
        {
            "WIDTH": in_features,
            "K": cut.features,
            "PARTS": parts,
            "PLANES": form.planes,
            "M": min(cut.rows, max(form.rows, 16)),
            "TILE": max(form.rows, 16),
            "J": cut.lanes,
        },
        {"num_warps": cut.num_warps, "num_stages": cut.num_stages},
    )


def _expand(shape: Shape, form: Form, widths: tuple[int, ...], in_features: int) -> CompileCase:
    cut = tile("expand", (in_features, sum(widths)), form.num_lanes, form.num_tokens)
    w0, w1, w2 = (*widths, 0, 0)[:3]
    constants: dict[str, Any] = {"W0": w0, "W1": w1, "W2": w2, "N": cut.columns}
    return CompileCase(
        f"expand {shape.name} {form.name} {widths}",
        expand_kernel,
        {"y": "*bf16", "y_row": "i32"} | form.types,
        constants | form.constants(cut, len(widths)),
        form.options(cut),
    )


def _cases(shape: Shape, forms: list[Form], cache: str = "*bf16") -> list[CompileCase]:
    """A rank is no constant of a kernel: each case serves all of them."""
    cases = []
    kv = shape.kv_heads * HEAD_DIM
    for form in forms:
        cases += [_qkv(shape, form, cache), _activation(shape, form)]
        if form.rows <= 1:
            cases.append(_norm(shape, form))
        if form.num_lanes > 0:
            cases.append(_expand(shape, form, (shape.heads * HEAD_DIM, kv, kv), shape.hidden))
            cases.append(_shrink(shape, form, shape.inner, 1, shape.hidden))
    return cases


CASES = [*_cases(LLAMA, FORMS), *_cases(QWEN, [FORMS[2]], "*fp8e4nv")]
CASES += [_activation(LLAMA, FORMS[0], kind) for kind in ("relu", "gelu", "gelu_tanh")]
