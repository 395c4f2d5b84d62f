"""`python -m loramux.engine ADDRESS CONFIG_JSON` is the engine's process; see `loramux/engine/process.py`."""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def main() -> int:
    """Import the engine without collecting garbage, of which imports leave next to none, and run it."""
    _die_with_parent()
    gc.disable()  # 0.25 s of 1.2
    process = importlib.import_module("loramux.engine.process")
    gc.freeze()
    gc.enable()
    code: int = process.main(*sys.argv[1:])
    return code


def _die_with_parent() -> None:
    """Ask Linux to kill this process when the server dies, however it dies."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit("the server ended while the engine was starting")


if __name__ == "__main__":
    sys.exit(main())
