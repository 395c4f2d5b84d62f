"""A venv for each client, made once from its pinned requirements and kept in the cache folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Final

REQUIREMENTS: Final = Path(__file__).parent / "requirements"


def cache_folder() -> Path:
    """Where all of them are."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "loramux" / "clients"


def client_python(name: str) -> Path:
    """The interpreter of a client's venv; the first call on a machine installs it.

    The folder's name holds a hash of the pins and of the interpreter, so that a change makes a new one,
    and a mark is set last, so that nobody uses one whose making was cut short. What a client imports is
    compiled when it does so: most of what is installed never is.
    """
    pins = REQUIREMENTS / f"{name}.txt"
    key = hashlib.sha256(pins.read_bytes() + f"{sys.executable} {sys.version}".encode()).hexdigest()[:16]
    folder = cache_folder() / f"{name}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs on one machine
        mark = folder / ".complete"
        python = folder / "bin" / "python"
        if not mark.exists():
            venv.create(folder, with_pip=False, clear=True)
            install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
            subprocess.run(
                [*install, "--disable-pip-version-check", "--no-deps", "--no-compile", "-r", str(pins)],
                check=True,
            )
            mark.touch()
    return python
