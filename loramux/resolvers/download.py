"""From a listing to files on the disk: continued where they broke off, hashed while they are written.

A download has no total time-out, since an adapter may be large and a line slow. What ends it is a
source that gives no byte for `stall_timeout_s` (the remotes see to that) several times in a row.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

from loramux.engine.errors import AdapterUnavailable
from loramux.resolvers.cache import StoredFile
from loramux.resolvers.listing import Hiccup, Listing, Remote, RemoteFile
from loramux.resolvers.settings import SourceSettings

_READ_BYTES: Final = 1 << 20
_REAL_PROGRESS_BYTES: Final = 64 << 10  # fewer than this between two failures is no progress
_MAX_RETRY_AFTER_S: Final = 20.0

T = TypeVar("T")


class Watch:
    """What the caller sees of a download and may do to it."""

    def __init__(self, report: Callable[[int], None]) -> None:
        """`report` is called in the download's thread with the number of bytes that are there."""
        self.report = report
        self.downloaded_bytes = 0  # over the line, not found on the disk
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Stop as soon as possible."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """True after `cancel`."""
        return self._cancelled.is_set()

    def check(self) -> None:
        """Raise AdapterUnavailable if the download was cancelled."""
        if self._cancelled.is_set():
            raise AdapterUnavailable("the download was cancelled", param="lora_path")

    def pause(self, seconds: float) -> None:
        """Wait, unless cancelled."""
        self._cancelled.wait(seconds)
        self.check()


class Tries:
    """Counts failures in a row, and waits longer after each."""

    def __init__(self, place: object, settings: SourceSettings, watch: Watch) -> None:
        self._place = place
        self._settings = settings
        self._watch = watch
        self._failed = 0

    def succeeded(self) -> None:
        """Start counting anew."""
        self._failed = 0

    def failed(self, hiccup: Hiccup) -> None:
        """Wait for the next try.

        Raises:
            AdapterUnavailable: that was the last.
        """
        self._failed += 1
        self._watch.check()
        if self._failed >= self._settings.max_tries:
            raise AdapterUnavailable(
                f"{self._place} could not be read, tried {self._failed} times: {hiccup}", param="lora_path"
            ) from hiccup
        delay_s = self._settings.retry_delay_s * 2 ** (self._failed - 1)
        self._watch.pause(max(delay_s, min(hiccup.retry_after_s or 0.0, _MAX_RETRY_AFTER_S)))


def with_retries(call: Callable[[], T], tries: Tries) -> T:
    """The value of a call that may fail with a Hiccup."""
    while True:
        try:
            return call()
        except Hiccup as hiccup:
            tries.failed(hiccup)


def download(
    remote: Remote, listing: Listing, folder: Path, settings: SourceSettings, watch: Watch
) -> list[StoredFile]:
    """Bring every file of a listing into a folder, all of their bytes on the disk and hash-checked.

    Args:
        remote: the source.
        listing: what to bring.
        folder: may hold the beginnings of some files, from the same listing.
        settings: the limits.
        watch: told of every few bytes; may cancel.

    Raises:
        SourceChanged: a file changed since it was listed.
        AdapterUnavailable: the source failed too often, or its bytes do not have the hash that it says.
        OSError: of the local disk.
        LoramuxError: whatever the remote says.
    """
    stored = []
    done_before = 0
    for file in listing.files:
        fetch = _FileFetch(remote, listing, file, folder / file.name, settings, watch, done_before)
        stored.append(fetch.run())
        done_before += file.size
    return stored


class _FileFetch:
    """One file on its way."""

    def __init__(
        self,
        remote: Remote,
        listing: Listing,
        file: RemoteFile,
        path: Path,
        settings: SourceSettings,
        watch: Watch,
        done_before: int,
    ) -> None:
        self._remote = remote
        self._listing = listing
        self._file = file
        self._path = path
        self._watch = watch
        self._done_before = done_before
        self._tries = Tries(f"{listing.source.uri} ({file.name})", settings, watch)

    def run(self) -> StoredFile:
        """Bring it; a wrong hash is given one more chance, from the first byte."""
        for last in (False, True):
            digests = self._bring()
            wrong = digests.difference()
            if wrong is None:
                return StoredFile(self._file.name, self._file.size, digests.sha256.hexdigest())
            self._path.unlink()
            if last:
                raise AdapterUnavailable(
                    f"{self._listing.source.uri}: what came for {self._file.name} does not have the"
                    f" {wrong} that the source says",
                    param="lora_path",
                )
        raise AssertionError("unreachable")

    def _bring(self) -> _Digests:
        if self._path.exists():
            self._path.chmod(0o644)
        with self._path.open("a+b") as out:
            digests = _Digests(self._file)
            have = self._read_back(out, digests)
            while have < self._file.size:
                started_at = have
                try:
                    for chunk in self._remote.read(self._listing, self._file, have):
                        have += self._take(chunk, have, out, digests)
                    if have < self._file.size:
                        raise Hiccup(f"the connection ended after {have} of {self._file.size} bytes")
                except Hiccup as hiccup:
                    if have - started_at >= _REAL_PROGRESS_BYTES:
                        self._tries.succeeded()
                    self._tries.failed(hiccup)
            out.flush()
            os.fsync(out.fileno())
        return digests

    def _take(self, chunk: bytes, have: int, out: BinaryIO, digests: _Digests) -> int:
        if have + len(chunk) > self._file.size:
            raise Hiccup(f"more bytes came than the {self._file.size} that the source lists")
        out.write(chunk)
        digests.update(chunk)
        self._watch.downloaded_bytes += len(chunk)
        self._watch.report(self._done_before + have + len(chunk))
        self._watch.check()  # after the write: what came is kept
        return len(chunk)

    def _read_back(self, out: BinaryIO, digests: _Digests) -> int:
        """Hash what an earlier try left; returns its length."""
        out.seek(0)
        have = 0
        while chunk := out.read(_READ_BYTES):
            digests.update(chunk)
            have += len(chunk)
        if have > self._file.size:
            out.truncate(0)
            digests.restart()
            have = 0
        return have


class _Digests:
    """sha256, which the store needs, and the other hashes that the source states."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self.restart()

    def restart(self) -> None:
        """Forget all bytes."""
        self.sha256 = hashlib.sha256()
        self._stated = {"sha256": (self._file.sha256, self.sha256)}
        if self._file.md5 is not None:
            self._stated["MD5"] = (self._file.md5, hashlib.md5(usedforsecurity=False))
        if self._file.git_sha1 is not None:
            git = hashlib.sha1(f"blob {self._file.size}\0".encode(), usedforsecurity=False)
            self._stated["git hash"] = (self._file.git_sha1, git)

    def update(self, chunk: bytes) -> None:
        """Take the next bytes."""
        for _, digest in self._stated.values():
            digest.update(chunk)

    def difference(self) -> str | None:
        """The name of a stated hash that is another; None if all agree."""
        for name, (stated, digest) in self._stated.items():
            if stated is not None and stated != digest.hexdigest():
                return name
        return None
