"""How the attention kernel is cut up: one table for all shapes, for an H200 (sm_90, 132 multiprocessors).

A tile is `block_m` rows against `block_n` keys at a time; the rows are query tokens times the query
heads of one KV head. Decode rows get the smallest tile that tensor cores take, since they wait for
memory; prompt rows get the largest whose accumulator fits into the registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from loramux.engine.kernels.attention import AttentionShape

NUM_SMS: Final = 132
MIN_ROWS: Final = 16  # of a matrix product, and columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """One class of rows: how they are cut and launched."""

    block_m: int  # rows: query tokens * query heads of a KV head
    block_n: int  # keys
    num_warps: int
    num_stages: int
    programs: int  # wanted at the same time; with fewer tiles, the keys of a tile are split
    min_keys: int  # a split is not smaller
    mask_all: bool  # every score is masked, in one loop, instead of a loop for those that need no mask
    unroll: int  # parts of a tile that are read at the same time when they are added up

    def queries(self, group: int) -> int:
        """Query tokens of a tile."""
        return self.block_m // group


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """Both classes of a model's rows."""

    decode: Tiles
    prompt: Tiles


def tiles_of(shape: AttentionShape) -> AttentionTiles:
    """From the table."""
    group = shape.num_heads // shape.num_kv_heads
    kind = (group, shape.head_dim, shape.dtype)
    return AttentionTiles(decode_tiles(*kind), prompt_tiles(*kind))


def padded(head_dim: int) -> int:
    """The next power of two that a matrix product takes: what a kernel's tile holds."""
    return max(MIN_ROWS, 1 << (head_dim - 1).bit_length())


def decode_tiles(group: int, head_dim: int, dtype: torch.dtype) -> Tiles:
    """For sequences with one query token."""
    wide = padded(head_dim) * dtype.itemsize  # bytes of a key
    return Tiles(
        block_m=max(MIN_ROWS, 1 << (group - 1).bit_length()),
        block_n=64 if wide <= 256 else 32,
        num_warps=4,
        num_stages=3,
        programs=176,
        min_keys=128,
        mask_all=True,
        unroll=4,
    )


def prompt_tiles(group: int, head_dim: int, dtype: torch.dtype) -> Tiles:
    """For prompt chunks."""
    if dtype == torch.float32:  # no tensor cores: what counts is that it fits
        rows, keys, warps, stages = (32, 32, 8, 2) if padded(head_dim) > 128 else (64, 32, 8, 2)
    elif padded(head_dim) > 128:
        rows, keys, warps, stages = 128, 64, 8, 2
    else:
        rows, keys, warps, stages = 128, 64, 8, 3
    return Tiles(
        block_m=max(rows, 1 << (group - 1).bit_length()),
        block_n=keys,
        num_warps=warps,
        num_stages=stages,
        programs=NUM_SMS,
        min_keys=512,
        mask_all=False,
        unroll=1,
    )
