"""The decoder: every supported architecture is this file plus one entry in `families.py`.

    embed → (norm → qkv → rope → attention → attn_out → + → norm → mlp_in → act → mlp_out → +) × layers
          → norm → lm_head

Tokens of all sequences of a step are one flat batch [num_tokens, hidden_size]; only attention looks
at sequence borders, through `ModelInput.attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from loramux.engine.adapters.weights import LanePool
from loramux.engine.kernels.attention import KVCache, paged_attention, write_kv
from loramux.engine.kernels.tables import TableSegment, change_embedding, change_logits
from loramux.engine.layers.linear import Linear, LoraLinear
from loramux.engine.layers.norm import LayerNorm, Norm, RMSNorm
from loramux.engine.layers.rotary import Rotary, rotate
from loramux.engine.model_input import ModelInput
from loramux.engine.models.families import HEAD_MODULE, ModelConfig, Site
from loramux.engine.models.weights import Checkpoint, head_weight

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True, slots=True)
class _Layer:
    norm_1: Norm
    qkv: LoraLinear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    attn_out: LoraLinear
    norm_2: Norm
    mlp_in: LoraLinear
    mlp_out: LoraLinear
    window: int | None


class Decoder:
    """A decoder-only transformer with LoRA lanes at every linear site."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        lanes: LanePool,
        *,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device,
        on_layer: Callable[[], None] = lambda: None,
    ) -> None:
        """Read the weights; `on_layer` is called after each layer, for a progress bar.

        Raises:
            UnsupportedModel: a tensor is missing, has another shape, or has no place here.
        """
        self.config = config
        self._load = _WeightLoader(config, checkpoint)
        embed = (config.vocab_size, config.embed_dim)
        self._embedding = checkpoint.take(f"{config.embedding_module}.weight", embed)
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
        self._norm = self._load.norm(f"{config.root}.{config.norm_names[2]}") if config.final_norm else None
        name = head_weight(config, checkpoint)
        is_tied = name != f"{HEAD_MODULE}.weight"
        self._lm_head = Linear(self._embedding if is_tied else checkpoint.take(name, embed))
        checkpoint.check_all_used(may_remain=(f"{HEAD_MODULE}.weight",))
        self._activation = _ACTIVATIONS[config.activation]

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
        for layer, cache in zip(self._layers, caches, strict=True):
            x = self._run_layer(layer, x, batch, cache, angles)
        x = x[batch.logits_index]
        if self._norm is not None:
            x = self._norm(x)
        return self._project_out(x) if self._project_out is not None else x

    def logits(self, hidden: Tensor, tables: list[TableSegment]) -> Tensor:
        """[num_rows, embed_dim] → [num_rows, vocab_size] in the model's dtype."""
        logits = self._lm_head(hidden)
        change_logits(logits, hidden, tables)
        return logits

    def _embed(self, batch: ModelInput) -> Tensor:
        x = functional.embedding(batch.token_ids, self._embedding)
        change_embedding(x, batch.token_ids, batch.tables)
        if self._project_in is not None:
            x = self._project_in(x)
        if self._positions is not None:
            x = x + functional.embedding(batch.positions + self.config.position_offset, self._positions)
        return x

    def _run_layer(
        self,
        layer: _Layer,
        x: Tensor,
        batch: ModelInput,
        cache: KVCache,
        angles: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        if self.config.post_norm:
            x = layer.norm_1(x + self._attend(layer, x, batch, cache, angles))
            return layer.norm_2(x + self._mlp(layer, x, batch))
        x = x + self._attend(layer, layer.norm_1(x), batch, cache, angles)
        return x + self._mlp(layer, layer.norm_2(x), batch)

    def _attend(
        self,
        layer: _Layer,
        x: Tensor,
        batch: ModelInput,
        cache: KVCache,
        angles: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        c = self.config
        qkv = layer.qkv(x, batch.lora).view(-1, c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        q, k, v = torch.split(qkv, [c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = layer.q_norm(q), layer.k_norm(k)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        write_kv(cache, k, v, batch.attention.write_rows)
        out = paged_attention(
            q.contiguous(), cache, batch.attention, scale=c.head_dim**-0.5, window=layer.window
        )
        return layer.attn_out(out, batch.lora)

    def _mlp(self, layer: _Layer, x: Tensor, batch: ModelInput) -> Tensor:
        inner = layer.mlp_in(x, batch.lora)
        if self.config.gated_mlp:
            gate, up = inner.chunk(2, dim=-1)
            inner = self._activation(gate) * up
        else:
            inner = self._activation(inner)
        return layer.mlp_out(inner, batch.lora)


class _WeightLoader:
    """Builds layers from a checkpoint."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint) -> None:
        self._config = config
        self._checkpoint = checkpoint

    def layer(self, index: int, lanes: LanePool) -> _Layer:
        c = self._config
        prefix = c.layer_prefix(index)
        qkv, attn_out, mlp_in, mlp_out = (
            LoraLinear(self._site(prefix, site), lanes.site(index, site.name)) for site in c.sites
        )
        return _Layer(
            norm_1=self.norm(prefix + c.norm_names[0]),
            qkv=qkv,
            q_norm=self._head_norm(prefix + "self_attn.q_norm") if c.qk_norm else None,
            k_norm=self._head_norm(prefix + "self_attn.k_norm") if c.qk_norm else None,
            attn_out=attn_out,
            norm_2=self.norm(prefix + c.norm_names[1]),
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

    def _head_norm(self, name: str) -> RMSNorm:
        weight = self._checkpoint.take(f"{name}.weight", (self._config.head_dim,))
        return RMSNorm(weight, self._config.norm_eps)

    def _site(self, prefix: str, site: Site) -> Linear:
        take = self._checkpoint.take
        weights = [
            take(f"{prefix}{part.module}.weight", (part.out_features, site.in_features))
            for part in site.parts
        ]
        biases = [
            take(f"{prefix}{part.module}.bias", (part.out_features,)) for part in site.parts if site.bias
        ]
        return Linear(_cat(weights), _cat(biases) if biases else None)


def _cat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
