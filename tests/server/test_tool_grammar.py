"""Grammars of calls and of what stands around them, with the real compiler and a small tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken

from loramux.engine.errors import InvalidRequest
from loramux.engine.grammar import compile_grammar, load_tokenizer
from loramux.engine.types import GrammarSpec
from loramux.server.limits import Limits
from loramux.server.schemas.chat import ChatTool
from loramux.server.structured import json_schema_grammar, lark_grammar, regex_grammar
from loramux.server.tokenizer import Tokenizer
from loramux.server.tool_grammar import after_reasoning, answer_or_calls, arguments_grammar, calls_grammar
from tests.server.tiny_text import VOCAB_SIZE, byte_tokenizer, write_text_model

CITY: Final = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TREE: Final = {
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/Node"}},
    "required": ["root"],
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {"next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}},
            "required": ["next"],
            "additionalProperties": False,
        }
    },
}
ANSWER: Final = json_schema_grammar(
    {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
)


def tool(name: str, parameters: dict[str, Any] | None = None, **more: Any) -> ChatTool:
    return ChatTool.model_validate({"function": {"name": name, "parameters": parameters, **more}})


TOOLS: Final = [tool("weather", CITY), tool("walk", TREE), tool("now")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("grammar") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def compiler(folder: Path) -> LLTokenizer:
    return load_tokenizer(folder)


def allows(compiler: LLTokenizer, spec: GrammarSpec, text: str) -> bool:
    """Whether the grammar allows exactly this text."""
    matcher: LLMatcher = compile_grammar(spec, compiler).deep_copy()
    ids = compiler.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("text", "is_allowed"),
    [
        ('[{"name": "weather", "parameters": {"city": "Bern"}}]', True),
        ('[{"name": "now", "parameters": {}}, {"name": "weather", "parameters": {"city": ""}}]', True),
        ('[{"name": "walk", "parameters": {"root": {"next": {"next": null}}}}]', True),
        ('[{"name": "walk", "parameters": {"root": {"next": 5}}}]', False),
        ('[{"name": "weather", "parameters": {}}]', False),
        ('[{"name": "other", "parameters": {}}]', False),
        ("[]", False),
        ("Hello", False),
    ],
)
def test_required_calls_are_calls_of_the_tools(compiler: LLTokenizer, text: str, is_allowed: bool) -> None:
    assert allows(compiler, calls_grammar(TOOLS, Limits(), parallel=True), text) is is_allowed


def test_required_calls_are_one_if_they_may_not_be_parallel(compiler: LLTokenizer) -> None:
    spec = calls_grammar(TOOLS, Limits(), parallel=False)
    call = '{"name": "now", "parameters": {}}'

    assert allows(compiler, spec, f"[{call}]")
    assert not allows(compiler, spec, f"[{call}, {call}]")


def test_named_call_is_its_arguments(compiler: LLTokenizer) -> None:
    assert allows(compiler, arguments_grammar(TOOLS[0], Limits()), '{"city": "Bern"}')
    assert not allows(compiler, arguments_grammar(TOOLS[0], Limits()), '{"town": "Bern"}')
    assert allows(compiler, arguments_grammar(TOOLS[2], Limits()), "{}")


def test_schema_of_a_tool_is_bounded() -> None:
    deep: dict[str, Any] = {"type": "object"}
    for _ in range(200):
        deep = {"type": "object", "properties": {"a": deep}}

    with pytest.raises(InvalidRequest) as caught:
        calls_grammar([tool("deep", deep)], Limits(), parallel=True)

    assert caught.value.param == "tools"


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'),
        ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Bern"}}]'),
        ("llama3_json", '{"name": "weather", "parameters": {"city": "Bern"}}'),
    ],
)
def test_answer_with_a_schema_may_be_calls_instead(
    compiler: LLTokenizer, tokenizer: Tokenizer, name: str, call: str
) -> None:
    spec = answer_or_calls(ANSWER, name, TOOLS, Limits(), tokenizer)

    assert allows(compiler, spec, call)
    assert allows(compiler, spec, '{"a": 1}')
    assert not allows(compiler, spec, "Hello")
    assert not allows(compiler, spec, call.replace("city", "town"))


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (ANSWER, '{"a": 1}'),
        (regex_grammar(r"[a-c/]+\/x"), "a/b/x"),
        (lark_grammar('start: "yes" | other\nother: "no"'), "no"),
        (GrammarSpec("ebnf", 'start: "yes"'), "yes"),
    ],
)
@pytest.mark.parametrize("is_open", [True, False])
def test_any_answer_may_follow_the_reasoning(
    compiler: LLTokenizer, tokenizer: Tokenizer, spec: GrammarSpec, text: str, is_open: bool
) -> None:
    wrapped = after_reasoning(spec, "<think>", "</think>", tokenizer, is_open=is_open)

    thoughts = ("" if is_open else "<think>") + '\nWell, {"x"} < 3.\n</think>'
    assert allows(compiler, wrapped, f"{thoughts}\n\n{text}")
    assert allows(compiler, wrapped, f"{thoughts}{text}")
    assert not allows(compiler, wrapped, f"{thoughts}\n\nHm {text}")
    assert allows(compiler, wrapped, text) is not is_open


def test_marks_that_are_special_tokens_are_written_as_such(
    compiler: LLTokenizer, tokenizer: Tokenizer
) -> None:
    wrapped = after_reasoning(ANSWER, "<|start|>", "<|end|>", tokenizer, is_open=False)

    assert allows(compiler, wrapped, '<|start|>Well.<|end|>\n{"a": 1}')
    assert not allows(compiler, wrapped, "<|start|>Well.")


def test_mark_in_brackets_may_be_a_special_token(tmp_path: Path) -> None:
    backend = byte_tokenizer()
    backend.add_special_tokens([AddedToken("[TOOL_CALLS]", special=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    spec = answer_or_calls(ANSWER, "mistral", TOOLS, Limits(), Tokenizer.from_folder(tmp_path))
    matcher = compile_grammar(spec, load_tokenizer(tmp_path)).deep_copy()

    ids = [VOCAB_SIZE, *b'[{"name": "now", "arguments": {}}]']

    assert matcher.try_consume_tokens(ids) == len(ids)
    assert matcher.is_accepting()


def test_gbnf_cannot_be_part_of_another_grammar(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="Lark"):
        after_reasoning(GrammarSpec("ebnf", 'root ::= "a"'), "<think>", "</think>", tokenizer, is_open=True)
