"""The journal: which adapters clients loaded and unloaded, so that a restart brings them back.

One small JSON file in `--state-dir`, written whole: after a crash it is the old one or the new one. A
call is answered after its change is on the disk. Adapters of `--lora-modules`, `--adapters-file` and
resolvers are not written down, as they come back by themselves; but that one of `--lora-modules` was
unloaded is.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final, Self

import msgspec

from loramux.engine.errors import AdapterUnavailable, InvalidConfig
from loramux.resolvers.file_lock import FileLock, replace_file

_FILE: Final = "adapters.json"
_FORMAT: Final = 1


class JournalEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter as it was last loaded."""

    name: str
    source: str  # a URI, pinned to a revision where the source has one
    digest: str  # what it held
    version: int
    shown_source: str | None = None  # if clients see something else
    pinned: bool = False
    base_model_name: str | None = None


class _Content(msgspec.Struct, kw_only=True):
    format: int = _FORMAT
    adapters: list[JournalEntry] = []
    removed: list[str] = []  # names of --lora-modules that were unloaded


class Journal:
    """What is written down, and the pen. Belongs to one server at a time."""

    def __init__(self, folder: Path, content: _Content, lock: FileLock) -> None:
        self.folder = folder
        self.entries = {entry.name: entry for entry in content.adapters}
        self.removed = set(content.removed)
        self._file_lock = lock
        self._writing = asyncio.Lock()
        self._num_changes = 0
        self._num_written = 0

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read the journal of a folder, which is created when missing.

        Raises:
            InvalidConfig: it cannot be read or written, or another server uses it.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / "lock")
            if not lock.acquire(blocking=False):
                message = f"--state-dir {folder} is in use by another server"
                raise InvalidConfig(message, param="--state-dir")
            for left in folder.glob(f"{_FILE}.*"):  # of a write that a crash cut off
                left.unlink()
        except OSError as error:
            raise InvalidConfig(f"--state-dir {folder}: {error}", param="--state-dir") from error
        try:
            return cls(folder, _read(folder / _FILE), lock)
        except InvalidConfig:
            lock.release()
            raise

    async def record(self, entry: JournalEntry) -> None:
        """Write down that an adapter is loaded; returns when it is on the disk.

        Raises:
            AdapterUnavailable: the disk refused; it is as if nobody had asked.
        """
        before = self.entries.get(entry.name)
        self.entries[entry.name] = entry
        was_removed = entry.name in self.removed
        self.removed.discard(entry.name)
        try:
            await self._save()
        except AdapterUnavailable:
            self.entries.pop(entry.name)
            if before is not None:
                self.entries[entry.name] = before
            if was_removed:
                self.removed.add(entry.name)
            raise

    async def forget(self, name: str, *, remember_removal: bool = False) -> None:
        """Write down that an adapter is gone; `remember_removal` if a flag would bring it back."""
        had_entry = self.entries.pop(name, None) is not None
        if remember_removal:
            self.removed.add(name)
        if had_entry or remember_removal:
            await self._save()

    def close(self) -> None:
        """Let another server have the folder."""
        self._file_lock.release()

    async def written(self) -> None:
        """Return when every change so far is on the disk.

        Raises:
            AdapterUnavailable: the disk refused.
        """
        await self._write(self._num_changes)

    async def _save(self) -> None:
        self._num_changes += 1
        await self._write(self._num_changes)

    async def _write(self, wanted: int) -> None:
        """Changes that come while the disk is busy are written together."""
        async with self._writing:
            if self._num_written >= wanted:
                return
            written = self._num_changes
            content = _Content(
                adapters=sorted(self.entries.values(), key=lambda entry: entry.name),
                removed=sorted(self.removed),
            )
            data = msgspec.json.format(msgspec.json.encode(content))
            try:
                await asyncio.to_thread(replace_file, self.folder / _FILE, data, scratch=self.folder)
            except OSError as error:
                raise AdapterUnavailable(
                    f"the journal in {self.folder} (--state-dir) cannot be written: {error.strerror}"
                ) from error
            self._num_written = written


def _read(path: Path) -> _Content:
    try:
        data = path.read_bytes() if path.exists() else msgspec.json.encode(_Content())
        content = msgspec.json.decode(data, type=_Content)
    except (OSError, msgspec.DecodeError) as error:
        raise InvalidConfig(f"{path} (in --state-dir): {error}", param="--state-dir") from error
    if content.format != _FORMAT:
        message = f"{path} has format {content.format}; this version reads format {_FORMAT}"
        raise InvalidConfig(message, param="--state-dir")
    return content
