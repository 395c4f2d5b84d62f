"""The formats of Mistral, all behind the mark `[TOOL_CALLS]`.

Older tokenizers: `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`. From version 11 on, one mark a
call: `[TOOL_CALLS]name[CALL_ID]id[ARGS]{...}`, where `[CALL_ID]id` and `[ARGS]` may be missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Final

from loramux.server.tool_parsers.base import CallArguments, CallStart, Event, Text
from loramux.server.tool_parsers.call_object import MAX_NAME_CHARS, CallArray, CallObject
from loramux.server.tool_parsers.json_value import WHITESPACE, JsonValue, Status
from loramux.server.tool_parsers.markers import MarkerSearch

MARK: Final = "[TOOL_CALLS]"
_ARGS: Final = "[ARGS]"
_CALL_ID: Final = "[CALL_ID]"
MARKS: Final = (MARK, _ARGS, _CALL_ID)
_NAME: Final = re.compile(r"[A-Za-z0-9_.:/-]+")


class MistralParser:
    """Reads one answer."""

    def __init__(self, names: Collection[str] = ()) -> None:
        self._search = MarkerSearch(MARK)
        self._json: CallObject | CallArray = CallObject()
        self._arguments = JsonValue()
        self._raw: list[str] = []  # read since the mark, while it is not certain that this is a call
        self._name = ""
        self._tag = ""
        self._has_begun = False
        self._step: Callable[[str, int, list[Event]], int] = self._in_text

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
        if self._step == self._in_json:
            rest += self._json.leftover()
        return [Text(rest)] if rest else []

    def _in_text(self, text: str, position: int, events: list[Event]) -> int:
        shown, mark, position = self._search.feed(text, position)
        if shown:
            events.append(Text(shown))
        if mark is not None:
            self._raw.append(mark)
            self._name, self._tag, self._step = "", "", self._after_mark
        return position

    def _after_mark(self, text: str, position: int, events: list[Event]) -> int:
        char = text[position]
        if char in WHITESPACE:
            return self._read(char, position)
        if char in "[{":
            kind = CallArray if char == "[" else CallObject
            self._json = kind("".join(self._raw))
            self._raw.clear()
            self._step = self._in_json
        elif _NAME.match(char):
            self._step = self._in_name
        else:
            return self._back_to_text(position, events)
        return position

    def _in_json(self, text: str, position: int, events: list[Event]) -> int:
        position = self._json.feed(text, position)
        events += self._json.events
        self._json.events.clear()
        if self._json.status is not Status.RUNNING:
            self._raw.append(self._json.leftover() if self._json.status is Status.FAILED else "")
            return self._back_to_text(position, events)
        return position

    def _in_name(self, text: str, position: int, events: list[Event]) -> int:
        if match := _NAME.match(text, position):
            self._name += match[0]
            if len(self._name) > MAX_NAME_CHARS:
                return self._back_to_text(position, events)
            return self._read(match[0], position)
        return self._after_name(text, position, events)

    def _after_name(self, text: str, position: int, events: list[Event]) -> int:
        """Tags, up to the object that holds the arguments."""
        char = text[position]
        if char == "{":
            self._arguments, self._step = JsonValue(), self._in_arguments
            self._has_begun = False
            return position
        if char == "[":
            self._tag, self._step = "", self._in_tag
            return position
        if char in WHITESPACE:
            self._step = self._after_name
            return self._read(char, position)
        return self._back_to_text(position, events)

    def _in_tag(self, text: str, position: int, events: list[Event]) -> int:
        tag = self._tag + text[position]
        if not any(known.startswith(tag) for known in (_ARGS, _CALL_ID)):
            return self._back_to_text(position, events)
        self._tag = tag
        if tag == _CALL_ID:
            self._step = self._in_call_id
        elif tag == _ARGS:
            self._step = self._after_name
        return self._read(text[position], position)

    def _in_call_id(self, text: str, position: int, events: list[Event]) -> int:
        if match := _NAME.match(text, position):  # ids of our own replace it
            return self._read(match[0], position)
        self._step = self._after_name
        return position

    def _in_arguments(self, text: str, position: int, events: list[Event]) -> int:
        start = position
        position = self._arguments.feed(text, start)
        if not self._has_begun and not self._arguments.is_under_way:  # it may still be no call
            self._raw.append(text[start:position])
        else:
            if not self._has_begun:
                self._raw.clear()
                events.append(CallStart(self._name))
                self._has_begun = True
            if piece := self._arguments.take():
                events.append(CallArguments(piece))
        if self._arguments.status is not Status.RUNNING:
            return self._back_to_text(position, events)
        return position

    def _read(self, text: str, position: int) -> int:
        self._raw.append(text)
        return position + len(text)

    def _back_to_text(self, position: int, events: list[Event]) -> int:
        rest = "".join(self._raw)
        self._raw.clear()
        if rest:
            events.append(Text(rest))
        self._step = self._in_text
        return position
