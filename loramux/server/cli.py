"""The `loramux` command: `serve`, `fetch`, `doctor`, `keys` and `bench`.

Imports happen where they are used, so that `--help` and `--version` answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from loramux.version import __version__

if TYPE_CHECKING:
    from loramux.server.config import Config

_USAGE: Final = """\
usage: loramux COMMAND ...

  serve MODEL   serve a model and its LoRA adapters (loramux serve --help)
  fetch URI...  bring adapters into the local store (loramux fetch --help)
  doctor URI    say whether an adapter fits a base model (loramux doctor --help)
  keys new      make an entry for serve --api-keys-file (loramux keys --help)
  bench         measure an OpenAI-compatible server (loramux bench --help)

  --version     print the version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words else "--help"
    if command == "serve":
        return _serve(words[1:])
    if command == "bench":
        from loramux.server import bench

        return bench.main(words[1:])
    if command in ("fetch", "doctor"):
        from loramux.server import adapter_commands

        run = adapter_commands.fetch if command == "fetch" else adapter_commands.doctor
        return run(words[1:])
    if command == "keys":
        from loramux.server.access import key_command

        return key_command.main(words[1:])
    if command in ("--version", "-V"):
        print(f"loramux {__version__}")
        return 0
    if command in ("--help", "-h"):
        print(_USAGE, end="")
        return 0 if words else 2
    print(f"loramux: unknown command {command!r}\n\n{_USAGE}", end="", file=sys.stderr)
    return 2


def _serve(words: list[str]) -> int:
    from loramux.engine.errors import InvalidConfig
    from loramux.server.config import read_config

    try:
        config = read_config(words)
    except InvalidConfig as error:
        print(f"loramux serve: error: {error.message}", file=sys.stderr)
        return 2
    if config.given.get("print_config") or config.given.get("check_config"):
        return _show(config)
    from loramux.server import lifecycle

    return lifecycle.run(config)


def _show(config: Config) -> int:
    """Print the configuration, or only what is to be said about it; nothing is loaded."""
    from loramux.server.config_print import render_config

    for warning in config.warnings:
        print(f"loramux: warning: {warning}", file=sys.stderr)
    print(render_config(config) if config.given.get("print_config") else "the configuration is fine")
    return 0
