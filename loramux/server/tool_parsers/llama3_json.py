"""The format of Llama 3: the answer is `{"name": ..., "parameters": {...}}`, perhaps after a mark.

Several calls are separated by semicolons. Since an answer may be JSON without being a call, only an
object with the name of a declared tool is one, unless the mark `<|python_tag|>` stands before it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

from loramux.server.tool_parsers.base import Event, Text
from loramux.server.tool_parsers.call_object import CallObject
from loramux.server.tool_parsers.json_value import WHITESPACE, Status
from loramux.server.tool_parsers.markers import MarkerSearch

MARK: Final = "<|python_tag|>"
MARKS: Final = (MARK,)
_SEPARATORS: Final = ";,"


class Llama3JsonParser:
    """Reads one answer of a request with these tools."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._search = MarkerSearch(*MARKS)
        self._call = CallObject()
        self._between: list[str] = []  # read after a call, or after the mark
        self._is_marked = False
        self._has_separator = False
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
        rest = "".join(self._between) + self._search.finish()
        if self._step == self._in_call:
            rest += self._call.leftover()
        return [Text(rest)] if rest else []

    def _start(self, text: str, position: int, events: list[Event]) -> int:
        """At the beginning of the answer: white space may come before a call."""
        if text[position] == "{":
            return self._begin(position)
        if text[position] not in WHITESPACE:
            self._step = self._in_text
            return position
        events.append(Text(text[position]))
        return position + 1

    def _begin(self, position: int) -> int:
        before = "".join(self._between)
        self._between.clear()
        self._call = CallObject(before, None if self._is_marked else self._names)
        self._step = self._in_call
        return position

    def _in_text(self, text: str, position: int, events: list[Event]) -> int:
        shown, mark, position = self._search.feed(text, position)
        if shown:
            events.append(Text(shown))
        if mark is not None:
            self._between.append(mark)
            self._is_marked, self._step = True, self._after_mark
        return position

    def _after_mark(self, text: str, position: int, events: list[Event]) -> int:
        char = text[position]
        if char == "{":
            return self._begin(position)
        if char in WHITESPACE:
            self._between.append(char)
            return position + 1
        return self._back_to_text(position, events)

    def _in_call(self, text: str, position: int, events: list[Event]) -> int:
        position = self._call.feed(text, position)
        events += self._call.events
        self._call.events.clear()
        if self._call.status is Status.DONE:
            self._has_separator, self._step = False, self._after_call
        elif self._call.status is Status.FAILED:
            self._between.append(self._call.leftover())
            return self._back_to_text(position, events)
        return position

    def _after_call(self, text: str, position: int, events: list[Event]) -> int:
        char = text[position]
        if char == "{":
            return self._begin(position)
        if char in _SEPARATORS and not self._has_separator:
            self._has_separator = True
        elif char not in WHITESPACE:
            return self._back_to_text(position, events)
        self._between.append(char)
        return position + 1

    def _back_to_text(self, position: int, events: list[Event]) -> int:
        rest = "".join(self._between)
        self._between.clear()
        if rest:
            events.append(Text(rest))
        self._is_marked, self._step = False, self._in_text
        return position
