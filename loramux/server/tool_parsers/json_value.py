"""One JSON value that arrives in pieces: where it ends, and whether it is JSON at all.

Strict but for one thing: models write line breaks into strings as they are, and these come out as the
escapes that JSON demands.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum
from typing import Final

WHITESPACE: Final = " \t\n\r"
MAX_DEPTH: Final = 128

_PLAIN: Final = re.compile(r'[^"\\\x00-\x1f]+')
_SPACES: Final = re.compile(r"[ \t\n\r]+")
_HEX: Final = frozenset("0123456789abcdefABCDEF")
_LITERALS: Final = {"t": "rue", "f": "alse", "n": "ull"}
_CONTROL: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}

# A number as states: what each class of character leads to. Those of _WHOLE may end it.
_DIGITS: Final = "0123456789"
_NUMBER: Final[dict[str, dict[str, str]]] = {
    "-": {"0": "zero"} | dict.fromkeys("123456789", "int"),
    "zero": {".": "dot", "e": "e", "E": "e"},
    "int": {".": "dot", "e": "e", "E": "e"} | dict.fromkeys(_DIGITS, "int"),
    "dot": dict.fromkeys(_DIGITS, "fraction"),
    "fraction": {"e": "e", "E": "e"} | dict.fromkeys(_DIGITS, "fraction"),
    "e": {"+": "sign", "-": "sign"} | dict.fromkeys(_DIGITS, "exponent"),
    "sign": dict.fromkeys(_DIGITS, "exponent"),
    "exponent": dict.fromkeys(_DIGITS, "exponent"),
}
_WHOLE: Final = frozenset({"zero", "int", "fraction", "exponent"})


class Status(Enum):
    """How far a value has come."""

    RUNNING = 1
    DONE = 2
    FAILED = 3  # it cannot become what it should be


class JsonValue:
    """Follows one value from its first character (white space before it is skipped) to its last."""

    def __init__(self) -> None:
        self.status = Status.RUNNING
        self.is_under_way = False  # an object has a key, or has ended: this is most likely JSON
        self._step: Callable[[str, int], int] = self._value
        self._closers: list[str] = []  # of the arrays and objects around the place
        self._is_key = False  # the string belongs before a colon
        self._literal = ""  # rest of true, false or null
        self._num_hex = 0
        self._number = ""
        self._out: list[str] = []
        self._from = 0  # where in the piece that is fed the text begins that is not in _out

    def feed(self, text: str, start: int = 0) -> int:
        """Read from `start`; returns where the value ended or failed, or the text's length."""
        position = self._from = start
        while position < len(text) and self.status is Status.RUNNING:
            position = self._step(text, position)
        self._out.append(text[self._from : position])
        return position

    def take(self) -> str:
        """What was read since the last call."""
        taken = "".join(self._out)
        self._out.clear()
        return taken

    def _fail(self, position: int) -> int:
        self.status = Status.FAILED
        return position

    def _end(self, position: int) -> int:
        """A value has ended before `position`."""
        if self._closers:
            self._step = self._after
        else:
            self.status = Status.DONE
        return position

    def _value(self, text: str, position: int, *, closer: str = "") -> int:
        char = text[position]
        if char in WHITESPACE:
            return _skip(text, position)
        if char == closer:
            return self._close(position)
        if char == '"':
            self._is_key, self._step = False, self._string
        elif char in "{[":
            return self._open(char, position)
        elif char in _LITERALS:
            self._literal, self._step = _LITERALS[char], self._in_literal
        elif char == "-" or char in _NUMBER["-"]:
            self._number, self._step = _NUMBER["-"].get(char, "-"), self._in_number
        else:
            return self._fail(position)
        return position + 1

    def _open(self, char: str, position: int) -> int:
        if len(self._closers) >= MAX_DEPTH:
            return self._fail(position)
        self._closers.append("}" if char == "{" else "]")
        self._step = self._first_key if char == "{" else self._first_item
        return position + 1

    def _close(self, position: int) -> int:
        self.is_under_way = True
        self._closers.pop()
        return self._end(position + 1)

    def _first_item(self, text: str, position: int) -> int:
        return self._value(text, position, closer="]")

    def _first_key(self, text: str, position: int) -> int:
        char = text[position]
        if char in WHITESPACE:
            return _skip(text, position)
        return self._close(position) if char == "}" else self._key(text, position)

    def _key(self, text: str, position: int) -> int:
        if text[position] in WHITESPACE:
            return _skip(text, position)
        if text[position] != '"':
            return self._fail(position)
        self.is_under_way = True
        self._is_key, self._step = True, self._string
        return position + 1

    def _colon(self, text: str, position: int) -> int:
        if text[position] in WHITESPACE:
            return _skip(text, position)
        if text[position] != ":":
            return self._fail(position)
        self._step = self._value
        return position + 1

    def _after(self, text: str, position: int) -> int:
        char = text[position]
        if char in WHITESPACE:
            return _skip(text, position)
        if char == self._closers[-1]:
            return self._close(position)
        if char != ",":
            return self._fail(position)
        self._step = self._key if self._closers[-1] == "}" else self._value
        return position + 1

    def _string(self, text: str, position: int) -> int:
        if match := _PLAIN.match(text, position):
            return match.end()
        char = text[position]
        if char == "\\":
            self._step = self._escape
        elif char != '"':
            self._out += (text[self._from : position], _CONTROL.get(char) or f"\\u{ord(char):04x}")
            self._from = position + 1
        elif self._is_key:
            self._step = self._colon
        else:
            return self._end(position + 1)
        return position + 1

    def _escape(self, text: str, position: int) -> int:
        char = text[position]
        if char == "u":
            self._num_hex, self._step = 4, self._hex
        elif char in '"\\/bfnrt':
            self._step = self._string
        else:
            return self._fail(position)
        return position + 1

    def _hex(self, text: str, position: int) -> int:
        if text[position] not in _HEX:
            return self._fail(position)
        self._num_hex -= 1
        if not self._num_hex:
            self._step = self._string
        return position + 1

    def _in_literal(self, text: str, position: int) -> int:
        if text[position] != self._literal[0]:
            return self._fail(position)
        self._literal = self._literal[1:]
        return position + 1 if self._literal else self._end(position + 1)

    def _in_number(self, text: str, position: int) -> int:
        following = _NUMBER[self._number].get(text[position])
        if following is not None:
            self._number = following
            return position + 1
        return self._end(position) if self._number in _WHOLE else self._fail(position)


def _skip(text: str, position: int) -> int:
    match = _SPACES.match(text, position)
    return match.end() if match else position
