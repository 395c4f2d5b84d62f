"""MODEL to a local folder: a path as it is, or a Hub id, downloaded once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from loramux.engine.errors import InvalidConfig

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES: Final = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja")  # never pickles
_SKIPPED: Final = ("original/*", "onnx/*", "runs/*")


def resolve_model(
    model: str, *, revision: str | None = None, download_dir: str | None = None, token: str | None = None
) -> Path:
    """The local folder of a model. May download, and block for as long as that takes.

    Args:
        model: a folder, or `organisation/name` on the Hub.
        revision: branch, tag or commit on the Hub.
        download_dir: where downloads are kept; the Hub cache by default.
        token: for gated models.

    Raises:
        InvalidConfig: there is no such folder or Hub model, or it holds no config.json.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            hint = " (it holds a LoRA adapter)" if (folder / "adapter_config.json").is_file() else ""
            raise InvalidConfig(f"{model} is not a model folder: no config.json in it{hint}", param="--model")
        return folder.resolve()
    if not _HUB_ID.fullmatch(model):
        raise InvalidConfig(f"there is no model folder {model}", param="--model")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model,
                revision=revision,
                cache_dir=download_dir,
                token=token,
                allow_patterns=list(_FILES),
                ignore_patterns=list(_SKIPPED),
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = f"{model} is neither a model folder nor a Hub model that can be fetched: {reason}"
        raise InvalidConfig(message, param="--model") from error
