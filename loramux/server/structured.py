"""What a request says about the shape of its answer, as a grammar for the engine.

`response_format` is OpenAI's field, `structured_outputs` vLLM's; a request may bring one of them. Every
other part of the server that wants to force a shape (tool calls) makes its `GrammarSpec` with the small
functions here. Nothing here compiles anything: `grammar_checker` does, in a process that can be stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from loramux.engine.errors import InvalidRequest
from loramux.engine.types import GrammarSpec
from loramux.server.limits import Limits

OPTIONS_KEY: Final = "x-guidance"  # where llguidance looks for its options inside a schema
KINDS: Final = ("json", "regex", "choice", "grammar", "json_object")
# A model may write line breaks and spaces for ever where JSON allows them; this much is enough for
# pretty printing 15 levels deep.
WHITESPACE: Final = r"[ \t\r\n]{1,32}"
GUIDED: Final = {  # fields that vLLM ignores by now -> what to use instead
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
    "guided_whitespace_pattern": "whitespace_pattern",
}
_VLLM_FIELD: Final = "structured_outputs"
_SWITCH: Final = (bool, "true or false")
_TEXT: Final = (str, "a string")
_FIELD_TYPES: Final[dict[str, tuple[type | tuple[type, ...], str]]] = {
    "json": ((str, dict), "an object, or a string with one"),
    "regex": _TEXT,
    "choice": (list, "a list of strings"),
    "grammar": _TEXT,
    "json_object": _SWITCH,
    "disable_any_whitespace": _SWITCH,
    "disable_additional_properties": _SWITCH,
    "whitespace_pattern": _TEXT,
}
# Keywords of JSON schema whose entries are named by the user; and those that hold no schema.
_SCHEMA_MAPS: Final = frozenset(
    ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
)
_FORMATS: Final = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)
_PLAIN_VALUES: Final = frozenset(("const", "enum", "default", "examples", "required"))


def refuse_guided(fields: Mapping[str, Any]) -> None:
    """Refuse vLLM's former fields instead of answering without their constraint.

    Raises:
        InvalidRequest: names the field and what took its place.
    """
    for name, successor in GUIDED.items():
        if fields.get(name) is not None:
            message = f"{name} is not supported any more: use structured_outputs: {{{successor!r}: ...}}"
            raise InvalidRequest(message, param=name)


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
    plain = _rewritten(schema, _drop_unknown_format) if isinstance(schema, Mapping) else {"allOf": [schema]}
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


@dataclass(frozen=True, slots=True)
class Requested:
    """What a request asks for, and the field that asks for it."""

    spec: GrammarSpec
    param: str


def requested_grammar(
    response_format: Mapping[str, Any] | None, structured_outputs: Mapping[str, Any] | None, limits: Limits
) -> Requested | None:
    """The grammar that a request's fields ask for; None if they ask for plain text.

    Raises:
        InvalidRequest: a field has a wrong shape, asks for more than the limits allow, or for what
            cannot be done; `param` names it.
    """
    by_format = _of_response_format(response_format, limits) if response_format is not None else None
    if structured_outputs is None:
        return by_format
    if by_format is not None:
        raise _refusal("response_format and structured_outputs cannot both constrain the answer")
    return Requested(structured_grammar(read_structured_outputs(structured_outputs), limits), _VLLM_FIELD)


def read_structured_outputs(field: Mapping[str, Any]) -> StructuredOutputsParams:
    """vLLM's field as JSON brings it.

    Raises:
        InvalidRequest: an entry is wrong or not supported.
    """
    if field.get("structural_tag") is not None:
        raise _refusal("structural_tag is not supported; use json, regex, choice or grammar")
    given = {name: field[name] for name in _FIELD_TYPES if field.get(name) is not None}
    for name, value in given.items():
        kinds, words = _FIELD_TYPES[name]
        if not isinstance(value, kinds):
            raise _refusal(f"{name} must be {words}, got {_short(value)}")
    return StructuredOutputsParams(**given)


def structured_grammar(params: StructuredOutputsParams, limits: Limits) -> GrammarSpec:
    """The grammar of vLLM's field.

    Raises:
        InvalidRequest: it is more than the limits allow.
    """
    if params.regex is not None:
        _check_bytes("regex", params.regex, limits.regex_bytes, "--max-regex-bytes")
        return regex_grammar(params.regex)
    if params.grammar is not None:
        _check_bytes("grammar", params.grammar, limits.schema_bytes, "--max-schema-bytes")
        return GrammarSpec("ebnf", params.grammar)
    if params.choice is not None:
        return _of_choices(params.choice, limits)
    whitespace: str | None = params.whitespace_pattern or WHITESPACE
    if params.disable_any_whitespace:
        if params.whitespace_pattern is not None:
            raise _refusal("disable_any_whitespace and whitespace_pattern exclude each other")
        whitespace = None
    _check_bytes("whitespace_pattern", whitespace or "", limits.regex_bytes, "--max-regex-bytes")
    schema = {"type": "object"} if params.json is None else _read_schema(params.json, limits)
    _check_depth(schema, limits.schema_depth, _VLLM_FIELD)
    if params.disable_additional_properties:
        schema = _rewritten(schema, _close)
    spec = _encoded(schema, _VLLM_FIELD, whitespace=whitespace)
    _check_bytes("json", spec.text, limits.schema_bytes, "--max-schema-bytes")
    return spec


def checked_schema_grammar(
    schema: object, limits: Limits, *, strict: object = None, param: str = "response_format"
) -> GrammarSpec:
    """`json_schema_grammar` for a schema that a client sent, within the limits.

    Args:
        schema: as decoded from JSON.
        limits: bytes and depth.
        strict: False = keywords that cannot be enforced are ignored; otherwise the schema is refused.
        param: the field at fault.

    Raises:
        InvalidRequest: it is no schema, or too large.
    """
    if not isinstance(schema, Mapping | bool):
        raise _refusal(f"the schema must be an object, got {_short(schema)}", param)
    if strict is not None and not isinstance(strict, bool):
        raise _refusal(f"strict must be true or false, got {_short(strict)}", param)
    _check_depth(schema, limits.schema_depth, param)
    spec = _encoded(schema, param, is_lenient=strict is False)
    _check_bytes("the schema", spec.text, limits.schema_bytes, "--max-schema-bytes", param)
    return spec


def _of_response_format(field: Mapping[str, Any], limits: Limits) -> Requested | None:
    param = "response_format"
    kind = field.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Requested(json_object_grammar(), param)
    if kind != "json_schema":
        raise _refusal(f"type must be text, json_object or json_schema, got {_short(kind)}", param)
    inner = field.get("json_schema")
    if not isinstance(inner, Mapping):
        raise _refusal(f"json_schema must be an object, got {_short(inner)}", param)
    schema, strict = inner.get("schema"), inner.get("strict")
    return Requested(checked_schema_grammar(schema, limits, strict=strict, param=param), param)


def _of_choices(choices: Sequence[str], limits: Limits) -> GrammarSpec:
    if not choices or not all(isinstance(choice, str) for choice in choices):
        raise _refusal("choice must be a list of strings that is not empty")
    if len(choices) > limits.choices:
        raise _refusal(
            f"choice allows at most {limits.choices} entries, got {len(choices)} (the server's --max-choices)"
        )
    try:
        spec = choice_grammar(choices)
    except UnicodeEncodeError as error:
        raise _refusal("choice holds half a character (a lone surrogate)") from error
    _check_bytes("choice", spec.text, limits.schema_bytes, "--max-schema-bytes")
    return spec


def _read_schema(value: str | Mapping[str, Any], limits: Limits) -> Mapping[str, Any] | bool:
    if not isinstance(value, str):
        return value
    _check_bytes("json", value, limits.schema_bytes, "--max-schema-bytes")
    try:
        schema = msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError) as error:
        raise _refusal(f"json is not valid JSON: {error}") from error
    if not isinstance(schema, dict | bool):
        raise _refusal(f"json must hold a JSON schema, got {_short(schema)}")
    return schema


def _encoded(
    schema: Mapping[str, Any] | bool,
    param: str,
    *,
    whitespace: str | None = WHITESPACE,
    is_lenient: bool = False,
) -> GrammarSpec:
    try:
        return json_schema_grammar(schema, whitespace=whitespace, is_lenient=is_lenient)
    except (UnicodeEncodeError, OverflowError) as error:
        raise _refusal(f"the schema cannot be written as JSON: {error}", param) from error


def _rewritten(schema: Any, change: Callable[[dict[str, Any]], None]) -> Any:
    """A copy of a schema after `change` of every schema in it, the innermost first."""
    if isinstance(schema, list):
        return [_rewritten(entry, change) for entry in schema]
    if not isinstance(schema, Mapping):
        return schema
    copy: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _SCHEMA_MAPS and isinstance(value, Mapping):
            copy[name] = {key: _rewritten(inner, change) for key, inner in value.items()}
        else:
            copy[name] = value if name in _PLAIN_VALUES else _rewritten(value, change)
    change(copy)
    return copy


def _close(schema: dict[str, Any]) -> None:
    """No further properties for an object that does not say."""
    if "properties" in schema or schema.get("type") == "object":
        schema.setdefault("additionalProperties", False)


def _drop_unknown_format(schema: dict[str, Any]) -> None:
    """A format that nobody checks is a remark, as the specification has it."""
    if isinstance(schema.get("format"), str) and schema["format"] not in _FORMATS:
        del schema["format"]


def _check_depth(schema: object, limit: int, param: str) -> None:
    """Level by level, since recursion would be what a deep schema breaks."""
    level = [schema] if isinstance(schema, Mapping | list) else []
    for _ in range(limit):
        inner = (value.values() if isinstance(value, Mapping) else value for value in level)
        level = [value for values in inner for value in values if isinstance(value, Mapping | list)]
        if not level:
            return
    flag = "the server's --max-schema-depth"
    raise _refusal(f"the schema is nested more than {limit} levels deep ({flag})", param)


def _check_bytes(name: str, text: str, limit: int, flag: str, param: str = _VLLM_FIELD) -> None:
    if len(text) > limit or len(text.encode("utf-8", "replace")) > limit:
        size = len(text.encode("utf-8", "replace"))
        raise _refusal(f"{name} allows at most {limit} bytes, got {size} (the server's {flag})", param)


def _refusal(message: str, param: str = _VLLM_FIELD) -> InvalidRequest:
    return InvalidRequest(f"{param}: {message}", param=param)


def _short(value: object) -> str:
    if isinstance(value, str | list | Mapping) and len(value) > 60:
        return f"a {type(value).__name__} of {len(value)} entries"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
