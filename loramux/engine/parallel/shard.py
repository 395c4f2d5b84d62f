"""Which part of a model one rank of a tensor-parallel engine holds. No torch here.

    qkv        by heads: a rank's query heads, and the KV heads that they read
    attn_out   by input features: those of the rank's heads; the ranks' outputs are summed
    mlp_in     by output features, the same ones of gate and up
    mlp_out    by input features; the ranks' outputs are summed
    embedding  by rows of the vocabulary; the ranks' outputs are summed
    lm_head    by rows of the vocabulary; the ranks' logits are gathered

Everything else (norms, learned positions, projections of a narrow embedding) is the same on every
rank. A rank's part looks like a smaller model: `Shard.own` is its `ModelConfig`, from which lanes,
attention and KV cache are made as if it were the whole one, and `Shard.pieces` says where its tensors
lie in the checkpoint's. LoRA follows its site: where the weight is cut by output features, B is, and where it
is cut by input features, A is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from loramux.engine.errors import InvalidConfig
from loramux.engine.models.families import HEAD_MODULE, ModelConfig, Site, SitePart

FLAG: Final = "--tensor-parallel-size"
ALL: Final = slice(None)
SUMMED_SITES: Final = frozenset({"attn_out", "mlp_out"})  # whose output is the sum over the ranks


@dataclass(frozen=True, slots=True)
class Piece:
    """What a rank takes of one tensor."""

    shape: tuple[int, ...]  # of the whole tensor
    rows: slice = field(default_factory=lambda: ALL)  # output features, or tokens of the vocabulary
    columns: slice = field(default_factory=lambda: ALL)  # input features; of tensors with two dimensions

    @property
    def index(self) -> tuple[slice, ...]:
        """For indexing the whole tensor."""
        return (self.rows, self.columns)[: len(self.shape)]


_WHOLE: Final = Piece(())


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of a model; the whole model where there is one rank."""

    whole: ModelConfig
    own: ModelConfig  # with this rank's heads, features and biases; its vocabulary is the whole one
    rank: int = 0
    size: int = 1
    pieces: Mapping[str, Piece] = field(default_factory=dict)  # by tensor name; others are whole

    def rows(self, module: str) -> slice:
        """Which output features of a module of the layers are this rank's; the rows of LoRA's B."""
        return self._piece(module).rows

    def columns(self, module: str) -> slice:
        """Which input features of a module of the layers are this rank's; the columns of LoRA's A."""
        return self._piece(module).columns

    @property
    def vocab_per_rank(self) -> int:
        """Rows of the vocabulary's tables on every rank; those of the last ranks are padded to it."""
        return -(-self.whole.vocab_size // self.size)

    @property
    def vocab_rows(self) -> slice:
        """Tokens whose embedding and logits this rank computes."""
        first, total = self.rank * self.vocab_per_rank, self.whole.vocab_size
        return slice(min(first, total), min(first + self.vocab_per_rank, total))

    @property
    def num_vocab_rows(self) -> int:
        """How many tokens those are."""
        return len(range(self.whole.vocab_size)[self.vocab_rows])

    def _piece(self, module: str) -> Piece:
        return self.pieces.get(f"{module}.weight", _WHOLE)


def whole_model(config: ModelConfig) -> Shard:
    """The only rank's part."""
    return Shard(config, config)


def shard_model(config: ModelConfig, rank: int, size: int) -> Shard:
    """The part of rank `rank` of `size`.

    Raises:
        InvalidConfig: the model cannot be divided by that many ranks.
    """
    if size == 1:
        return whole_model(config)
    _check(config, size)
    kv_heads = max(config.num_kv_heads // size, 1)
    first_kv = rank * config.num_kv_heads // size  # with more ranks than KV heads, several share one
    qkv, attn_out, mlp_in, mlp_out = config.sites
    dim, heads = config.head_dim, config.num_heads // size
    q, kv = _span(rank * heads * dim, heads * dim), _span(first_kv * dim, kv_heads * dim)
    inner = mlp_out.in_features // size
    features = _span(rank * inner, inner)
    sites = (
        _by_rows(qkv, (q, kv, kv)),
        _by_columns(attn_out, q, rank),
        _by_rows(mlp_in, (features,) * len(mlp_in.parts)),
        _by_columns(mlp_out, features, rank),
    )
    shard = Shard(config, replace(config, num_heads=heads, num_kv_heads=kv_heads, sites=sites), rank, size)
    table = Piece((config.vocab_size, config.embed_dim), rows=shard.vocab_rows)
    pieces = {f"{config.embedding_module}.weight": table, f"{HEAD_MODULE}.weight": table}
    for layer in range(config.num_layers):
        prefix = config.layer_prefix(layer)
        for site, rows in ((qkv, (q, kv, kv)), (mlp_in, (features,) * len(mlp_in.parts))):
            for part, own_rows in zip(site.parts, rows, strict=True):
                name, shape = prefix + part.module, (part.out_features, site.in_features)
                pieces[f"{name}.weight"] = Piece(shape, rows=own_rows)
                pieces[f"{name}.bias"] = Piece(shape[:1], rows=own_rows)
        for site, columns in ((attn_out, q), (mlp_out, features)):
            name, shape = prefix + site.parts[0].module, (site.out_features, site.in_features)
            pieces[f"{name}.weight"] = Piece(shape, columns=columns)
            if rank > 0:  # the sum of all ranks' outputs holds the bias once
                pieces[f"{name}.bias"] = Piece(shape[:1], rows=slice(0, 0))
    return replace(shard, pieces=pieces)


def _by_rows(site: Site, rows: tuple[slice, ...]) -> Site:
    parts = tuple(SitePart(p.module, r.stop - r.start) for p, r in zip(site.parts, rows, strict=True))
    return replace(site, parts=parts)


def _by_columns(site: Site, columns: slice, rank: int) -> Site:
    return replace(site, in_features=columns.stop - columns.start, bias=site.bias and rank == 0)


def _span(start: int, length: int) -> slice:
    return slice(start, start + length)


def _check(config: ModelConfig, size: int) -> None:
    inner = config.sites[3].in_features
    for what, number in (("attention heads", config.num_heads), ("MLP features", inner)):
        if number % size:
            raise InvalidConfig(
                f"{FLAG} {size}: the model's {number} {what} cannot be divided by {size}", param=FLAG
            )
    if config.num_kv_heads % size and size % config.num_kv_heads:
        raise InvalidConfig(
            f"{FLAG} {size}: the model's {config.num_kv_heads} KV heads can neither be divided by {size} nor"
            f" shared evenly by {size} ranks",
            param=FLAG,
        )
