"""Steps for the attention's tests: which sequences compute which tokens, and where their blocks lie."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

from loramux.engine.kernels.attention import AttentionShape, BatchLayout

BLOCK: Final = 16
Work = list[tuple[int, int]]  # of each sequence: tokens computed before, tokens computed now


def make_shape(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int = 64,
    *,
    window: int | None = None,
    block_size: int = BLOCK,
    dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> AttentionShape:
    """A model's attention."""
    return AttentionShape(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        windows=(window,),
        dtype=dtype,
        device=torch.device(device),
        kv_dtype=kv_dtype,
    )


def make_layout(work: Work, block_size: int = BLOCK) -> BatchLayout:
    """A step; no two sequences share a block, and no block's id is its place."""
    work = sorted(work, key=lambda one: one[1] > 1)
    starts, counts = (np.array(column, dtype=np.int64) for column in zip(*work, strict=True))
    offsets = np.concatenate(([0], np.cumsum(counts)))
    owner = np.repeat(np.arange(len(work)), counts)
    positions = np.arange(offsets[-1]) - offsets[:-1][owner] + starts[owner]
    blocks = [np.arange(-(-(s + n) // block_size)) * len(work) + i for i, (s, n) in enumerate(work)]
    return BatchLayout(starts + counts, counts, offsets, owner, positions, blocks, int((counts == 1).sum()))
