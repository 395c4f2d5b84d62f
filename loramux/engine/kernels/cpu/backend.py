"""The compiled attention kernels behind the engine's `Attention` interface."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loramux.engine.kernels.attention import (
    Angles,
    AttentionInput,
    AttentionShape,
    BatchLayout,
    KVCache,
    token_slots,
)
from loramux.engine.kernels.cpu.attention import Tile, scratch_size, tile_of
from loramux.engine.kernels.cpu.dtypes import TAGS, Ints, split_evenly
from loramux.engine.kernels.cpu.intrinsics import BLOCK, units
from loramux.engine.kernels.cpu.lazy_zeros import lazy_zeros
from loramux.engine.kernels.cpu.operations import ATTEND_ARGUMENTS, attend_code, store_code
from loramux.engine.kernels.cpu.recording import Call, Operation, StepState, arguments, bits
from loramux.engine.kernels.cpu.rows import rotate_and_store, rotate_and_store_parallel
from loramux.engine.kernels.cpu.threads import is_alone
from loramux.engine.kernels.cpu.vector_ir import LANES
from loramux.engine.layers.norm import RMSNorm

PARALLEL_ITEMS = 12  # sequences * KV heads of a decode step from which a second thread pays for its waking
PARALLEL_TOKENS = 64  # tokens from which rotating and storing is worth a second thread


def supports(shape: AttentionShape) -> bool:
    """True if `CpuAttention` can serve a model of this shape."""
    return (
        shape.device.type == "cpu"
        and shape.dtype in TAGS
        and shape.cache_dtype == shape.dtype
        and shape.block_size == BLOCK
        and shape.head_dim % (2 * LANES) == 0
    )


@dataclass(frozen=True, slots=True)
class TileList:
    """Tiles of one kind, as the compiled kernels read them."""

    tile: Tile
    rows: Ints  # [num_tiles, 4], see `attend_range`
    bounds: Ints  # [num_threads + 1] of the work items, so that each thread reads as many keys


@dataclass(frozen=True, slots=True)
class CpuAttentionInput(AttentionInput):
    """A step's attention work."""

    slots: Ints  # [num_tokens]: where each token's keys and values go
    block_ids: Ints  # the sequences' tables, one behind the other
    lists: list[TileList]  # of sequences that decode, and of prompts


class CpuAttention:
    """Compiled attention and cache writes; `attention_ir.py` says how a block lies in memory."""

    def __init__(self, shape: AttentionShape) -> None:
        assert supports(shape)
        self._shape = shape
        self._tag = TAGS[shape.dtype]
        self._group = shape.num_heads // shape.num_kv_heads
        self._vectors = units(shape.head_dim // LANES)
        self._decode, self._prompt = (
            tile_of(self._group, len(self._vectors), is_prompt=is_prompt) for is_prompt in (False, True)
        )
        self._threads = max(torch.get_num_threads(), 1)
        self._scratch = np.zeros((self._threads, 0), dtype=np.float32)
        tiles = (self._decode, self._prompt)
        self._calls = {tile: Call(self._attend_code(tile), ATTEND_ARGUMENTS, self._threads) for tile in tiles}

    def empty_cache(self, num_blocks: int) -> KVCache:
        """One layer's cache, zeroed."""
        s = self._shape
        word = 4 // s.dtype.itemsize  # elements of 32 bits
        k = lazy_zeros(
            (num_blocks, s.num_kv_heads, s.head_dim // word, BLOCK, word), dtype=s.dtype, device=s.device
        )
        v = lazy_zeros(
            (num_blocks, s.num_kv_heads, BLOCK // word, s.head_dim, word), dtype=s.dtype, device=s.device
        )
        return KVCache(k, v)

    def plan(self, layout: BatchLayout) -> CpuAttentionInput:
        """One tile a sequence that decodes, several tiles a prompt; all of a sequence share its table."""
        lengths = np.array([len(ids) for ids in layout.blocks], dtype=np.int64)
        first_block = np.cumsum(lengths) - lengths
        n = layout.num_decode
        self._reserve(-(-int(layout.ends.max()) // BLOCK))
        lists = []
        if n:
            ends = layout.ends[:n]
            rows = np.stack((first_block[:n], ends, np.arange(n), np.ones_like(ends)), axis=1)
            lists.append(TileList(self._decode, rows, self._split(ends)))
        if n < len(layout.counts):
            lists.append(self._prompt_tiles(layout, first_block))
        return CpuAttentionInput(token_slots(layout, BLOCK), np.concatenate(layout.blocks), lists)

    def store(
        self,
        qkv: Tensor,
        angles: Angles | None,
        norms: tuple[RMSNorm, RMSNorm] | None,
        cache: KVCache,
        plan: AttentionInput,
    ) -> Tensor:
        """See `Attention.store`; q and k are changed in place."""
        assert isinstance(plan, CpuAttentionInput)
        s = self._shape
        heads = qkv.view(-1, s.num_heads + 2 * s.num_kv_heads, s.head_dim)
        num_tokens = len(heads)
        arguments = (
            self._tag,
            qkv.data_ptr(),
            *((angles[0].data_ptr(), angles[1].data_ptr()) if angles is not None else (0, 0)),
            *((norms[0].address, norms[1].address) if norms is not None else (0, 0)),
            norms[0].eps if norms is not None else 0.0,
            cache.k.data_ptr(),
            cache.v.data_ptr(),
            plan.slots,
            s.num_heads,
            s.num_kv_heads,
            self._vectors,
        )
        if num_tokens < PARALLEL_TOKENS or self._threads == 1:
            rotate_and_store(*arguments, 0, num_tokens)
        else:
            rotate_and_store_parallel(*arguments, split_evenly(num_tokens, self._threads))
        return heads[:, : s.num_heads]

    def attend(self, q: Tensor, cache: KVCache, plan: AttentionInput, *, window: int | None) -> Tensor:
        """See `Attention.attend`."""
        assert isinstance(plan, CpuAttentionInput)
        s = self._shape
        num_tokens = q.shape[0]
        out = torch.empty((num_tokens, self.out_features), dtype=q.dtype)
        for tiles in plan.lists:
            call = self._calls[tiles.tile]
            num_items = len(tiles.rows) * s.num_kv_heads
            is_decode = tiles.tile is self._decode
            self._tell(plan, tiles, call.state)
            call.arguments[:] = self._attend_arguments(q, q.stride(0), cache, out, window)
            alone = is_decode and (num_items < PARALLEL_ITEMS or is_alone(num_tokens))
            call(alone=alone)
        return out

    @property
    def out_features(self) -> int:
        """Of what `attend` yields: num_heads * head_dim."""
        return self._shape.num_heads * self._shape.head_dim

    def operations(
        self,
        qkv: Tensor,
        norms: tuple[RMSNorm, RMSNorm] | None,
        cache: KVCache,
        out: Tensor,
        window: int | None,
    ) -> tuple[Operation, Operation]:
        """`store` and `attend` for steps in which all sequences decode, from `qkv` into `out`."""
        s = self._shape
        weights = (norms[0].address, norms[1].address, bits(norms[0].eps)) if norms is not None else (0, 0, 0)
        stored = (qkv.data_ptr(), *weights, cache.k.data_ptr(), cache.v.data_ptr())
        attended = self._attend_arguments(qkv, qkv.stride(0), cache, out, window)
        return (
            Operation(
                "rotate, store", store_code(self._vectors), arguments(*stored, s.num_heads, s.num_kv_heads)
            ),
            Operation("attention", self._attend_code(self._decode), arguments(*attended)),
        )

    def describe(self, plan: AttentionInput, state: StepState) -> None:
        """Tell `operations` of a step."""
        assert isinstance(plan, CpuAttentionInput)
        (tiles,) = plan.lists
        assert tiles.tile is self._decode
        state.slots = plan.slots.ctypes.data
        self._tell(plan, tiles, state)

    def _attend_code(self, tile: Tile) -> int:
        return attend_code(self._tag, self._vectors, tile, self._group)

    def _attend_arguments(
        self, q: Tensor, stride: int, cache: KVCache, out: Tensor, window: int | None
    ) -> tuple[int, ...]:
        s = self._shape
        tensors = (q.data_ptr(), stride * q.itemsize, cache.k.data_ptr(), cache.v.data_ptr(), out.data_ptr())
        return (*tensors, window or 0, bits(s.scale), s.num_kv_heads)

    def _tell(self, plan: CpuAttentionInput, tiles: TileList, state: StepState) -> None:
        state.block_ids, state.num_block_ids = plan.block_ids.ctypes.data, len(plan.block_ids)
        state.tiles, state.num_tiles = tiles.rows.ctypes.data, len(tiles.rows)
        state.bounds = tiles.bounds.ctypes.data
        state.attention_room, state.attention_room_size = self._scratch.ctypes.data, self._scratch.shape[1]

    def _prompt_tiles(self, layout: BatchLayout, first_block: Ints) -> TileList:
        n, size = layout.num_decode, self._prompt.tokens
        counts = layout.counts[n:]
        per_prompt = -(-counts // size)
        owner = np.repeat(np.arange(len(counts)), per_prompt)
        begin = (np.arange(len(owner)) - (np.cumsum(per_prompt) - per_prompt)[owner]) * size
        ends = (layout.ends[n:] - counts)[owner] + begin + 1
        tokens = layout.offsets[n:-1][owner] + begin
        rows = np.stack(
            (first_block[n:][owner], ends, tokens, np.minimum(counts[owner] - begin, size)), axis=1
        )
        return TileList(self._prompt, rows, self._split(ends))

    def _split(self, ends: Ints) -> Ints:
        keys = np.cumsum(ends)
        shares = keys[-1] * np.arange(self._threads + 1) // self._threads
        rows = np.searchsorted(keys, shares)
        rows[0], rows[-1] = 0, len(ends)
        bounds: Ints = rows * self._shape.num_kv_heads
        return bounds

    def _reserve(self, longest: int) -> None:
        """Room for one tile's scores, in each thread."""
        needed = max(scratch_size(t, self._shape.head_dim, longest) for t in (self._decode, self._prompt))
        if self._scratch.shape[1] < needed:
            self._scratch = np.zeros((self._threads, 2 * needed), dtype=np.float32)
