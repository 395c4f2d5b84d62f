"""Rows in fp8 at the inputs of the linear sites of Llama-3.1-8B and Qwen2.5-7B."""

from __future__ import annotations

import triton

from loramux.engine.kernels.gpu.fp8 import num_warps, quantize_rows_kernel
from tests.engine.kernels.gpu.compile_cases import CompileCase

CASES = [
    CompileCase(
        f"quantize rows of {width}",
        quantize_rows_kernel,
        {"x": "*bf16", "x_row": "i32", "out": "*fp8e4nv", "scales": "*fp32"},
        {"WIDTH": width, "BLOCK": triton.next_power_of_2(width)},
        {"num_warps": num_warps(triton.next_power_of_2(width))},
    )
    for width in (3584, 4096, 14336, 18944)
]
