"""`Attention` on a GPU: the plan of `attention_input`, the kernels, and their scratch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loramux.engine.kernels.attention import Angles, AttentionInput, AttentionShape, BatchLayout, KVCache
from loramux.engine.kernels.gpu.attention_input import AttentionPlanner, GpuAttentionInput
from loramux.engine.kernels.gpu.attention_kernel import attend_items
from loramux.engine.kernels.gpu.attention_tiles import AttentionTiles, Tiles, padded
from loramux.engine.kernels.gpu.qkv import store_qkv
from loramux.engine.kernels.gpu.site_output import SiteOutput
from loramux.engine.layers.norm import RMSNorm
from loramux.engine.step_buffers import StepBuffers, StepLimits


class GpuAttention:
    """Paged attention in Triton, for prompts and decode rows alike.

    A captured step uses `planner` with the step's own buffers; `plan` is for steps that are not.
    """

    def __init__(
        self,
        shape: AttentionShape,
        limits: StepLimits,
        *,
        soft_cap: float | None = None,
        tiles: AttentionTiles | None = None,
    ) -> None:
        """Allocate the scratch of split tiles.

        Args:
            soft_cap: scores become soft_cap * tanh(score / soft_cap); None = they stay
            tiles: None = from the table
        """
        self.planner = AttentionPlanner(shape, limits, tiles)
        self._shape = shape
        self._soft_cap = soft_cap or 0.0
        self._windows = {window: i for i, window in enumerate(shape.windows)}
        self._buffers: StepBuffers | None = None
        cuts = (self.planner.decode, self.planner.prompt)
        parts = [self.planner.num_split_items(cut) * shape.num_kv_heads for cut in cuts]
        rows = max(count * cut.block_m for count, cut in zip(parts, cuts, strict=True))
        on_device: dict[str, Any] = {"dtype": torch.float32, "device": shape.device}
        self._part_out = torch.empty((rows, padded(shape.head_dim)), **on_device)
        self._part_stats = torch.empty((rows, 2), **on_device)
        self._counters = torch.zeros(max(parts), dtype=torch.int32, device=shape.device)

    @property
    def nbytes(self) -> int:
        """Bytes of the scratch."""
        return self._part_out.nbytes + self._part_stats.nbytes + self._counters.nbytes

    def empty_cache(self, num_blocks: int) -> KVCache:
        """One layer's cache, zeroed: [num_blocks, num_kv_heads, block_size, head_dim]."""
        s = self._shape
        size = (num_blocks, s.num_kv_heads, s.block_size, s.head_dim)
        return KVCache(*(torch.zeros(size, dtype=s.cache_dtype, device=s.device) for _ in "kv"))

    def plan(self, layout: BatchLayout) -> GpuAttentionInput:
        """In buffers of its own; valid until the next but one call."""
        if self._buffers is None:
            self._buffers = StepBuffers(self.planner.fields, self._shape.device)
        rows = self.planner.fill(self._buffers.next_slot(), layout)
        self._buffers.upload(rows)
        return self.planner.view(
            self._buffers.device,
            len(layout.positions),
            len(layout.blocks),
            has_decode=layout.num_decode > 0,
            has_prompts=layout.num_decode < len(layout.blocks),
        )

    def store(
        self,
        qkv: Tensor | SiteOutput,
        angles: Angles | None,
        norms: tuple[RMSNorm, RMSNorm] | None,
        cache: KVCache,
        plan: AttentionInput,
    ) -> Tensor:
        """See `Attention.store`; what LoRA still has to add to qkv is added, too."""
        assert isinstance(plan, GpuAttentionInput)
        if isinstance(qkv, Tensor):
            qkv = SiteOutput(qkv, qkv.shape[1])
        return store_qkv(qkv, angles, norms, cache, plan.slots, num_heads=self._shape.num_heads)

    def attend(self, q: Tensor, cache: KVCache, plan: AttentionInput, *, window: int | None) -> Tensor:
        """See `Attention.attend`; rows of padding are left as they are."""
        assert isinstance(plan, GpuAttentionInput)
        q = q.contiguous()
        out = torch.empty_like(q)
        own = self._windows[window]
        if plan.decode_items is not None:
            self._launch(q, cache, out, plan.decode_items[own], plan, self.planner.decode, window)
        if plan.prompt_items is not None:
            self._launch(q, cache, out, plan.prompt_items[own], plan, self.planner.prompt, window)
        return out.view(q.shape[0], -1)

    def _launch(
        self,
        q: Tensor,
        cache: KVCache,
        out: Tensor,
        items: Tensor,
        plan: GpuAttentionInput,
        cut: Tiles,
        window: int | None,
    ) -> None:
        s = self._shape
        attend_items[s.num_kv_heads, items.shape[0]](
            *(q, cache.k, cache.v, out, items, plan.block_ids),
            *(self._part_out, self._part_stats, self._counters),
            SCALE=s.scale,
            SOFT_CAP=self._soft_cap,
            WINDOW=window or 0,
            NUM_KV_HEADS=s.num_kv_heads,
            GROUP=s.num_heads // s.num_kv_heads,
            HEAD_DIM=s.head_dim,
            DIM=padded(s.head_dim),
            BLOCK_SIZE=s.block_size,
            BLOCK_M=cut.block_m,
            BLOCK_N=cut.block_n,
            MASK_ALL=cut.mask_all,
            UNROLL=cut.unroll,
            num_warps=cut.num_warps,
            num_stages=cut.num_stages,
        )
