"""The checkpoints that parity is shown on: five families and what varies inside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.parity.reference import Reference
from tests.tiny_models import FAMILIES, as_legacy_config, make_tiny, mixed_rank_adapters, rewrite_tensors


class Variation(NamedTuple):
    """How a checkpoint differs from its family's plain one."""

    family: str
    config: dict[str, Any]
    edit: Callable[[Path], None] | None = None  # what is changed in the folder afterwards


def _rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


def _strip_opt_prefix(folder: Path) -> None:
    rewrite_tensors(folder, strip_prefix="model.")


def _store_rotary_buffers(folder: Path) -> None:
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    rewrite_tensors(folder, extra={name: torch.rand(6) for name in names})


def _store_another_head(folder: Path) -> None:
    head = 0.4 * torch.randn(131, 48, generator=torch.Generator().manual_seed(0))
    rewrite_tensors(folder, extra={"lm_head.weight": head})


_LLAMA3 = _rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
_YARN = _rope("yarn", factor=16.0, original_max_position_embeddings=32)
_SLIDING = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}

VARIATIONS: dict[str, Variation] = {
    **{family: Variation(family, {}) for family in FAMILIES},
    "llama-tied": Variation("llama", {"tie_word_embeddings": True}),
    "llama-tied-in-name-only": Variation("llama", {"tie_word_embeddings": True}, _store_another_head),
    "llama-biases": Variation("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-mha": Variation("llama", {"num_key_value_heads": 4}),
    "llama-mqa": Variation("llama", {"num_key_value_heads": 1, "vocab_size": 257, "num_hidden_layers": 3}),
    "llama-wide-heads": Variation("llama", {"head_dim": 20}),
    "llama-rope-theta": Variation("llama", _rope("default", rope_theta=500.0)),
    "llama-rope-linear": Variation("llama", _rope("linear", factor=4.0)),
    "llama-rope-dynamic": Variation("llama", {"max_position_embeddings": 64, **_rope("dynamic", factor=4.0)}),
    "llama-rope-llama3": Variation("llama", _LLAMA3),
    "llama-rope-yarn": Variation("llama", _YARN),
    "llama-rope-yarn-tuned": Variation(
        "llama",
        _rope(
            "yarn",
            factor=8.0,
            original_max_position_embeddings=64,
            attention_factor=1.3,
            beta_fast=16.0,
            beta_slow=2.0,
            truncate=False,
        ),
    ),
    "llama-rope-yarn-mscale": Variation(
        "llama",
        _rope("yarn", factor=16.0, original_max_position_embeddings=32, mscale=1.2, mscale_all_dim=0.7),
    ),
    "llama-legacy-config": Variation("llama", _LLAMA3, as_legacy_config),
    "llama-sharded": Variation("llama", {"shard_size": "60KB"}),
    "llama-bf16": Variation("llama", {"dtype": "bfloat16"}),
    "llama-fp16": Variation("llama", {"dtype": "float16"}),
    "llama-stored-buffers": Variation("llama", {}, _store_rotary_buffers),
    "mistral-sliding": Variation("mistral", {"sliding_window": 24, "head_dim": 16}),
    "qwen2-untied": Variation("qwen2", {"tie_word_embeddings": False}),
    "qwen2-sliding": Variation("qwen2", _SLIDING),
    "qwen2-yarn-legacy": Variation("qwen2", _YARN, as_legacy_config),
    "qwen3-untied": Variation("qwen3", {"tie_word_embeddings": False, "attention_bias": True}),
    "qwen3-sliding": Variation("qwen3", _SLIDING),
    "opt-350m-like": Variation("opt", {"seed": 8, "do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "opt-gelu": Variation("opt", {"activation_function": "gelu", "tie_word_embeddings": False}),
    "opt-no-bias": Variation("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "opt-bare-names": Variation("opt", {}, _strip_opt_prefix),
    # heads of 32 and rows of 16: attention and LoRA by the compiled CPU kernels
    "llama-compiled": Variation("llama", {"head_dim": 32}),
    "qwen3-compiled": Variation("qwen3", {"head_dim": 32}),
    "mistral-compiled": Variation("mistral", {"sliding_window": 24, "head_dim": 32}),
    "opt-compiled": Variation("opt", {"hidden_size": 64, "num_attention_heads": 2}),
}


class Checkpoint(NamedTuple):
    """A model on disk, adapters for it by name, and what they should answer."""

    folder: Path
    adapters: dict[str, Path]
    reference: Reference


def make_checkpoint(name: str, root: Path) -> Checkpoint:
    """One of VARIATIONS with its four mixed-rank adapters."""
    family, config, edit = VARIATIONS[name]
    folder = make_tiny(family, root / name, **config)
    if edit:
        edit(folder)
    adapters = mixed_rank_adapters(family, folder, root / f"{name}-adapters")
    return Checkpoint(folder, adapters, Reference(folder, adapters))


class Zoo:
    """Makes every checkpoint once, when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._made: dict[str, Checkpoint] = {}

    def __getitem__(self, name: str) -> Checkpoint:
        if name not in self._made:
            self._made[name] = make_checkpoint(name, self.root)
        return self._made[name]
