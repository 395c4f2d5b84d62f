"""Every format of tool calls: what a model writes is what a client reads, however the text is cut."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.server.message_parser import ArgumentsPart, CallPart, TextPart, join_parts
from loramux.server.tool_parsers.json_value import MAX_DEPTH
from tests.server.tool_parsers.formats import (
    CALLS,
    FORMATS,
    Call,
    cut,
    meant,
    message_of,
    plain,
    read,
    write,
)

MODEL_FORMATS = FORMATS[:-1]
WEATHER = Call("get_weather", {"city": "Zürich", "days": 2})
ADD = Call("add", {"a": 1})
# Pieces of which texts are made that come close to calls.
_SHARDS = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>"),
    *("<|python_start|>", "<|python_end|>", '{"name": "', '"arguments": ', '"parameters": ', "get", "add"),
    *("{", "}", "[", "]", "(", ")", '"', "'", "\\", ",", ":", ";", "=", " ", "\n", "1", "-", "e9", "null"),
    *("x", "ü", "\\ud800", "'''", "\x00", "True", "a=", '{"name": "add", "arguments": {}}'),
]
NOISE = st.lists(st.sampled_from(_SHARDS) | st.text(max_size=3), max_size=25).map("".join)
PLACES = st.lists(st.integers(0, 10_000), max_size=40)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=150, deadline=None)
@given(calls=CALLS, places=PLACES)
def test_calls_survive_any_cut(name: str, calls: list[Call], places: list[int]) -> None:
    text = write(name, calls)

    message = join_parts(read(name, cut(text, places)))

    assert meant(message.calls) == calls
    assert message.text == ""
    assert plain(message) == plain(message_of(name, text))


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=150, deadline=None)
@given(text=NOISE, places=PLACES)
def test_noise_raises_nothing_and_means_the_same_however_it_is_cut(
    name: str, text: str, places: list[int]
) -> None:
    whole, cut_up, single = (
        join_parts(read(name, pieces)) for pieces in ([text], cut(text, places), list(text))
    )

    assert plain(cut_up) == plain(whole) == plain(single)


@pytest.mark.parametrize("name", FORMATS)
def test_every_place_to_cut_gives_the_same(name: str) -> None:
    text = write(name, [WEATHER, ADD])

    for place in range(len(text)):
        assert meant(join_parts(read(name, cut(text, [place]))).calls) == [WEATHER, ADD]


@pytest.mark.parametrize("name", MODEL_FORMATS)
@pytest.mark.parametrize(
    "text",
    [
        *("Hello, world.", "  leading and trailing \n", "a < b and [1, 2] and {3}", "\n\n", "<tool", "[TOO"),
        *('{"answer": 42}', '{"name": "Bob", "parameters": 1}', "[1, 2, 3]", "[note] this", "[getx(a=1)]"),
        *("see </tool_call>", "<|python_tag|>print(1)", "[TOOL_CALLS]", "<tool_call>", "[", "{", "[get"),
    ],
)
def test_text_without_a_call_is_unchanged(name: str, text: str) -> None:
    for pieces in ([text], list(text)):
        assert plain(join_parts(read(name, pieces))) == (text, [])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_answer_that_breaks_off_keeps_what_there_was(name: str, kept: float) -> None:
    text = write(name, [WEATHER])
    text = text[: int(len(text) * kept)]

    message = message_of(name, text)

    if message.calls:
        assert message.calls[0].name == "get_weather"
        assert message.calls[0].arguments in text
        assert message.text == ""
    else:
        assert message.text == text


@pytest.mark.parametrize("name", FORMATS)
def test_arguments_follow_their_call_and_ids_are_unique(name: str) -> None:
    parts = read(name, list(write(name, [WEATHER, ADD, ADD])))

    starts = [part for part in parts if isinstance(part, CallPart)]
    assert [part.number for part in starts] == [0, 1, 2]
    assert len({part.id for part in starts}) == 3
    assert all(part.id.startswith("chatcmpl-tool-") for part in starts)
    latest = -1
    for part in parts:
        latest = part.number if isinstance(part, CallPart) else latest
        assert not isinstance(part, ArgumentsPart) or (part.number == latest and part.text)


@pytest.mark.parametrize("name", FORMATS)
def test_one_call_is_kept_when_calls_may_not_be_parallel(name: str) -> None:
    message = join_parts(read(name, [write(name, [WEATHER, ADD])], parallel_calls=False))

    assert meant(message.calls) == [WEATHER]
    assert message.text == ""


@pytest.mark.parametrize("name", ["hermes", "mistral"])
def test_text_before_a_call_is_shown_before_the_call_ends(name: str) -> None:
    parts = read(name, ["Let me ", "look.\n", *write(name, [WEATHER])])

    assert parts[:3] == [TextPart("Let me "), TextPart("look.\n"), parts[2]]
    assert isinstance(parts[2], CallPart)
    assert meant(join_parts(parts).calls) == [WEATHER]


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', "", [ADD]),
        ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [ADD]),
        ("hermes", '<tool_call>{"name": "add", "arguments": null}', "", [Call("add", {})]),
        ("hermes", '<tool_call>{"name": "add"}</tool_call> Done.', " Done.", [Call("add", {})]),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": "\n"}}', "", [Call("add", {"a": "\n"})]),
        ("hermes", "<tool_call>\nadd(1)</tool_call>", "<tool_call>\nadd(1)</tool_call>", []),
        ("hermes", '<tool_call>{"name":"a","parameters":{x', '<tool_call>{"name":"a","parameters":{x', []),
        ("hermes", '<tool_call>{"name": "a", "arguments": {"a": x}}', 'x}}', None),
        ("mistral", "[TOOL_CALLS]add[ARGS]{'a': 1}", "[TOOL_CALLS]add[ARGS]{'a': 1}", []),
        ("hermes", '<tool_call>{"name": "a", "arguments": [', '<tool_call>{"name": "a", "arguments": [', []),
        ("llama3_json", '<|python_tag|>{"name": "other", "parameters": {}}', "", [Call("other", {})]),
        ("llama3_json", '{"type": "function", "name": "add", "parameters": {"a": 1}}', "", [ADD]),
        ("llama3_json", '{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', []),
        ("llama3_json", '{"name": "add", "parameters": {"a": 1}}; and', "; and", [ADD]),
        ("mistral", '[TOOL_CALLS]add{"a": 1}', "", [ADD]),
        ("mistral", '[TOOL_CALLS] {"name": "add", "arguments": {"a": 1}}', "", [ADD]),
        ("mistral", '[TOOL_CALLS]add[CALL_ID]x9[ARGS]{"a": 1}[TOOL_CALLS]add{}', "", [ADD, Call("add", {})]),
        ("mistral", "[TOOL_CALLS]add then", "[TOOL_CALLS]add then", []),
        ("mistral", '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}, 5]', ", 5]", [ADD]),
        ("pythonic", "[add(a=1), add(a=open('x'))]", ", add(a=open('x'))]", [ADD]),
        ("pythonic", "<|python_start|>[add(a=1)]<|python_end|>", "", [ADD]),
        ("pythonic", 'Sure. [add(a=1)]', "Sure. [add(a=1)]", []),
        ("pythonic", '[get(q="""a"b\n\'\'\'""", r=true)]', "", [Call("get", {"q": "a\"b\n'''", "r": True})]),
        ("pythonic", "[get(q=-1.5, r=('', None))]", "", [Call("get", {"q": -1.5, "r": ["", None]})]),
        ("pythonic", "[add(1)]", "[add(1)]", []),
        ("pythonic", "[add(**{})]", "[add(**{})]", []),
        ("pythonic", "[add(a=f'{1}')]", "[add(a=f'{1}')]", []),
        ("pythonic", "[add(a=__import__('os').system('x'))]", "[add(a=__import__('os').system('x'))]", []),
        ("pythonic", "[add(a=9**9)]", "[add(a=9**9)]", []),
        ("pythonic", "[add(a=1e999)]", "[add(a=1e999)]", []),
        ("pythonic", "[add(a={1: 2})]", "[add(a={1: 2})]", []),
    ],
)  # fmt: skip
def test_what_models_write_beside_the_plain_format(
    name: str, text: str, content: str, calls: list[Call] | None
) -> None:
    for pieces in ([text], list(text)):
        message = join_parts(read(name, pieces))
        assert message.text == content
        assert calls is None or meant(message.calls) == calls


@pytest.mark.parametrize(
    "start",
    ['<tool_call>{"name": "add", "arguments": ', '<tool_call>{"more": ', '<tool_call>{"arguments": '],
)
def test_depth_of_arguments_is_bounded(start: str) -> None:
    text = start + '{"a":' * 100_000

    message = message_of("hermes", text)

    shown = "".join(call.arguments for call in message.calls)
    assert shown.count("{") <= MAX_DEPTH
    assert text.endswith(shown + message.text)
    assert message.text


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("hermes", "<tool_call>"),
        ("hermes", "<tool_call"),
        ("hermes", '<tool_call>{"name": "'),
        ("hermes", "</tool_call>" + " " * 50),
        ("llama3_json", '{"name": "add", "parameters": {"a": '),
        ("llama3_json", "<|python_tag|>{"),
        ("mistral", "[TOOL_CALLS]x"),
        ("mistral", "[TOOL_CALLS][["),
        ("pythonic", "[add(a="),
        ("pythonic", "[" + " " * 50),
        ("pythonic", "<|python_start|>[add("),
        ("pythonic", "[add(a=" + "-" * 1000),
        ("required", "[{"),
        ("required", " \n"),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 1_000_000])
def test_time_is_linear_in_a_hostile_text(name: str, unit: str, size: int) -> None:
    def seconds(length: int) -> float:
        text = (unit * (length // len(unit) + 1))[:length]
        pieces = [text[at : at + size] for at in range(0, length, size)]
        started = time.process_time()
        message = join_parts(read(name, pieces))
        assert message.text == text or message.calls
        return time.process_time() - started

    short, long = (min(seconds(length) for _ in range(2)) for length in (4_000, 40_000))
    assert long < 10 * short * 3 + 0.1  # a quadratic parser would need a hundredfold
