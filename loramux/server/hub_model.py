"""A model of the Hugging Face Hub, downloaded once."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from loramux.engine.errors import InvalidConfig

# Only what is read: never pickled weights, never code.
_TEXTS: Final = ["*.json", "*.jinja"]
_WEIGHTS: Final = ["*.safetensors"]


def download_model(
    model: str, *, revision: str | None, download_dir: str | None, token: str | None, with_weights: bool
) -> Path:
    """The folder with a Hub id's files; the arguments are those of `find_model_folder`.

    Raises:
        InvalidConfig: the Hub cannot be reached, or does not have it.
    """
    files = _TEXTS + _WEIGHTS if with_weights else _TEXTS
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model, revision=revision, cache_dir=download_dir, token=token, allow_patterns=files
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InvalidConfig(
            f"model {model!r} is not a folder here, and the Hub did not give it: {why}", param="model"
        ) from error
