"""A call written as a JSON object, `{"name": ..., "arguments": {...}}`, and a list of such calls.

Used by every format that is JSON inside some marks of its own. "parameters" means the same as
"arguments"; either may come before the name, and be a JSON text inside a string.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

import msgspec

from loramux.server.tool_parsers.base import CallArguments, CallStart, Event
from loramux.server.tool_parsers.json_value import WHITESPACE, JsonValue, Status

MAX_NAME_CHARS: Final = 256

_ARGUMENTS: Final = ("arguments", "parameters")
_KNOWN_KEYS: Final = frozenset({"name", "type", "id", *_ARGUMENTS})


class CallObject:
    """Follows one object.

    Args:
        before: text in front of it that becomes text again if this is no call.
        names: tools that exist. Given where the format has no mark that says "this is a call": then an
            object is a call only with one of these names, with arguments, and without unknown keys.
    """

    def __init__(self, before: str = "", names: Collection[str] | None = None) -> None:
        self.status = Status.RUNNING
        self.events: list[Event] = []  # taken by whoever feeds it
        self._raw = [before]  # what was read, until the call has begun
        self._names = names
        self._step: Callable[[str, int], int] = self._open
        self._value = JsonValue()
        self._key = ""
        self._name: str | None = None
        self._early: list[str] | None = None  # arguments that were read before the name
        self._has_arguments = False
        self._has_begun = False

    def feed(self, text: str, start: int = 0) -> int:
        """Read from `start`; returns where the object ended or failed, or the text's length."""
        position = start
        while position < len(text) and self.status is Status.RUNNING:
            position = self._step(text, position)
        if not self._has_begun:
            self._raw.append(text[start:position])
        return position

    def leftover(self) -> str:
        """The text that was read and is in no event: all of it, unless the call has begun."""
        return "" if self._has_begun else "".join(self._raw)

    def _fail(self, position: int) -> int:
        self.status = Status.FAILED
        return position

    def _open(self, text: str, position: int) -> int:
        return self._expect("{", self._first_key, text, position)

    def _expect(self, char: str, then: Callable[[str, int], int], text: str, position: int) -> int:
        if text[position] in WHITESPACE:
            return position + 1
        if text[position] != char:
            return self._fail(position)
        self._step = then
        return position + 1

    def _first_key(self, text: str, position: int) -> int:
        return self._finish(position) if text[position] == "}" else self._next_key(text, position)

    def _next_key(self, text: str, position: int) -> int:
        if text[position] in WHITESPACE:
            return position + 1
        if text[position] != '"':
            return self._fail(position)
        self._value, self._step = JsonValue(), self._in_key
        return position

    def _in_key(self, text: str, position: int) -> int:
        position = self._value.feed(text, position)
        if self._value.status is Status.DONE:
            key = _string(self._value.take())
            if key is None or (self._names is not None and key not in _KNOWN_KEYS):
                return self._fail(position)
            self._key, self._step = key, self._colon
        return self._checked(position)

    def _colon(self, text: str, position: int) -> int:
        return self._expect(":", self._value_start, text, position)

    def _value_start(self, text: str, position: int) -> int:
        char = text[position]
        if char in WHITESPACE:
            return position + 1
        self._value, self._step = JsonValue(), self._in_other
        if self._key == "name":
            self._step = self._in_name
            return position if char == '"' and self._name is None else self._fail(position)
        if self._key in _ARGUMENTS:
            if self._has_arguments or char not in '{"n':
                return self._fail(position)
            self._has_arguments = True
            self._step = self._in_arguments if char == "{" else self._in_packed_arguments
        return position

    def _in_other(self, text: str, position: int) -> int:
        position = self._value.feed(text, position)
        self._value.take()
        if self._value.status is Status.DONE:
            self._step = self._after
        return self._checked(position)

    def _in_name(self, text: str, position: int) -> int:
        position = self._value.feed(text, position)
        if self._value.status is Status.DONE:
            name = _string(self._value.take())
            if not name or len(name) > MAX_NAME_CHARS or not (self._names is None or name in self._names):
                return self._fail(position)
            self._name, self._step = name, self._after
            if self._early is not None:
                self._begin()
        return self._checked(position)

    def _in_arguments(self, text: str, position: int) -> int:
        position = self._value.feed(text, position)
        self._add(self._value.take())
        if self._name is not None and not self._has_begun and self._value.is_under_way:
            self._begin()
        if self._value.status is Status.DONE:
            self._step = self._after
        return self._checked(position)

    def _in_packed_arguments(self, text: str, position: int) -> int:
        """Arguments as a string with JSON inside, or null for none."""
        position = self._value.feed(text, position)
        if self._value.status is Status.DONE:
            packed = self._value.take()
            unpacked = "{}" if packed == "null" else _json_object(_string(packed))
            if unpacked is None:
                return self._fail(position)
            if self._name is not None:
                self._begin()
            self._add(unpacked)
            self._step = self._after
        return self._checked(position)

    def _after(self, text: str, position: int) -> int:
        if text[position] == "}":
            return self._finish(position)
        return self._expect(",", self._next_key, text, position)

    def _finish(self, position: int) -> int:
        if not self._has_begun:
            if self._name is None or (self._names is not None and not self._has_arguments):
                return self._fail(position)
            self._begin()
            self._add("{}")
        self.status = Status.DONE
        return position + 1

    def _begin(self) -> None:
        assert self._name is not None
        self._has_begun = True
        self._raw.clear()
        self.events.append(CallStart(self._name))
        early, self._early = self._early or [], None
        self._add("".join(early))

    def _add(self, text: str) -> None:
        if self._has_begun:
            self.events += [CallArguments(text)] if text else []
        elif self._early is None:
            self._early = [text]
        else:
            self._early.append(text)

    def _checked(self, position: int) -> int:
        return self._fail(position) if self._value.status is Status.FAILED else position


def _string(text: str) -> str | None:
    """What a JSON string stands for; None if that is no text (half of a surrogate pair)."""
    try:
        return msgspec.json.decode(text, type=str)
    except msgspec.DecodeError:
        return None


def _json_object(text: str | None) -> str | None:
    """The text if it is one JSON object, without what surrounds it."""
    if text is None:
        return None
    text = text.strip(WHITESPACE) or "{}"
    value = JsonValue()
    end = value.feed(text)
    is_object = text.startswith("{") and value.status is Status.DONE and end == len(text)
    return value.take() if is_object else None


class CallArray:
    """Follows `[call, call, ...]`, each a `CallObject`; its arguments and attributes are the same."""

    def __init__(self, before: str = "", names: Collection[str] | None = None) -> None:
        self.status = Status.RUNNING
        self.events: list[Event] = []
        self._raw = [before]  # what was read since the last call, outside of calls
        self._names = names
        self._call: CallObject | None = None
        self._may_end = True
        self._step: Callable[[str, int], int] = self._open

    def feed(self, text: str, start: int = 0) -> int:
        """Read from `start`; returns where the list ended or failed, or the text's length."""
        position = start
        while position < len(text) and self.status is Status.RUNNING:
            position = self._step(text, position)
        return position

    def leftover(self) -> str:
        """The text that was read and is in no event."""
        return self._call.leftover() if self._call else "".join(self._raw)

    def _read(self, text: str, position: int) -> int:
        self._raw.append(text[position])
        return position + 1

    def _open(self, text: str, position: int) -> int:
        if text[position] == "[":
            self._step = self._item
        elif text[position] not in WHITESPACE:
            self.status = Status.FAILED
            return position
        return self._read(text, position)

    def _item(self, text: str, position: int) -> int:
        if text[position] in WHITESPACE:
            return self._read(text, position)
        if text[position] == "]" and self._may_end:
            self.status = Status.DONE
            return position + 1
        self._call = CallObject("".join(self._raw), self._names)
        self._raw.clear()
        self._step = self._in_call
        return position

    def _in_call(self, text: str, position: int) -> int:
        assert self._call is not None
        position = self._call.feed(text, position)
        self.events += self._call.events
        self._call.events.clear()
        if self._call.status is Status.DONE:
            self._call, self._step = None, self._after
        elif self._call.status is Status.FAILED:
            self.status = Status.FAILED
        return position

    def _after(self, text: str, position: int) -> int:
        char = text[position]
        if char == "]":
            self.status = Status.DONE
            return position + 1
        if char == ",":
            self._may_end, self._step = False, self._item
        elif char not in WHITESPACE:
            self.status = Status.FAILED
            return position
        return self._read(text, position)
