"""Answers that a grammar made: a list of calls, or the arguments of one.

They need no format of the model's: for `tool_choice: "required"` and for a named tool the output is
constrained, and these read what it is constrained to.
"""

from __future__ import annotations

from collections.abc import Collection

from loramux.server.tool_parsers.base import CallArguments, CallStart, Event, Text
from loramux.server.tool_parsers.call_object import CallArray
from loramux.server.tool_parsers.json_value import Status


class RequiredCallsParser:
    """Reads `[{"name": ..., "parameters": {...}}, ...]`."""

    def __init__(self, names: Collection[str] = ()) -> None:
        self._calls = CallArray()

    def feed(self, text: str) -> list[Event]:
        """What the next piece of the answer settles."""
        calls = self._calls
        position = calls.feed(text)
        events = list(calls.events)
        calls.events.clear()
        rest = text[position:]
        if calls.status is Status.FAILED:
            rest = calls.leftover() + rest
            self._calls = CallArray()
            self._calls.status = Status.DONE  # everything that follows is text
        if rest:
            events.append(Text(rest))
        return events

    def finish(self) -> list[Event]:
        """What is left when the answer has ended."""
        rest = self._calls.leftover() if self._calls.status is Status.RUNNING else ""
        return [Text(rest)] if rest else []


class NamedCallParser:
    """The whole answer is the arguments of one call.

    Args:
        name: the tool that the request names.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._has_begun = False

    def feed(self, text: str) -> list[Event]:
        """What the next piece of the answer settles."""
        start = [] if self._has_begun else [CallStart(self._name)]
        self._has_begun = True
        return [*start, CallArguments(text)]

    def finish(self) -> list[Event]:
        """What is left when the answer has ended: nothing; an empty answer is no call."""
        return []
