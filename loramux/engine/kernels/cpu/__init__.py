"""CPU kernels compiled by numba at first use and kept on disk.

The cache folder is named after a digest of these sources: numba itself tells an old file from a new
one by its time and size, which an installed package may share with another version of itself, and a
stale kernel would compute wrong numbers. Importing this package sets the folder, before any kernel is
declared.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Final

import numba

from loramux.engine.kernel_cache import hold


def cache_folder() -> Path:
    """Where compiled kernels of exactly these sources are kept; a temporary one if none is writable.

    It is held from now on: see `loramux.engine.kernel_cache`.
    """
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = home / "loramux" / f"kernels-{digest.hexdigest()[:16]}"
    try:
        hold(folder)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="loramux-kernels-"))


FOLDER: Final = cache_folder()
numba.config.CACHE_DIR = str(FOLDER)
