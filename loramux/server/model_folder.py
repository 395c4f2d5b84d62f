"""MODEL to a local folder: a folder stays what it is, a Hub id is downloaded once."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Final, cast

from loramux.engine.errors import InvalidConfig

_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")


def find_model_folder(
    model: str,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    token: str | None = None,
    with_weights: bool = True,
) -> Path:
    """The folder that holds a model's config, weights and tokenizer. May download, and block meanwhile.

    Args:
        model: a local folder, or an id on the Hugging Face Hub (at `HF_ENDPOINT`).
        revision: branch, tag or commit of a Hub id.
        download_dir: where the Hub's files are kept; None = the Hub's own cache folder.
        token: for gated models; None = what the Hub's own client finds.
        with_weights: False where the tensors are not read.

    Raises:
        InvalidConfig: it is neither, the folder holds no model, or the Hub cannot be reached.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            hint = " (it holds a LoRA adapter)" if (folder / "adapter_config.json").is_file() else ""
            raise InvalidConfig(f"model {model!r} is a folder without config.json{hint}", param="model")
        return folder
    if not _HUB_ID.fullmatch(model):
        raise InvalidConfig(
            f"model {model!r} is neither a folder nor an id of the form ORGANISATION/NAME", param="model"
        )
    download = importlib.import_module(
        "loramux.server.hub_model"
    ).download_model  # who has a folder needs no Hub
    return cast(
        Path,
        download(model, revision=revision, download_dir=download_dir, token=token, with_weights=with_weights),
    )
