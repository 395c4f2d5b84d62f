"""The sampling kernels for the vocabularies of Llama 3 and Qwen 2.5; they are the same for 1 to 128 rows."""

from __future__ import annotations

from typing import Any

import triton

from loramux.engine.kernels.gpu import sampling, sampling_filter
from loramux.engine.kernels.sampling import DRAW, FULL, GREEDY
from tests.engine.kernels.gpu.compile_cases import CompileCase

TYPES = {
    "logits": "*bf16",
    "logits_stride": "i32",
    "ints": "*i32",
    "floats": "*fp32",
    "counts": "*i32",
    "biases": "*fp32",
    "masks": "*i32",
    "mask_stride": "i32",
    "scaled": "*fp32",
    "best_scores": "*fp32",
    "best_ids": "*i32",
    "peaks": "*fp32",
    "sums": "*fp32",
    "list_values": "*fp32",
    "list_tokens": "*i32",
    "arrived": "*i32",
    "out": "*i32",
    "vocab_size": "i32",
    "num_chunks": "i32",
}


def case(name: str, kernel: Any, num_warps: int, logits: str = "*bf16", **constants: int) -> CompileCase:
    options: dict[str, Any] = {"num_warps": num_warps, "enable_fp_fusion": False}
    return CompileCase(name, kernel, TYPES | {"logits": logits}, constants, options)


def cases(vocab_size: int) -> list[CompileCase]:
    width = triton.next_power_of_2(triton.cdiv(vocab_size, sampling.CHUNK))
    draw = {"BLOCK": sampling.CHUNK, "WIDTH": width}
    found = [
        case(
            f"draw {vocab_size} mode {mode} {logits}",
            sampling._draw,
            sampling.DRAW_WARPS,
            logits,
            MODE=mode,
            **draw,
        )
        for mode in (GREEDY, DRAW, FULL)
        for logits in ("*bf16", "*fp32")
    ]
    block = sampling.FILTER_BLOCK
    cut = {
        "BLOCKS": triton.cdiv(vocab_size, block),
        "BLOCK": block,
        "LIST": sampling.LIST_SIZE,
        "WIDTH": width,
    }
    found.append(case(f"filter {vocab_size}", sampling_filter.filter_rows, sampling.FILTER_WARPS, **cut))
    return found


CASES = [*cases(128256), *cases(152064)]
