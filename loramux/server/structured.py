"""What a request says about the shape of its answer, as a grammar for the engine.

`response_format` is OpenAI's field, `structured_outputs` vLLM's; a request may bring one of them. Every
other part of the server that wants to force a shape (tool calls) makes its `GrammarSpec` with the small
functions here. Nothing here compiles anything: `grammar_checker` does, in a process that can be stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from loramux.engine.errors import InvalidRequest
from loramux.engine.types import GrammarSpec

OPTIONS_KEY: Final = "x-guidance"  # where llguidance looks for its options inside a schema
KINDS: Final = ("json", "regex", "choice", "grammar", "json_object")
# A model may write line breaks and spaces for ever where JSON allows them; this much is enough for
# pretty printing 15 levels deep.
WHITESPACE: Final = r"[ \t\r\n]{1,32}"
_GUIDED: Final = {  # fields that vLLM ignores by now -> what to use instead
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
    "guided_whitespace_pattern": "whitespace_pattern",
    "guided_decoding_backend": "",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """vLLM's `structured_outputs`: exactly one of the first five.

    Raises:
        InvalidRequest: none or several of them are given, or one has the wrong type.
    """

    json: str | Mapping[str, Any] | None = None  # a JSON schema, as an object or as text
    regex: str | None = None  # the whole text must match
    choice: Sequence[str] | None = None  # the text is one of these
    grammar: str | None = None  # Lark in llguidance's dialect, or GBNF
    json_object: bool | None = None  # any JSON object
    disable_any_whitespace: bool = False  # no whitespace between JSON's tokens
    disable_additional_properties: bool = False  # objects have only the properties that the schema names
    whitespace_pattern: str | None = None  # a regular expression for whitespace between JSON's tokens

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) not in (None, False)]
        if len(given) != 1:
            names = ", ".join(KINDS)
            message = f"structured_outputs needs exactly one of {names}, got {', '.join(given) or 'none'}"
            raise InvalidRequest(message, param="structured_outputs")


def json_schema_grammar(
    schema: Mapping[str, Any] | bool,
    *,
    whitespace: str | None = WHITESPACE,
    is_lenient: bool = False,
) -> GrammarSpec:
    """JSON that fits a schema.

    Args:
        schema: a JSON schema; options of the grammar compiler inside it are dropped.
        whitespace: regular expression for whitespace between tokens; None = there is none.
        is_lenient: ignore keywords that cannot be enforced instead of refusing the schema.
    """
    options: dict[str, Any] = {"lenient": is_lenient}
    if whitespace is None:
        options["whitespace_flexible"] = False
    else:
        options["whitespace_pattern"] = whitespace
    plain = schema if isinstance(schema, Mapping) else {"allOf": [schema]}
    return GrammarSpec("json_schema", msgspec.json.encode({**plain, OPTIONS_KEY: options}).decode())


def json_object_grammar(*, whitespace: str | None = WHITESPACE) -> GrammarSpec:
    """Any JSON object."""
    return json_schema_grammar({"type": "object"}, whitespace=whitespace)


def regex_grammar(pattern: str) -> GrammarSpec:
    """A text that the regular expression matches as a whole (Rust's syntax, `^` and `$` allowed around)."""
    return GrammarSpec("regex", pattern)


def lark_grammar(text: str) -> GrammarSpec:
    """A text of a language; the grammar is Lark in llguidance's dialect, and begins with `start`."""
    return GrammarSpec("lark", text)


def choice_grammar(choices: Sequence[str]) -> GrammarSpec:
    """Exactly one of several texts."""
    quoted = (msgspec.json.encode(choice).decode() for choice in choices)
    return lark_grammar("start: " + " | ".join(quoted))
