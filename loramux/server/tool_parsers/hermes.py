"""The format of Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

Several calls are several such blocks. The closing mark may be missing.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from loramux.server.tool_parsers.base import Event, Text
from loramux.server.tool_parsers.call_object import CallObject
from loramux.server.tool_parsers.json_value import Status
from loramux.server.tool_parsers.markers import MarkerSearch

OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"
MARKS: Final = (OPEN, CLOSE)


class HermesParser:
    """Reads one answer."""

    def __init__(self, names: Collection[str] = ()) -> None:
        self._search = MarkerSearch(*MARKS)
        self._call: CallObject | None = None
        self._expects_close = False

    def feed(self, text: str) -> list[Event]:
        """What the next piece of the answer settles."""
        events: list[Event] = []
        position = 0
        while position < len(text):
            if self._call is None:
                position = self._in_text(text, position, events)
            else:
                position = self._in_call(self._call, text, position, events)
        return events

    def finish(self) -> list[Event]:
        """What is left when the answer has ended."""
        rest = self._search.finish() if self._call is None else self._call.leftover()
        if self._expects_close and CLOSE.startswith(rest):
            return []
        return [Text(rest)] if rest else []

    def _in_text(self, text: str, position: int, events: list[Event]) -> int:
        shown, mark, position = self._search.feed(text, position)
        if shown.strip():
            self._expects_close = False
        if mark == OPEN:
            self._call = CallObject(OPEN)
        elif mark == CLOSE and not self._expects_close:
            shown += CLOSE
        if mark is not None:
            self._expects_close = False
        if shown:
            events.append(Text(shown))
        return position

    def _in_call(self, call: CallObject, text: str, position: int, events: list[Event]) -> int:
        position = call.feed(text, position)
        events += call.events
        call.events.clear()
        if call.status is not Status.RUNNING:
            self._call = None
            self._expects_close = call.status is Status.DONE
            if rest := call.leftover():
                events.append(Text(rest))
        return position
