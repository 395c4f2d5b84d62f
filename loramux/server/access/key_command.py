"""`loramux keys new` and `loramux keys hash`: entries for `--api-keys-file`.

The key itself goes to standard output once, and is written down nowhere.
"""

from __future__ import annotations

import argparse
import getpass
import secrets
import sys
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from loramux.engine.errors import InvalidConfig
from loramux.server.access.caller import SCOPES
from loramux.server.access.keys import check_entry, hash_key

_PREFIX: Final = "lmx-"
_RANDOM_BYTES: Final = 32


def main(argv: Sequence[str]) -> int:
    """Run `loramux keys`; returns the exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "hash":
        key = getpass.getpass("key: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
        if len(key) < 20:
            sys.stderr.write("loramux keys: warning: a key of less than 20 characters can be guessed\n")
    else:
        key = _PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
    value: dict[str, Any] = {
        "id": arguments.id,
        "sha256": hash_key(key.encode()).hex(),
        "scopes": arguments.scopes,
        "adapters": arguments.adapters,
        "sources": arguments.sources,
    }
    entry = {name: field for name, field in value.items() if field}
    try:
        check_entry("the entry", entry)
    except InvalidConfig as error:
        sys.stderr.write(f"loramux keys: error: {error.message}\n")
        return 2
    if arguments.command == "new":
        sys.stderr.write("loramux keys: the key, which is shown this once; the entry is for the file:\n")
        sys.stdout.write(f"{key}\n")
    lines = [f"{name}: {msgspec.json.encode(field).decode()}" for name, field in entry.items()]
    sys.stdout.write("  - " + "\n    ".join(lines) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loramux keys", description="Make entries for the file of loramux serve --api-keys-file."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("new", "draw a key"), ("hash", "read a key from standard input")):
        command = commands.add_parser(name, help=f"{text}, and print its entry")
        command.add_argument("--id", required=True, help="name of the key in logs and metrics")
        command.add_argument(
            "--scopes", nargs="+", default=["inference"], metavar="SCOPE", help=f"of {', '.join(SCOPES)}"
        )
        command.add_argument(
            "--adapters", nargs="+", metavar="GLOB", help="adapters it may use; * unless given"
        )
        command.add_argument(
            "--sources", nargs="+", metavar="GLOB", help="where it may load from; * unless given"
        )
    return parser
