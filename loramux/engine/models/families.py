"""What each supported Hugging Face architecture looks like, as data. No torch here.

`load_model_config` reads a folder's `config.json` into one `ModelConfig` that spells out every
choice `decoder.py` has to make; a family is one entry in `_FAMILIES` and no code elsewhere. A field
that would change the mathematics and is not understood stops the start with its name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loramux.engine.errors import UnsupportedModel
from loramux.engine.types import LoraSite

JsonObject = dict[str, Any]
HEAD_MODULE: Final = "lm_head"


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: base frequency and how it is stretched beyond the training length."""

    kind: str = "default"  # default | linear | dynamic | llama3 | yarn
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 0  # tokens the model was trained on, before stretching
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None = derived from factor and mscale
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn


@dataclass(frozen=True, slots=True)
class SitePart:
    """One linear layer of the checkpoint inside a fused site."""

    module: str  # path below the layer, e.g. self_attn.q_proj
    out_features: int


@dataclass(frozen=True, slots=True)
class Site:
    """Linear layers that share their input and run as one GEMM; where an adapter may attach."""

    name: str  # qkv | attn_out | mlp_in | mlp_out
    in_features: int
    parts: tuple[SitePart, ...]
    bias: bool

    @property
    def out_features(self) -> int:
        """Rows of the fused weight."""
        return sum(part.out_features for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One decoder-only model, every choice spelled out."""

    architecture: str
    torch_dtype: str  # of the checkpoint: bfloat16 | float16 | float32
    vocab_size: int
    hidden_size: int
    embed_dim: int  # width of the token embedding; differs from hidden_size in small OPTs only
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int  # positions that the checkpoint defines
    tie_embeddings: bool
    norm: str  # rms | layer
    norm_eps: float
    norm_affine: bool  # the norms have weights (and biases, for layer norms)
    post_norm: bool  # normalise after the residual addition instead of before the sub-layer
    final_norm: bool
    qk_norm: bool  # RMS norm over each head of q and k, before RoPE
    gated_mlp: bool  # act(gate) * up, else act(up)
    activation: str  # silu | relu | gelu | gelu_tanh
    rope: RopeConfig | None  # None: learned positions
    position_offset: int  # added to a position before the learned table is read
    windows: tuple[int | None, ...]  # sliding window in tokens, one a layer; None = full attention
    sites: tuple[Site, Site, Site, Site]  # qkv, attn_out, mlp_in, mlp_out
    root: str  # prefix of embeddings, layers and final norm: model | model.decoder
    norm_names: tuple[str, str, str]  # before attention, before the MLP, final

    @property
    def derived_max_len(self) -> int:
        """Tokens of context the model can serve, RoPE stretching included."""
        if self.rope is None or self.rope.kind in ("default", "llama3"):
            return self.max_position
        if self.rope.kind == "yarn":
            return max(self.max_position, int(self.rope.original_max_position * self.rope.factor))
        return int(self.max_position * self.rope.factor)

    def layer_prefix(self, layer: int) -> str:
        """Path of one layer's modules, with the trailing dot."""
        return f"{self.root}.layers.{layer}."

    def lora_sites(self) -> dict[str, LoraSite]:
        """Every module that an adapter may change, by its path in the checkpoint."""
        layers = {
            self.layer_prefix(layer) + part.module: LoraSite(site.in_features, part.out_features)
            for layer in range(self.num_layers)
            for site in self.sites
            for part in site.parts
        }
        embedding = LoraSite(self.vocab_size, self.embed_dim, "embedding")
        head = LoraSite(self.embed_dim, self.vocab_size, "head", self.tie_embeddings)
        return {self.embedding_module: embedding, **layers, HEAD_MODULE: head}

    @property
    def embedding_module(self) -> str:
        """Path of the token embedding."""
        return f"{self.root}.embed_tokens"


def load_model_config(folder: Path) -> ModelConfig:
    """Read `config.json` of a Hugging Face folder.

    Raises:
        UnsupportedModel: no config, an architecture that is not in the list, or a field whose
            value would change the mathematics and is not implemented.
    """
    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file() and not path.is_file():
        raise UnsupportedModel(
            f"{folder} is a LoRA adapter, not a base model: pass the base model and "
            f"--lora-modules NAME={folder}",
            param="model",
        )
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnsupportedModel(f"{folder} holds no config.json", param="model") from None
    except (ValueError, OSError) as error:
        raise UnsupportedModel(f"{path} cannot be read: {error}", param="model") from None
    names = raw.get("architectures") if isinstance(raw, dict) else None
    name = names[0] if isinstance(names, list) and names else None
    if name not in _FAMILIES:
        raise UnsupportedModel(
            f"architecture {name!r} of {folder} is not supported; supported are {', '.join(_FAMILIES)}",
            param="model",
        )
    if raw.get("quantization_config"):
        raise UnsupportedModel(
            "config.json field quantization_config: quantised checkpoints are not supported; "
            "use the bfloat16, float16 or float32 checkpoint",
            param="model",
        )
    try:
        return _FAMILIES[name](name, raw)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UnsupportedModel(f"{path}: missing or malformed field: {error!r}", param="model") from None


def _llama_like(architecture: str, raw: JsonObject) -> ModelConfig:
    """Llama, Mistral, Qwen2 and Qwen3: RMS norms, rotary positions, gated MLP."""
    hidden, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
    layers = int(raw["num_hidden_layers"])
    kv_heads = int(raw.get("num_key_value_heads") or (8 if architecture == "MistralForCausalLM" else heads))
    head_dim = int(raw.get("head_dim") or (128 if architecture == "Qwen3ForCausalLM" else hidden // heads))
    inner = int(raw["intermediate_size"])
    qkv_bias = bool(raw.get("attention_bias", False)) or architecture == "Qwen2ForCausalLM"
    out_bias = bool(raw.get("attention_bias", False)) and architecture != "Qwen2ForCausalLM"
    mlp_bias = bool(raw.get("mlp_bias", False))
    if heads % kv_heads:
        raise UnsupportedModel(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}", param="model"
        )
    max_position = int(raw.get("max_position_embeddings", 2048))
    return ModelConfig(
        architecture=architecture,
        torch_dtype=_dtype(raw),
        vocab_size=int(raw["vocab_size"]),
        hidden_size=hidden,
        embed_dim=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        norm="rms",
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        norm_affine=True,
        post_norm=False,
        final_norm=True,
        qk_norm=architecture == "Qwen3ForCausalLM",
        gated_mlp=True,
        activation=_activation(raw.get("hidden_act", "silu"), "hidden_act"),
        rope=_rope(raw, max_position),
        position_offset=0,
        windows=_windows(architecture, raw, layers),
        sites=(
            Site(
                "qkv",
                hidden,
                (
                    SitePart("self_attn.q_proj", heads * head_dim),
                    SitePart("self_attn.k_proj", kv_heads * head_dim),
                    SitePart("self_attn.v_proj", kv_heads * head_dim),
                ),
                qkv_bias,
            ),
            Site("attn_out", heads * head_dim, (SitePart("self_attn.o_proj", hidden),), out_bias),
            Site(
                "mlp_in", hidden, (SitePart("mlp.gate_proj", inner), SitePart("mlp.up_proj", inner)), mlp_bias
            ),
            Site("mlp_out", inner, (SitePart("mlp.down_proj", hidden),), mlp_bias),
        ),
        root="model",
        norm_names=("input_layernorm", "post_attention_layernorm", "norm"),
    )


def _opt(architecture: str, raw: JsonObject) -> ModelConfig:
    """OPT: layer norms with bias, learned positions, plain MLP."""
    hidden, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
    inner, layers = int(raw["ffn_dim"]), int(raw["num_hidden_layers"])
    bias = bool(raw.get("enable_bias", True))
    pre_norm = bool(raw.get("do_layer_norm_before", True))
    return ModelConfig(
        architecture=architecture,
        torch_dtype=_dtype(raw),
        vocab_size=int(raw["vocab_size"]),
        hidden_size=hidden,
        embed_dim=int(raw.get("word_embed_proj_dim") or hidden),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_position=int(raw["max_position_embeddings"]),
        tie_embeddings=bool(raw.get("tie_word_embeddings", True)),
        norm="layer",
        norm_eps=1e-5,
        norm_affine=bool(raw.get("layer_norm_elementwise_affine", True)),
        post_norm=not pre_norm,
        final_norm=pre_norm and not raw.get("_remove_final_layer_norm", False),
        qk_norm=False,
        gated_mlp=False,
        activation=_activation(raw.get("activation_function", "relu"), "activation_function"),
        rope=None,
        position_offset=2,  # the first two rows of OPT's table belong to padding
        windows=(None,) * layers,
        sites=(
            Site("qkv", hidden, tuple(SitePart(f"self_attn.{x}_proj", hidden) for x in "qkv"), bias),
            Site("attn_out", hidden, (SitePart("self_attn.out_proj", hidden),), bias),
            Site("mlp_in", hidden, (SitePart("fc1", inner),), bias),
            Site("mlp_out", inner, (SitePart("fc2", hidden),), bias),
        ),
        root="model.decoder",
        norm_names=("self_attn_layer_norm", "final_layer_norm", "final_layer_norm"),
    )


_FAMILIES: Final[dict[str, Callable[[str, JsonObject], ModelConfig]]] = {
    "LlamaForCausalLM": _llama_like,
    "MistralForCausalLM": _llama_like,
    "Qwen2ForCausalLM": _llama_like,
    "Qwen3ForCausalLM": _llama_like,
    "OPTForCausalLM": _opt,
}
SUPPORTED_ARCHITECTURES: Final = tuple(_FAMILIES)

_ACTIVATIONS: Final = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_DTYPES: Final = {"bfloat16", "float16", "float32"}


def _activation(value: object, field: str) -> str:
    if value not in _ACTIVATIONS:
        raise UnsupportedModel(
            f"config.json field {field}: {value!r} is not supported; supported are {', '.join(_ACTIVATIONS)}",
            param="model",
        )
    return _ACTIVATIONS[str(value)]


def _dtype(raw: JsonObject) -> str:
    """The checkpoint's dtype; `dtype` is the newer spelling of `torch_dtype`."""
    value = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    value = str(value).removeprefix("torch.")
    if value not in _DTYPES:
        raise UnsupportedModel(
            f"config.json field torch_dtype: {value!r} is not supported; supported are {sorted(_DTYPES)}",
            param="model",
        )
    return value


def _rope(raw: JsonObject, max_position: int) -> RopeConfig:
    """RoPE from `rope_parameters` (newer) or `rope_theta` + `rope_scaling` (older)."""
    fields: JsonObject = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    kind = str(fields.get("rope_type") or fields.get("type") or "default")
    if kind not in ("default", "linear", "dynamic", "llama3", "yarn"):
        raise UnsupportedModel(
            f"config.json rope type {kind!r} is not supported; supported are "
            "default, linear, dynamic, llama3, yarn",
            param="model",
        )
    partial = fields.get("partial_rotary_factor", raw.get("partial_rotary_factor")) or 1.0
    if float(partial) != 1.0:
        raise UnsupportedModel(
            f"config.json field partial_rotary_factor: {partial} is not supported, only 1.0", param="model"
        )
    original = int(
        fields.get("original_max_position_embeddings")
        or raw.get("original_max_position_embeddings")
        or max_position
    )
    factor = fields.get("factor")
    return RopeConfig(
        kind=kind,
        theta=float(fields.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        factor=float(factor) if factor is not None else (max_position / original if kind == "yarn" else 1.0),
        original_max_position=max_position if kind == "dynamic" else original,
        low_freq_factor=float(fields.get("low_freq_factor", 1.0)),
        high_freq_factor=float(fields.get("high_freq_factor", 4.0)),
        beta_fast=float(fields.get("beta_fast") or 32.0),
        beta_slow=float(fields.get("beta_slow") or 1.0),
        attention_factor=_optional_float(fields.get("attention_factor")),
        mscale=_optional_float(fields.get("mscale")),
        mscale_all_dim=_optional_float(fields.get("mscale_all_dim")),
        truncate=bool(fields.get("truncate", True)),
    )


def _optional_float(value: object) -> float | None:
    return None if value is None else float(str(value))


def _windows(architecture: str, raw: JsonObject, layers: int) -> tuple[int | None, ...]:
    """Sliding window per layer, in tokens, as transformers decides it."""
    window = raw.get("sliding_window", 4096)  # transformers' default where the key is absent
    if architecture == "LlamaForCausalLM" or window is None:
        return (None,) * layers
    if architecture == "MistralForCausalLM":
        return (int(window),) * layers
    if not raw.get("use_sliding_window", False):
        return (None,) * layers
    kinds = raw.get("layer_types")
    if kinds is None:
        first = int(raw.get("max_window_layers", 28))
        return tuple(int(window) if layer >= first else None for layer in range(layers))
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)
