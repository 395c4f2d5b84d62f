"""The kernel that fills lanes; its shapes lie in its table, so one case is each dtype of lanes."""

from __future__ import annotations

from loramux.engine.kernels.gpu.scatter import (
    NUM_COLUMNS,
    NUM_WARPS,
    TILE_FEATURES,
    TILE_LANES,
    scatter_kernel,
)
from tests.engine.kernels.gpu.compile_cases import CompileCase

CASES = [
    CompileCase(
        f"scatter into {dtype}",
        scatter_kernel,
        {
            "table": "*i64",
            "source": "*u8",
            "flags": "*i32",
            "like": f"*{dtype}",
            "first_row": "i32",
            "count": "i32",
        },
        {"WIDTH": NUM_COLUMNS, "LANES": TILE_LANES, "FEATURES": TILE_FEATURES},
        {"num_warps": NUM_WARPS},
    )
    for dtype in ("bf16", "fp16", "fp32")
]
