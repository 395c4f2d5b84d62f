"""What requests may hold, beyond what the framework reads off the types: nulls, ranges, uploads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from loramux.server.adapter_names import MAX_NAME_CHARS
from loramux.server.adapter_upload import CONFIG_HEADER
from loramux.server.limits import Limits
from loramux.server.routes.adapter_route import UPLOAD_TYPE
from loramux.server.schemas.adapters import PutAdapter
from loramux.server.schemas.chat import REASONING_EFFORTS
from loramux.server.services import Services

_MAX_PRIORITY: Final = 2**31 - 1
_INT64: Final = {"minimum": -(2**63), "maximum": 2**63 - 1}
# Fields that are read only to be refused, so that nobody takes them for ignored.
_REFUSED: Final = (
    *("use_beam_search", "length_penalty", "best_of", "repetition_detection", "suffix", "prompt_embeds"),
    *("media_io_kwargs", "mm_processor_kwargs", "thinking_token_budget"),
    *(
        f"guided_{kind}"
        for kind in ("json", "regex", "choice", "grammar", "json_object", "whitespace_pattern")
    ),
)
_REFUSED_IN: Final = {
    "ResponsesRequest": ("previous_response_id", "conversation", "prompt", "background"),
}
_TEXT_FIELDS: Final = ("lora_name", "lora_path", "name", "src", "source", "uri")
# Of a path: rules of adapter_names.py that a schema can say.
_NAME: Final = {"minLength": 1, "maxLength": MAX_NAME_CHARS}


def state_fields(document: dict[str, Any], services: Services) -> None:
    """Say which values this server takes: its limits, its vocabulary, and null for whatever is optional."""
    schemas: dict[str, Any] = document["components"]["schemas"]
    rules = _rules(services.config.server.limits, services.engine.info.vocab_size)
    for title, schema in schemas.items():
        required = schema.get("required", ())
        for name in (*_REFUSED, *_REFUSED_IN.get(title, ())):
            schema.get("properties", {}).pop(name, None)
        for name, field in schema.get("properties", {}).items():
            _narrow(field, rules.get(name, {}))
            if name in required and name in _TEXT_FIELDS:
                field["minLength"] = 1
            if name not in required:
                _allow_null(field)
    for path, methods in document["paths"].items():
        for operation in methods.values():
            for parameter in operation.get("parameters", ()):
                if parameter["in"] == "path" and path == "/v1/lora_adapters/{name}":
                    parameter["schema"] |= _NAME


def describe_uploads(document: dict[str, Any]) -> None:
    """The body of a PUT, which the route reads by itself: where an adapter is, or its bytes."""
    operation = document["paths"]["/v1/lora_adapters/{name}"]["put"]
    schema = PutAdapter.model_json_schema(ref_template="#/components/schemas/{model}")
    for name, field in schema["properties"].items():
        if name not in schema["required"]:
            _allow_null(field)
    schema["properties"]["source"]["minLength"] = 1
    document["components"]["schemas"]["PutAdapter"] = schema
    operation["requestBody"] = {
        "required": True,
        "description": "Where the adapter is; or its weights, with what else there is to say in the query.",
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/PutAdapter"}},
            UPLOAD_TYPE: {"schema": {"type": "string", "format": "binary"}},
        },
    }
    operation["parameters"].append(
        {
            "in": "header",
            "name": CONFIG_HEADER,
            "description": "For an upload: its adapter_config.json, as JSON or in base64.",
            "required": False,
            "schema": {"type": "string"},
        }
    )


def _rules(limits: Limits, vocab_size: int) -> Mapping[str, Mapping[str, Any]]:
    """Constraints by field name, as `sampling_params.py` and `limits.py` check them."""
    ids = {"items": {"minimum": 0, "maximum": vocab_size - 1}}
    string = {"minLength": 1, "maxLength": limits.string_chars}
    return {
        "n": {"minimum": 1, "maximum": limits.n},
        "temperature": {"minimum": 0, "maximum": 2},
        "top_p": {"exclusiveMinimum": 0, "maximum": 1},
        "top_k": {"minimum": -1, "maximum": _INT64["maximum"]},
        "min_p": {"minimum": 0, "maximum": 1},
        "presence_penalty": {"minimum": -2, "maximum": 2},
        "frequency_penalty": {"minimum": -2, "maximum": 2},
        "repetition_penalty": {"minimum": 0.01, "maximum": 100},
        "seed": _INT64,
        "max_tokens": {"minimum": 1},
        "max_completion_tokens": {"minimum": 1},
        "max_output_tokens": {"minimum": 1},
        "min_tokens": {"minimum": 0},
        "logprobs": {"minimum": 0, "maximum": limits.logprobs},
        "top_logprobs": {"minimum": 0, "maximum": limits.logprobs},
        "prompt_logprobs": {"minimum": 0, "maximum": limits.logprobs},
        "stop": {**string, "maxItems": limits.stop, "items": string},
        "bad_words": {"maxItems": limits.bad_words, "items": {**string, "pattern": r"\S"}},
        "stop_token_ids": {"maxItems": limits.stop_token_ids, **ids},
        "allowed_token_ids": {"minItems": 1, "maxItems": limits.logit_bias, **ids},
        "tokens": ids,
        "messages": {"minItems": 1, "maxItems": limits.messages},
        "logprob_token_ids": {"maxItems": limits.logprob_token_ids, **ids},
        "priority": {"minimum": -_MAX_PRIORITY, "maximum": _MAX_PRIORITY},
        "reasoning_effort": {"enum": list(REASONING_EFFORTS)},
        "effort": {"enum": list(REASONING_EFFORTS)},
        "cache_salt": {"maxLength": 128},
        "model": {"maxLength": MAX_NAME_CHARS},
        "truncate_prompt_tokens": {"minimum": -1},
        "stream_interval": {"minimum": 1},
    }


_KEYWORDS: Final = {
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "string": ("minLength", "maxLength", "pattern", "enum"),
    "array": ("minItems", "maxItems", "items"),
}


def _narrow(field: dict[str, Any], rule: Mapping[str, Any]) -> None:
    """Add a rule's keywords to those members of a union that they speak about."""
    for member in _members(field):
        for keyword in _KEYWORDS.get(member.get("type", ""), ()):
            if keyword == "items" and keyword in rule:
                _narrow(member["items"], rule["items"])
            elif keyword in rule:
                member[keyword] = rule[keyword]


def _members(field: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from field.get("anyOf", (field,))


def _allow_null(field: dict[str, Any]) -> None:
    """Null says the same as leaving the field out."""
    if any(member.get("type") == "null" for member in _members(field)) or not field.keys() - {"title"}:
        return
    about: dict[str, Any] = {
        name: field.pop(name) for name in ("title", "description", "default") if name in field
    }
    members = field.pop("anyOf", None) or [dict(field)]
    field.clear()
    field.update(about, anyOf=[*members, {"type": "null"}])
