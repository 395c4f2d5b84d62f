"""The formats of tool calls by name, and which one a model uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from loramux.server.tool_parsers import hermes, llama3_json, mistral, pythonic
from loramux.server.tool_parsers.base import ParserFactory


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One format."""

    name: str
    parser: ParserFactory
    marks: tuple[str, ...]  # may be special tokens; must then be shown to the parser
    short_ids: bool = False  # the model's template takes only ids of 9 letters and digits


_HERMES: Final = ToolFormat("hermes", hermes.HermesParser, hermes.MARKS)
_LLAMA3: Final = ToolFormat("llama3_json", llama3_json.Llama3JsonParser, llama3_json.MARKS)
_MISTRAL: Final = ToolFormat("mistral", mistral.MistralParser, mistral.MARKS, short_ids=True)
_PYTHONIC: Final = ToolFormat("pythonic", pythonic.PythonicParser, pythonic.MARKS)

TOOL_FORMATS: Final = {
    "hermes": _HERMES,
    "qwen3_json": _HERMES,
    "llama3_json": _LLAMA3,
    "llama4_json": _LLAMA3,
    "mistral": _MISTRAL,
    "pythonic": _PYTHONIC,
    "llama4_pythonic": _PYTHONIC,
}

# What a chat template says when it teaches a format; the first row that is found decides.
_SIGNS: Final = (
    ("<function=", None),  # XML inside <tool_call>, as Qwen3-Coder and GLM write it: not supported
    ("<arg_key>", None),
    ("[TOOL_CALLS]", _MISTRAL),
    ("func_name1(", _PYTHONIC),
    ("<tool_call>", _HERMES),
    ("<|python_tag|>", _LLAMA3),
    ('{"name": function name, "parameters":', _LLAMA3),
)


def format_of_template(source: str) -> ToolFormat | None:
    """The format that a chat template asks the model for; None if it is not plain."""
    for sign, tool_format in _SIGNS:
        if sign in source:
            return tool_format
    return None
