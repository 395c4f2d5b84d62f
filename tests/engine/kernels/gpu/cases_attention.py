"""How attention is launched for real models."""

from __future__ import annotations

from typing import Final

import torch

from loramux.engine.kernels.gpu.attention_kernel import attend_items
from loramux.engine.kernels.gpu.attention_tiles import Tiles, decode_tiles, padded, prompt_tiles
from tests.engine.kernels.gpu.compile_cases import CompileCase

MODELS: Final = {  # query heads, KV heads, head_dim
    "Llama-3.1-8B": (32, 8, 128),
    "Qwen2.5-7B": (28, 4, 128),
    "SmolLM2-135M": (9, 3, 64),
}
POINTERS: Final = {
    "items": "*i32",
    "block_ids": "*i32",
    "part_out": "*fp32",
    "part_stats": "*fp32",
    "counters": "*i32",
}


def attention_case(
    name: str, heads: tuple[int, int, int], tiles: Tiles, cache: str = "*bf16", window: int = 0
) -> CompileCase:
    num_heads, num_kv_heads, head_dim = heads
    row = padded(head_dim)
    keys = 2 * tiles.block_n * row * (1 if "fp8" in cache else 2)  # bytes of a tile of keys and values
    is_wgmma = tiles.block_m >= 64  # reads its operands from shared memory, so queries and one tile more
    least = tiles.num_stages * keys + tiles.block_m * row * 2 if is_wgmma else (tiles.num_stages - 1) * keys
    return CompileCase(
        name=f"{name} attention, {cache} cache, window {window}, {tiles.block_m} rows",
        kernel=attend_items,
        types=POINTERS | {"q": "*bf16", "out": "*bf16", "k_cache": cache, "v_cache": cache},
        constants={
            "SCALE": head_dim**-0.5,
            "SOFT_CAP": 0.0,
            "WINDOW": window,
            "NUM_KV_HEADS": num_kv_heads,
            "GROUP": num_heads // num_kv_heads,
            "HEAD_DIM": head_dim,
            "DIM": padded(head_dim),
            "BLOCK_SIZE": 16,
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "MASK_ALL": tiles.mask_all,
            "UNROLL": tiles.unroll,
        },
        options={"num_warps": tiles.num_warps, "num_stages": tiles.num_stages},
        least_shared=least,
    )


def both_tiles(heads: tuple[int, int, int]) -> tuple[Tiles, Tiles]:
    group = heads[0] // heads[1]
    return decode_tiles(group, heads[2], torch.bfloat16), prompt_tiles(group, heads[2], torch.bfloat16)


CASES = [
    *(attention_case(name, heads, tiles) for name, heads in MODELS.items() for tiles in both_tiles(heads)),
    *(attention_case("fp8", (32, 8, 128), tiles, "*fp8e4nv") for tiles in both_tiles((32, 8, 128))),
    *(attention_case("window", (32, 8, 96), tiles, window=2048) for tiles in both_tiles((32, 8, 96))),
]
