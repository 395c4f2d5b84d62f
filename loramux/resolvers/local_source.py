"""Folders of this machine as a source: under the allowed roots, and copied before they are used.

A training job rewrites its folder in place, so what was inspected would not be what is read later. The
copy is taken between two looks at every file (size, times, inode); if they differ, it is taken again.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from loramux.engine.errors import AdapterNotFound, AdapterUnavailable, InvalidRequest
from loramux.resolvers.adapter_folder import AdapterFolder
from loramux.resolvers.base import PinnedSource
from loramux.resolvers.cache import source_key
from loramux.resolvers.listing import Hiccup, Listing, RemoteFile, SourceChanged, check_names
from loramux.resolvers.refusal import refused, shown
from loramux.resolvers.settings import SourceSettings
from loramux.resolvers.uri import SourceUri

# A file that changed less than this before a look may change again without its times showing it.
_SETTLED_NS: Final = 1_000_000_000
_READ_BYTES: Final = 1 << 20


class LocalSource:
    """file:// and pvc:// addresses; see `loramux.resolvers.listing.Remote`."""

    def __init__(self, settings: SourceSettings) -> None:
        self._settings = settings

    def list(self, uri: SourceUri) -> Listing:
        """The adapter's files as they are now."""
        folder = AdapterFolder(self.find(uri))
        try:
            names = [entry.name for entry in os.scandir(folder.root) if not entry.is_dir()]
        except OSError as error:
            raise AdapterUnavailable(f"{uri} cannot be read: {error.strerror}", param="lora_path") from error
        files = tuple(_look_at(folder.root / name, name) for name in check_names(names, uri))
        now_ns = time.time_ns()
        is_settled = all(now_ns - _changed_ns(file) > _SETTLED_NS for file in files)
        fingerprint = source_key(str(folder.root), *(f"{file.name} {file.etag}" for file in files))
        return Listing(PinnedSource(str(uri)), fingerprint if is_settled else None, files)

    def read(self, listing: Listing, file: RemoteFile, start: int) -> Iterator[bytes]:
        """The file's bytes; it is looked at again before the first and after the last."""
        folder = AdapterFolder(Path(file.key).parent)
        with folder.open(file.name) as handle:
            _check_unchanged(handle.fileno(), file)
            handle.seek(start)
            yield from _chunks(handle, file.name)
            _check_unchanged(handle.fileno(), file)
        if _look_at(Path(file.key), file.name).etag != file.etag:
            raise SourceChanged(f"{file.name} was replaced while it was copied")

    def close(self) -> None:
        """Nothing is open."""

    def find(self, uri: SourceUri) -> Path:
        """The real folder that an address means, which need not exist.

        Raises:
            InvalidRequest: it is not under a root that the operator allowed; whether there is something
                outside of the roots is not told.
            AdapterNotFound: no root of claims is configured.
        """
        if uri.scheme == "pvc":
            if self._settings.pvc_root is None:
                raise AdapterNotFound(
                    f"No adapter found for {uri}: this server has no root of claims (--pvc-root)",
                    param="lora_path",
                )
            claim = self._settings.pvc_root / uri.authority
            return contained(claim / uri.path, [claim], uri)
        return contained(Path(uri.path), self._settings.allowed_local_paths, uri)


def contained(path: Path, roots: Sequence[Path], shown_as: object) -> Path:
    """The path without symlinks, if it lies in or under one of the roots.

    Raises:
        InvalidRequest: it does not.
    """
    real = Path(os.path.realpath(path))
    if any(real.is_relative_to(os.path.realpath(root)) for root in roots):
        return real
    raise InvalidRequest(
        f"lora_path {shown(str(shown_as))} is not under a folder that this server may read adapters from"
        " (--allowed-local-path)",
        param="lora_path",
    )


def _chunks(handle: BinaryIO, name: str) -> Iterator[bytes]:
    while True:
        try:
            chunk = handle.read(_READ_BYTES)
        except OSError as error:
            raise Hiccup(f"{name} cannot be read: {error.strerror}") from error
        if not chunk:
            return
        yield chunk


def _look_at(path: Path, name: str) -> RemoteFile:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise SourceChanged(f"{name} disappeared") from None
    if not stat.S_ISREG(status.st_mode):
        raise refused(f"{name} is not a regular file", param=name)
    return RemoteFile(name, status.st_size, key=str(path), etag=_identity(status))


def _identity(status: os.stat_result) -> str:
    """Changes with every write to a file, and with every file put in its place."""
    return f"{status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _changed_ns(file: RemoteFile) -> int:
    return max(int(part) for part in (file.etag or "0").split()[-2:])


def _check_unchanged(fd: int, file: RemoteFile) -> None:
    if _identity(os.fstat(fd)) != file.etag:
        raise SourceChanged(f"{file.name} was written to while it was copied")
