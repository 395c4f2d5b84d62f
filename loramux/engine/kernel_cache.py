"""The folders of compiled CPU kernels in the user's cache, one for each version of their sources.

A process that uses one holds a shared lock in it as long as it lives. An engine that has started removes the
folders of other versions that no process holds, nor has begun to use for 30 days. It renames such a folder
under the exclusive lock, so whoever wants it at this moment either has it in time or makes a new one.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import time
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

KEPT_S: Final = 30 * 86_400.0
_NAME: Final = re.compile(r"kernels-[0-9a-f]{16}")
_MARK: Final = "in-use"  # holds the locks; its time is that of the last process that began to use the folder
_REMOVED: Final = "removed-"  # before the name of a folder that is being emptied
_TRIES: Final = 10
_held: list[int] = []  # file descriptors, open until the process ends


def hold(folder: Path) -> None:
    """Make a folder unless it is there, and keep it while this process lives.

    Raises:
        OSError: it cannot be made or written.
    """
    for _ in range(_TRIES):
        with contextlib.suppress(FileExistsError, FileNotFoundError):  # removed between two lines
            folder.mkdir(parents=True, exist_ok=True)
            mark = os.open(folder / _MARK, os.O_RDWR | os.O_CREAT, 0o666)
            with contextlib.suppress(OSError):  # no locks here: then nobody can remove it
                fcntl.flock(mark, fcntl.LOCK_SH)
            if _is_at(mark, folder / _MARK):
                os.utime(folder / _MARK)
                _held.append(mark)
                return
            os.close(mark)
    raise OSError(f"{folder} is no folder, or is removed whenever it is made")


def remove_unused(own: Path, *, kept_s: float = KEPT_S) -> list[str]:
    """Remove what other versions left beside this version's folder; several processes may do so at once.

    Args:
        own: stays; nothing is removed if it is no folder of the cache.
        kept_s: seconds since a folder was last begun to be used.

    Returns:
        The names of the folders.
    """
    if not _NAME.fullmatch(own.name):
        return []
    with contextlib.suppress(OSError):
        siblings = sorted(own.parent.iterdir())
        before = time.time() - kept_s
        removed = [
            path.name
            for path in siblings
            if path != own and _NAME.fullmatch(path.name) and _put_aside(path, before)
        ]
        for path in own.parent.glob(f"{_REMOVED}kernels-*"):
            shutil.rmtree(path, ignore_errors=True)
        if removed:
            logger.info("compiled kernels of other versions, long unused, were removed: %d", len(removed))
        return removed
    return []


def _put_aside(folder: Path, before: float) -> bool:
    """Rename a folder that nobody uses and nobody began to use since; True if this call did it."""
    path = folder / _MARK
    try:
        is_marked = path.exists()
        if (path if is_marked else folder).stat().st_mtime > before:
            return False
        # One without a mark is of a version that left none; with ours nobody can take it unseen.
        mark = os.open(path, os.O_RDWR if is_marked else os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_old = not is_marked or os.fstat(mark).st_mtime <= before  # still, now that it is locked
            if is_old and _is_at(mark, path):
                folder.rename(folder.with_name(f"{_REMOVED}{folder.name}-{os.getpid()}"))
                return True
        finally:
            os.close(mark)
    except OSError:  # held by a process, gone meanwhile, or not ours
        pass
    return False


def _is_at(descriptor: int, path: Path) -> bool:
    """True if a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
