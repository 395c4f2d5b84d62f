"""Adapters as bytes, and the fixtures' types: what the tests of sources put into a hub or a bucket."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loramux.resolvers.sources import Sources
from tests.adapter_files import llama_sites, peft_config, random_tensors, safetensors_bytes

SITES = llama_sites()
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

OpenSources = Callable[..., Sources]


def adapter_files(seed: int = 0, **config: Any) -> dict[str, bytes]:
    """An adapter's two files."""
    chosen = {module: site for module, site in SITES.items() if module.endswith(("q_proj", "v_proj"))}
    return {
        CONFIG: json.dumps(peft_config(**config)).encode(),
        WEIGHTS: safetensors_bytes(random_tensors(chosen, seed=seed)),
    }


def below(folder: str, files: dict[str, bytes]) -> dict[str, bytes]:
    """The files in a folder of a repository or bucket."""
    return {f"{folder}/{name}": data for name, data in files.items()}


def contents(folder: Path) -> dict[str, bytes]:
    """An adapter's files in a folder of the store."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def left_behind(store: Path) -> list[str]:
    """What downloads and evictions left in a store."""
    return [
        str(path.relative_to(store)) for name in ("partial", "trash") for path in (store / name).rglob("*")
    ]
