"""The local store: adapters' files by content, shared by every server that is given the same folder.

    cache/<digest>/       the files of one adapter, never changed; digest = sha256 over names and contents
    sources/<key>.json    what was found at one place: revision and digest
    partial/<key>/        a download; partial/<key>.lock is held while somebody works on it
    sessions/<id>/        one process: .lock is held while it lives, a file <digest> is a lease
    trash/<id>/           on its way out
    lock                  held for moments: to lease, to publish, to evict

Invariants, whoever is killed wherever:
- A folder appears in `cache/` by one rename, after all of its bytes are on the disk.
- A leased folder is not evicted. Leasing and evicting exclude each other by `lock`; a lease dies with its
  session's lock.
- What a dead process left (a partial download, a session, trash) is locked by nobody, and the next
  `clean` removes it.

Everything here blocks, for moments; call it from a thread.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from loramux.engine.errors import AdapterUnavailable
from loramux.resolvers.file_lock import FileLock, replace_file, sync_folder

_LOCK_POLL_S: Final = 0.05  # how soon a waiting download notices that another process is done
_MANIFEST: Final = "manifest.json"
_FOLDERS: Final = ("cache", "sources", "partial", "sessions", "trash")
_DISK_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class StoredFile(msgspec.Struct, frozen=True):
    """A file of an adapter, by content."""

    name: str
    size: int
    sha256: str


class SourceRecord(msgspec.Struct, frozen=True):
    """What was found at one place."""

    uri: str
    revision: str | None
    digest: str
    fingerprint: str = ""  # of the listing it was made from; another one means that the place changed


class Manifest(msgspec.Struct, frozen=True):
    """The files of a stored adapter."""

    files: list[StoredFile]


class StoreLease:
    """A lease on one stored folder; see `loramux.resolvers.base.Lease`."""

    def __init__(self, store: Store, folder: Path, digest: str, nbytes: int) -> None:
        self.folder = folder
        self.digest = digest
        self.nbytes = nbytes
        self._store: Store | None = store

    def share(self) -> StoreLease:
        """Another lease on the same folder, without any I/O. This one must still be held."""
        assert self._store is not None
        lease = self._store.lease(self.digest)
        assert lease is not None
        return lease

    def release(self) -> None:
        """Let the folder be evicted; more than one call does nothing."""
        store, self._store = self._store, None
        if store is not None:
            store.release(self.digest)


@dataclass(slots=True)
class _Held:
    """What this process leases of one folder."""

    count: int
    nbytes: int


class _Entry(NamedTuple):
    last_used_ns: int
    digest: str
    nbytes: int


def content_key(files: Iterable[StoredFile]) -> str:
    """The digest of an adapter's files: sha256 over their names, sizes and hashes, in name order."""
    lines = sorted(f"{file.name}\0{file.size}\0{file.sha256}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def source_key(*parts: str) -> str:
    """A file name for a place: no two places share one, whatever characters they have."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class Store:
    """One process's door to the store.

    Args:
        folder: created when missing.
        max_bytes: the budget of `cache/`; None = no limit.
        min_free_bytes: what a download must leave free on the disk.

    Raises:
        AdapterUnavailable: the folder cannot be written.
    """

    def __init__(self, folder: Path, *, max_bytes: int | None = None, min_free_bytes: int = 0) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self._min_free_bytes = min_free_bytes
        self.num_evicted = 0  # by this process
        self.num_bytes = 0  # of adapters, as of the last time that somebody looked
        self._leases: dict[str, _Held] = {}
        self._mutex = threading.Lock()  # guards _leases; taken after `lock`, never before it
        with self._disk_errors():
            for name in _FOLDERS:
                (folder / name).mkdir(parents=True, exist_ok=True)
            self._lock = folder / "lock"
            self._session = folder / "sessions" / os.urandom(8).hex()
            with self._locked():  # a session without its lock would look dead to another's `clean`
                self._session.mkdir()
                self._alive = FileLock(self._session / ".lock")
                self._alive.acquire()

    def close(self) -> None:
        """Give all leases back."""
        with self._locked():
            shutil.rmtree(self._session, ignore_errors=True)
            self._alive.release()

    # Finding and leasing

    def find(self, key: str, fingerprint: str | None = None) -> tuple[SourceRecord, StoreLease] | None:
        """What is known of a place, leased; None if nothing is, or its files are gone.

        Args:
            key: of the place.
            fingerprint: of what is there now; None = whatever was there.
        """
        record = self.record(key)
        if record is not None and fingerprint not in (None, record.fingerprint):
            return None
        lease = self.lease(record.digest) if record else None
        return (record, lease) if record and lease else None

    def record(self, key: str) -> SourceRecord | None:
        """What is known of a place, whether its files are here or not."""
        try:
            return msgspec.json.decode(self._record(key).read_bytes(), type=SourceRecord)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def remember(self, key: str, record: SourceRecord) -> None:
        """Note what is at a place."""
        with self._disk_errors():
            replace_file(self._record(key), msgspec.json.encode(record), scratch=self._session)

    def lease(self, digest: str) -> StoreLease | None:
        """Lease a stored folder; None if it is not here. Free of I/O when this process leases it already."""
        with self._mutex:
            if digest in self._leases:
                return self._leased(digest)
        with self._disk_errors(), self._locked(), self._mutex:
            return self._leased(digest) if self._is_whole(digest) else None

    def _leased(self, digest: str) -> StoreLease:
        if digest not in self._leases:
            (self._session / digest).touch()
            os.utime(self._folder(digest))  # last used: now
            self._leases[digest] = _Held(0, self._nbytes(digest))
        held = self._leases[digest]
        held.count += 1
        return StoreLease(self, self._folder(digest), digest, held.nbytes)

    def release(self, digest: str) -> None:
        """Give one lease back; called by the lease itself."""
        with self._mutex:
            self._leases[digest].count -= 1
            if self._leases[digest].count == 0:
                del self._leases[digest]
                (self._session / digest).unlink(missing_ok=True)

    # Filling

    @contextlib.contextmanager
    def partial(self, key: str, is_cancelled: Callable[[], bool]) -> Iterator[Path]:
        """A folder to download into, which no other thread or process uses meanwhile.

        It may hold what an earlier download got. What is in it when the block ends stays, for the next.

        Raises:
            AdapterUnavailable: `is_cancelled` became true while another process was at work on it.
        """
        folder = self.folder / "partial" / key
        lock = FileLock(folder.with_suffix(".lock"))
        with self._disk_errors():
            pause = threading.Event()
            while not lock.acquire(blocking=False):
                if is_cancelled():
                    raise AdapterUnavailable("the download was cancelled", param="lora_path")
                pause.wait(_LOCK_POLL_S)
        try:
            with self._disk_errors():
                folder.mkdir(exist_ok=True)
            yield folder
        finally:
            is_left = folder.exists() and any(folder.iterdir())
            if not is_left:
                shutil.rmtree(folder, ignore_errors=True)
            lock.release(delete=not is_left)

    def publish(self, partial: Path, files: list[StoredFile]) -> StoreLease:
        """Move a complete download to its place and lease it.

        Args:
            partial: the folder that `partial` gave; holds exactly `files`, already on the disk.
            files: what is in it, hashed while it was written.
        """
        digest = content_key(files)
        with self._disk_errors():
            for file in files:
                (partial / file.name).chmod(0o444)
            replace_file(partial / _MANIFEST, msgspec.json.encode(Manifest(files)), scratch=self._session)
            with self._locked(), self._mutex:
                if self._is_whole(digest):
                    shutil.rmtree(partial)  # another place had the same content
                else:
                    self._discard(digest)
                    os.rename(partial, self._folder(digest))
                    sync_folder(self.folder / "cache")
                return self._leased(digest)

    def make_room(self, nbytes: int) -> None:
        """Evict what was not used for longest until `nbytes` more fit.

        Raises:
            AdapterUnavailable: they do not, even without all that nobody leases.
        """
        with self._disk_errors(), self._locked():
            entries = sorted(self._entries())
            self.num_bytes = sum(entry.nbytes for entry in entries) + nbytes
            budget = self.num_bytes - (self._max_bytes or 0)
            over = budget if self._max_bytes is not None else 0
            short = nbytes + self._min_free_bytes - self.free_bytes()
            if short > 0:
                short -= self._drop_idle_partials()
            leased = self._all_leased() if max(over, short) > 0 else frozenset()
            for entry in entries:
                if max(over, short) <= 0:
                    break
                if entry.digest not in leased:
                    self._discard(entry.digest)
                    self.num_evicted += 1
                    self.num_bytes -= entry.nbytes
                    over, short = over - entry.nbytes, short - entry.nbytes
        self._empty_trash()
        if over > 0:
            raise AdapterUnavailable(
                f"the adapter needs {nbytes} bytes in the local store {self.folder}, and its limit of"
                f" {self._max_bytes} bytes (--max-store-bytes) is taken up by adapters in use",
                param="lora_path",
            )
        if short > 0:
            raise self._disk_full(nbytes)

    def error_for(self, error: OSError, nbytes: int | None = None) -> AdapterUnavailable:
        """The error to raise when the disk fails; `nbytes` is what was to be written, if that is known."""
        if error.errno in _DISK_FULL:
            return self._disk_full(nbytes)
        return AdapterUnavailable(
            f"the local store {self.folder} cannot be used: {error.strerror or error}", param="lora_path"
        )

    def _disk_full(self, nbytes: int | None) -> AdapterUnavailable:
        needed = f"{nbytes} bytes" if nbytes is not None else "more bytes"
        return AdapterUnavailable(
            f"the disk of the local store {self.folder} is full: the adapter needs {needed}, and"
            f" {self.free_bytes()} bytes are free, of which {self._min_free_bytes} must stay free",
            param="lora_path",
        )

    def free_bytes(self) -> int:
        """What this process may still write to the store's disk."""
        status = os.statvfs(self.folder)
        return status.f_bavail * status.f_frsize

    # Tidying

    def clean(self) -> None:
        """Remove what processes that no longer live left behind. Safe while others are at work."""
        with self._disk_errors(), self._locked():
            self._drop_dead_sessions()
            self._drop_idle_partials()
            for path in _children(self.folder / "sources"):
                record = self.record(path.stem)
                if record is None or not self._folder(record.digest).exists():
                    path.unlink(missing_ok=True)
            self.num_bytes = sum(entry.nbytes for entry in self._entries())
        self._empty_trash()

    def _drop_dead_sessions(self) -> None:
        for session in _children(self.folder / "sessions"):
            lock = FileLock(session / ".lock")
            if lock.acquire(blocking=False):
                shutil.rmtree(session, ignore_errors=True)
                lock.release()

    def _drop_idle_partials(self) -> int:
        freed = 0
        keys = {path.name.removesuffix(".lock") for path in _children(self.folder / "partial")}
        for key in keys:
            folder = self.folder / "partial" / key
            lock = FileLock(folder.with_suffix(".lock"))
            if lock.acquire(blocking=False):
                freed += sum(file.stat().st_size for file in _children(folder))
                shutil.rmtree(folder, ignore_errors=True)
                lock.release(delete=True)
        return freed

    def _discard(self, digest: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._folder(digest), self.folder / "trash" / f"{digest}.{os.urandom(8).hex()}")

    def _empty_trash(self) -> None:
        for folder in _children(self.folder / "trash"):
            shutil.rmtree(folder, ignore_errors=True)

    # Reading the state of the folder

    def _entries(self) -> list[_Entry]:
        return [
            _Entry(folder.stat().st_mtime_ns, folder.name, self._nbytes(folder.name))
            for folder in _children(self.folder / "cache")
        ]

    def _nbytes(self, digest: str) -> int:
        return sum(file.stat().st_size for file in _children(self._folder(digest)) if file.name != _MANIFEST)

    def _is_whole(self, digest: str) -> bool:
        """True when every file of the manifest is here in full length."""
        folder = self._folder(digest)
        try:
            manifest = msgspec.json.decode((folder / _MANIFEST).read_bytes(), type=Manifest)
            return all((folder / file.name).stat().st_size == file.size for file in manifest.files)
        except (FileNotFoundError, msgspec.DecodeError):
            return False

    def _all_leased(self) -> frozenset[str]:
        """Digests that any living process leases."""
        self._drop_dead_sessions()
        sessions = _children(self.folder / "sessions")
        return frozenset(lease.name for session in sessions for lease in _children(session))

    def _folder(self, digest: str) -> Path:
        return self.folder / "cache" / digest

    def _record(self, key: str) -> Path:
        return self.folder / "sources" / f"{key}.json"

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        return FileLock(self._lock).held()

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self.error_for(error) from error


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
