"""The two ends of the model: token ids to embeddings, hidden states to logits.

In a tensor-parallel engine each rank holds some rows of both tables. Embeddings are summed over the
ranks, of which one has the token; logits are gathered.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from loramux.engine.layers.linear import BaseLinear
from loramux.engine.parallel.peers import Peers


class Embedding:
    """The table of one device."""

    def __init__(self, weight: Tensor) -> None:
        """Args:
        weight: [vocabulary, embed_dim]
        """
        self._weight = weight

    def __call__(self, token_ids: Tensor) -> Tensor:
        """[num_tokens] → [num_tokens, embed_dim]."""
        return functional.embedding(token_ids, self._weight)


class ShardedEmbedding:
    """This rank's rows of the table, and the sum over all ranks."""

    def __init__(self, weight: Tensor, first_token: int, peers: Peers) -> None:
        """Args:
        weight: [vocabulary per rank, embed_dim], of first_token and those behind it; padding is 0
        """
        self._weight = weight
        self._first_token = first_token
        self._peers = peers

    def __call__(self, token_ids: Tensor) -> Tensor:
        """[num_tokens] → [num_tokens, embed_dim], the same on every rank."""
        rows = token_ids - self._first_token
        is_elsewhere = (rows < 0) | (rows >= self._weight.shape[0])
        x = functional.embedding(rows.masked_fill_(is_elsewhere, 0), self._weight)
        return self._peers.add(x.masked_fill_(is_elsewhere[:, None], 0))


class ShardedHead:
    """This rank's rows of the output head, and the logits of all ranks."""

    def __init__(self, linear: BaseLinear, vocab_size: int, peers: Peers) -> None:
        self._linear = linear
        self._vocab_size = vocab_size
        self._peers = peers

    def __call__(self, hidden: Tensor) -> Tensor:
        """[num_rows, embed_dim] → [num_rows, vocabulary], on every rank."""
        return self._peers.gather(self._linear(hidden))[:, : self._vocab_size].contiguous()
