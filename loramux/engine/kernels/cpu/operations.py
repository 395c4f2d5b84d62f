"""Kernels of a decoder layer as operations of a recording; what they need of a step is its `StepState`."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, Final

import numpy as np
from numba import carray

from loramux.engine.kernels.cpu.attention import Tile, attend_range
from loramux.engine.kernels.cpu.intrinsics import BFLOAT16, Dtype, Size
from loramux.engine.kernels.cpu.product_strips import NO_LANES, SCRATCH_BYTES, multiply_strips
from loramux.engine.kernels.cpu.recording import as_float, operation_code
from loramux.engine.kernels.cpu.rows import rms_norm, rotate_and_store, silu_mul
from loramux.engine.kernels.cpu.threads import as_floats, as_ints
from loramux.engine.kernels.cpu.vector_ir import LANES

ATTEND_ARGUMENTS: Final = 8  # how many
PRODUCT_ARGUMENTS: Final = 3


def norm_code() -> int:
    """`rows.rms_norm` in bfloat16. Arguments: x, delta, weight, out, width, bits of eps."""
    return operation_code(_norm)


def product_code() -> int:
    """The equation of `product.py`. Arguments: x, out, a `PackedLinear`'s address."""
    return operation_code(_product)


def silu_code() -> int:
    """`rows.silu_mul` in bfloat16. Arguments: gate_up, out, width."""
    return operation_code(_silu)


@cache
def store_code(vectors: Size) -> int:
    """`rows.rotate_and_store` in bfloat16, for heads of this size.

    Arguments: qkv, q_weight, k_weight, bits of eps, k_cache, v_cache, heads, kv_heads.
    """

    def store(arguments: Any, states: Any, thread: int, num_threads: int) -> None:
        a, state = carray(arguments, 8), carray(states, 1)[0]
        rows = state.rows
        slots = carray(as_ints(state.slots), rows)
        rotate_and_store(
            *(BFLOAT16, a[0], state.cos, state.sin, a[1], a[2], as_float(a[3]), a[4], a[5], slots),
            *(a[6], a[7], vectors, rows * thread // num_threads, rows * (thread + 1) // num_threads),
        )

    return operation_code(store)


@lru_cache(maxsize=None, typed=True)  # dtypes are told by type only: their values are all 0
def attend_code(dtype: Dtype, vectors: Size, tile: Tile, group: int) -> int:
    """`attention.attend_range` for a model's shape.

    Arguments: q, q_bytes, k, v, out, window, bits of scale, kv_heads.
    """
    rows, score_rows, score_blocks = tile.rows, tile.score_rows, tile.score_blocks
    value_rows = tile.value_rows

    def attend(arguments: Any, states: Any, thread: int, num_threads: int) -> None:
        a, state = carray(arguments, ATTEND_ARGUMENTS), carray(states, 1)[0]
        bounds = carray(as_ints(state.bounds), num_threads)
        begin, end = bounds[thread], state.num_tiles * a[7]
        if thread + 1 < num_threads:  # the last one of a team that is smaller than planned does the rest
            end = bounds[thread + 1]
        block_ids = carray(as_ints(state.block_ids), state.num_block_ids)
        tiles = carray(as_ints(state.tiles), (state.num_tiles, 4))
        room = state.attention_room + thread * state.attention_room_size * 4
        attend_range(
            *(dtype, vectors, rows, score_rows, score_blocks, value_rows, group),
            *(a[0], a[1], a[2], a[3], a[4], block_ids, tiles, a[5], np.float32(as_float(a[6])), a[7]),
            *(carray(as_floats(room), state.attention_room_size), begin, end),
        )

    return operation_code(attend)


def _norm(arguments: Any, states: Any, thread: int, num_threads: int) -> None:
    a, rows = carray(arguments, 6), carray(states, 1)[0].rows
    begin, end = rows * thread // num_threads, rows * (thread + 1) // num_threads
    rms_norm(BFLOAT16, a[0], a[1], a[2], a[3], a[4], as_float(a[5]), begin, end)


def _product(arguments: Any, states: Any, thread: int, num_threads: int) -> None:
    a, state = carray(arguments, PRODUCT_ARGUMENTS), carray(states, 1)[0]
    linear = carray(as_ints(a[2]), 7)
    strips = -(-linear[6] // LANES)
    multiply_strips(
        *(linear[0], a[0], a[1], state.rows, linear[1], linear[2], linear[3], linear[4]),
        *(state.product_room + thread * SCRATCH_BYTES, linear[5], linear[6]),
        *(strips * thread // num_threads, strips * (thread + 1) // num_threads, 0, 0, *NO_LANES),
    )


def _silu(arguments: Any, states: Any, thread: int, num_threads: int) -> None:
    a, rows = carray(arguments, 3), carray(states, 1)[0].rows
    begin, end = rows * thread // num_threads, rows * (thread + 1) // num_threads
    silu_mul(BFLOAT16, a[0], a[1], a[2], begin, end)
