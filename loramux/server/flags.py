"""The parser of `loramux serve`, in vLLM's spelling.

`--a_b` is `--a-b`, a switch `--x` has a `--no-x`, and numbers of tokens take k, m, g (thousands) and
K, M, G (powers of 1024). A flag that vLLM has and that would do nothing here is accepted with one
warning; an unknown one is an error with the nearest known name.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from functools import cache
from typing import Any, Final, NoReturn

import msgspec

from loramux.engine.errors import InvalidConfig
from loramux.server.flag import Flag
from loramux.server.flag_table import FLAGS
from loramux.server.vllm_flags import ALWAYS_ON, HARMLESS_VALUES, INERT_ALIASES, INERT_OPTIONS, INERT_SWITCHES


class ServeParser(argparse.ArgumentParser):
    """Argparse that raises instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        """Raise `InvalidConfig`."""
        raise InvalidConfig(message)


@cache
def build_parser() -> ServeParser:
    """The parser for what follows `loramux serve`."""
    parser = ServeParser(
        prog="loramux serve",
        allow_abbrev=False,
        description="Serve a model and its LoRA adapters to OpenAI clients. Every flag can also be set as "
        "LORAMUX_NAME in the environment; vLLM's other flags are accepted and named in a warning.",
    )
    parser.add_argument("positional_model", metavar="MODEL", nargs="?", help="a model folder, or a Hub id")
    for title, flags in FLAGS.items():
        add_flags(parser, title, flags)
    short: dict[str, list[str]] = {}
    for alias, name in INERT_ALIASES.items():
        short.setdefault(name, []).append(alias)
    for name in sorted(INERT_SWITCHES):
        names = [f"--{name}", *short.get(name, ())]
        parser.add_argument(
            *names, action=argparse.BooleanOptionalAction, dest=f"inert {name}", help=argparse.SUPPRESS
        )
    for name in sorted(INERT_OPTIONS):
        names = [f"--{name}", *short.get(name, ())]
        parser.add_argument(*names, nargs="+", action="extend", dest=f"inert {name}", help=argparse.SUPPRESS)
    return parser


def add_flags(parser: argparse.ArgumentParser, title: str, flags: Sequence[Flag]) -> None:
    """Let a parser take these flags; the value of one that is not given is None."""
    group = parser.add_argument_group(title)
    for flag in flags:
        _add(group, flag)


def _add(group: argparse._ArgumentGroup, flag: Flag) -> None:
    names = [f"--{name}" for name in (flag.name, *flag.aliases)]
    names += [f"-{flag.short}"] if flag.short else []
    if flag.is_switch:
        group.add_argument(
            *names, dest=flag.dest, action=argparse.BooleanOptionalAction, default=None, help=flag.help
        )
    elif flag.is_list:
        group.add_argument(*names, dest=flag.dest, nargs="+", action="extend", type=flag.type, help=flag.help)
    else:
        group.add_argument(*names, dest=flag.dest, type=flag.type, help=flag.help)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the arguments of `loramux serve`.

    Returns:
        The values (None where a flag was not given), and one warning for each flag without effect.

    Raises:
        InvalidConfig: an unknown flag or a value of the wrong kind.
    """
    words = _join_members([_canonical(word) for word in argv])
    namespace, unknown = build_parser().parse_known_args(words)
    for word in unknown:
        _refuse(word)
    return namespace, _warnings(namespace)


def all_flags() -> dict[str, Flag]:
    """Every flag that has an effect, by its attribute name."""
    return {flag.dest: flag for flags in FLAGS.values() for flag in flags}


def _canonical(word: str) -> str:
    """`--a_b=1` as `--a-b=1`; `--disable-x` of an inert or known `--enable-x` as `--no-enable-x`."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    name, dot, member = name.partition(".")
    name = name.replace("_", "-")
    if dot and name not in INERT_OPTIONS:  # of those, --speculative-config.method ngram is as good as any
        return f"--{name}.{member}{equals}{value}"
    opposite = f"enable-{name.removeprefix('disable-')}"
    if name.startswith("disable-") and name not in _KNOWN and opposite in _KNOWN:
        name = f"no-{opposite}"
    return f"--{name}{equals}{value}"


def _join_members(words: Sequence[str]) -> list[str]:
    """Each `--object.member value` or `--object.a.b=value` as a part of one `--object={...}`.

    Raises:
        InvalidConfig: a member without a value, or an object that is given in both ways.
    """
    objects = {f"--{flag.name}" for flag in all_flags().values() if flag.is_object}
    members: dict[str, dict[str, Any]] = {}
    rest: list[str] = []
    left = iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        name, *path = name.split(".")
        if not path or name not in objects:
            rest.append(word)
            continue
        text = value if equals else next(left, None)
        if text is None or not all(path):
            raise InvalidConfig(f"{word} needs a member and a value", param=name)
        _put(members.setdefault(name, {}), path, text)
    for name, object_ in members.items():
        if any(word.partition("=")[0] == name for word in rest):
            raise InvalidConfig(f"{name} is given whole and by members; use one of the two", param=name)
        rest.append(f"{name}={msgspec.json.encode(object_).decode()}")
    return rest


def _put(value: dict[str, Any], path: list[str], text: str) -> None:
    """JSON where the text is JSON, else the text itself."""
    for name in path[:-1]:
        inner = value.setdefault(name, {})
        if not isinstance(inner, dict):
            raise InvalidConfig(f"{'.'.join(path)} is in something that is no object, at {name!r}")
        value = inner
    try:
        value[path[-1]] = msgspec.json.decode(text)
    except msgspec.DecodeError:
        value[path[-1]] = text


_KNOWN: Final = (
    frozenset(flag.name for flags in FLAGS.values() for flag in flags) | INERT_SWITCHES | INERT_OPTIONS
)


def _refuse(word: str) -> NoReturn:
    if not word.startswith("-"):
        raise InvalidConfig(f"unexpected argument {word!r}")
    name = word.partition("=")[0]
    near = difflib.get_close_matches(name.lstrip("-"), sorted(_KNOWN), n=1, cutoff=0.6)
    hint = f"; did you mean --{near[0]}?" if near else "; see `loramux serve --help`"
    raise InvalidConfig(f"unknown flag {name}{hint}", param=name)


def _warnings(namespace: argparse.Namespace) -> list[str]:
    found: list[str] = []
    for dest, value in sorted(vars(namespace).items()):
        name = dest.removeprefix("inert ")
        if dest == name or value is None or value == [HARMLESS_VALUES.get(name)]:
            continue
        if value is True and name in ALWAYS_ON:
            continue
        shown = f"--no-{name}" if value is False else f"--{name}"
        found.append(f"{shown} has no effect in loramux")
    return found
