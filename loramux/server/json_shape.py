"""How deep and how large a JSON text is, found at the speed of memory and before it is parsed.

Parsing makes an object of every value while nothing else in the process can run: a body of a million
lists would hold every stream up for half a second. Texts below the limits are usually told apart by
counting a few bytes; only texts that are near them are looked at with care.
"""

from __future__ import annotations

from typing import Final

from loramux.engine.errors import InvalidRequest
from loramux.server.limits import Limits

_STRING_WEIGHT: Final = 4  # how much longer than a number a string takes to parse,
_CONTAINER_WEIGHT: Final = 16  # and a list or an object
_ALL_BUT_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
_SQUARE: Final = bytes.maketrans(b"{}", b"[]")


def check_shape(text: bytes, limits: Limits) -> None:
    """Refuse a JSON text that is too deep or has too many values; that it is JSON at all is not checked.

    Raises:
        InvalidRequest: names what was found, the limit and the flag.
    """
    opens = text.count(b"[") + text.count(b"{")
    weight = _weight(text.count(b","), text.count(b'"') // 2, opens)
    if weight <= limits.json_values and opens <= limits.json_depth:
        return  # even if every one of these bytes is JSON's own, and none part of a string
    outside, strings = _without_strings(text, limits)
    opens = outside.count(b"[") + outside.count(b"{")
    if _weight(outside.count(b","), strings, opens) > limits.json_values:
        raise _too_many(limits)
    if opens > limits.json_depth:
        _check_depth(outside, limits.json_depth)


def _weight(commas: int, strings: int, containers: int) -> int:
    """A comma stands for each value but the first."""
    return commas + 1 + (_STRING_WEIGHT - 1) * strings + (_CONTAINER_WEIGHT - 1) * containers


def _without_strings(text: bytes, limits: Limits) -> tuple[bytes, int]:
    """What stands outside of strings, and how many strings there are."""
    if b"\\" in text:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    quotes = text.count(b'"')
    if _weight(0, quotes // 2, 0) > limits.json_values:
        raise _too_many(limits)
    return b"".join(text.split(b'"')[::2]), quotes // 2


def _check_depth(outside: bytes, limit: int) -> None:
    """Take the innermost pairs away, level by level."""
    brackets = outside.translate(_SQUARE, _ALL_BUT_BRACKETS)
    for _ in range(limit):
        inner = brackets.replace(b"[]", b"")
        if not inner:
            return
        if len(inner) == len(brackets):  # they do not match: the parser will say so
            return
        brackets = inner
    raise InvalidRequest(
        f"The request body is nested too deeply: at most {limit} levels (the server's --max-json-depth)."
    )


def _too_many(limits: Limits) -> InvalidRequest:
    return InvalidRequest(
        f"The request body holds too many values: at most {limits.json_values}, where a string counts "
        f"{_STRING_WEIGHT} and a list or object {_CONTAINER_WEIGHT} (the server's --max-json-values)."
    )
