"""Small random checkpoints and adapters, made by transformers and PEFT themselves.

Nothing is downloaded: a tiny model is a real Hugging Face folder with random weights that are
spread enough for greedy tokens to vary and for an adapter to change them. The same arguments give
the same bytes.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

transformers.utils.logging.disable_progress_bar()

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "opt")

_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_SHAPES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "mistral": {**_LLAMA_LIKE, "sliding_window": None},
    "qwen2": {**_LLAMA_LIKE, "tie_word_embeddings": True},
    "qwen3": {**_LLAMA_LIKE, "head_dim": 16, "tie_word_embeddings": True},
    "opt": {
        "vocab_size": 131,
        "hidden_size": 48,
        "ffn_dim": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "dropout": 0.0,
    },
}
_CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "opt": transformers.OPTConfig,
}

_GAINS = {
    "q_proj": 1.5,
    "k_proj": 1.5,
    "v_proj": 1.6,
    "o_proj": 2.5,
    "down_proj": 2.5,
    "out_proj": 2.5,
    "fc2": 1.6,
}


def make_tiny(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    shard_size: str = "50GB",
    **config: Any,
) -> Path:
    """Write a random checkpoint of `family` (one of FAMILIES) into `folder` and return the folder.

    Args:
        family: whose architecture and default shape to take.
        folder: created if missing.
        seed: of the weights.
        dtype: of the tensors on disk.
        shard_size: more than one file when the tensors need more than this, e.g. "20KB".
        config: fields of the family's config that differ from the default shape.
    """
    hf_config = _CONFIGS[family](**{**_SHAPES[family], **config})
    hf_config.bos_token_id, hf_config.eos_token_id, hf_config.pad_token_id = 0, 2, 1
    model = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    _spread_weights(model, torch.Generator().manual_seed(10 * seed + FAMILIES.index(family)))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_size)
    return folder


@torch.no_grad()
def _spread_weights(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter so that activations keep unit size and attention is not uniform."""

    def draw(parameter: torch.nn.Parameter, std: float, mean: float = 0.0) -> None:
        parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))

    for name, parameter in model.named_parameters():  # tied weights appear once
        if parameter.dim() == 1:
            is_norm_weight = "norm" in name and name.endswith("weight")
            draw(parameter, 0.2, mean=1.0 if is_norm_weight else 0.0)
        elif "embed" in name or "lm_head" in name:
            draw(parameter, 0.25)
        else:
            # Layers outweigh the embedding, or a tied model would repeat its last token for ever.
            gain = next((gain for part, gain in _GAINS.items() if part in name), 1.2)
            draw(parameter, gain / parameter.shape[1] ** 0.5)


def as_legacy_config(folder: Path) -> None:
    """Rewrite `config.json` the way transformers 4 wrote it: rope_theta, rope_scaling, torch_dtype."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else {"type": rope["rope_type"], **rope}
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))


def rewrite_tensors(
    folder: Path, *, strip_prefix: str = "", extra: dict[str, torch.Tensor] | None = None
) -> None:
    """Change the key names of a single-file checkpoint, as some published ones have them.

    Args:
        folder: of a checkpoint with one `model.safetensors`.
        strip_prefix: removed from every key that starts with it.
        extra: tensors to add.
    """
    path = folder / "model.safetensors"
    tensors = {key.removeprefix(strip_prefix): value for key, value in load_file(path).items()}
    save_file({**tensors, **(extra or {})}, path, metadata={"format": "pt"})


def make_adapter(
    model_folder: Path,
    out_folder: Path,
    *,
    r: int,
    targets: list[str] | str,
    alpha: float | None = None,
    rslora: bool = False,
    seed: int = 0,
    strength: float = 0.7,
    dtype: str = "float32",
    **config: Any,
) -> Path:
    """Write a random adapter for a tiny model with PEFT and return its folder.

    Args:
        model_folder: the base checkpoint.
        out_folder: created if missing.
        r: default rank.
        targets: `target_modules`: names, a regex or "all-linear".
        alpha: `lora_alpha`; None means 2 r.
        rslora: scale by alpha / sqrt(r).
        seed: of the weights.
        strength: size of the change beside the base layer's output of about 1.
        dtype: of the tensors on disk.
        config: further LoraConfig fields (rank_pattern, alpha_pattern, layers_to_transform, ...).
    """
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    lora = peft.LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        target_modules=targets,
        use_rslora=rslora,
        task_type="CAUSAL_LM",
        **config,
    )
    with warnings.catch_warnings():  # PEFT asks transformers under a name that is going away
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(base, lora)
    _draw_adapter(model, torch.Generator().manual_seed(1000 + seed), strength)
    model.to(getattr(torch, dtype)).save_pretrained(out_folder)
    return out_folder


@torch.no_grad()
def _draw_adapter(model: torch.nn.Module, generator: torch.Generator, strength: float) -> None:
    for module in model.modules():
        if not isinstance(module, peft.tuners.lora.LoraLayer):
            continue
        for name, lora_a in module.lora_A.items():
            rank, in_features = lora_a.weight.shape
            lora_b = module.lora_B[name].weight
            lora_a.weight.copy_(torch.randn(lora_a.weight.shape, generator=generator) / in_features**0.5)
            std = strength / (module.scaling[name] * rank**0.5)
            lora_b.copy_(std * torch.randn(lora_b.shape, generator=generator))
    _draw_beyond_layers(model, generator)


# Beside an embedding of 0.4 and magnitudes of about 1: enough to change what is said.
_STDS_BEYOND_LAYERS = {
    "lora_embedding_A": 0.4,
    "lora_embedding_B": 0.2,
    "lora_magnitude_vector": 0.2,
    "modules_to_save": 0.1,
    "trainable_tokens_delta": 0.2,
}


@torch.no_grad()
def _draw_beyond_layers(model: torch.nn.Module, generator: torch.Generator) -> None:
    """DoRA's magnitudes, LoRA on the embedding, replaced tables and rows."""
    for name, parameter in model.named_parameters():
        std = next((std for part, std in _STDS_BEYOND_LAYERS.items() if part in name), None)
        if std is not None:
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))


def edit_adapter_config(folder: Path, **fields: Any) -> Path:
    """Overwrite fields of `adapter_config.json`, for what PEFT itself would not write."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def mixed_rank_adapters(family: str, model_folder: Path, out: Path) -> dict[str, Path]:
    """Four adapters of ranks 4, 8, 16 and 33 with different targets and scalings, by name."""
    is_opt = family == "opt"
    mlp = ["fc1", "fc2"] if is_opt else ["gate_proj", "up_proj", "down_proj"]
    output = "out_proj" if is_opt else "o_proj"
    recipes: dict[str, dict[str, Any]] = {
        "r4": {"r": 4, "targets": ["q_proj", "v_proj"]},
        "r8": {"r": 8, "targets": ["q_proj", "k_proj", "v_proj", output, *mlp], "alpha": 12.5},
        "r16": {"r": 16, "targets": mlp, "rslora": True, "alpha": 5},
        "r33": {
            "r": 33,
            "targets": ["q_proj", "k_proj", output],
            "rank_pattern": {"k_proj": 5},
            "alpha_pattern": {output: 7},
        },
    }
    return {
        name: make_adapter(model_folder, out / name, seed=seed, **recipe)
        for seed, (name, recipe) in enumerate(recipes.items())
    }


def random_prompt(length: int, *, seed: int = 0, vocab_size: int = 131) -> list[int]:
    """`length` token ids, none of them special (0 to 2)."""
    generator = torch.Generator().manual_seed(7000 + seed)
    return [int(token) for token in torch.randint(3, vocab_size, (length,), generator=generator)]
