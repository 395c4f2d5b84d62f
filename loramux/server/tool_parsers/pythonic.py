"""The pythonic format (Llama 4 and others): the answer is `[f(a=1), g(b="x")]`.

Each call is read as Python source into a syntax tree, in which only literals are accepted; nothing is
ever evaluated. A list is only taken for calls while it begins with a declared tool's name, so that an
answer such as `[1, 2]` stays text. Arguments come in one piece, when their call is complete.
"""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Callable, Collection
from typing import Final

import msgspec

from loramux.server.tool_parsers.base import CallArguments, CallStart, Event, Text
from loramux.server.tool_parsers.json_value import MAX_DEPTH, WHITESPACE
from loramux.server.tool_parsers.markers import MarkerSearch

OPEN: Final = "<|python_start|>"
CLOSE: Final = "<|python_end|>"
MARKS: Final = (OPEN, CLOSE)
_CLOSERS: Final = {"(": ")", "[": "]", "{": "}"}
_NAMES: Final = {"true": True, "false": False, "null": None}  # models mix in JSON's spelling
_PREFIX: Final = "_"  # before names of arguments, since `from` or `class` are no names in Python
_TOO_LARGE: Final = 1 << 63  # integers beyond are no JSON that clients can read


class PythonicParser:
    """Reads one answer of a request with these tools."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._longest = max(map(len, names), default=0)
        self._search = MarkerSearch(*MARKS)
        self._raw: list[str] = []  # read since the last call, or the beginning
        self._name = ""
        self._source = _CallSource()
        self._has_calls = False
        self._step: Callable[[str, int, list[Event]], int] = self._start

    def feed(self, text: str) -> list[Event]:
        """What the next piece of the answer settles."""
        events: list[Event] = []
        position = 0
        while position < len(text):
            position = self._step(text, position, events)
        return events

    def finish(self) -> list[Event]:
        """What is left when the answer has ended."""
        rest = "".join(self._raw) + self._search.finish()
        return [Text(rest)] if rest else []

    def _start(self, text: str, position: int, events: list[Event]) -> int:
        """Where a list may begin: at the beginning of the answer, or after the mark."""
        char = text[position]
        if char == "[":
            self._step = self._before_name
        elif char not in WHITESPACE:
            return self._back_to_text(position, events)
        return self._read(char, position)

    def _in_text(self, text: str, position: int, events: list[Event]) -> int:
        shown, mark, position = self._search.feed(text, position)
        if mark == CLOSE and not (self._has_calls and not shown.strip()):
            shown += CLOSE
        if shown:
            events.append(Text(shown))
        if mark == OPEN:
            self._raw.append(OPEN)
            self._step = self._start
        return position

    def _before_name(self, text: str, position: int, events: list[Event]) -> int:
        if text[position] in WHITESPACE:
            return self._read(text[position], position)
        self._name, self._step = "", self._in_name
        return position

    def _in_name(self, text: str, position: int, events: list[Event]) -> int:
        char = text[position]
        if char == "(" and self._name in self._names:
            self._source, self._step = _CallSource(), self._in_call
            return position
        self._name += char
        if len(self._name) > self._longest:
            return self._back_to_text(position, events)
        return self._read(char, position)

    def _in_call(self, text: str, position: int, events: list[Event]) -> int:
        end = self._source.feed(text, position)
        self._raw.append(text[position:end])
        if not self._source.is_open:
            arguments = self._source.arguments()
            if arguments is None:
                return self._back_to_text(end, events)
            events += (CallStart(self._name), CallArguments(arguments))
            self._raw.clear()
            self._has_calls, self._step = True, self._after_call
        return end

    def _after_call(self, text: str, position: int, events: list[Event]) -> int:
        char = text[position]
        if char == "]":
            self._raw.clear()
            self._step = self._in_text
            return position + 1
        if char == ",":
            self._step = self._before_name
        elif char not in WHITESPACE:
            return self._back_to_text(position, events)
        return self._read(char, position)

    def _read(self, char: str, position: int) -> int:
        self._raw.append(char)
        return position + 1

    def _back_to_text(self, position: int, events: list[Event]) -> int:
        rest = "".join(self._raw)
        self._raw.clear()
        if rest:
            events.append(Text(rest))
        self._step = self._in_text
        return position


class _CallSource:
    """Collects `(a=1, ...)` up to the closing parenthesis: follows brackets and strings."""

    def __init__(self) -> None:
        self.is_open = True
        self._pieces: list[str] = []
        self._closers: list[str] = []
        self._is_broken = False
        self._quote = ""  # of the string around the place
        self._run = 0  # quotes in a row: at the beginning of a string, or of what may be its end
        self._is_escaped = False
        self._is_beginning = False  # only quotes of the string were read
        self._wants_name = False  # the name of an argument comes next

    def feed(self, text: str, start: int) -> int:
        """Read from `start`; returns where the source ended, or the text's length."""
        position = copied = start
        while position < len(text) and self.is_open:
            char = text[position]
            if not self._in_string(char):
                if self._wants_name and (char.isalpha() or char == "_"):
                    self._pieces += (text[copied:position], _PREFIX)
                    copied, self._wants_name = position, False
                self._outside(char)
            position += 1
        self._pieces.append(text[copied:position])
        return position

    def arguments(self) -> str | None:
        """The keyword arguments as a JSON object; None if they are anything but literals."""
        if self._is_broken:
            return None
        source = "f" + "".join(self._pieces)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of doubtful escapes in a model's strings
                call = ast.parse(source, mode="eval").body
            if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
                return None
            values = {_name(keyword): _literal(keyword.value) for keyword in call.keywords}
            return msgspec.json.encode(values).decode()
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError, OverflowError):
            return None

    def _outside(self, char: str) -> None:
        if char in "\"'":
            self._quote, self._run, self._is_beginning = char, 1, True
        elif char in _CLOSERS:
            self._closers.append(_CLOSERS[char])
            if len(self._closers) > MAX_DEPTH:
                self._break()
        elif char in ")]}":
            if self._closers.pop() != char:
                self._break()
            elif not self._closers:
                self.is_open = False
        if char not in WHITESPACE:
            self._wants_name = char in "(," and len(self._closers) == 1

    def _break(self) -> None:
        self.is_open, self._is_broken = False, True

    def _in_string(self, char: str) -> bool:
        """Whether the character is part of a string; one quote opens it, or three."""
        if not self._quote:
            return False
        if self._is_beginning:
            return self._at_beginning(char)
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped, self._run = True, 0
        elif char == self._quote[0]:
            self._run += 1
            if self._run == len(self._quote):
                self._quote = ""
        else:
            self._run = 0
        return True

    def _at_beginning(self, char: str) -> bool:
        """Decide whether the string is empty, or opened by one quote, or by three."""
        if char == self._quote:
            self._run += 1
            if self._run == 3:
                self._quote, self._run, self._is_beginning = char * 3, 0, False
            return True
        self._is_beginning = False
        if self._run == 2:  # it was an empty string
            self._quote = ""
            return False
        self._run = 0
        return self._in_string(char)


def _name(keyword: ast.keyword) -> str:
    if keyword.arg is None:
        raise ValueError("arguments of a dictionary")
    return keyword.arg.removeprefix(_PREFIX)


def _literal(node: ast.expr) -> object:
    """The value of a literal.

    Raises:
        ValueError: it is something else, or has no JSON.
    """
    match node:
        case ast.Constant(value=str() | bool() | None as value):
            return value
        case ast.Constant(value=int() as value) if value < _TOO_LARGE:
            return value
        case ast.Constant(value=float() as value) if math.isfinite(value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float())):
            number = _literal(node.operand)
            assert isinstance(number, int | float)
            return -number
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _literal(value) for key, value in zip(keys, values, strict=True)}
    raise ValueError("not a literal")


def _key(node: ast.expr | None) -> str:
    key = None if node is None else _literal(node)
    if not isinstance(key, str):
        raise ValueError("a key of a JSON object is a string")
    return key
