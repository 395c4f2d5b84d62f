"""An adapter's folder as untrusted input: what may be opened in it, and how its JSON is read.

Only regular files whose real place is the folder itself are opened, so a symlink in an uploaded or
downloaded adapter cannot point the server at another file, nor a named pipe make it wait. The one
exception is the layout of the Hugging Face cache, where `snapshots/<revision>/` holds symlinks into
`blobs/` of the same repository.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import BinaryIO, Final

from loramux.engine.errors import AdapterNotFound
from loramux.resolvers.refusal import CONFIG_FILE, refused, shown

WEIGHTS_FILE: Final = "adapter_model.safetensors"
INDEX_FILE: Final = "adapter_model.safetensors.index.json"
_MODEL_FILES: Final = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


class AdapterFolder:
    """The folder of one adapter, pinned to its real path when it is opened.

    `root` has no symlinks left, so a link such as `current -> v3` that moves later does not mix
    two versions.
    """

    def __init__(self, path: Path) -> None:
        """Find the folder.

        Raises:
            AdapterNotFound: it does not exist or holds no adapter_config.json.
        """
        if not os.path.isdir(path):
            what = "this is not a folder" if os.path.exists(path) else "no such folder"
            raise AdapterNotFound(f"No adapter found for {path}: {what}", param="lora_path")
        self.root = Path(os.path.realpath(path))
        self._allowed = [str(self.root), *_cache_blobs(self.root)]
        if not self.has(CONFIG_FILE):
            raise AdapterNotFound(
                f"No adapter found for {path}: the folder has no {CONFIG_FILE}{self._model_hint()}",
                param="lora_path",
            )

    def has(self, name: str) -> bool:
        """True if there is something of that name."""
        return os.path.exists(self.root / name)

    def open(self, name: str) -> BinaryIO:
        """Open one file of the folder for reading.

        Raises:
            AdapterIncompatible: it is not a regular file of this folder, or cannot be read.
        """
        real = os.path.realpath(self.root / name)
        if os.path.dirname(real) not in self._allowed:
            raise refused(f"{name} is a link that leaves the adapter's folder", param=name)
        try:
            # O_NONBLOCK: opening a named pipe must not wait for a writer.
            fd = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise refused(f"{name} cannot be read: {error.strerror}", param=name) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise refused(f"{name} is not a regular file", param=name)
        return os.fdopen(fd, "rb", buffering=0)

    def read_json(self, name: str, *, max_bytes: int) -> dict[str, object]:
        """Read one JSON object.

        Raises:
            AdapterIncompatible: the file is larger than `max_bytes` or not one strict JSON object.
        """
        with self.open(name) as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise refused(
                    f"{name} has {size} bytes, more than the limit of {max_bytes} bytes", param=name
                )
            try:
                data = file.read(max_bytes + 1) or b""
            except OSError as error:
                raise refused(f"{name} cannot be read: {error.strerror}", param=name) from error
        return parse_json_object(data, name)

    def _model_hint(self) -> str:
        if self.has("config.json") and any(self.has(name) for name in _MODEL_FILES):
            return (
                "; it holds a full model (config.json and model weights), which is served with"
                " `loramux serve MODEL`, not as an adapter"
            )
        return ""


def parse_json_object(data: bytes, source: str) -> dict[str, object]:
    """Parse one JSON object strictly: UTF-8, no duplicate keys, no NaN, bounded nesting.

    Raises:
        AdapterIncompatible: anything else; names `source`.
    """
    try:
        value: object = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant
        )
    except RecursionError:
        raise refused(f"{source} is nested too deeply", param=source) from None
    except ValueError as error:
        raise refused(f"{source} is not valid JSON: {shown(str(error))}", param=source) from error
    if not isinstance(value, dict):
        raise refused(f"{source} must hold a JSON object, got {shown(value)}", param=source)
    return value


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique: dict[str, object] = {}
    for key, value in pairs:
        if key in unique:
            raise ValueError(f"key {shown(key)} stands twice")
        unique[key] = value
    return unique


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _cache_blobs(root: Path) -> list[str]:
    """The `blobs` folder of the Hugging Face cache that `root` is a snapshot of, if it is one."""
    return [str(parent.parent / "blobs") for parent in root.parents if parent.name == "snapshots"][:1]
