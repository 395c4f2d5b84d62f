"""Calls written in each format, and parsers run over a text cut in any way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

from hypothesis import strategies as st

from loramux.server.message_parser import CallRecord, Message, MessagePart, MessagePlan, join_parts
from loramux.server.tool_parsers.base import ToolParser
from loramux.server.tool_parsers.forced import RequiredCallsParser
from loramux.server.tool_parsers.registry import TOOL_FORMATS
from tests.server.deltas import delta

NAMES: Final = ("get_weather", "add", "get", "mod.send-mail")
FORMATS: Final = ("hermes", "llama3_json", "mistral", "pythonic", "required")

_SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**53), 2**53),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


class Call(NamedTuple):
    """What a model meant."""

    name: str
    arguments: dict[str, Any]


CALLS = st.lists(
    st.builds(
        Call,
        st.sampled_from(NAMES),
        st.dictionaries(st.sampled_from(["a", "from", "q_2", "class"]), _VALUES, max_size=3),
    ),
    min_size=1,
    max_size=3,
)


def make_parser(name: str) -> ToolParser:
    """A parser for requests that declare NAMES."""
    if name == "required":
        return RequiredCallsParser()
    return TOOL_FORMATS[name].parser(frozenset(NAMES))


def write(name: str, calls: Iterable[Call]) -> str:
    """The text of a model that makes these calls."""
    return _WRITERS[name](list(calls))


def read(name: str, pieces: Sequence[str], **plan: Any) -> list[MessagePart]:
    """The parts of an answer that arrives in these pieces."""
    parser = MessagePlan(make_tool_parser=lambda: make_parser(name), **plan).parser("")
    parts: list[MessagePart] = []
    for piece in pieces:
        parts += parser.add(delta(piece))
    return parts + parser.add(delta("", finish_reason="stop"))


def cut(text: str, places: Iterable[int]) -> list[str]:
    """The text cut at these places."""
    borders = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[begin:end] for begin, end in pairwise(borders)]


def plain(message: Message) -> tuple[str, list[tuple[str, str]]]:
    """A message without the ids of its calls, which are random."""
    return message.text, [(call.name, call.arguments) for call in message.calls]


def message_of(name: str, text: str) -> Message:
    """What an answer in one piece is."""
    return join_parts(read(name, [text]))


def meant(records: Iterable[CallRecord]) -> list[Call]:
    """The calls with their arguments as values."""
    return [Call(record.name, json.loads(record.arguments)) for record in records]


def _object(call: Call, key: str = "arguments") -> str:
    return json.dumps({"name": call.name, key: call.arguments}, ensure_ascii=False)


def _hermes(calls: list[Call]) -> str:
    return "\n".join(f"<tool_call>\n{_object(call)}\n</tool_call>" for call in calls)


def _mistral(calls: list[Call]) -> str:
    if len(calls) % 2:
        return "".join(f"[TOOL_CALLS]{call.name}[ARGS]{json.dumps(call.arguments)}" for call in calls)
    return f"[TOOL_CALLS][{', '.join(map(_object, calls))}]"


def _pythonic(calls: list[Call]) -> str:
    written = [
        f"{call.name}({', '.join(f'{name}={value!r}' for name, value in call.arguments.items())})"
        for call in calls
    ]
    return f"[{', '.join(written)}]"


_WRITERS: Final[dict[str, Callable[[list[Call]], str]]] = {
    "hermes": _hermes,
    "llama3_json": lambda calls: "; ".join(_object(call, "parameters") for call in calls),
    "mistral": _mistral,
    "pythonic": _pythonic,
    "required": lambda calls: f"[{', '.join(_object(call, 'parameters') for call in calls)}]",
}
