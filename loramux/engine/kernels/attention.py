"""Causal attention over the paged KV cache, for any mix of decode rows and prompt chunks.

    out[i] = softmax(q[i] · K[lo:pos+1]ᵀ · scale) · V[lo:pos+1]      lo = max(0, pos + 1 - window)

where K and V are the sequence's rows of the cache, pos the token's position, and each KV head serves
`num_heads / num_kv_heads` query heads.

An `Attention` owns the layout of its cache and everything between the qkv product and the output
projection: it plans a step once, rotates and stores keys and values, and attends. `TorchAttention`,
here, is plain torch and runs on every device; `kernels/cpu` holds the compiled one.
`reference_attention` says the equation in the most obvious way and is what the tests hold both to.

Cache layout here: k and v are [num_blocks, num_kv_heads, block_size, head_dim], so that one (block,
head) is one contiguous row of block_size * head_dim numbers: a sequence's keys, ordered as
[num_kv_heads, num_tokens, head_dim], are gathered by one `index_select` of whole rows. The row
indices depend only on the block tables, so they are built once a step and used by every layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from loramux.engine.kernels.cpu.dtypes import Ints
from loramux.engine.layers.norm import RMSNorm
from loramux.engine.layers.rotary import rotate

Angles = tuple[Tensor, Tensor]  # cos, sin: [num_tokens, 1, head_dim]

FP8_MAX = 448.0  # of float8_e4m3fn, which has no infinity
QUERY_BLOCK = 128  # prompt rows computed at once: bounds the score matrix, skips the upper triangle


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences with one query token each and block tables of similar length."""

    token_index: Tensor  # [num_seqs] int64: where their tokens lie in the batch
    cache_rows: Tensor  # [num_seqs * num_kv_heads * num_blocks] int64: rows of the cache to gather
    masks: dict[int | None, Tensor]  # window -> [num_seqs, 1, 1, num_blocks * block_size] 0 or -inf


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """A sequence with several query tokens, which are consecutive."""

    first_token: int  # where its tokens lie in the batch
    num_tokens: int
    start: int  # position of the first one
    cache_rows: Tensor  # [num_kv_heads * num_blocks] int64


class AttentionInput:
    """A step's attention work, the same for every layer, as the `Attention` that planned it reads it."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class TorchAttentionInput(AttentionInput):
    """As plain torch reads it."""

    write_rows: Tensor  # [num_tokens * num_kv_heads] int64: (block, head, offset) rows to write
    decode: list[DecodeGroup]
    prompts: list[PromptChunk]


@dataclass(frozen=True, slots=True)
class KVCache:
    """One layer's keys and values, in the layout of the `Attention` that made it."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """Which tokens a step computes, and in which blocks their sequences lie; by sequence, in token order."""

    ends: Ints  # [num_seqs]: position after the last token computed
    counts: Ints  # [num_seqs]: tokens computed; the first `num_decode` compute one
    offsets: Ints  # [num_seqs + 1]: where each sequence's tokens lie in the batch
    owner: Ints  # [num_tokens]: the sequence of each token
    positions: Ints  # [num_tokens]
    blocks: list[Ints]  # block ids of each sequence
    num_decode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """What an `Attention` must know of the model."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    windows: tuple[int | None, ...]  # the distinct sliding windows of the layers
    dtype: torch.dtype
    device: torch.device
    kv_dtype: torch.dtype | None = None  # of the cache; None = dtype

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of the cache's numbers."""
        return self.kv_dtype or self.dtype

    @property
    def scale(self) -> float:
        """Factor on the scores."""
        return float(self.head_dim**-0.5)


class Attention(Protocol):
    """Everything between the qkv product and the output projection."""

    def empty_cache(self, num_blocks: int) -> KVCache:
        """One layer's cache, zeroed."""
        ...

    def plan(self, layout: BatchLayout) -> AttentionInput:
        """What a step needs of the block tables; used by every layer."""
        ...

    def store(
        self,
        qkv: Any,
        angles: Angles | None,
        norms: tuple[RMSNorm, RMSNorm] | None,
        cache: KVCache,
        plan: AttentionInput,
    ) -> Tensor:
        """Normalise and rotate the heads of q and k, and write k and v into the cache.

        Args:
            qkv: what the site yields, consumed: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
                and, on a GPU, what is still to be added to it
            angles: None for models without rotation
            norms: of q's and k's heads; None for models without

        Returns:
            q, [num_tokens, num_heads, head_dim], possibly a view
        """
        ...

    def attend(self, q: Tensor, cache: KVCache, plan: AttentionInput, *, window: int | None) -> Tensor:
        """The module's equation: [num_tokens, num_heads, head_dim] → [num_tokens, num_heads * head_dim]."""
        ...


class TorchAttention:
    """Plain torch: gather, two products and a softmax."""

    def __init__(self, shape: AttentionShape) -> None:
        self._shape = shape
        self._heads = np.arange(shape.num_kv_heads, dtype=np.int64)

    def empty_cache(self, num_blocks: int) -> KVCache:
        """One layer's cache, zeroed."""
        s = self._shape
        size = (num_blocks, s.num_kv_heads, s.block_size, s.head_dim)
        return KVCache(*(torch.zeros(size, dtype=s.cache_dtype, device=s.device) for _ in "kv"))

    def plan(self, layout: BatchLayout) -> TorchAttentionInput:
        """Write rows for every token, groups of decode rows, and prompt chunks."""
        return TorchAttentionInput(
            write_rows=self._tensor(token_rows(layout, self._shape)),
            decode=self._decode_groups(layout),
            prompts=self._prompt_chunks(layout),
        )

    def store(
        self,
        qkv: Tensor,
        angles: Angles | None,
        norms: tuple[RMSNorm, RMSNorm] | None,
        cache: KVCache,
        plan: AttentionInput,
    ) -> Tensor:
        """See `Attention.store`."""
        assert isinstance(plan, TorchAttentionInput)
        return self.write(qkv, angles, norms, cache, plan.write_rows)

    def write(
        self,
        qkv: Tensor,
        angles: Angles | None,
        norms: tuple[RMSNorm, RMSNorm] | None,
        cache: KVCache,
        rows: Tensor,
    ) -> Tensor:
        """`store`, into these rows of the cache."""
        s = self._shape
        heads = qkv.view(-1, s.num_heads + 2 * s.num_kv_heads, s.head_dim)
        q, k, v = torch.split(heads, [s.num_heads, s.num_kv_heads, s.num_kv_heads], dim=1)
        if norms is not None:
            q, k = norms[0](q), norms[1](k)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        for own, values in ((cache.k, k), (cache.v, v)):
            stored = as_storable(to_cache(values.reshape(-1, s.head_dim), own.dtype))
            as_storable(own).view(-1, s.head_dim).index_copy_(0, rows, stored)
        return q.contiguous()

    def attend(self, q: Tensor, cache: KVCache, plan: AttentionInput, *, window: int | None) -> Tensor:
        """See `Attention.attend`."""
        assert isinstance(plan, TorchAttentionInput)
        out = torch.empty_like(q)
        for group in plan.decode:
            rows = group.token_index
            out[rows] = _decode(q[rows], cache, group, self._shape.scale, window)
        for chunk in plan.prompts:
            tokens = slice(chunk.first_token, chunk.first_token + chunk.num_tokens)
            num_kv_heads, _, head_dim = cache.k.shape[1:]
            k, v = (
                _gather(x, chunk.cache_rows, q.dtype).view(num_kv_heads, -1, head_dim)
                for x in (cache.k, cache.v)
            )
            out[tokens] = _prompt(q[tokens], k.transpose(1, 2), v, chunk.start, self._shape.scale, window)
        return out.view(q.shape[0], -1)

    def _tensor(self, values: Ints) -> Tensor:
        return torch.from_numpy(values).to(self._shape.device, non_blocking=True)

    def _decode_groups(self, layout: BatchLayout) -> list[DecodeGroup]:
        """Sequences whose block tables differ by less than a factor of two share a group, so that
        padding at most doubles what is read."""
        groups: list[DecodeGroup] = []
        used = (-(-layout.ends[: layout.num_decode] // self._shape.block_size)).tolist()
        by_length = sorted(range(layout.num_decode), key=lambda i: used[i])
        while by_length:
            longest = 2 * used[by_length[0]]
            size = sum(1 for i in by_length if used[i] <= longest)
            members, by_length = by_length[:size], by_length[size:]
            groups.append(self._decode_group(members, layout, max(used[i] for i in members)))
        return groups

    def _decode_group(self, members: list[int], layout: BatchLayout, width: int) -> DecodeGroup:
        table = np.zeros((len(members), width), dtype=np.int64)
        for row, i in enumerate(members):
            ids = layout.blocks[i][:width]
            table[row, : len(ids)] = ids
        ends = torch.from_numpy(layout.ends[members])[:, None]
        keys = torch.arange(width * self._shape.block_size)[None]
        masks: dict[int | None, Tensor] = {}
        for window in self._shape.windows:
            hidden = keys >= ends
            if window is not None:
                hidden |= keys < ends - window
            mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
            masks[window] = mask[:, None, None].to(self._shape.device)
        return DecodeGroup(self._tensor(np.array(members, dtype=np.int64)), self._cache_rows(table), masks)

    def _prompt_chunks(self, layout: BatchLayout) -> list[PromptChunk]:
        chunks = []
        for i in range(layout.num_decode, len(layout.blocks)):
            end, count = int(layout.ends[i]), int(layout.counts[i])
            table = layout.blocks[i][None, : -(-end // self._shape.block_size)]
            chunks.append(PromptChunk(int(layout.offsets[i]), count, end - count, self._cache_rows(table)))
        return chunks

    def _cache_rows(self, table: Ints) -> Tensor:
        """[num_seqs, num_blocks] block ids → [num_seqs * num_kv_heads * num_blocks] cache rows."""
        rows = table[:, None, :] * self._shape.num_kv_heads + self._heads[None, :, None]
        return self._tensor(rows.reshape(-1))


def token_slots(layout: BatchLayout, block_size: int) -> Ints:
    """Where each token's keys and values go: block * block_size + offset."""
    first_block = np.cumsum([0, *(len(ids) for ids in layout.blocks)])[:-1]
    block = np.concatenate(layout.blocks)[first_block[layout.owner] + layout.positions // block_size]
    slots: Ints = block * block_size + layout.positions % block_size
    return slots


def to_cache(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As a cache of `dtype` holds it; what 8 bits cannot hold becomes the largest value that they can."""
    if dtype == torch.float8_e4m3fn:
        x = x.clamp(-FP8_MAX, FP8_MAX)
    return x.to(dtype)


def as_storable(x: Tensor) -> Tensor:
    """The same memory in a dtype that can be gathered and scattered everywhere."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def token_rows(layout: BatchLayout, shape: AttentionShape) -> Ints:
    """Where each token's keys and values go, of each KV head: rows of a cache [num_blocks, heads, ...]."""
    size, heads = shape.block_size, np.arange(shape.num_kv_heads, dtype=np.int64)
    slots = token_slots(layout, size)
    rows: Ints = ((slots // size)[:, None] * len(heads) + heads) * size + (slots % size)[:, None]
    return rows.reshape(-1)


def _gather(cache: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of the cache as [rows / num_blocks of a sequence, num_blocks * block_size, head_dim]."""
    block_size, head_dim = cache.shape[2:]
    gathered = as_storable(cache).view(-1, block_size * head_dim).index_select(0, rows)
    return gathered.view(cache.dtype).to(dtype)


def _decode(q: Tensor, cache: KVCache, group: DecodeGroup, scale: float, window: int | None) -> Tensor:
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads = cache.k.shape[1]
    mask = group.masks[window]
    shape = (num_seqs * num_kv_heads, mask.shape[-1], head_dim)
    k = _gather(cache.k, group.cache_rows, q.dtype).view(shape)
    v = _gather(cache.v, group.cache_rows, q.dtype).view(shape)
    folded = q.reshape(num_seqs * num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = torch.bmm(folded, k.transpose(1, 2)).float()
    scores = scores.view(num_seqs, num_kv_heads, -1, mask.shape[-1]).mul_(scale).add_(mask)
    probs = torch.softmax(scores, dim=-1).to(q.dtype)
    return torch.bmm(probs.view(shape[0], -1, shape[1]), v).view(num_seqs, num_heads, head_dim)


def _prompt(q: Tensor, k: Tensor, v: Tensor, start: int, scale: float, window: int | None) -> Tensor:
    """Causal attention of one prompt chunk, a block of query rows at a time.

    Args:
        q: [num_tokens, num_heads, head_dim]
        k: [num_kv_heads, head_dim, at least start + num_tokens]
        v: [num_kv_heads, at least start + num_tokens, head_dim]
        start: position of the first query
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[0]
    out = torch.empty_like(q)
    # [num_kv_heads, queries per kv head, num_tokens, head_dim]
    folded = q.view(num_tokens, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    for begin in range(0, num_tokens, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, num_tokens)
        first, last = start + begin, start + end  # positions of these queries
        low = 0 if window is None else max(0, first + 1 - window)
        queries = folded[:, :, begin:end].reshape(num_kv_heads, -1, head_dim)
        scores = torch.bmm(queries, k[:, :, low:last]).float()
        scores = scores.view(num_kv_heads, -1, end - begin, last - low).mul_(scale)
        scores += _causal_mask(first, last, low, window, q.device)
        probs = torch.softmax(scores, dim=-1).to(q.dtype)
        block = torch.bmm(probs.view(num_kv_heads, -1, last - low), v[:, low:last])
        block = block.view(num_kv_heads, -1, end - begin, head_dim).permute(2, 0, 1, 3)
        out[begin:end] = block.reshape(end - begin, num_heads, head_dim)
    return out


def _causal_mask(first: int, last: int, low: int, window: int | None, device: torch.device) -> Tensor:
    """[last - first, last - low]: 0 where query position first+i sees key position low+j, else -inf."""
    distance = torch.arange(first, last, device=device)[:, None] - torch.arange(low, last, device=device)
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    return torch.zeros(distance.shape, device=device).masked_fill_(hidden, float("-inf"))


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, *, start: int, window: int | None, soft_cap: float | None = None
) -> Tensor:
    """The equation for one sequence, token by token, head by head, in the inputs' precision.

    Args:
        q: [num_tokens, num_heads, head_dim] at positions start...
        k, v: [start + num_tokens, num_kv_heads, head_dim]
        soft_cap: scores become soft_cap * tanh(score / soft_cap)
    """
    num_tokens, num_heads, head_dim = q.shape
    group = num_heads // k.shape[1]
    out = torch.empty_like(q)
    for token in range(num_tokens):
        end = start + token + 1
        low = 0 if window is None else max(0, end - window)
        for head in range(num_heads):
            scores = k[low:end, head // group] @ q[token, head] * head_dim**-0.5
            if soft_cap is not None:
                scores = torch.tanh(scores / soft_cap) * soft_cap
            out[token, head] = torch.softmax(scores, dim=0) @ v[low:end, head // group]
    return out
