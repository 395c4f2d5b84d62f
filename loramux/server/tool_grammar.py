"""Grammars of calls, and of answers around which a model reasons or makes calls instead.

A grammar constrains everything that the model writes. So what may stand around an answer is part of
it: a block of reasoning before it, and calls in its place while the model may choose.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from loramux.engine.errors import InvalidRequest
from loramux.engine.types import GrammarSpec
from loramux.server.limits import Limits
from loramux.server.schemas.chat import ChatTool
from loramux.server.structured import checked_schema_grammar, lark_grammar
from loramux.server.tokenizer import Tokenizer

_EMPTY_SCHEMA: Final = {"type": "object", "properties": {}}
_SLASH: Final = re.compile(r"\\.|/|\n", re.DOTALL)
_TOKEN_NAME: Final = re.compile(r"<[^<>\s]+>")  # how a grammar may write a special token


def arguments_grammar(tool: ChatTool, limits: Limits) -> GrammarSpec:
    """The arguments of one function.

    Raises:
        InvalidRequest: its `parameters` are no schema, or too large.
    """
    schema = tool.function.parameters or _EMPTY_SCHEMA
    return checked_schema_grammar(schema, limits, strict=bool(tool.function.strict), param="tools")


def calls_grammar(tools: Sequence[ChatTool], limits: Limits, *, parallel: bool) -> GrammarSpec:
    """`[{"name": ..., "parameters": {...}}, ...]`, at least one call.

    Raises:
        InvalidRequest: the `parameters` of a function are no schema, or too large.
    """
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": _any_call(tools, "parameters")}
    if not parallel:
        schema["maxItems"] = 1
    schema["$defs"] = _definitions(tools)
    return checked_schema_grammar(schema, limits, strict=_all_strict(tools), param="tools")


def answer_or_calls(
    answer: GrammarSpec, format_name: str, tools: Sequence[ChatTool], limits: Limits, tokenizer: Tokenizer
) -> GrammarSpec:
    """The answer, or calls in the model's own format.

    A format for which there is no grammar leaves the answer alone: no call can be made then.

    Raises:
        InvalidRequest: the `parameters` of a function are no schema, or too large.
    """
    writer = _FORMATS.get(format_name)
    if writer is None:
        return answer
    key = "parameters" if format_name == "llama3_json" else "arguments"
    schema = {**_any_call(tools, key), "$defs": _definitions(tools)}
    call = checked_schema_grammar(schema, limits, strict=_all_strict(tools), param="tools")
    rules = writer(lambda mark: mark_expression(mark, tokenizer))
    return lark_grammar(
        f"start: answer | calls\nanswer: {_inline(answer)}\nobject: {_inline(call)}\n{rules}\n"
    )


def after_reasoning(
    answer: GrammarSpec, open_mark: str, close_mark: str, tokenizer: Tokenizer, *, is_open: bool
) -> GrammarSpec:
    """The answer after a block of reasoning, which is any text.

    Args:
        answer: what comes after it.
        open_mark, close_mark: around it.
        tokenizer: the model's.
        is_open: the prompt has opened the block; otherwise it may be missing.
    """
    opening = "" if is_open else mark_expression(open_mark, tokenizer)
    closing = mark_expression(close_mark, tokenizer)
    if closing.startswith("<"):
        optional_mark = f"{mark_expression(open_mark, tokenizer)}?" if is_open else opening
        block = f"block: {optional_mark} THOUGHTS? {closing}\nTHOUGHTS: /(?s:.+)/"
    else:
        block = f"block: {opening} thoughts\nthoughts[suffix={closing}]: /(?s:.*)/"
    optional = "" if is_open else "?"
    return lark_grammar(f"start: block{optional} /\\n{{0,2}}/ answer\n{block}\nanswer: {_inline(answer)}\n")


def mark_expression(mark: str, tokenizer: Tokenizer) -> str:
    """A mark as a grammar writes it: a special token by its name, anything else as a string."""
    token_id = tokenizer.token_id(mark)
    is_special = token_id is not None and tokenizer.is_special(token_id)
    if is_special and _TOKEN_NAME.fullmatch(mark):
        return mark
    if is_special:  # a name that no grammar can write, such as [TOOL_CALLS]
        return f"<[{token_id}]>"
    return msgspec.json.encode(mark).decode()


def _any_call(tools: Sequence[ChatTool], key: str) -> dict[str, Any]:
    """The schema of a call of any of the tools; goes with `_definitions`."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "const": tool.function.name},
                key: {"$ref": f"#/$defs/tool{number}"},
            },
            "required": ["name", key],
            "additionalProperties": False,
        }
        for number, tool in enumerate(tools)
    ]
    return {"anyOf": calls}


def _definitions(tools: Sequence[ChatTool]) -> dict[str, Any]:
    return {
        f"tool{number}": _moved(tool.function.parameters or _EMPTY_SCHEMA, f"tool{number}")
        for number, tool in enumerate(tools)
    }


def _moved(schema: Any, name: str) -> Any:
    """The schema as it reads when it lies under `#/$defs/name`: its references lead there."""
    if isinstance(schema, list):
        return [_moved(entry, name) for entry in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {key: _moved(value, name) for key, value in schema.items()}
    target = schema.get("$ref")
    if isinstance(target, str) and (target == "#" or target.startswith("#/")):
        moved["$ref"] = f"#/$defs/{name}{target[1:]}"
    return moved


def _all_strict(tools: Sequence[ChatTool]) -> bool:
    return all(tool.function.strict for tool in tools)


def _inline(spec: GrammarSpec) -> str:
    """The grammar as one expression inside another one.

    Raises:
        InvalidRequest: it is written in GBNF, which cannot be part of another.
    """
    if spec.kind == "json_schema":
        return f"%json {spec.text}"
    if spec.kind == "regex":
        pattern = _SLASH.sub(lambda match: _SLASHES.get(match[0], match[0]), spec.text)
        return f"%lark {{\nstart: /{pattern}/\n}}"
    if spec.kind == "ebnf" and "::=" in spec.text:
        message = "structured_outputs.grammar must be Lark, not GBNF, with tools or for a model that reasons"
        raise InvalidRequest(message, param="structured_outputs")
    return f"%lark {{\n{spec.text}\n}}"


_SLASHES: Final = {"/": "\\/", "\n": "\\n"}


def _hermes_rules(mark: Callable[[str], str]) -> str:
    return (
        'calls: call ("\\n" call)*\n'
        f'call: {mark("<tool_call>")} "\\n" object "\\n" {mark("</tool_call>")}'
    )  # fmt: skip


def _mistral_rules(mark: Callable[[str], str]) -> str:
    return f'calls: {mark("[TOOL_CALLS]")} "[" object (", " object)* "]"'


def _llama3_rules(_mark: Callable[[str], str]) -> str:
    return 'calls: object ("; " object)*'


_FORMATS: Final[dict[str, Callable[[Callable[[str], str]], str]]] = {
    "hermes": _hermes_rules,
    "mistral": _mistral_rules,
    "llama3_json": _llama3_rules,
}
