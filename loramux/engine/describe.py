"""What the engine would make of a model's folder, told without starting it. No torch."""

from __future__ import annotations

from pathlib import Path

from loramux.engine.models.families import load_model_config
from loramux.engine.types import LoraSite


def lora_sites_of(folder: Path) -> dict[str, LoraSite]:
    """The modules of a base model that adapters may change: path -> shape.

    Raises:
        UnsupportedModel: its config.json is missing, or names a model that cannot be served.
    """
    return load_model_config(folder).lora_sites()
