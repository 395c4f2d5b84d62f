"""What an adapter changes beyond its lanes: vocabulary tables, and DoRA's gains.

Such changes belong to one adapter, not to lanes: they exist only while an adapter that has them is on
the device, and a step touches them only for that adapter's own tokens, which are consecutive. For
the token embedding and for the output head, in this order:

    full   the adapter's own table instead of the base model's
    rows   some of its rows replaced
    gain   DoRA: each output feature multiplied by magnitude / norm
    LoRA   plus A and B; scale and gain are already folded into B
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from loramux.engine.kernels.lora import OutputGain


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Replaced rows of a table."""

    token_ids: Tensor  # [num_rows] int64, ascending, each once
    rows: Tensor  # [num_rows, embed_dim]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.token_ids.nbytes + self.rows.nbytes

    def to(self, device: torch.device) -> TokenRows:
        """On another device; the same tensors if they are there already."""
        return TokenRows(self.token_ids.to(device), self.rows.to(device))


@dataclass(frozen=True, slots=True)
class TableChange:
    """How one adapter changes one table; None = not in this way."""

    full: Tensor | None = None  # [vocabulary, embed_dim]
    rows: TokenRows | None = None
    gain: Tensor | None = None  # embedding [embed_dim], head [vocabulary]
    a: Tensor | None = None  # embedding [vocabulary, rank], head [rank, embed_dim]
    b: Tensor | None = None  # embedding [rank, embed_dim], head [rank, vocabulary]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        parts = (self.full, self.rows, self.gain, self.a, self.b)
        return sum(part.nbytes for part in parts if part is not None)

    def to(self, device: torch.device) -> TableChange:
        """On another device; the same tensors if they are there already."""
        parts = (self.full, self.gain, self.a, self.b)
        full, gain, a, b = (None if part is None else part.to(device) for part in parts)
        return TableChange(full, None if self.rows is None else self.rows.to(device), gain, a, b)


@dataclass(frozen=True, slots=True)
class AdapterTables:
    """Everything of one adapter that does not lie in lanes."""

    gains: dict[int, OutputGain] = field(default_factory=dict)  # by index of the site
    embedding: TableChange | None = None
    head: TableChange | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        tables = sum(table.nbytes for table in (self.embedding, self.head) if table is not None)
        return tables + sum(gain.nbytes for gain in self.gains.values())

    def to(self, device: torch.device) -> AdapterTables:
        """On another device; the same tensors if they are there already."""
        return AdapterTables(
            {site: gain.to(device) for site, gain in self.gains.items()},
            None if self.embedding is None else self.embedding.to(device),
            None if self.head is None else self.head.to(device),
        )

    def __bool__(self) -> bool:
        return bool(self.gains) or self.embedding is not None or self.head is not None


@dataclass(frozen=True, slots=True)
class TableSegment:
    """Consecutive tokens of one adapter that has tables."""

    begin: int
    end: int
    logits_begin: int  # rows of the logits that belong to these tokens
    logits_end: int
    tables: AdapterTables


def change_embedding(x: Tensor, token_ids: Tensor, segments: list[TableSegment]) -> None:
    """Apply each adapter's embedding to its own tokens, in place.

    Args:
        x: [num_tokens, embed_dim], the base model's embeddings
        token_ids: [num_tokens]
    """
    for s in segments:
        if s.tables.embedding is not None:
            own = slice(s.begin, s.end)
            _change_embedding(x[own], token_ids[own], s.tables.embedding)


def _change_embedding(x: Tensor, token_ids: Tensor, change: TableChange) -> None:
    if change.full is not None:
        x.copy_(functional.embedding(token_ids, change.full))
    if change.rows is not None:
        known = change.rows.token_ids
        position = torch.searchsorted(known, token_ids).clamp_(max=len(known) - 1)
        is_replaced = (known[position] == token_ids)[:, None]
        x.copy_(torch.where(is_replaced, change.rows.rows[position], x))
    if change.gain is not None:
        x.mul_(change.gain)
    if change.a is not None and change.b is not None:
        x.addmm_(functional.embedding(token_ids, change.a), change.b)


def change_logits(logits: Tensor, hidden: Tensor, segments: list[TableSegment]) -> None:
    """Apply each adapter's head to its own rows, in place.

    Args:
        logits: [num_rows, vocabulary], the base model's
        hidden: [num_rows, embed_dim], the head's input
    """
    for s in segments:
        if s.tables.head is not None and s.logits_begin < s.logits_end:
            own = slice(s.logits_begin, s.logits_end)
            _change_logits(logits[own], hidden[own], s.tables.head)


def _change_logits(logits: Tensor, hidden: Tensor, change: TableChange) -> None:
    if change.full is not None:
        logits.copy_(functional.linear(hidden, change.full))
    if change.rows is not None:
        logits.index_copy_(1, change.rows.token_ids, functional.linear(hidden, change.rows.rows))
    if change.gain is not None:
        logits.mul_(change.gain)
    if change.a is not None and change.b is not None:
        logits.addmm_(functional.linear(hidden, change.a), change.b)
