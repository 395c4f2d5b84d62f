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
from loramux.engine.kernels.cpu.attention import attend_parallel, attend_range
from loramux.engine.kernels.cpu.dtypes import TAGS, Ints, Storage, split_evenly, storage
from loramux.engine.kernels.cpu.intrinsics import BLOCK, units
from loramux.engine.kernels.cpu.lazy_zeros import lazy_zeros
from loramux.engine.kernels.cpu.rows import rotate_and_store, rotate_and_store_parallel
from loramux.engine.kernels.cpu.vector_ir import LANES
from loramux.engine.layers.norm import RMSNorm

PARALLEL_ITEMS = 48  # sequences * KV heads of a decode step from which a second thread pays for its waking
PARALLEL_TOKENS = 64  # tokens from which rotating and storing is worth a second thread


def supports(shape: AttentionShape) -> bool:
    """True if `CpuAttention` can serve a model of this shape."""
    return (
        shape.device.type == "cpu"
        and shape.dtype in TAGS
        and shape.block_size == BLOCK
        and shape.head_dim % (2 * LANES) == 0
    )


@dataclass(frozen=True, slots=True)
class CpuKVCache(KVCache):
    """One layer's keys and values, also as the arrays that the kernels take."""

    k_rows: Storage
    v_rows: Storage


@dataclass(frozen=True, slots=True)
class CpuAttentionInput(AttentionInput):
    """A step's attention work, as the compiled kernels read it."""

    slots: Ints  # [num_tokens]: where each token's keys and values go
    block_ids: Ints  # the sequences' tables, one behind the other
    starts: Ints  # [num_tokens]: where the table of each token's sequence starts in block_ids
    ends: Ints  # [num_tokens]: position after the token
    tokens: Ints  # [num_tokens]: 0, 1, 2, ...
    bounds: Ints  # [num_threads + 1] of the work items, so that each thread reads as many keys


class CpuAttention:
    """Compiled attention, row by row also for prompts, and cache writes.

    Keys lie with the head dimension before the token, [num_blocks, num_kv_heads, head_dim, 16].
    """

    def __init__(self, shape: AttentionShape) -> None:
        assert supports(shape)
        self._shape = shape
        self._tag = TAGS[shape.dtype]
        self._group = units(shape.num_heads // shape.num_kv_heads)
        self._vectors = units(shape.head_dim // LANES)
        self._threads = max(torch.get_num_threads(), 1)
        self._scratch = np.zeros((self._threads, 0), dtype=np.float32)

    def empty_cache(self, num_blocks: int) -> KVCache:
        """One layer's cache, zeroed."""
        s = self._shape
        k = lazy_zeros((num_blocks, s.num_kv_heads, s.head_dim, BLOCK), dtype=s.dtype, device=s.device)
        v = lazy_zeros((num_blocks, s.num_kv_heads, BLOCK, s.head_dim), dtype=s.dtype, device=s.device)
        return CpuKVCache(k, v, storage(k), storage(v))

    def plan(self, layout: BatchLayout) -> CpuAttentionInput:
        """Every token is a row of its own; the rows of a sequence share its table."""
        lengths = np.array([len(ids) for ids in layout.blocks], dtype=np.int64)
        first_block = np.cumsum(lengths) - lengths
        self._reserve(-(-int(layout.ends.max()) // BLOCK))
        return CpuAttentionInput(
            slots=token_slots(layout, BLOCK),
            block_ids=np.concatenate(layout.blocks),
            starts=first_block[layout.owner],
            ends=layout.positions + 1,
            tokens=np.arange(len(layout.positions)),
            bounds=self._split(layout.positions + 1),
        )

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
        assert isinstance(cache, CpuKVCache)
        s = self._shape
        heads = qkv.view(-1, s.num_heads + 2 * s.num_kv_heads, s.head_dim)
        rows = storage(heads)
        arguments = (
            self._tag,
            qkv.data_ptr(),
            *((angles[0].data_ptr(), angles[1].data_ptr()) if angles is not None else (0, 0)),
            *((norms[0].address, norms[1].address) if norms is not None else (0, 0)),
            norms[0].eps if norms is not None else 0.0,
            cache.k_rows,
            cache.v_rows,
            plan.slots,
            s.num_heads,
            s.num_kv_heads,
            s.head_dim,
            rows,
        )
        if len(rows) < PARALLEL_TOKENS or self._threads == 1:
            rotate_and_store(*arguments, 0, len(rows))
        else:
            rotate_and_store_parallel(*arguments, split_evenly(len(rows), self._threads))
        return heads[:, : s.num_heads]

    def attend(self, q: Tensor, cache: KVCache, plan: AttentionInput, *, window: int | None) -> Tensor:
        """See `Attention.attend`."""
        assert isinstance(plan, CpuAttentionInput)
        s = self._shape
        num_tokens = q.shape[0]
        q = q.contiguous()
        out = torch.empty_like(q)
        num_items = num_tokens * s.num_kv_heads
        arguments = (
            *(self._tag, self._group, self._vectors),
            *(q.data_ptr(), cache.k.data_ptr(), cache.v.data_ptr(), out.data_ptr()),
            *(plan.block_ids, plan.starts, plan.ends, plan.tokens),
            *(window or 0, np.float32(s.scale), s.num_kv_heads),
        )
        if num_items < PARALLEL_ITEMS or self._threads == 1:
            attend_range(*arguments, self._scratch[0], 0, num_items)
        else:
            attend_parallel(*arguments, self._scratch, plan.bounds)
        return out.view(num_tokens, -1)

    def _split(self, ends: Ints) -> Ints:
        keys = np.cumsum(ends)
        shares = keys[-1] * np.arange(self._threads + 1) // self._threads
        rows = np.searchsorted(keys, shares)
        rows[0], rows[-1] = 0, len(ends)
        bounds: Ints = rows * self._shape.num_kv_heads
        return bounds

    def _reserve(self, longest: int) -> None:
        """Room for one sequence's scores, in each thread."""
        group = len(self._group)
        needed = 2 * group * self._shape.head_dim + group * BLOCK * longest
        if self._scratch.shape[1] < needed:
            self._scratch = np.zeros((self._threads, 2 * needed), dtype=np.float32)
