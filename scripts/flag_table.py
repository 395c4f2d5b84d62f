"""Write the table of all flags into docs/configuration.md, between its two markers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from loramux.engine.errors import InvalidConfig
from loramux.server.config import Config, read_config
from loramux.server.config_print import SECRETS, default_of
from loramux.server.flag import Flag
from loramux.server.flag_table import FLAGS

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
BEGIN, END = "<!-- flags: begin (scripts/flag_table.py) -->", "<!-- flags: end -->"


def table() -> str:
    """One table a group of flags."""
    config = read_config(["MODEL"], {"HOME": os.environ.get("HOME", "/")})
    lines: list[str] = []
    for title, flags in FLAGS.items():
        lines += [
            "",
            f"### {title[0].upper()}{title[1:]}",
            "",
            "| flag | default | meaning |",
            "|---|---|---|",
        ]
        lines += [
            f"| {names(flag)} | {shown(config, flag)} | {flag.help} |".replace(" |  |", " | |")
            for flag in flags
        ]
    return "\n".join(lines) + "\n\n"


def names(flag: Flag) -> str:
    """The flag and its other spellings."""
    names = [f"`--{name}`" for name in (flag.name, *flag.aliases)]
    return ", ".join(names + [f"`-{flag.short}`"] * bool(flag.short))


def shown(config: Config, flag: Flag) -> str:
    """The default, in words of a command line; nothing if there is none."""
    if flag.dest in SECRETS or flag.dest in ("model", "served_model_name"):
        return ""
    try:
        value: Any = default_of(config, flag)
    except (LookupError, InvalidConfig):
        return ""
    if flag.dest == "uds_permissions":
        return f"{value:o}"
    if isinstance(value, Path):
        return f"`{value}`".replace(os.environ.get("HOME", "/nowhere"), "~")
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple | list | frozenset):
        return " ".join(str(entry) for entry in value)
    return "" if value is None or value == {} else f"{value:g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Replace what stands between the markers."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}{END}{after}")


if __name__ == "__main__":
    main()
