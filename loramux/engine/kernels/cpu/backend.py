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
    PromptChunk,
    attend_prompt,
    prompt_tables,
    token_slots,
)
from loramux.engine.kernels.cpu.attention import attend_parallel, attend_range
from loramux.engine.kernels.cpu.dtypes import TAGS, Ints, split_evenly, storage
from loramux.engine.kernels.cpu.intrinsics import BLOCK, units
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
class CpuAttentionInput(AttentionInput):
    """A step's attention work, as the compiled kernels read it."""

    slots: Ints  # [num_tokens]: where each token's keys and values go
    block_ids: Ints  # the decode rows' tables, one behind the other
    indptr: Ints  # [num_decode + 1]
    ends: Ints  # [num_decode]
    tokens: Ints  # [num_decode]
    longest: int  # blocks of the longest of these tables


class CpuAttention:
    """Compiled decode attention and cache writes; prompt chunks by torch's products.

    Keys lie with the head dimension before the token, [num_blocks, num_kv_heads, head_dim, 16].
    """

    def __init__(self, shape: AttentionShape) -> None:
        assert supports(shape)
        self._shape = shape
        self._tag = TAGS[shape.dtype]
        self._group = units(shape.num_heads // shape.num_kv_heads)
        self._vectors = units(shape.head_dim // LANES)
        self._heads = np.arange(shape.num_kv_heads, dtype=np.int64)
        self._threads = max(torch.get_num_threads(), 1)
        self._scratch = np.zeros((self._threads, 0), dtype=np.float32)

    def empty_cache(self, num_blocks: int) -> KVCache:
        """One layer's cache, zeroed."""
        s = self._shape
        k = torch.zeros((num_blocks, s.num_kv_heads, s.head_dim, BLOCK), dtype=s.dtype)
        return KVCache(k, torch.zeros((num_blocks, s.num_kv_heads, BLOCK, s.head_dim), dtype=s.dtype))

    def plan(self, layout: BatchLayout) -> CpuAttentionInput:
        """Tables of the decode rows as they are, gather rows for prompt chunks."""
        ends = layout.ends[: layout.num_decode]
        used = -(-ends // BLOCK)
        tables = [ids[:n] for ids, n in zip(layout.blocks, used.tolist(), strict=False)]
        longest = int(used.max()) if len(used) else 0
        self._reserve(longest)
        return CpuAttentionInput(
            write_rows=torch.empty(0),
            decode=[],
            prompts=[
                PromptChunk(first, count, end - count, self._cache_rows(table))
                for first, count, end, table in prompt_tables(layout, BLOCK)
            ],
            slots=token_slots(layout, BLOCK),
            block_ids=np.concatenate(tables) if tables else np.zeros(0, dtype=np.int64),
            indptr=np.concatenate(([0], np.cumsum(used))),
            ends=ends,
            tokens=layout.offsets[: layout.num_decode],
            longest=longest,
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
        s = self._shape
        heads = qkv.view(-1, s.num_heads + 2 * s.num_kv_heads, s.head_dim)
        rows = storage(heads)
        arguments = (
            self._tag,
            qkv.data_ptr(),
            *((angles[0].data_ptr(), angles[1].data_ptr()) if angles is not None else (0, 0)),
            *((norms[0].address, norms[1].address) if norms is not None else (0, 0)),
            norms[0].eps if norms is not None else 0.0,
            storage(cache.k),
            storage(cache.v),
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
        num_items = len(plan.ends) * s.num_kv_heads
        if num_items:
            arguments = (
                *(self._tag, self._group, self._vectors),
                *(q.data_ptr(), cache.k.data_ptr(), cache.v.data_ptr(), out.data_ptr()),
                *(plan.block_ids, plan.indptr, plan.ends, plan.tokens),
                *(window or 0, np.float32(s.scale), s.num_kv_heads),
            )
            if num_items < PARALLEL_ITEMS or self._threads == 1:
                attend_range(*arguments, self._scratch[0], 0, num_items)
            else:
                attend_parallel(*arguments, self._scratch, split_evenly(num_items, self._threads))
        for chunk in plan.prompts:
            tokens = slice(chunk.first_token, chunk.first_token + chunk.num_tokens)
            k, v = self._gather(cache, chunk)
            attend_prompt(out[tokens], q[tokens], k, v, chunk.start, s.scale, window)
        return out.view(num_tokens, -1)

    def _gather(self, cache: KVCache, chunk: PromptChunk) -> tuple[Tensor, Tensor]:
        """k as [num_kv_heads, head_dim, tokens], v as [num_kv_heads, tokens, head_dim]."""
        s = self._shape
        width = s.head_dim * BLOCK
        k = cache.k.view(-1, width).index_select(0, chunk.cache_rows)
        v = cache.v.view(-1, width).index_select(0, chunk.cache_rows)
        k = k.view(s.num_kv_heads, -1, s.head_dim, BLOCK).transpose(1, 2)
        return k.reshape(s.num_kv_heads, s.head_dim, -1), v.view(s.num_kv_heads, -1, s.head_dim)

    def _cache_rows(self, table: Ints) -> Tensor:
        rows = table[:, None, :] * self._shape.num_kv_heads + self._heads[None, :, None]
        return torch.from_numpy(rows.reshape(-1))

    def _reserve(self, longest: int) -> None:
        """Room for one sequence's scores, in each thread."""
        group = len(self._group)
        needed = 2 * group * self._shape.head_dim + group * BLOCK * longest
        if self._scratch.shape[1] < needed:
            self._scratch = np.zeros((self._threads, 2 * needed), dtype=np.float32)
