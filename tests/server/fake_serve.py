"""`loramux serve` with the stand-in engine: the same process, flags and routes."""

from __future__ import annotations

import sys

from loramux.engine.errors import InvalidConfig
from loramux.server import lifecycle
from loramux.server.config import read_config

COMMAND = (sys.executable, "-m", "tests.server.fake_serve")

if __name__ == "__main__":
    try:
        config = read_config(sys.argv[1:])
    except InvalidConfig as error:
        sys.exit(error.message)
    sys.exit(lifecycle.run(config, engine_command=(sys.executable, "-m", "tests.server.fake_engine")))
