"""Adapter folders written by hand, without torch or PEFT: right ones, and bytes for wrong ones."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loramux.engine.types import LoraSite, TensorRef

WEIGHTS_FILE = "adapter_model.safetensors"
INDEX_FILE = "adapter_model.safetensors.index.json"
CONFIG_FILE = "adapter_config.json"

# key -> (safetensors dtype, shape, bytes)
Tensor = tuple[str, tuple[int, ...], bytes]  # dtype, shape, data
Tensors = dict[str, Tensor]

_SHAPES = {
    "self_attn.q_proj": LoraSite(16, 16),
    "self_attn.k_proj": LoraSite(16, 8),
    "self_attn.v_proj": LoraSite(16, 8),
    "self_attn.o_proj": LoraSite(16, 16),
    "mlp.gate_proj": LoraSite(16, 24),
    "mlp.up_proj": LoraSite(16, 24),
    "mlp.down_proj": LoraSite(24, 16),
}


def llama_sites(num_layers: int = 2, *, vocabulary: int = 0, is_tied: bool = False) -> dict[str, LoraSite]:
    """The modules of a Llama so small that nothing about it takes time.

    Args:
        num_layers: each with seven linear modules.
        vocabulary: rows of embedding and head; 0 leaves both out.
        is_tied: the head shares the embedding's weight.
    """
    sites = {
        f"model.layers.{layer}.{name}": site for layer in range(num_layers) for name, site in _SHAPES.items()
    }
    if vocabulary:
        sites["model.embed_tokens"] = LoraSite(vocabulary, 16, "embedding")
        sites["lm_head"] = LoraSite(16, vocabulary, "head", is_tied)
    return sites


def encode_values(values: NDArray[np.float32], dtype: str) -> bytes:
    """The values as little-endian bytes of a safetensors dtype; BF16 by cutting off the low half."""
    if dtype == "BF16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def safetensors_bytes(tensors: Tensors) -> bytes:
    """A whole safetensors file; the shapes and bytes are not checked against each other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for key, (dtype, shape, data) in tensors.items():
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    return with_header(header, b"".join(data for _, _, data in tensors.values()))


def with_number(tensor: Tensor, value: float) -> Tensor:
    """The same F32 tensor with one other number in it."""
    dtype, shape, data = tensor
    values = np.frombuffer(data, dtype="<f4").copy()
    values[3] = value
    return dtype, shape, values.tobytes()


def tensor_ref(folder: Path, key: str) -> TensorRef:
    """Where a tensor of the folder's one weights file lies."""
    content = (folder / WEIGHTS_FILE).read_bytes()
    size = int.from_bytes(content[:8], "little")
    entry = json.loads(content[8 : 8 + size])[key]
    return TensorRef(key, WEIGHTS_FILE, entry["dtype"], 8 + size + entry["data_offsets"][0])


def with_header(header: object, body: bytes = b"") -> bytes:
    """A safetensors file with any header: an object to write as JSON, or the bytes themselves."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def random_tensors(
    modules: Mapping[str, LoraSite],
    *,
    rank: int | Mapping[str, int] = 4,
    dtype: str = "F32",
    seed: int = 0,
    prefix: str = "base_model.model.",
) -> Tensors:
    """A and B of every module, values around 0.1, the same for the same seed."""
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    for module, site in modules.items():
        r = rank if isinstance(rank, int) else rank[module]
        for side, shape in (("A", (r, site.in_features)), ("B", (site.out_features, r))):
            values = rng.normal(scale=0.1, size=math.prod(shape)).astype(np.float32)
            end = f"lora_embedding_{side}" if site.kind == "embedding" else f"lora_{side}.weight"
            tensors[f"{prefix}{module}.{end}"] = (dtype, shape, encode_values(values, dtype))
    return tensors


def write_adapter(
    folder: Path,
    sites: Mapping[str, LoraSite],
    *,
    rank: int = 4,
    alpha: float = 8,
    target_modules: Iterable[str] = ("q_proj", "v_proj"),
    dtype: str = "F32",
    seed: int = 0,
    **config_overrides: Any,
) -> Path:
    """Write an adapter as PEFT lays it out and return its folder.

    Args:
        folder: created if missing.
        sites: the base model's modules; those named by `target_modules` get tensors.
        rank: of every module.
        alpha: the config's lora_alpha.
        target_modules: last parts of module paths, such as "q_proj".
        dtype: F32, F16 or BF16.
        seed: of the values.
        config_overrides: fields of adapter_config.json; None is written as null.
    """
    targets = list(target_modules)
    chosen = {module: site for module, site in sites.items() if module.rpartition(".")[2] in targets}
    return write_folder(
        folder,
        peft_config(r=rank, lora_alpha=alpha, target_modules=targets, **config_overrides),
        random_tensors(chosen, rank=rank, dtype=dtype, seed=seed),
    )


def peft_config(**overrides: Any) -> dict[str, Any]:
    """An adapter_config.json with the usual fields."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "inference_mode": True,
        **overrides,
    }


def write_folder(folder: Path, config: object, tensors: Tensors | bytes | None) -> Path:
    """Write adapter_config.json and adapter_model.safetensors; None leaves a file out."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        text = config if isinstance(config, bytes) else json.dumps(config).encode()
        (folder / CONFIG_FILE).write_bytes(text)
    if tensors is not None:
        data = tensors if isinstance(tensors, bytes) else safetensors_bytes(tensors)
        (folder / WEIGHTS_FILE).write_bytes(data)
    return folder
