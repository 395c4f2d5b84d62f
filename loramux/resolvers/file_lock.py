"""Locks between processes that die with their holder, and JSON files that are whole or absent.

`flock` belongs to an open file, so two threads of one process exclude each other as well, and the
kernel lets go when a process is killed: a lock that can be taken proves that nobody works there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


class FileLock:
    """An exclusive lock on a file that the holder may delete.

    Who waited for a file that was deleted meanwhile holds a lock on nothing; so after locking, the
    file must still be the one at the path.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def acquire(self, *, blocking: bool = True) -> bool:
        """Take the lock; False (only when not `blocking`) if another holds it."""
        while self._fd is None:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
                if os.path.samestat(os.fstat(fd), os.stat(self.path)):
                    self._fd, fd = fd, -1
            except BlockingIOError:
                return False
            except FileNotFoundError:
                pass  # deleted while we waited: lock the next one
            finally:
                if fd >= 0:
                    os.close(fd)
        return True

    def release(self, *, delete: bool = False) -> None:
        """Let go, and delete the file first if asked to."""
        if self._fd is None:
            return
        if delete:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock for a block."""
        self.acquire()
        try:
            yield
        finally:
            self.release()


def replace_file(path: Path, data: bytes, *, scratch: Path) -> None:
    """Write a file so that after a crash it is the old one or the new one, whole.

    Args:
        path: its place.
        data: its content.
        scratch: an existing folder on the same file system, for the new file while it is written.
    """
    temporary = scratch / f"{path.name}.{os.urandom(8).hex()}"
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power failure."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
