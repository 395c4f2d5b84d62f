"""Whose lanes each token owns, as the kernels of the linear sites read it. No Triton here.

Two forms of the same facts: by token, for steps of few tokens; and as tiles, up to `tile_rows`
consecutive tokens of one adapter each, so that their lanes are read once a tile. Tiles cover every
token, base tokens and padding with rank 0, and need sequences of one adapter to stand together.

What is static in a captured graph is the prefix of the pool that holds all lanes in use, rounded up
to one of `lane_buckets`: it decides how many rows of [weight; lanes] a product reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from torch import Tensor

from loramux.engine.adapters.lanes import LaneSpan
from loramux.engine.kernels.cpu.dtypes import Ints
from loramux.engine.kernels.lora import GainSegment
from loramux.engine.step_buffers import DeviceFields, Fields, HostFields, StepLimits

SMALLEST_BUCKET: Final = 64  # lanes
SMALLEST_TILE: Final = 16  # tokens; what a tensor core takes at once
LARGEST_TILE: Final = 64
_TILE_FIELDS: Final = 4  # numbers that describe one tile


@dataclass(frozen=True, slots=True)
class GpuLoraInput:
    """A step's LoRA work; the same at every site."""

    token_lane: Tensor  # [num_tokens] int32: first lane; -1 = base or padding
    token_rank: Tensor  # [num_tokens] int32: lanes owned; 0 = base or padding
    tiles: Tensor  # [num_tiles, 4] int32: first token, tokens, first lane, rank; no tokens = nothing to do
    tile_rows: int  # most tokens of a tile
    num_lanes: int  # prefix of the pool that holds every lane in use; above 0
    decode_only: bool  # every sequence computes one token
    gains: Sequence[GainSegment] = ()  # DoRA's; a step that has some is never captured

    @property
    def num_tokens(self) -> int:
        """Tokens of the step, padding included."""
        return self.token_lane.shape[0]


def lane_buckets(pool_lanes: int) -> tuple[int, ...]:
    """Every value of `num_lanes`, ascending: none, 64, 128, 256 …, the whole pool."""
    sizes = [0]
    while sizes[-1] < pool_lanes:
        sizes.append(min(max(SMALLEST_BUCKET, 2 * sizes[-1]), pool_lanes))
    return tuple(sizes)


def lanes_in_use(spans: Sequence[LaneSpan | None], pool_lanes: int) -> int:
    """The bucket of a step; 0 if no sequence has an adapter.

    Args:
        spans: of each sequence; None = base.
        pool_lanes: lanes of the pool.
    """
    end = max((span.first + span.rank for span in spans if span is not None), default=0)
    return next(size for size in lane_buckets(pool_lanes) if size >= end)


def tile_rows(num_tokens: int) -> int:
    """Tokens of a tile in a step of `num_tokens`: as many as leave enough tiles to fill the device.

    An expand reads all of an adapter's B once a tile: with tiles of 16, 2048 tokens of one adapter of
    rank 16 would read 117 MB at Llama-3.1-8B's mlp_in, four times the activations.
    """
    if num_tokens <= 256:
        return SMALLEST_TILE
    return 32 if num_tokens <= 1024 else LARGEST_TILE


def fields(limits: StepLimits) -> Fields:
    """What the LoRA work of a step needs in the step's buffers; nothing without a pool."""
    if limits.num_lanes == 0:
        return {}
    most = _num_tiles(limits.max_tokens, limits.max_seqs, SMALLEST_TILE)
    return {
        "token_lane": ((limits.max_tokens,), np.int32),
        "token_rank": ((limits.max_tokens,), np.int32),
        "lora_tiles": ((most, _TILE_FIELDS), np.int32),
    }


def fill(host: HostFields, spans: Sequence[LaneSpan | None], offsets: Ints, num_tokens: int) -> None:
    """Write a step's lanes; a step without adapters needs no call.

    Args:
        spans: of each sequence in token order, sequences of one adapter side by side; None = base.
        offsets: [num_seqs + 1], where each sequence's tokens begin and the last one's end.
        num_tokens: of the step, padding included.
    """
    first = np.array([-1 if span is None else span.first for span in spans] + [-1], dtype=np.int32)
    rank = np.array([0 if span is None else span.rank for span in spans] + [0], dtype=np.int32)
    ends = np.append(offsets[1:], num_tokens)  # the padding is one more base sequence
    counts = np.diff(np.append(offsets, num_tokens))
    host["token_lane"][:num_tokens] = np.repeat(first, counts)
    host["token_rank"][:num_tokens] = np.repeat(rank, counts)

    is_last = np.append(first[1:] != first[:-1], True)  # of its run of one adapter
    run_ends = ends[is_last]
    run_begins = np.append(0, run_ends[:-1])
    rows = tile_rows(num_tokens)
    tiles_of = -(-(run_ends - run_begins) // rows)
    total = int(tiles_of.sum())
    before = np.cumsum(tiles_of) - tiles_of
    begin = np.repeat(run_begins, tiles_of) + (np.arange(total) - np.repeat(before, tiles_of)) * rows
    tiles = host["lora_tiles"]
    tiles[:total, 0] = begin
    tiles[:total, 1] = np.minimum(np.repeat(run_ends, tiles_of) - begin, rows)
    tiles[:total, 2] = np.repeat(first[is_last], tiles_of)
    tiles[:total, 3] = np.repeat(rank[is_last], tiles_of)
    tiles[total:] = 0


def view(
    device: DeviceFields,
    num_tokens: int,
    num_seqs: int,
    *,
    num_lanes: int,
    decode_only: bool,
    gains: Sequence[GainSegment] = (),
) -> GpuLoraInput | None:
    """The LoRA work of a step; None if no sequence has an adapter.

    Args:
        num_tokens, num_seqs: of the step, padding included.
        num_lanes: as `lanes_in_use` says.
        gains: the tokens of DoRA adapters.
    """
    if num_lanes == 0:
        return None
    rows = tile_rows(num_tokens)
    return GpuLoraInput(
        token_lane=device["token_lane"][:num_tokens],
        token_rank=device["token_rank"][:num_tokens],
        tiles=device["lora_tiles"][: _num_tiles(num_tokens, num_seqs, rows)],
        tile_rows=rows,
        num_lanes=num_lanes,
        decode_only=decode_only,
        gains=gains,
    )


def _num_tiles(num_tokens: int, num_seqs: int, rows: int) -> int:
    """Most tiles that a step can have: each run of one adapter, and the padding, ends in a short one."""
    return min(num_tokens, num_tokens // rows + num_seqs + 1)
