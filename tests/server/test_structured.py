"""Fields that constrain an answer: what they mean, and what is refused."""

from __future__ import annotations

import json
from typing import Any, Final

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.engine.errors import InvalidRequest
from loramux.engine.types import GrammarSpec
from loramux.server.limits import Limits
from loramux.server.sampling_params import SamplingParams
from loramux.server.structured import (
    GUIDED,
    OPTIONS_KEY,
    StructuredOutputsParams,
    lark_grammar,
    regex_grammar,
    requested_grammar,
)

LIMITS: Final = Limits(schema_bytes=2000, schema_depth=6, regex_bytes=50, choices=3)
OBJECT: Final = {"type": "object", "properties": {"a": {"type": "integer"}}}
_WORDS: Final = (
    "type",
    "properties",
    "items",
    "$ref",
    "$defs",
    "enum",
    "anyOf",
    "format",
    "const",
    "default",
    "a",
)
CHAT: Final = {"messages": [{"role": "user", "content": "hi"}]}


def asked(
    response_format: dict[str, Any] | None = None, structured_outputs: dict[str, Any] | None = None
) -> GrammarSpec | None:
    found = requested_grammar(response_format, structured_outputs, LIMITS)
    return None if found is None else found.spec


def schema_of(spec: GrammarSpec | None) -> dict[str, Any]:
    """The schema, without the compiler's options."""
    assert spec is not None
    assert spec.kind == "json_schema"
    schema: dict[str, Any] = json.loads(spec.text)
    del schema[OPTIONS_KEY]
    return schema


def options_of(spec: GrammarSpec | None) -> dict[str, Any]:
    assert spec is not None
    options: dict[str, Any] = json.loads(spec.text)[OPTIONS_KEY]
    return options


def format_of(schema: object, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}


@pytest.mark.parametrize("nothing", [None, {"type": "text"}])
def test_plain_text_needs_no_grammar(nothing: dict[str, Any] | None) -> None:
    assert asked(nothing, None) is None


def test_json_object_is_any_object() -> None:
    assert schema_of(asked({"type": "json_object"})) == {"type": "object"}
    assert asked(None, {"json_object": True}) == asked({"type": "json_object"})


def test_schemas_arrive_unchanged() -> None:
    assert schema_of(asked(format_of(OBJECT, strict=True))) == OBJECT
    assert schema_of(asked(None, {"json": OBJECT})) == OBJECT
    assert schema_of(asked(None, {"json": json.dumps(OBJECT), "regex": None})) == OBJECT


def test_only_strict_false_ignores_what_cannot_be_enforced() -> None:
    assert options_of(asked(format_of(OBJECT, strict=False)))["lenient"] is True
    assert options_of(asked(format_of(OBJECT, strict=True)))["lenient"] is False
    assert options_of(asked(format_of(OBJECT)))["lenient"] is False


def test_options_inside_a_schema_are_not_the_clients_to_set() -> None:
    assert options_of(asked(format_of({**OBJECT, OPTIONS_KEY: {"lenient": True}})))["lenient"] is False


def test_formats_that_nobody_checks_are_remarks() -> None:
    schema = {"properties": {"format": {"type": "string", "format": "color"}, "b": {"format": "date"}}}

    assert schema_of(asked(format_of(schema))) == {
        "properties": {"format": {"type": "string"}, "b": {"format": "date"}}
    }


def test_whitespace_can_be_chosen() -> None:
    plain, none, own = (
        options_of(asked(None, {"json": OBJECT, **more}))
        for more in ({}, {"disable_any_whitespace": True}, {"whitespace_pattern": " ?"})
    )

    assert plain["whitespace_pattern"] == r"[ \t\r\n]{1,32}"
    assert none["whitespace_flexible"] is False
    assert own["whitespace_pattern"] == " ?"


def test_additional_properties_can_be_closed_everywhere_but_where_values_stand() -> None:
    schema = {
        **OBJECT,
        "properties": {"type": {"type": "object"}, "open": {**OBJECT, "additionalProperties": True}},
        "default": {"type": "object"},
        "anyOf": [OBJECT],
    }
    closed = schema_of(asked(None, {"json": schema, "disable_additional_properties": True}))

    assert closed["additionalProperties"] is False
    assert closed["properties"]["type"]["additionalProperties"] is False
    assert closed["properties"]["open"]["additionalProperties"] is True
    assert closed["anyOf"][0]["additionalProperties"] is False
    assert closed["default"] == {"type": "object"}


def test_other_kinds_become_their_grammars() -> None:
    assert asked(None, {"regex": "a+"}) == regex_grammar("a+")
    assert asked(None, {"choice": ["a", 'ü"\n']}) == lark_grammar('start: "a" | "ü\\"\\n"')
    assert asked(None, {"grammar": "root ::= x"}) == GrammarSpec("ebnf", "root ::= x")


@pytest.mark.parametrize(
    ("field", "fragment"),
    [
        ({"type": "xml"}, "'xml'"),
        ({}.fromkeys(["schema"]), "None"),
        ({"type": "structural_tag"}, "structural_tag"),
        ({"type": "json_schema"}, "json_schema must be an object"),
        ({"type": "json_schema", "json_schema": {}}, "must be an object, got None"),
        (format_of([]), "got []"),
        (format_of(OBJECT, strict="yes"), "strict"),
        (format_of({"description": "x" * 3000}), "--max-schema-bytes"),
        (format_of({"a": {"a": {"a": {"a": {"a": {"a": {}}}}}}}), "--max-schema-depth"),
        (format_of({"const": "\ud800"}), "cannot be written"),
    ],
)
def test_wrong_formats_are_refused(field: dict[str, Any], fragment: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        asked(field)

    assert fragment in caught.value.message
    assert caught.value.param == "response_format"


@pytest.mark.parametrize(
    ("field", "fragment"),
    [
        ({"other": 1}, "exactly one"),
        ({"json_object": False}, "exactly one"),
        ({"regex": "a", "choice": ["a"]}, "regex, choice"),
        ({"structural_tag": "{}"}, "structural_tag is not supported"),
        ({"json": 5}, "json must be"),
        ({"json": "{"}, "not valid JSON"),
        ({"json": "5"}, "must hold a JSON schema"),
        ({"json": "[" * 1500}, "not valid JSON"),
        ({"json": "x" * 3000}, "--max-schema-bytes"),
        ({"json": {"a": {"a": {"a": {"a": {"a": {"a": {}}}}}}}}, "--max-schema-depth"),
        ({"json": OBJECT, "whitespace_pattern": " " * 60}, "--max-regex-bytes"),
        ({"json": OBJECT, "whitespace_pattern": " ", "disable_any_whitespace": True}, "exclude"),
        ({"regex": "a" * 60}, "--max-regex-bytes"),
        ({"regex": "ä" * 30}, "60 (the server's --max-regex-bytes)"),
        ({"regex": ["a"]}, "regex must be a string"),
        ({"choice": []}, "not empty"),
        ({"choice": ["a", 1]}, "list of strings"),
        ({"choice": "abc"}, "choice must be"),
        ({"choice": ["a"] * 4}, "--max-choices"),
        ({"choice": ["a" * 3000]}, "--max-schema-bytes"),
        ({"choice": ["\ud800"]}, "surrogate"),
        ({"grammar": "a" * 3000}, "--max-schema-bytes"),
        ({"json_object": "yes"}, "true or false"),
        ({}, "exactly one"),
    ],
)
def test_wrong_structured_outputs_are_refused(field: dict[str, Any], fragment: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        asked(None, field)

    assert fragment in caught.value.message
    assert caught.value.param == "structured_outputs"


def test_an_empty_response_format_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="type must be text") as caught:
        asked({})

    assert caught.value.param == "response_format"


def test_two_constraints_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="both"):
        asked({"type": "json_object"}, {"regex": "a"})


def test_offline_parameters_take_the_same_and_refuse_the_same() -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["a", "b"]))

    assert params.structured_outputs is not None
    assert params.structured_outputs.choice == ["a", "b"]
    with pytest.raises(InvalidRequest, match="exactly one"):
        StructuredOutputsParams()


_JSON: Final = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_WORDS), inner, max_size=4),
    max_leaves=20,
)
_CONSTRAINTS: Final = ("json", "regex", "choice", "grammar", "json_object", "whitespace_pattern")
_FORMATS: Final = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "json_object", "json_schema"]) | _JSON},
    optional={"json_schema": st.fixed_dictionaries({"schema": _JSON}, optional={"strict": _JSON}) | _JSON},
)


@settings(max_examples=300, deadline=None)
@given(
    st.none() | _FORMATS, st.none() | st.fixed_dictionaries({}, optional=dict.fromkeys(_CONSTRAINTS, _JSON))
)
def test_any_json_gives_a_grammar_or_a_refusal(
    response_format: dict[str, Any] | None, structured_outputs: dict[str, Any] | None
) -> None:
    try:
        spec = asked(response_format, structured_outputs)
    except InvalidRequest as error:
        param = error.param
    else:
        param = None if spec is None else "structured_outputs" if structured_outputs else "response_format"

    assert param in (None, "response_format", "structured_outputs")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_requests_are_refused_before_the_first_byte_of_a_stream(http: httpx.Client, path: str) -> None:
    body = {**CHAT, "prompt": "hi", "stream": True}
    # This server comments on a stream after 0.2 s; the process that tries grammars takes longer to start.
    http.post(path, json={**body, "stream": False, "structured_outputs": {"choice": ["a"]}})
    bad = ({"response_format": format_of({"type": "strange"})}, {"structured_outputs": {"regex": "("}})
    for fields in bad:
        response = http.post(path, json={**body, **fields})

        assert response.status_code == 400
        assert response.headers["content-type"].startswith("application/json")
        assert response.json()["error"]["param"] in fields


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_requests_with_good_grammars_are_answered(http: httpx.Client, path: str) -> None:
    fields = (
        {"response_format": {"type": "text"}, "structured_outputs": None},
        {"response_format": {"type": "json_object"}},
        {"response_format": format_of(OBJECT, strict=True)},
        {"structured_outputs": {"choice": ["a", "b"]}, "guided_json": None},
        {"structured_outputs": {"grammar": 'root ::= "a"'}},
    )
    for extra in fields:
        response = http.post(path, json={**CHAT, "prompt": "hi", **extra})

        assert response.status_code == 200, response.text


@pytest.mark.parametrize("name", sorted(GUIDED))
def test_former_fields_are_refused_with_the_new_name(http: httpx.Client, name: str) -> None:
    response = http.post("/v1/completions", json={"prompt": "hi", name: "a"})

    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == name
    assert f"'{GUIDED[name]}'" in error["message"]


def test_a_hint_says_how_to_ignore_a_keyword(http: httpx.Client) -> None:
    schema = {"type": "array", "uniqueItems": True}
    strict, loose = (
        http.post("/v1/chat/completions", json={**CHAT, "response_format": format_of(schema, strict=strict)})
        for strict in (True, False)
    )

    assert strict.status_code == 400
    assert "uniqueItems" in strict.json()["error"]["message"]
    assert "strict: false" in strict.json()["error"]["message"]
    assert loose.status_code == 200
