"""`Attention` through FlashInfer, an optional package, for comparison: its wrappers plan and compute.

Its cache layout HND is ours. One wrapper computes decode rows, another prompt chunks, each planned once
a step and window. It compiles its kernels when they are first used, for which it needs nvcc.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import flashinfer
import numpy as np
import torch
from torch import Tensor

from loramux.engine.kernels.attention import (
    Angles,
    AttentionInput,
    AttentionShape,
    BatchLayout,
    KVCache,
    TorchAttention,
    token_rows,
)
from loramux.engine.kernels.cpu.dtypes import Ints
from loramux.engine.layers.norm import RMSNorm

WORKSPACE_BYTES: Final = 128 << 20  # as FlashInfer's documentation advises
LAYOUT: Final = "HND"  # [num_blocks, num_kv_heads, block_size, head_dim]


@dataclass(frozen=True, slots=True)
class FlashInferInput(AttentionInput):
    """What is not in the wrappers."""

    write_rows: Tensor  # [num_tokens * num_kv_heads] int64
    num_decode: int  # leading rows, of sequences with one token
    num_tokens: int


@dataclass(frozen=True, slots=True)
class _Wrappers:
    decode: Any
    prompts: Any


class FlashInferAttention:
    """Plain torch writes the cache, FlashInfer reads it."""

    def __init__(self, shape: AttentionShape) -> None:
        self._shape = shape
        self._plain = TorchAttention(shape)
        self._wrappers = {window: self._make_wrappers() for window in shape.windows}

    def empty_cache(self, num_blocks: int) -> KVCache:
        """See `Attention.empty_cache`."""
        return self._plain.empty_cache(num_blocks)

    def plan(self, layout: BatchLayout) -> FlashInferInput:
        """Plans the wrappers; valid until the next call."""
        split = layout.num_decode
        for window, own in self._wrappers.items():
            options = self._options(window)
            if split:
                own.decode.plan(*self._tables(layout, slice(0, split)), *self._sizes(), **options)
            if split < len(layout.blocks):
                starts = _int32(layout.offsets[split:] - layout.offsets[split])
                tables = self._tables(layout, slice(split, None))
                own.prompts.plan(starts, *tables, *self._sizes(), causal=True, **options)
        rows = torch.from_numpy(token_rows(layout, self._shape)).to(self._shape.device, non_blocking=True)
        return FlashInferInput(rows, split, len(layout.positions))

    def store(
        self,
        qkv: Tensor,
        angles: Angles | None,
        norms: tuple[RMSNorm, RMSNorm] | None,
        cache: KVCache,
        plan: AttentionInput,
    ) -> Tensor:
        """See `Attention.store`."""
        assert isinstance(plan, FlashInferInput)
        return self._plain.write(qkv, angles, norms, cache, plan.write_rows)

    def attend(self, q: Tensor, cache: KVCache, plan: AttentionInput, *, window: int | None) -> Tensor:
        """See `Attention.attend`."""
        assert isinstance(plan, FlashInferInput)
        own, split, kv = self._wrappers[window], plan.num_decode, (cache.k, cache.v)
        out = torch.empty_like(q)
        if split:
            out[:split] = own.decode.run(q[:split], kv)
        if split < plan.num_tokens:
            out[split:] = own.prompts.run(q[split:], kv)
        return out.view(q.shape[0], -1)

    def _make_wrappers(self) -> _Wrappers:
        def workspace() -> Tensor:
            return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=self._shape.device)

        group = self._shape.num_heads // self._shape.num_kv_heads
        return _Wrappers(
            flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), LAYOUT, use_tensor_cores=group >= 4),
            flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), LAYOUT),
        )

    def _tables(self, layout: BatchLayout, own: slice) -> tuple[Tensor, Tensor, Tensor]:
        """First block of each sequence, all blocks, tokens in each last block."""
        size = self._shape.block_size
        ends = layout.ends[own]
        used = -(-ends // size)
        ids = [ids[:count] for ids, count in zip(layout.blocks[own], used, strict=True)]
        first = np.concatenate(([0], np.cumsum(used)))
        blocks = _int32(np.concatenate(ids)).to(self._shape.device, non_blocking=True)
        return _int32(first), blocks, _int32((ends - 1) % size + 1)

    def _sizes(self) -> tuple[int, int, int, int]:
        s = self._shape
        return s.num_heads, s.num_kv_heads, s.head_dim, s.block_size

    def _options(self, window: int | None) -> dict[str, Any]:
        s = self._shape
        return {
            "window_left": -1 if window is None else window - 1,
            "sm_scale": s.scale,
            "q_data_type": s.dtype,
            "kv_data_type": s.cache_dtype,
        }


def _int32(values: Ints) -> Tensor:
    return torch.from_numpy(values.astype(np.int32))
