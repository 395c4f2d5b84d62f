"""Adapters that clients send: written to a folder, which then is a source like any other.

With `--state-dir` they outlive the server, for as long as the journal knows them. Without it they are kept
for this process only, and what a killed one left is removed by the next.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import shutil
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from typing import Final

from loramux.engine.errors import AdapterUnavailable, InvalidRequest
from loramux.resolvers.adapter_folder import WEIGHTS_FILE
from loramux.resolvers.file_lock import FileLock
from loramux.resolvers.refusal import CONFIG_FILE
from loramux.resolvers.uri import SourceUri, parse_uri
from loramux.server.errors import RequestTooLarge

CONFIG_HEADER: Final = "x-loramux-adapter-config"
SHOWN_SOURCE: Final = "upload"
_WRITE_BYTES: Final = 1 << 20


class Uploads:
    """Where uploaded adapters are kept.

    Args:
        folder: created with the first upload.
        max_bytes: of one adapter.
        is_persistent: whether they outlive this process; then nobody else may use the folder.
    """

    def __init__(self, folder: Path, *, max_bytes: int, is_persistent: bool) -> None:
        self._root = folder
        self._max_bytes = max_bytes
        self._is_persistent = is_persistent
        self._folder = folder if is_persistent else folder / os.urandom(8).hex()
        self._lock = FileLock(self._folder.with_suffix(".lock"))

    def clean(self, known_uris: Collection[str]) -> None:
        """Remove what nothing refers to: folders of dead processes, or that the journal does not know."""
        if not self._root.is_dir():
            return
        for path in list(self._root.iterdir()):
            if path.suffix == ".lock":
                continue
            if self._is_persistent:
                if _uri(path) not in known_uris:
                    shutil.rmtree(path, ignore_errors=True)
                continue
            lock = FileLock(path.with_suffix(".lock"))
            if lock.acquire(blocking=False):
                shutil.rmtree(path, ignore_errors=True)
                lock.release(delete=True)

    def close(self) -> None:
        """Remove what was for this process only."""
        if not self._is_persistent:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._lock.release(delete=True)

    async def receive(self, config: str, weights: AsyncIterator[bytes]) -> str:
        """Write an adapter to the disk as it comes; returns the URI of its folder.

        Args:
            config: adapter_config.json, as it is or in base64.
            weights: adapter_model.safetensors.

        Raises:
            InvalidRequest: `config` is neither.
            RequestTooLarge: it is larger than one adapter may be.
            AdapterUnavailable: the disk refused.
        """
        text = _decode(config)
        folder = self._folder / os.urandom(8).hex()
        try:
            await asyncio.to_thread(self._make, folder, text)
            await self._write(folder / WEIGHTS_FILE, weights)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                message = f"the upload could not be stored: {error.strerror}"
                raise AdapterUnavailable(message) from error
            raise
        return _uri(folder)

    def discard(self, uri: str) -> None:
        """Remove an adapter that nobody needs any more; does nothing for other sources."""
        if uri.startswith(_uri(self._folder) + "/"):
            shutil.rmtree(parse_uri(uri).path, ignore_errors=True)

    def _make(self, folder: Path, config: bytes) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        if not self._is_persistent:
            self._lock.acquire()
        folder.mkdir(parents=True)
        (folder / CONFIG_FILE).write_bytes(config)

    async def _write(self, path: Path, weights: AsyncIterator[bytes]) -> None:
        size = 0
        pieces: list[bytes] = []
        pending = 0
        with path.open("wb") as file:
            async for piece in weights:
                size += len(piece)
                if size > self._max_bytes:
                    limit = f"{self._max_bytes} bytes (the server's --max-adapter-bytes)"
                    raise RequestTooLarge(f"an adapter allows at most {limit}")
                pieces.append(piece)
                pending += len(piece)
                if pending >= _WRITE_BYTES:
                    await asyncio.to_thread(file.writelines, pieces)
                    pieces, pending = [], 0
            await asyncio.to_thread(file.writelines, pieces)
            file.flush()
            if self._is_persistent:
                await asyncio.to_thread(os.fsync, file.fileno())


def _decode(config: str) -> bytes:
    text = config.strip()
    if text.startswith("{"):
        return text.encode("latin-1")  # as header bytes came
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        message = f"{CONFIG_HEADER} must be adapter_config.json as JSON or in base64"
        raise InvalidRequest(message, param=CONFIG_HEADER) from error


def _uri(folder: Path) -> str:
    return str(SourceUri("file", path=str(folder)))
