"""Reasoning apart from the answer: the splitter, and over HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux.server.reasoning import REASONING_FORMATS, Split, reasoning_of_template
from tests.running_server import RunningServer, running_server
from tests.server.chat_client import answered, chat, chunks, rebuilt
from tests.server.fake_serve import COMMAND
from tests.server.tiny_text import CHAT_TEMPLATE

TEMPLATE: Final = (
    "{% if tools %}<tool_call>{% endif %}"
    "{% for message in messages %}{{ message.reasoning_content or '' }}{% endfor %}"
    + CHAT_TEMPLATE
    + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)
THOUGHT: Final = "<think>\nWell,\n\nyes.\n</think>\n\nYes."
_PIECES = st.lists(
    st.sampled_from(["<think>", "</think>", "\n", " ", "<", "/think>", "<thi", "a", "<tool_call>"]),
    max_size=12,
)


def split(text: str | Sequence[str], *, name: str = "qwen3", prompt_end: str = "") -> Split:
    splitter = REASONING_FORMATS[name].splitter(prompt_end)
    pieces = [text] if isinstance(text, str) else text
    splits = [*(splitter.feed(piece) for piece in pieces), splitter.finish()]
    return Split("".join(each.reasoning for each in splits), "".join(each.content for each in splits))


@pytest.mark.parametrize(
    ("name", "prompt_end", "text", "expected"),
    [
        ("qwen3", "", THOUGHT, ("Well,\n\nyes.", "Yes.")),
        ("qwen3", "<think>\n", "Well.\n</think>\n\nYes.", ("Well.", "Yes.")),
        ("qwen3", "<think>\n\n</think>\n\n", "Yes, </think> <think>.", ("", "Yes, </think> <think>.")),
        ("qwen3", "", "Yes.", ("", "Yes.")),
        ("qwen3", "", " \n Yes", ("", " \n Yes")),
        ("qwen3", "", "<thin", ("", "<thin")),
        ("qwen3", "", "\n<think>a</think>b</think>", ("a", "b</think>")),
        ("qwen3", "", "<think>a\n", ("a", "")),
        ("qwen3", "", "Use <think> marks</think>", ("", "Use <think> marks</think>")),
        ("qwen3", "", "<think>\n\n</think>\n\nYes.", ("", "Yes.")),
        ("deepseek_r1", "", "Well.</think>Yes.", ("Well.", "Yes.")),
        ("deepseek_r1", "", "<think>\nWell.</think>Yes.", ("Well.", "Yes.")),
        ("deepseek_r1", "", "Well </thin", ("Well </thin", "")),
        ("deepseek_r1", "</think>", "Yes.", ("", "Yes.")),
    ],
)  # fmt: skip
def test_reasoning_is_what_stands_between_the_marks(
    name: str, prompt_end: str, text: str, expected: tuple[str, str]
) -> None:
    assert split(text, name=name, prompt_end=prompt_end) == expected
    assert split(list(text), name=name, prompt_end=prompt_end) == expected


@given(pieces=_PIECES, name=st.sampled_from(sorted(REASONING_FORMATS)), is_open=st.booleans())
def test_any_cut_gives_the_same(pieces: list[str], name: str, is_open: bool) -> None:
    prompt_end = "<think>" if is_open else ""

    assert split(pieces, name=name, prompt_end=prompt_end) == split(
        "".join(pieces), name=name, prompt_end=prompt_end
    )


def test_template_shows_whether_the_model_reasons() -> None:
    qwen3 = reasoning_of_template(TEMPLATE)

    assert qwen3 is not None
    assert qwen3.name == "qwen3"
    assert reasoning_of_template(CHAT_TEMPLATE) is None


@pytest.fixture(scope="module")
def reasoner(text_model: Path) -> Iterator[RunningServer]:
    """A model whose chat template knows reasoning and tools."""
    with running_server(
        *(str(text_model), "--max-model-len=2048", f"--chat-template={TEMPLATE}"), command=COMMAND
    ) as server:
        yield server


@pytest.fixture
def reasoning_http(reasoner: RunningServer) -> Iterator[httpx.Client]:
    """A plain client for it."""
    with reasoner.client() as client:
        yield client


def test_reasoning_is_a_field_of_its_own(reasoning_http: httpx.Client) -> None:
    answer = answered(reasoning_http, THOUGHT)

    message = answer["choices"][0]["message"]
    assert message["reasoning"] == "Well,\n\nyes."
    assert message["content"] == "Yes."
    num_thinking = len("<think>\nWell,\n\nyes.\n</think>")
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": num_thinking}
    assert answer["usage"]["completion_tokens"] == len(THOUGHT) + 1


def test_stream_carries_the_reasoning_first(reasoning_http: httpx.Client) -> None:
    pieces = chunks(reasoning_http, THOUGHT, stream_options={"include_usage": True})

    message = rebuilt(pieces)
    assert (message["reasoning"], message["content"]) == ("Well,\n\nyes.", "Yes.")
    assert message["finish_reason"] == "stop"
    assert pieces[0]["choices"][0]["delta"] == {"role": "assistant", "content": None, "reasoning": "W"}
    assert pieces[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0


def test_reasoning_is_left_out_on_request(reasoning_http: httpx.Client) -> None:
    choice = chat(reasoning_http, THOUGHT, include_reasoning=False)
    streamed = rebuilt(chunks(reasoning_http, THOUGHT, include_reasoning=False))

    assert choice["message"] == {"role": "assistant", "content": "Yes.", "refusal": None}
    assert (streamed["reasoning"], streamed["content"]) == ("", "Yes.")


def test_calls_are_found_after_the_reasoning_only(reasoning_http: httpx.Client) -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    tools = [{"type": "function", "function": {"name": "f"}}]

    message = chat(reasoning_http, f"<think>{call}</think>{call}", tools=tools)["message"]

    assert message["reasoning"] == call
    assert message["content"] is None
    assert len(message["tool_calls"]) == 1


def test_grammar_begins_after_the_reasoning(reasoning_http: httpx.Client) -> None:
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "!grammar"}],
        "response_format": {"type": "json_object"},
    }

    thinking = chat(reasoning_http, "", **body)["message"]["content"]
    direct = chat(reasoning_http, "", **body, chat_template_kwargs={"enable_thinking": False})

    assert thinking.startswith("start: block?")
    assert direct["message"]["content"].startswith("{")


def test_thinking_can_be_switched_off(reasoning_http: httpx.Client) -> None:
    for body in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        message = chat(reasoning_http, "<think> is a mark", **body)["message"]
        assert message["content"] == "<think> is a mark"


def test_earlier_reasoning_reaches_the_template(reasoning_http: httpx.Client) -> None:
    messages = [
        {"role": "assistant", "content": "Yes.", "reasoning": "Well."},
        {"role": "user", "content": "!say:Fine.!end"},
    ]

    answer = answered(reasoning_http, "", messages=messages, return_token_ids=True)

    prompt = bytes(id_ for id_ in answer["prompt_token_ids"] if id_ < 256).decode()
    assert prompt.startswith("Well.assistant: Yes.")
