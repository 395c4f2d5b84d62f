"""Reasoning, text and calls of one answer, told apart together."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.server.choice import Delta
from loramux.server.message_parser import MessagePart, MessagePlan, ReasoningPart, TextPart, join_parts
from loramux.server.reasoning import REASONING_FORMATS
from loramux.server.tool_parsers.hermes import HermesParser
from tests.server.deltas import delta

CLOSE_ID = 7
PLAN = MessagePlan(
    reasoning=REASONING_FORMATS["qwen3"], reasoning_end_id=CLOSE_ID, make_tool_parser=HermesParser
)
CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
PIECES = st.lists(
    st.sampled_from(["<think>", "</think>", CALL, "<tool_call>", "\n", " ", "a", "<", "ü", '{"name": "f"']),
    max_size=12,
)


def read(pieces: list[str], plan: MessagePlan = PLAN, prompt_end: str = "") -> list[MessagePart]:
    parser = plan.parser(prompt_end)
    parts = [part for piece in pieces for part in parser.add(delta(piece))]
    return parts + parser.add(delta("", finish_reason="stop"))


@settings(deadline=None)
@given(pieces=PIECES, is_open=st.booleans())
def test_any_cut_gives_the_same_message(pieces: list[str], is_open: bool) -> None:
    prompt_end = "<think>\n" if is_open else ""
    text = "".join(pieces)

    messages = [
        join_parts(read(cut, prompt_end=prompt_end))
        for cut in ([text], pieces, list(text))
        if text or not cut
    ]

    seen = {
        (message.reasoning, message.text, tuple(call.arguments for call in message.calls))
        for message in messages
    }
    assert len(seen) == 1


def test_nothing_is_lost_between_the_marks() -> None:
    message = join_parts(read([f"<think>hm {CALL}</think>", f"Look: {CALL}", " Done."]))

    assert message.reasoning == f"hm {CALL}"
    assert message.text == "Look:  Done."
    assert [call.arguments for call in message.calls] == ['{"a": 1}']


def test_plan_without_reasoning_and_tools_changes_nothing() -> None:
    assert read(["\n<think>", CALL], MessagePlan()) == [TextPart("\n<think>"), TextPart(CALL)]


def test_tokens_after_the_closing_mark_are_no_reasoning() -> None:
    parser = PLAN.parser("<think>")

    parts = parser.add(Delta(0, text="hm", token_ids=[1, 2]))
    parts += parser.add(Delta(0, text=" yes</think>\n\nYes.", token_ids=[3, CLOSE_ID, 5, 6]))
    parts += parser.add(Delta(0, text=" So.", token_ids=[8], finish_reason="stop"))

    assert parts == [ReasoningPart("hm"), ReasoningPart(" yes"), TextPart("Yes."), TextPart(" So.")]
    assert parser.num_reasoning_tokens == 4


@pytest.mark.parametrize("pieces", [["Yes."], ["<thi", "rd>"], ["<thi"], ["\n", "Yes."]])
def test_an_answer_without_reasoning_has_no_tokens_of_it(pieces: list[str]) -> None:
    parser = PLAN.parser("")
    for piece in pieces:
        parser.add(Delta(0, text=piece, token_ids=[1, 2]))
    parser.add(Delta(0, finish_reason="stop"))

    assert parser.num_reasoning_tokens == 0


@pytest.mark.parametrize(
    ("text", "reason", "shown"),
    [(CALL, "stop", "tool_calls"), (CALL, "length", "length"), ("Hello", "stop", "stop"), (CALL, None, None)],
)
def test_calls_change_the_finish_reason_of_a_finished_answer(
    text: str, reason: str | None, shown: str | None
) -> None:
    parser = PLAN.parser("")
    parser.add(delta(text, finish_reason="stop"))

    assert parser.finish_reason(reason) == shown


@pytest.mark.parametrize(("cut", "shown"), [(CALL.index("1}"), "stop"), (len(CALL), "tool_calls")])
def test_call_that_a_stop_string_cuts_is_no_reason_to_call(cut: int, shown: str) -> None:
    parser = PLAN.parser("")
    parser.add(Delta(0, text=CALL[:cut], finish_reason="stop", stop_reason="1"))

    assert parser.num_calls == 1
    assert parser.finish_reason("stop") == shown


def test_call_that_is_not_shown_may_be_cut() -> None:
    parser = replace(PLAN, parallel_calls=False).parser("")
    parser.add(Delta(0, text=CALL + CALL[:-14], finish_reason="stop", stop_reason="1"))

    assert parser.num_calls == 2
    assert parser.finish_reason("stop") == "tool_calls"
