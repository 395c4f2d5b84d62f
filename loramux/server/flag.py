"""What a flag is: name, kind and help; and how its value is read."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

_SUFFIXES: Final = {
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "K": 1 << 10,
    "M": 1 << 20,
    "G": 1 << 30,
    "": 1,
}


def parse_count(text: str) -> int:
    """`2k` = 2000, `2K` = 2048, `-1` = -1."""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kmgKMG]?)", text.strip())
    if match is None or ("." in match[1] and not match[2]):
        raise argparse.ArgumentTypeError(f"expected a whole number (k, m, g, K, M, G allowed), got {text!r}")
    return (
        int(float(match[1]) * _SUFFIXES[match[2]]) if "." in match[1] else int(match[1]) * _SUFFIXES[match[2]]
    )


def parse_length(text: str) -> int:
    """A number of tokens; `auto` is -1."""
    return -1 if text.strip() == "auto" else parse_count(text)


def parse_permissions(text: str) -> int:
    """`660` = 0o660."""
    if re.fullmatch(r"(0o?)?[0-7]{3}", text.strip()) is None:
        raise argparse.ArgumentTypeError(f"expected three octal digits such as 660, got {text!r}")
    return int(text, 8)


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag that has an effect."""

    name: str  # without the dashes
    help: str
    type: Callable[[str], Any] = str
    is_switch: bool = False
    is_list: bool = False  # one or several values; may be repeated
    is_object: bool = False  # a JSON object, whose members may also be given as `--name.member value`
    aliases: tuple[str, ...] = ()
    short: str = ""  # its form with one dash

    @property
    def dest(self) -> str:
        """The attribute that argparse sets."""
        return self.name.replace("-", "_")


def switch(name: str, help_: str, *aliases: str) -> Flag:
    """A flag without a value; it has a `--no-` form."""
    return Flag(name, help_, is_switch=True, aliases=aliases)
