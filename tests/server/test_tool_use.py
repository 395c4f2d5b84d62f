"""What tools mean for a call: formats by flag and by template, choices, marks, ids, earlier turns."""

from __future__ import annotations

from typing import Any, Final

import pytest
from tokenizers import AddedToken

from loramux.engine.errors import InvalidConfig, InvalidRequest
from loramux.server.config import read_config
from loramux.server.detokenizer import TextStream
from loramux.server.limits import Limits
from loramux.server.message_parser import CallPart
from loramux.server.schemas.chat import ChatMessage, ChatRequest
from loramux.server.tokenizer import Tokenizer
from loramux.server.tool_config import ToolConfig
from loramux.server.tool_history import read_arguments, with_short_ids
from loramux.server.tool_parsers.registry import format_of_template
from loramux.server.tool_use import ToolDesk
from tests.server.deltas import delta
from tests.server.tiny_text import EOS, VOCAB_SIZE, byte_tokenizer, tiny_tokenizer

TOOL: Final = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
HERMES: Final = 'return <tool_call>\n{\\"name\\": <function-name>}\n</tool_call>'


def desk(template: str | None = None, tokenizer: Tokenizer | None = None, **config: Any) -> ToolDesk:
    return ToolDesk(ToolConfig(**config), template, tokenizer or tiny_tokenizer(), Limits())


def request(**body: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [], **body})


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (HERMES, "hermes"),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ('Respond in the format {"name": function name, "parameters": dictionary', "llama3_json"),
        ("[func_name1(params_name1=params_value1), func_name2(params)]", "pythonic"),
        ("<tool_call>\n<function=example_function_name>", None),
        ("<tool_call>{function-name}<arg_key>", None),
        ("{{ messages }}", None),
    ],
)
def test_template_shows_the_format(template: str, name: str | None) -> None:
    found = format_of_template(template)

    assert (found.name if found else None) == name


def test_flag_wins_over_the_template() -> None:
    by_flag = desk(HERMES, tool_parser="pythonic").format
    switched_off = desk(HERMES, tool_parser="none").format

    assert by_flag is not None
    assert by_flag.name == "pythonic"
    assert switched_off is None


def test_auto_choice_can_be_switched_off_and_must_have_a_format_if_asked_for() -> None:
    with pytest.raises(InvalidRequest) as refused:
        desk(HERMES, auto_tool_choice=False).plan(request(tools=[TOOL]))
    with pytest.raises(InvalidConfig) as not_started:
        desk("{{ messages }}", auto_tool_choice=True)

    assert refused.value.param == "tool_choice"
    assert not_started.value.param == "--enable-auto-tool-choice"
    assert desk(HERMES, auto_tool_choice=True).plan(request(tools=[TOOL])).message.make_tool_parser


def test_tools_that_may_not_be_called_are_shown_unless_excluded() -> None:
    body = request(tools=[TOOL], tool_choice="none")

    assert desk().plan(body).prompt_tools == [TOOL]
    assert desk(exclude_when_none=True).plan(body).prompt_tools is None
    assert desk().plan(body).message.make_tool_parser is None


def test_marks_that_are_special_tokens_reach_the_parser() -> None:
    backend = byte_tokenizer()
    backend.add_special_tokens([AddedToken("[TOOL_CALLS]", special=True)])
    tokenizer = Tokenizer(backend, {"eos_token": "<|eos|>"})
    use = desk("[TOOL_CALLS]", tokenizer).plan(request(tools=[TOOL]))

    text = TextStream(tokenizer, [EOS], shown_special_token_ids=use.shown_special_token_ids)
    parser = use.message.parser("")
    ids = [VOCAB_SIZE, *b'[{"name": "f", "arguments": {}}]', EOS]
    parts = [part for id_ in ids for part in parser.add(delta(text.add(id_)))]

    assert use.shown_special_token_ids == {VOCAB_SIZE}
    assert isinstance(parts[0], CallPart)
    assert parts[0].name == "f"


def test_shown_tokens_do_not_show_the_others() -> None:
    tokenizer = tiny_tokenizer()
    bos, eos, start, end = range(256, 260)

    text = TextStream(tokenizer, [bos, start], shown_special_token_ids={start})
    shown = "".join(map(text.add, [*"ü".encode(), eos, start, *b"x", end, *b"y"])) + text.finish()

    assert shown == "ü<|start|>xy"


def test_ids_are_short_where_the_template_demands_it() -> None:
    use = desk("[TOOL_CALLS]").plan(request(tools=[TOOL]))
    parts = use.message.parser("").add(delta("[TOOL_CALLS]f[ARGS]{}", finish_reason="stop"))
    call = parts[0]
    assert isinstance(call, CallPart)
    messages = [
        ChatMessage(role="assistant", tool_calls=[{"id": call.id, "function": {"name": "f"}}]),
        ChatMessage(role="assistant", tool_calls=[{"id": "call_elsewhere", "function": {"name": "f"}}]),
        ChatMessage(role="tool", tool_call_id="call_elsewhere", content="1"),
    ]

    kept, other, result = with_short_ids(messages)

    assert kept.tool_calls is not None
    assert other.tool_calls is not None
    assert kept.tool_calls[0]["id"] == call.id
    assert len(call.id) == len(result.tool_call_id or "") == 9
    assert other.tool_calls[0]["id"] == result.tool_call_id


@pytest.mark.parametrize(
    ("call", "fragment"),
    [
        ({}, "function"),
        ({"function": {"name": 5}}, "function"),
        ({"function": {"name": "f", "arguments": '{"a": '}}, "JSON"),
        ({"function": {"name": "f", "arguments": "[1]"}}, "object"),
        ({"function": {"name": "f", "arguments": '{"a":' * 50_000}}, "JSON"),
    ],
)
def test_calls_of_earlier_turns_are_checked(call: dict[str, Any], fragment: str) -> None:
    with pytest.raises(InvalidRequest, match=fragment) as caught:
        read_arguments(call, "messages[1].tool_calls[0]")

    assert caught.value.param == "messages[1].tool_calls[0]"


@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}])
def test_templates_get_arguments_as_objects(arguments: object) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}

    read_arguments(call, "x")

    assert call["function"]["arguments"] == {"a": 1}


@pytest.mark.parametrize("flag", ["--tool-call-parser=unknown", "--reasoning-parser=unknown"])
def test_unknown_parser_is_refused_with_the_known_ones(flag: str) -> None:
    with pytest.raises(InvalidConfig, match="unknown") as caught:
        read_config(["model", flag], {})

    assert caught.value.param == flag.partition("=")[0]


def test_flags_of_vllm_are_taken() -> None:
    config = read_config(
        [
            *("model", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
            *("--reasoning-parser", "deepseek_r1", "--exclude-tools-when-tool-choice-none"),
        ],
        {},
    )

    assert config.warnings == ()
    assert config.server.tools == ToolConfig(
        tool_parser="hermes", reasoning_parser="deepseek_r1", auto_tool_choice=True, exclude_when_none=True
    )
