"""Stand-ins for libraries that attend to a paged cache, as their documentation describes them.

`varlen_attn` is torch's; the two classes are FlashInfer's. Each reads the pages token by token.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from loramux.engine.kernels.attention import reference_attention


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
) -> Tensor:
    """Pages are [num_pages, page_size, num_kv_heads, head_dim]; window_size is (left, right) of a query."""
    assert enable_gqa
    assert window_size[1] == 0, "causal"
    assert {x.dtype for x in (cu_seq_q, seqused_k, block_table)} == {torch.int32}
    starts, lengths = cu_seq_q.tolist(), seqused_k.tolist()
    assert max_q == max(b - a for a, b in pairwise(starts))
    assert max_k == max(lengths)
    assert scale == query.shape[2] ** -0.5
    rows = []
    for i, length in enumerate(lengths):
        pages = block_table[i, : -(-length // key.shape[1])].long()
        k, v = (x[pages].flatten(0, 1)[:length] for x in (key, value))
        rows.append(attend(query[starts[i] : starts[i + 1]], k, v, window_size[0]))
    return torch.cat(rows)


class BatchPrefillWithPagedKVCacheWrapper:
    """Pages are [num_pages, num_kv_heads, page_size, head_dim], the layout HND."""

    def __init__(self, workspace: Tensor, kv_layout: str) -> None:
        assert kv_layout == "HND"

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        causal: bool,
        window_left: int,
        **options: Any,
    ) -> None:
        """Keep what `run` needs."""
        assert causal
        self.queries, self.indptr = qo_indptr.tolist(), paged_kv_indptr.tolist()
        self.indices, self.last = paged_kv_indices.long(), paged_kv_last_page_len.tolist()
        self.page_size, self.window_left, self.options = page_size, window_left, options

    def run(self, q: Tensor, kv: tuple[Tensor, Tensor]) -> Tensor:
        """One sequence after the other."""
        assert self.options["q_data_type"] == q.dtype
        assert self.options["kv_data_type"] == kv[0].dtype
        rows = []
        for i, last in enumerate(self.last):
            pages = self.indices[self.indptr[i] : self.indptr[i + 1]]
            length = (len(pages) - 1) * self.page_size + last
            k, v = (x[pages].transpose(1, 2).flatten(0, 1)[:length] for x in kv)
            rows.append(attend(q[self.queries[i] : self.queries[i + 1]], k, v, self.window_left))
        return torch.cat(rows)


class BatchDecodeWithPagedKVCacheWrapper:
    """One query token a sequence."""

    def __init__(self, workspace: Tensor, kv_layout: str, *, use_tensor_cores: bool) -> None:
        self.inner = BatchPrefillWithPagedKVCacheWrapper(workspace, kv_layout)

    def plan(self, indptr: Tensor, *rest: Any, **options: Any) -> None:
        """As for prompts, without the queries."""
        self.inner.plan(torch.arange(len(indptr)), indptr, *rest, causal=True, **options)

    def run(self, q: Tensor, kv: tuple[Tensor, Tensor]) -> Tensor:
        """As for prompts."""
        return self.inner.run(q, kv)


def attend(q: Tensor, k: Tensor, v: Tensor, left: int) -> Tensor:
    """One sequence's queries, which end where its keys end; left = -1 sees everything before."""
    window = None if left < 0 else left + 1
    return reference_attention(q, k, v, start=len(k) - len(q), window=window)
