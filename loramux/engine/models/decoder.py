"""The decoder: every supported architecture is this file plus one entry in `families.py`.

    embed → (norm → qkv → rope → attention → attn_out → + → norm → mlp_in → act → mlp_out → +) × layers
          → norm → lm_head

Tokens of all sequences of a step are one flat batch [num_tokens, hidden_size]; only attention looks
at sequence borders, through `ModelInput.attention`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from loramux.engine.adapters.weights import LanePool
from loramux.engine.kernels.attention import Angles, Attention, KVCache
from loramux.engine.kernels.gpu.lora_input import GpuLoraInput
from loramux.engine.kernels.lora import LoraInput, SiteLanes
from loramux.engine.kernels.tables import TableSegment, change_embedding, change_logits
from loramux.engine.layers.linear import Linear, make_head, make_linear
from loramux.engine.layers.norm import LayerNorm, Norm, RMSNorm
from loramux.engine.layers.parts import LinearSite, Parts, SiteOutput, TorchParts
from loramux.engine.layers.rotary import Rotary
from loramux.engine.layers.vocabulary import Embedding, ShardedEmbedding, ShardedHead
from loramux.engine.model_input import KeptRows, ModelInput
from loramux.engine.models.families import HEAD_MODULE, Site
from loramux.engine.models.layer import DecoderLayer
from loramux.engine.models.recorded_layers import RecordedLayers, can_record
from loramux.engine.models.weights import WeightSource, head_weight
from loramux.engine.parallel.peers import Peers
from loramux.engine.parallel.shard import SUMMED_SITES, Shard


class Decoder:
    """A decoder-only transformer with LoRA lanes at every linear site."""

    def __init__(
        self,
        shard: Shard,
        checkpoint: WeightSource,
        lanes: LanePool,
        attention: Attention,
        *,
        parts: Parts | None = None,
        peers: Peers | None = None,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device,
        quantization: str | None = None,
        on_layer: Callable[[], None] = lambda: None,
    ) -> None:
        """Read the weights.

        Args:
            shard: the part of the model that this rank computes.
            lanes, attention: for that part.
            parts: makes the layers' parts; None = `TorchParts`.
            peers: the other ranks; None if there are none.
            quantization: form of the weights of layers and head; the embedding stays in `dtype`.
            on_layer: called after each layer, for a progress bar.

        Raises:
            UnsupportedModel: a tensor is missing, has another shape, or has no place here.
        """
        self.config = config = shard.own
        self._attention = attention
        self._parts = parts or TorchParts()
        self._load = _WeightLoader(shard, checkpoint, self._parts, quantization, peers)
        embedding = self._load.vocabulary(f"{config.embedding_module}.weight")
        self._embedding = (
            Embedding(embedding)
            if peers is None
            else ShardedEmbedding(embedding, shard.vocab_rows.start, peers)
        )
        self._project_in, self._project_out = self._load.projections()
        self._rotary: Rotary | None = None
        self._positions: Tensor | None = None
        if config.rope is not None:
            self._rotary = Rotary(config.rope, config.head_dim, max_len, dtype=dtype, device=device)
        else:
            rows = config.max_position + config.position_offset
            name = f"{config.root}.embed_positions.weight"
            self._positions = checkpoint.take(name, (rows, config.hidden_size))
        self._layers = []
        for index in range(config.num_layers):
            self._layers.append(self._load.layer(index, lanes))
            on_layer()
        final_norm = f"{config.root}.{config.norm_names[2]}"
        self._norm = self._parts.norm(self._load.norm(final_norm)) if config.final_norm else None
        name = head_weight(config, checkpoint, shard.num_vocab_rows)
        is_tied = name != f"{HEAD_MODULE}.weight"
        head = make_head(embedding if is_tied else self._load.vocabulary(name), quantization)
        self._lm_head = head if peers is None else ShardedHead(head, shard.whole.vocab_size, peers)
        checkpoint.check_all_used(may_remain=(f"{HEAD_MODULE}.weight",))
        self._recorded: RecordedLayers | None = None
        self._activation = self._parts.activation(config.activation, is_gated=config.gated_mlp)

    def record(self, caches: list[KVCache]) -> None:
        """From now on compute layers in one call where that can be done; `caches` as for every `forward`."""
        parts = (self._layers, self._norm, self._activation, self._attention)
        if not self.config.post_norm and can_record(*parts):
            self._recorded = RecordedLayers(*parts, caches)

    @property
    def needs_lengths(self) -> bool:
        """True if the model input must carry `rope_lengths` (dynamic RoPE)."""
        return self._rotary is not None and self._rotary.is_dynamic

    def forward(self, batch: ModelInput, caches: list[KVCache]) -> Tensor:
        """Compute the step's KV and the last hidden states of the tokens that need logits.

        Returns:
            [len(batch.logits_index), embed_dim], input of `logits`
        """
        x = self._embed(batch)
        angles = self._rotary.angles(batch.positions, batch.rope_lengths) if self._rotary else None
        if self._recorded is not None and self._recorded.takes(batch):
            hidden = self._recorded(x, angles, batch)
            return self._project_out(hidden) if self._project_out is not None else hidden
        delta: SiteOutput = None  # the last sub-layer's output, not yet added to x
        last = self._layers[-1]
        for layer, cache in zip(self._layers, caches, strict=True):
            kept = batch.kept if layer is last else None
            x, delta = self._run_layer(layer, x, delta, batch, cache, angles, kept)
        if batch.kept is None:
            x = x[batch.logits_index]
        if delta is not None:
            rows = self._parts.whole(delta)
            x += rows if batch.kept is not None else rows[batch.logits_index]
        if self._norm is not None:
            x = self._norm(x)
        return self._project_out(x) if self._project_out is not None else x

    def logits(self, hidden: Tensor, tables: list[TableSegment]) -> Tensor:
        """[num_rows, embed_dim] → [num_rows, vocabulary] in the model's dtype, the whole vocabulary's."""
        logits = self._lm_head(hidden)
        change_logits(logits, hidden, tables)
        return logits

    def _embed(self, batch: ModelInput) -> Tensor:
        x = self._embedding(batch.token_ids)
        change_embedding(x, batch.token_ids, batch.tables)
        if self._project_in is not None:
            x = self._project_in(x)
        if self._positions is not None:
            x = x + functional.embedding(batch.positions + self.config.position_offset, self._positions)
        return x

    def _run_layer(
        self,
        layer: DecoderLayer,
        x: Tensor,
        delta: SiteOutput,
        batch: ModelInput,
        cache: KVCache,
        angles: Angles | None,
        kept: KeptRows | None,
    ) -> tuple[Tensor, SiteOutput]:
        """One layer: the residual stream (changed in place) and what is still to be added to it.

        With `kept`, of these rows only.
        """
        lora = batch.lora if kept is None else kept.lora
        if self.config.post_norm:
            attended = self._attend(layer, x, batch, cache, angles, kept)
            x = layer.norm_1.after_add(x if kept is None else x[kept.index], attended)
            return layer.norm_2.after_add(x, self._mlp(layer, x, lora)), None
        normed = layer.norm_1(x) if delta is None else layer.norm_1.after_add(x, delta)
        attended = self._attend(layer, normed, batch, cache, angles, kept)
        if kept is not None:
            x = x[kept.index]
        return x, self._mlp(layer, layer.norm_2.after_add(x, attended), lora)

    def _attend(
        self,
        layer: DecoderLayer,
        x: Tensor,
        batch: ModelInput,
        cache: KVCache,
        angles: Angles | None,
        kept: KeptRows | None,
    ) -> SiteOutput:
        qkv = layer.qkv(x, batch.lora)
        q = self._attention.store(qkv, angles, layer.head_norms, cache, batch.attention)
        out = self._attention.attend(q, cache, batch.attention, window=layer.window)
        if kept is None:
            return layer.attn_out(out, batch.lora)
        return layer.attn_out(out[kept.index], kept.lora)

    def _mlp(self, layer: DecoderLayer, x: Tensor, lora: LoraInput | GpuLoraInput | None) -> SiteOutput:
        return layer.mlp_out(self._activation(layer.mlp_in(x, lora)), lora)


class _WeightLoader:
    """Builds layers from a checkpoint."""

    def __init__(
        self,
        shard: Shard,
        checkpoint: WeightSource,
        parts: Parts,
        quantization: str | None,
        peers: Peers | None,
    ) -> None:
        self._shard = shard
        self._config = shard.own
        self._checkpoint = checkpoint
        self._parts = parts
        self._quantization = quantization
        self._peers = peers

    def vocabulary(self, name: str) -> Tensor:
        """This rank's rows of the embedding or the head, [vocab_per_rank, embed_dim]; padding is 0."""
        num_rows = self._shard.num_vocab_rows
        weight = self._checkpoint.take(name, (num_rows, self._config.embed_dim))
        missing = self._shard.vocab_per_rank - num_rows
        return functional.pad(weight, (0, 0, 0, missing)) if missing else weight

    def layer(self, index: int, lanes: LanePool) -> DecoderLayer:
        c = self._config
        prefix = c.layer_prefix(index)
        qkv, attn_out, mlp_in, mlp_out = (
            self._site(prefix, site, lanes.site(index, site.name)) for site in c.sites
        )
        return DecoderLayer(
            norm_1=self._parts.norm(self.norm(prefix + c.norm_names[0])),
            qkv=qkv,
            head_norms=self._head_norms(prefix) if c.qk_norm else None,
            attn_out=attn_out,
            norm_2=self._parts.norm(self.norm(prefix + c.norm_names[1])),
            mlp_in=mlp_in,
            mlp_out=mlp_out,
            window=c.windows[index],
        )

    def norm(self, name: str) -> Norm:
        c, features = self._config, (self._config.hidden_size,)
        if c.norm == "rms":
            return RMSNorm(self._checkpoint.take(f"{name}.weight", features), c.norm_eps)
        weight = self._checkpoint.take(f"{name}.weight", features) if c.norm_affine else None
        bias = self._checkpoint.take(f"{name}.bias", features) if c.norm_affine else None
        return LayerNorm(c.hidden_size, weight, bias, c.norm_eps)

    def projections(self) -> tuple[Linear | None, Linear | None]:
        """Between a narrow embedding and the hidden size; (None, None) where they are equal."""
        c = self._config
        if c.embed_dim == c.hidden_size:
            return None, None
        narrow_to_wide = self._checkpoint.take(f"{c.root}.project_in.weight", (c.hidden_size, c.embed_dim))
        wide_to_narrow = self._checkpoint.take(f"{c.root}.project_out.weight", (c.embed_dim, c.hidden_size))
        return Linear(narrow_to_wide), Linear(wide_to_narrow)

    def _head_norms(self, prefix: str) -> tuple[RMSNorm, RMSNorm]:
        c, take = self._config, self._checkpoint.take
        q, k = (take(f"{prefix}self_attn.{x}_norm.weight", (c.head_dim,)) for x in "qk")
        return RMSNorm(q, c.norm_eps), RMSNorm(k, c.norm_eps)

    def _site(self, prefix: str, site: Site, lanes: SiteLanes | None) -> LinearSite:
        names = [prefix + part.module for part in site.parts]
        place = None if lanes is None or lanes.weight is None else lanes.weight[: site.out_features]
        weight = self._fused([f"{name}.weight" for name in names], site, (site.in_features,), place)
        bias = self._fused([f"{name}.bias" for name in names], site, ()) if site.bias else None
        linear = make_linear(weight, bias, self._quantization, self._parts.quantize_rows)
        return self._parts.site(site.name, linear, lanes, self._peers if site.name in SUMMED_SITES else None)

    def _fused(
        self, names: list[str], site: Site, row: tuple[int, ...], place: Tensor | None = None
    ) -> Tensor:
        """The parts' tensors below each other, each read into its place.

        Args:
            names: one a part
            row: shape of what belongs to one output feature
            place: where the whole is to lie; None = anywhere
        """
        if len(names) == 1 and place is None:
            return self._checkpoint.take(names[0], (site.out_features, *row))
        fused = self._checkpoint.empty((site.out_features, *row)) if place is None else place
        widths = [part.out_features for part in site.parts]
        for name, rows in zip(names, torch.split(fused, widths), strict=True):
            self._checkpoint.fill(rows, name)
        return fused
