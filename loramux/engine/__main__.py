"""`python -m loramux.engine ADDRESS CONFIG_JSON` is the engine's process; see `loramux/engine/process.py`."""

from __future__ import annotations

import gc
import importlib
import sys


def main() -> int:
    """Import the engine without collecting garbage, of which imports leave next to none, and run it."""
    gc.disable()  # 0.25 s of 1.2
    process = importlib.import_module("loramux.engine.process")
    gc.freeze()
    gc.enable()
    code: int = process.main(*sys.argv[1:])
    return code


if __name__ == "__main__":
    sys.exit(main())
