"""The built-in resolver for a folder of adapters: `<folder>/<name>/adapter_config.json`.

Set by `LORAMUX_LORA_RESOLVER_CACHE_DIR`. The name is untrusted: what it means must lie under the folder
once every symlink in it is followed. Nothing is remembered, so a new folder is seen at once.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Final

from loramux.engine.errors import InvalidConfig
from loramux.resolvers.base import ResolverContext
from loramux.resolvers.base_match import BaseMatch, base_match_from, check_folder
from loramux.resolvers.refusal import CONFIG_FILE
from loramux.resolvers.settings import twin_variable
from loramux.resolvers.uri import SourceUri

VARIABLE: Final = "LORA_RESOLVER_CACHE_DIR"


def create(context: ResolverContext) -> FilesystemResolver | None:
    """The resolver that the environment asks for, if it does.

    Raises:
        InvalidConfig: the folder does not exist.
    """
    folder = twin_variable(context.environ, VARIABLE)
    if folder is None:
        return None
    if not os.path.isdir(folder):
        raise InvalidConfig(
            f"LORAMUX_{VARIABLE} must be a folder, got {folder!r}", param=f"LORAMUX_{VARIABLE}"
        )
    return FilesystemResolver(Path(folder), base_match_from(context.environ))


class FilesystemResolver:
    """Names are paths below one folder; see `loramux.resolvers.base.Resolver`."""

    name = "lora_filesystem_resolver"
    not_found_ttl_s = 0.0

    def __init__(self, folder: Path, base_match: BaseMatch) -> None:
        self.folder = folder
        self._base_match = base_match

    async def resolve(self, base_model_name: str, adapter_name: str) -> str | None:
        """The folder of that name, if it holds an adapter."""
        return await asyncio.to_thread(self._find, base_model_name, adapter_name)

    def _find(self, base_model_name: str, adapter_name: str) -> str | None:
        path = self._path(adapter_name)
        # os.path.isfile, since it also says False for a name that is too long for a file.
        if path is None or not os.path.isfile(path / CONFIG_FILE):
            return None
        check_folder(path, base_model_name, self._base_match, f"adapter {adapter_name!r}")
        return str(SourceUri("file", path=str(path)))

    def _path(self, adapter_name: str) -> Path | None:
        """Where the name points, if that is inside the folder; not resolved, so that links may move on."""
        parts = adapter_name.split("/")
        if "\0" in adapter_name or "\\" in adapter_name or any(part in ("", ".", "..") for part in parts):
            return None
        path = Path(os.path.abspath(self.folder)).joinpath(*parts)
        real, root = os.path.realpath(path), os.path.realpath(self.folder)
        return path if real != root and Path(real).is_relative_to(root) else None
