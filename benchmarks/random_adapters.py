"""Random LoRA adapters for measurements: right shapes, meaningless weights, written without torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(folder: Path, model: Path, *, rank: int, seed: int, size: float = 0.01) -> Path:
    """Write a PEFT folder for all linear layers of a Llama-shaped model; returns the folder.

    With a small `size` of B's values the base stays in charge; with 0.05 every text is another one.
    """
    rng = np.random.default_rng(seed)
    config = json.loads((model / "config.json").read_text())
    tensors: dict[str, np.ndarray] = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (size_in, size_out) in _shapes(config).items():
            part = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            key = f"base_model.model.model.layers.{layer}.{part}.{name}"
            a = rng.standard_normal((rank, size_in), dtype=np.float32) / np.sqrt(size_in)
            b = rng.standard_normal((size_out, rank), dtype=np.float32) * size
            tensors[f"{key}.lora_A.weight"] = a.astype(np.float16)
            tensors[f"{key}.lora_B.weight"] = b.astype(np.float16)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(LINEARS),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1))
    return folder


def _shapes(config: dict[str, int]) -> dict[str, tuple[int, int]]:
    """(in, out) of each linear layer."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    kv = head * config.get("num_key_value_heads", heads)
    return {
        "q_proj": (hidden, head * heads),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (head * heads, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
