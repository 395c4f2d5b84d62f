"""Causal attention over the paged KV cache, for any mix of decode rows and prompt chunks.

    out[i] = softmax(q[i] · K[lo:pos+1]ᵀ · scale) · V[lo:pos+1]      lo = max(0, pos + 1 - window)

where K and V are the sequence's rows of the cache, pos the token's position, and each KV head serves
`num_heads / num_kv_heads` query heads.

Cache layout: k and v are [num_blocks, num_kv_heads, block_size, head_dim], so that one (block, head)
is one contiguous row of block_size * head_dim numbers: a sequence's keys, ordered as
[num_kv_heads, num_tokens, head_dim], are gathered by one `index_select` of whole rows. The row
indices depend only on the block tables, so they are built once a step and used by every layer.

`paged_attention` is the plain-torch form, which runs on every device. `reference_attention` says the
same in the most obvious way and is what the tests hold it to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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


@dataclass(frozen=True, slots=True)
class AttentionInput:
    """A step's attention work; the same for every layer."""

    write_rows: Tensor  # [num_tokens * num_kv_heads] int64: (block, head, offset) rows to write
    decode: list[DecodeGroup]
    prompts: list[PromptChunk]


@dataclass(frozen=True, slots=True)
class KVCache:
    """One layer's keys and values, each [num_blocks, num_kv_heads, block_size, head_dim]."""

    k: Tensor
    v: Tensor


def write_kv(cache: KVCache, k: Tensor, v: Tensor, rows: Tensor) -> None:
    """Store the keys and values of this step's tokens.

    Args:
        k, v: [num_tokens, num_kv_heads, head_dim]
        rows: `AttentionInput.write_rows`
    """
    head_dim = k.shape[-1]
    cache.k.view(-1, head_dim).index_copy_(0, rows, k.reshape(-1, head_dim))
    cache.v.view(-1, head_dim).index_copy_(0, rows, v.reshape(-1, head_dim))


def paged_attention(
    q: Tensor, cache: KVCache, plan: AttentionInput, *, scale: float, window: int | None
) -> Tensor:
    """The module's equation for every token of the step.

    Args:
        q: [num_tokens, num_heads, head_dim], already rotated; K and V are already in the cache.
        window: sliding window of this layer in tokens, None for full attention.

    Returns:
        [num_tokens, num_heads * head_dim]
    """
    out = torch.empty_like(q)
    for group in plan.decode:
        rows = group.token_index
        out[rows] = _decode(q[rows], cache, group, scale, window)
    for chunk in plan.prompts:
        tokens = slice(chunk.first_token, chunk.first_token + chunk.num_tokens)
        out[tokens] = _prompt(q[tokens], cache, chunk, scale, window)
    return out.view(q.shape[0], -1)


def _gather(cache: Tensor, rows: Tensor) -> Tensor:
    """Rows of the cache as [rows / num_blocks of a sequence, num_blocks * block_size, head_dim]."""
    block_size, head_dim = cache.shape[2:]
    return cache.view(-1, block_size * head_dim).index_select(0, rows)


def _decode(q: Tensor, cache: KVCache, group: DecodeGroup, scale: float, window: int | None) -> Tensor:
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads = cache.k.shape[1]
    mask = group.masks[window]
    shape = (num_seqs * num_kv_heads, mask.shape[-1], head_dim)
    k = _gather(cache.k, group.cache_rows).view(shape)
    v = _gather(cache.v, group.cache_rows).view(shape)
    folded = q.reshape(num_seqs * num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = torch.bmm(folded, k.transpose(1, 2)).float()
    scores = scores.view(num_seqs, num_kv_heads, -1, mask.shape[-1]).mul_(scale).add_(mask)
    probs = torch.softmax(scores, dim=-1).to(q.dtype)
    return torch.bmm(probs.view(shape[0], -1, shape[1]), v).view(num_seqs, num_heads, head_dim)


def _prompt(q: Tensor, cache: KVCache, chunk: PromptChunk, scale: float, window: int | None) -> Tensor:
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = cache.k.shape[1]
    k = _gather(cache.k, chunk.cache_rows).view(num_kv_heads, -1, head_dim)
    v = _gather(cache.v, chunk.cache_rows).view(num_kv_heads, -1, head_dim)
    out = torch.empty_like(q)
    # [num_kv_heads, queries per kv head, num_tokens, head_dim]
    folded = q.view(num_tokens, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    for begin in range(0, num_tokens, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, num_tokens)
        first, last = chunk.start + begin, chunk.start + end  # positions of these queries
        low = 0 if window is None else max(0, first + 1 - window)
        queries = folded[:, :, begin:end].reshape(num_kv_heads, -1, head_dim)
        scores = torch.bmm(queries, k[:, low:last].transpose(1, 2)).float()
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


def reference_attention(q: Tensor, k: Tensor, v: Tensor, *, start: int, window: int | None) -> Tensor:
    """The equation for one sequence, token by token, head by head, in the inputs' precision.

    Args:
        q: [num_tokens, num_heads, head_dim] at positions start...
        k, v: [start + num_tokens, num_kv_heads, head_dim]
    """
    num_tokens, num_heads, head_dim = q.shape
    group = num_heads // k.shape[1]
    out = torch.empty_like(q)
    for token in range(num_tokens):
        end = start + token + 1
        low = 0 if window is None else max(0, end - window)
        for head in range(num_heads):
            scores = k[low:end, head // group] @ q[token, head] * head_dim**-0.5
            out[token, head] = torch.softmax(scores, dim=0) @ v[low:end, head // group]
    return out
