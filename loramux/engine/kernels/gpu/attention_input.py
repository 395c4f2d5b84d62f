"""A step's attention work as the GPU kernel reads it: a list of items, planned in numpy.

A tile is some consecutive query tokens of one sequence. Its keys are one range, from the window's
edge to its last token's own position. An item is a tile with a part of that range:

    tile of 4 tokens, positions 996..999, window None     items:  keys 0..511 | 512..999

Ranges are split that are longer than the whole step's keys shared out over the device: the host knows
every length, so one long context among short ones keeps nobody waiting. The items of a tile are
consecutive, and whichever of them ends last adds their results up in order. Those with most work come
first, split tiles before all others: an item's number is also its place in the kernel's scratch.

How many items there are depends on the lengths, how many programs are launched must not (a captured
graph fixes it): the list is as long as it can ever be, and items with `NUM_PARTS` 0 are nobody's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from torch import Tensor

from loramux.engine.kernels.attention import AttentionInput, AttentionShape, BatchLayout
from loramux.engine.kernels.cpu.dtypes import Ints
from loramux.engine.kernels.gpu.attention_tiles import AttentionTiles, Tiles, tiles_of
from loramux.engine.step_buffers import DeviceFields, Fields, HostFields, StepLimits

# Columns of an item.
BLOCK_START: Final = 0  # where the sequence's blocks begin in `block_ids`
FIRST_TOKEN: Final = 1  # of the tile, in the batch
NUM_TOKENS: Final = 2  # of the tile
POSITION: Final = 3  # of the first token
KEY_BEGIN: Final = 4  # a multiple of the tile's block_n
KEY_END: Final = 5
FIRST_ITEM: Final = 6  # of the tile
NUM_PARTS: Final = 7  # items of the tile; 0 = no item here
NUM_COLUMNS: Final = 8


@dataclass(frozen=True, slots=True)
class GpuAttentionInput(AttentionInput):
    """As the Triton kernels read it; every tensor is int32."""

    slots: Tensor  # [num_tokens]: block * block_size + offset to write to; -1 = padding, write nothing
    block_ids: Tensor  # blocks of all sequences, one after the other
    decode_items: Tensor | None  # [num_windows, num_items, NUM_COLUMNS]; None = no such rows
    prompt_items: Tensor | None


class _TileList(NamedTuple):
    """Query tiles, by column; ends = position after the last token."""

    block_start: Ints
    first_token: Ints
    num_tokens: Ints
    position: Ints


class AttentionPlanner:
    """What the attention of one model needs of a step."""

    def __init__(
        self, shape: AttentionShape, limits: StepLimits, tiles: AttentionTiles | None = None
    ) -> None:
        """Args:
        tiles: None = from the table
        """
        tiles = tiles or tiles_of(shape)
        self.decode, self.prompt = tiles.decode, tiles.prompt
        self._queries = self.prompt.queries(shape.num_heads // shape.num_kv_heads)
        self._num_kv_heads = shape.num_kv_heads
        self._windows = shape.windows
        self._block_size = shape.block_size
        self._limits = limits

    @property
    def fields(self) -> Fields:
        """Of the step's buffers. `block_ids` is large and hardly ever full: see `fill`."""
        limits, windows = self._limits, len(self._windows)
        decode = self.num_decode_items(limits.max_seqs)
        prompt = self.num_prompt_items(limits.max_tokens, limits.max_seqs)
        return {
            "slots": ((limits.max_tokens,), np.int32),
            "decode_items": ((windows, decode, NUM_COLUMNS), np.int32),
            "prompt_items": ((windows, prompt, NUM_COLUMNS), np.int32),
            "block_ids": ((limits.max_seqs * limits.max_blocks,), np.int32),
        }

    def num_decode_items(self, num_seqs: int) -> int:
        """The most that so many sequences can give."""
        return num_seqs + self._wanted(self.decode)

    def num_prompt_items(self, num_tokens: int, num_seqs: int) -> int:
        """The most that so many tokens can give."""
        tiles = num_tokens // self._queries + min(num_seqs, num_tokens // 2)
        return tiles + self._wanted(self.prompt)

    def num_split_items(self, cut: Tiles) -> int:
        """The most items that tiles in several parts can have: fewer than `_wanted` tiles are that long."""
        return 2 * self._wanted(cut)

    def fill(self, host: HostFields, layout: BatchLayout) -> Mapping[str, int]:
        """Write a step's fields.

        Returns:
            How many rows of `block_ids` matter, as `StepBuffers.upload` takes it.
        """
        block_start = np.cumsum([0, *(len(ids) for ids in layout.blocks)], dtype=np.int64)
        used = int(block_start[-1])
        block_ids = host["block_ids"]
        np.concatenate(layout.blocks, out=block_ids[:used], casting="same_kind")
        num_tokens, size = len(layout.positions), self._block_size
        block = block_ids[block_start[layout.owner] + layout.positions // size]
        host["slots"][:num_tokens] = block * size + layout.positions % size
        host["slots"][num_tokens:] = -1
        decode = self._decode_tiles(layout, block_start)
        prompt = self._prompt_tiles(layout, block_start)
        for i, window in enumerate(self._windows):
            self._fill_items(host["decode_items"][i], decode, self.decode, window)
            self._fill_items(host["prompt_items"][i], prompt, self.prompt, window)
        return {"block_ids": used}

    def view(
        self,
        device: DeviceFields,
        num_tokens: int,
        num_seqs: int,
        *,
        has_decode: bool = True,
        has_prompts: bool = True,
    ) -> GpuAttentionInput:
        """The kernels' inputs for a step of at most this size.

        Args:
            num_tokens, num_seqs: padding included; they alone decide how much is launched.
            has_decode, has_prompts: False if no sequence computes one token, or none several.
        """
        num_decode = self.num_decode_items(num_seqs)
        num_prompt = self.num_prompt_items(num_tokens, num_seqs)
        return GpuAttentionInput(
            slots=device["slots"][:num_tokens],
            block_ids=device["block_ids"],
            decode_items=device["decode_items"][:, :num_decode] if has_decode else None,
            prompt_items=device["prompt_items"][:, :num_prompt] if has_prompts else None,
        )

    def _decode_tiles(self, layout: BatchLayout, block_start: Ints) -> _TileList:
        own = slice(0, layout.num_decode)
        ends = layout.ends[own]
        return _TileList(block_start[:-1][own], layout.offsets[:-1][own], np.ones_like(ends), ends - 1)

    def _prompt_tiles(self, layout: BatchLayout, block_start: Ints) -> _TileList:
        own = slice(layout.num_decode, None)
        counts, starts = layout.counts[own], layout.ends[own] - layout.counts[own]
        num_tiles = -(-counts // self._queries)
        seq = np.repeat(np.arange(len(counts)), num_tiles)
        first = (np.arange(len(seq)) - (np.cumsum(num_tiles) - num_tiles)[seq]) * self._queries
        return _TileList(
            block_start[:-1][own][seq],
            layout.offsets[:-1][own][seq] + first,
            np.minimum(counts[seq] - first, self._queries),
            starts[seq] + first,
        )

    def _fill_items(self, items: Ints, tiles: _TileList, cut: Tiles, window: int | None) -> None:
        """Split the tiles' keys and write the items, those with most keys first."""
        size = cut.block_n
        ends = tiles.position + tiles.num_tokens
        low = np.zeros_like(ends) if window is None else np.maximum(tiles.position + 1 - window, 0)
        low = low // size * size
        order = np.argsort(low - ends, kind="stable")
        keys = (ends - low)[order]
        mean = int(keys.sum()) // self._wanted(cut) + 1
        parts = -(-keys // max(cut.min_keys, mean))
        share = ((keys - 1) // parts // size + 1) * size  # keys of a part
        parts = -(-keys // share)
        tile = np.repeat(np.arange(len(order)), parts)
        first = (np.cumsum(parts) - parts)[tile]
        begin = (np.arange(len(tile)) - first) * share[tile]
        source, num_items = order[tile], len(tile)
        own = items[:num_items]
        own[:, BLOCK_START] = tiles.block_start[source]
        own[:, FIRST_TOKEN] = tiles.first_token[source]
        own[:, NUM_TOKENS] = tiles.num_tokens[source]
        own[:, POSITION] = tiles.position[source]
        own[:, KEY_BEGIN] = low[source] + begin
        own[:, KEY_END] = low[source] + np.minimum(begin + share[tile], keys[tile])
        own[:, FIRST_ITEM] = first
        own[:, NUM_PARTS] = parts[tile]
        items[num_items:] = 0

    def _wanted(self, cut: Tiles) -> int:
        """Items, of all KV heads each, that fill the device: no split tile has more keys than their mean."""
        return max(cut.programs // self._num_kv_heads, 1)
