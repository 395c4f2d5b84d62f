"""The output of a response, item by item: what each part of a message adds, and the events that say so.

Whole answers and streams are made by the same `ResponseItems`, so the two cannot differ.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

from loramux.server.message_parser import ArgumentsPart, CallPart, MessagePart, ReasoningPart, TextPart
from loramux.server.schemas.chat import TokenLogprob
from loramux.server.schemas.responses import (
    OutputFunctionCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    ReasoningText,
)

Event = dict[str, Any]  # "type" and what belongs to it, without the sequence number
_Kind = Literal["message", "reasoning", "function_call"]
_PREFIX: dict[_Kind, str] = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


@dataclass(slots=True)
class _OpenItem:
    """The item that is being written."""

    kind: _Kind
    index: int
    id: str
    call_id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def item(self, status: str) -> OutputItem:
        """As it is now."""
        text = "".join(self.pieces)
        if self.kind == "function_call":
            return OutputFunctionCall(
                id=self.id, call_id=self.call_id, name=self.name, arguments=text, status=status
            )
        is_empty = status == "in_progress"
        if self.kind == "reasoning":
            return OutputReasoning(
                id=self.id, status=status, content=[] if is_empty else [ReasoningText(text=text)]
            )
        return OutputMessage(id=self.id, status=status, content=[] if is_empty else [self.part(text)])

    def part(self, text: str) -> OutputText:
        """The message's text so far."""
        return OutputText(text=text, logprobs=self.logprobs)


class ResponseItems:
    """The items of one response, in order."""

    def __init__(self) -> None:
        self.finished: list[OutputItem] = []
        self._open: _OpenItem | None = None

    def add(self, part: MessagePart, logprobs: list[TokenLogprob]) -> list[Event]:
        """The events of one part; `logprobs` are those of a text's tokens."""
        match part:
            case TextPart(text):
                item, events = self._in("message")
                item.logprobs += logprobs
                return [*events, _delta("response.output_text.delta", item, text, logprobs=logprobs)]
            case ReasoningPart(text):
                item, events = self._in("reasoning")
                return [*events, _delta("response.reasoning_text.delta", item, text)]
            case CallPart(_, id_, name):
                events = self.close("completed")
                item = self._begin("function_call")
                item.call_id, item.name = id_, name
                return [*events, _added(item)]
            case ArgumentsPart(_, text):
                item, events = self._in("function_call")
                event = _delta("response.function_call_arguments.delta", item, text)
                del event["content_index"]
                return [*events, event]

    def close(self, status: str) -> list[Event]:
        """End the open item, if there is one; status is "completed" or "incomplete"."""
        item, self._open = self._open, None
        if item is None:
            return []
        whole = item.item(status)
        self.finished.append(whole)
        text = "".join(item.pieces)
        place: Event = {"item_id": item.id, "output_index": item.index}
        done: Event = {"type": "response.output_item.done", "output_index": item.index, "item": whole}
        if item.kind == "function_call":
            name = "response.function_call_arguments.done"
            return [{"type": name, **place, "name": item.name, "arguments": text}, done]
        place["content_index"] = 0
        if item.kind == "reasoning":
            part: OutputText | ReasoningText = ReasoningText(text=text)
            said: Event = {"type": "response.reasoning_text.done", **place, "text": text}
        else:
            part = item.part(text)
            said = {"type": "response.output_text.done", **place, "text": text, "logprobs": item.logprobs}
        return [said, {"type": "response.content_part.done", **place, "part": part}, done]

    def _in(self, kind: _Kind) -> tuple[_OpenItem, list[Event]]:
        """The open item if it is of this kind, else a new one."""
        if self._open is not None and self._open.kind == kind:
            return self._open, []
        events = self.close("completed")
        item = self._begin(kind)
        part = ReasoningText(text="") if kind == "reasoning" else OutputText(text="")
        place = {"item_id": item.id, "output_index": item.index, "content_index": 0}
        return item, [*events, _added(item), {"type": "response.content_part.added", **place, "part": part}]

    def _begin(self, kind: _Kind) -> _OpenItem:
        self._open = _OpenItem(kind, len(self.finished), f"{_PREFIX[kind]}_{uuid.uuid4().hex}")
        return self._open


def _added(item: _OpenItem) -> Event:
    return {
        "type": "response.output_item.added",
        "output_index": item.index,
        "item": item.item("in_progress"),
    }


def _delta(kind: str, item: _OpenItem, text: str, **more: Any) -> Event:
    item.pieces.append(text)
    place = {"item_id": item.id, "output_index": item.index, "content_index": 0}
    return {"type": kind, **place, "delta": text, **more}
