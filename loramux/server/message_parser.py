"""What a model's answer consists of: reasoning, text, and calls of tools.

`MessageParser` reads the deltas of one choice and says what each of them adds. Chats use it for whole
answers and for streams alike, so the two cannot differ.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import msgspec

from loramux.server.choice import Delta
from loramux.server.reasoning import ReasoningFormat, ReasoningSplitter
from loramux.server.tool_history import SHORT_ID_CHARS
from loramux.server.tool_parsers.base import CallArguments, CallStart, Event, Text, ToolParser

PROMPT_END: Final = 64  # characters of a prompt that say whether it opens the reasoning


class ReasoningPart(NamedTuple):
    """More of the reasoning."""

    text: str


class TextPart(NamedTuple):
    """More of the text."""

    text: str


class CallPart(NamedTuple):
    """A call begins: its place among the calls, an id of its own, the tool's name."""

    number: int
    id: str
    name: str


class ArgumentsPart(NamedTuple):
    """More of the arguments of a call; joined they are a JSON text."""

    number: int  # of the call
    text: str


MessagePart = ReasoningPart | TextPart | CallPart | ArgumentsPart


@dataclass(frozen=True, slots=True, kw_only=True)
class MessagePlan:
    """How the answers of one call are read; one plan for all choices.

    The default reads everything as text.
    """

    reasoning: ReasoningFormat | None = None
    reasoning_end_id: int | None = None  # the closing mark, if it is one token
    make_tool_parser: Callable[[], ToolParser] | None = None
    parallel_calls: bool = True  # False keeps the first call only
    short_call_ids: bool = False  # of 9 letters and digits
    calls_end_turn: bool = True  # calls make the finish reason "tool_calls"; not with a named tool

    def parser(self, prompt_end: str) -> MessageParser:
        """A parser for one choice, whose prompt ends so."""
        splitter = self.reasoning.splitter(prompt_end) if self.reasoning else None
        tools = self.make_tool_parser() if self.make_tool_parser else None
        return MessageParser(self, splitter, tools)


class MessageParser:
    """Reads one choice.

    Args:
        plan: how.
        splitter: tells reasoning from the rest, if the model reasons.
        tools: finds calls in the rest, if there may be any.
    """

    def __init__(
        self, plan: MessagePlan, splitter: ReasoningSplitter | None, tools: ToolParser | None
    ) -> None:
        self._plan = plan
        self._splitter = splitter
        self._tools = tools
        self._blank: list[str] = []  # white space that is dropped if a call is beside it
        self._text_since_call = False
        self._last_arguments: list[str] = []  # of the last call that is shown
        self._is_cut = False  # a stop string of the client's broke a call off
        self._num_in_block = 0  # tokens; none, as long as it is open whether a block begins
        self.num_calls = 0

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens of the reasoning so far, its marks among them."""
        return self._num_in_block if self._splitter is not None and self._splitter.has_block else 0

    def add(self, delta: Delta) -> list[MessagePart]:
        """What a delta adds; the last one, which has a finish reason, settles everything."""
        is_last = delta.finish_reason is not None
        if self._splitter is None and self._tools is None:
            return [TextPart(delta.text)] if delta.text else []
        parts: list[MessagePart] = []
        text = delta.text
        if self._splitter is not None:
            was_over = self._splitter.is_over
            text = self._split(self._splitter, text, parts, is_last=is_last)
            if not was_over:
                self._num_in_block += self._num_before_end(self._splitter, delta.token_ids)
        if self._tools is None:
            return [*parts, TextPart(text)] if text else parts
        events = self._tools.feed(text) if text else []
        if is_last:
            events += self._tools.finish()
        for event in events:
            self._add_event(event, parts)
        if is_last and self._blank and not self.num_calls:
            parts.append(TextPart("".join(self._blank)))
        if delta.stop_reason is not None and self.num_calls:
            self._is_cut = not _is_json("".join(self._last_arguments))
        return parts

    def finish_reason(self, reason: str | None) -> str | None:
        """The finish reason that a client sees for the engine's."""
        if reason == "stop" and self.num_calls and self._plan.calls_end_turn and not self._is_cut:
            return "tool_calls"
        return reason

    def _num_before_end(self, splitter: ReasoningSplitter, token_ids: list[int]) -> int:
        """How many tokens belong to the reasoning, when some of them may follow the closing mark."""
        end_id = self._plan.reasoning_end_id
        if splitter.is_over and end_id is not None and end_id in token_ids:
            return token_ids.index(end_id) + 1
        return len(token_ids)

    def _split(
        self, splitter: ReasoningSplitter, text: str, parts: list[MessagePart], *, is_last: bool
    ) -> str:
        """Put the reasoning aside; returns the rest."""
        reasoning, content = splitter.feed(text)
        if is_last:
            rest = splitter.finish()
            reasoning, content = reasoning + rest.reasoning, content + rest.content
        if reasoning:
            parts.append(ReasoningPart(reasoning))
        return content

    def _add_event(self, event: Event, parts: list[MessagePart]) -> None:
        match event:
            case Text(text):
                self._add_text(text, parts)
            case CallStart(name):
                self.num_calls += 1
                self._blank.clear()
                self._text_since_call = False
                if self._is_kept():
                    self._last_arguments.clear()
                    parts.append(CallPart(self.num_calls - 1, self._new_id(), name))
            case CallArguments(text):
                if self._is_kept():
                    self._last_arguments.append(text)
                    parts.append(ArgumentsPart(self.num_calls - 1, text))

    def _new_id(self) -> str:
        id_ = uuid.uuid4().hex
        return id_[:SHORT_ID_CHARS] if self._plan.short_call_ids else f"chatcmpl-tool-{id_}"

    def _is_kept(self) -> bool:
        return self._plan.parallel_calls or self.num_calls == 1

    def _add_text(self, text: str, parts: list[MessagePart]) -> None:
        if not self._text_since_call:
            if text.isspace():
                self._blank.append(text)
                return
            text = "".join((*self._blank, text))
            self._blank.clear()
            self._text_since_call = True
        parts.append(TextPart(text))


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except msgspec.DecodeError:
        return False
    return True


@dataclass(slots=True)
class CallRecord:
    """One call, whole."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Message:
    """An answer put together from its parts."""

    text: str = ""
    reasoning: str = ""
    calls: list[CallRecord] = field(default_factory=list)


def join_parts(parts: list[MessagePart]) -> Message:
    """The whole message that the parts of one choice make."""
    message = Message()
    texts: list[str] = []
    reasoning: list[str] = []
    arguments: list[list[str]] = []
    for part in parts:
        match part:
            case TextPart(text):
                texts.append(text)
            case ReasoningPart(text):
                reasoning.append(text)
            case CallPart(_, id_, name):
                message.calls.append(CallRecord(id_, name))
                arguments.append([])
            case ArgumentsPart(number, text):
                arguments[number].append(text)
    for call, pieces in zip(message.calls, arguments, strict=True):
        call.arguments = "".join(pieces)
    message.text, message.reasoning = "".join(texts), "".join(reasoning)
    return message
