"""What schemathesis has to know about this API beyond its description; read by its command line.

The environment tells where an adapter is: LORAMUX_TEST_ADAPTER.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any, Final

import jsonschema
import schemathesis
from schemathesis.specs.openapi.checks import positive_data_acceptance

ADAPTER: Final = os.environ["LORAMUX_TEST_ADAPTER"]
MODEL: Final = "tiny"
_SOURCE_FIELDS: Final = ("source", "lora_path", "src")
_EVENTS: Final = "text/event-stream"

# Refusals of requests that fit the description, by field: what they break cannot be said in a schema.
BEYOND_SCHEMAS: Final = {
    "source": "an address is a path, a URI or a Hub id",
    "lora_path": "the same",
    "src": "the same",
    "lora_name": "no control characters, no `..`, not `events`, not the base model's name",
    "name": "the same",
    "digest": "the digest of what is at the source",
    "input_tokens": "the prompt's length in tokens",
    "prompt": "the same; and an empty one has no token to go on from",
    "truncate_prompt_tokens": "-1 or at least 1",
    "min_tokens": "at most max_tokens, and what the context holds",
    "max_tokens": "at most the context",
    "max_completion_tokens": "the same",
    "max_output_tokens": "the same",
    "reasoning": "one of the efforts",
    "stream_options": "only with stream",
    "prompt_logprobs": "not with stream",
    "top_logprobs": "only with logprobs",
    "logit_bias": "keys are token ids",
    "input": "items of many kinds, each with fields of its own",
    "text": "as response_format",
    "messages": "roles, parts and their order are the chat template's business",
    "continue_final_message": "not with add_generation_prompt",
    "tools": "names and schemas of functions",
    "tool_choice": "names one of the tools",
    "parallel_tool_calls": "only with tools",
    "response_format": "a schema that is a grammar",
    "structured_outputs": "the same, and one of several kinds",
    "logprob_token_ids": "only with logprobs",
    "chat_template": "if the operator lets requests bring one",
    "chat_template_kwargs": "names that the template may be given",
}
_INDEX: Final = re.compile(r"[\[.].*")
_ONE_OF: Final = "needs either 'prompt' or 'messages'"  # null means that it is not given
# The schema language takes 5.0 for an integer; this API does not, as its types are strict (contract 3).
_WHOLE_FLOAT: Final = re.compile(r"valid integer, got -?[0-9.]+(e\+?[0-9]+)?\.$")


@schemathesis.hook
def before_call(_context: Any, case: Any, _kwargs: Any) -> None:
    """Bring requests to where they are carried out: a model that there is, a source that can be loaded."""
    if case.meta is None or not case.meta.generation.mode.is_positive or not isinstance(case.body, dict):
        return
    if case.meta.phase.name.value != "stateful":
        if isinstance(case.body.get("model"), str):
            case.body["model"] = MODEL
        return
    for field in _SOURCE_FIELDS:
        if field in case.body:
            case.body[field] = {"uri": ADAPTER} if isinstance(case.body[field], dict) else ADAPTER
            for other in ("digest", "base_model_name"):
                case.body.pop(other, None)


@schemathesis.check
def described_data_is_accepted(ctx: Any, response: Any, case: Any) -> bool | None:
    """`positive_data_acceptance`, but for the rules of `BEYOND_SCHEMAS`."""
    if response.status_code == 400:
        if case.media_type == "application/x-safetensors":
            return None  # random bytes are no adapter
        error = response.json()["error"]
        message = error["message"]
        if _WHOLE_FLOAT.search(message) or _ONE_OF in message:
            return None
        if _INDEX.sub("", error["param"] or "") in BEYOND_SCHEMAS:
            return None
    is_known: bool | None = positive_data_acceptance(ctx, response, case)
    return is_known


@schemathesis.check
def events_match_the_description(_ctx: Any, response: Any, case: Any) -> None:
    """Each `data:` line of a stream is an event of the kind that the description names."""
    (kind,) = response.headers.get("content-type", [""])
    if response.status_code != 200 or not kind.startswith(_EVENTS):
        return
    document = case.operation.schema.raw_schema
    operation = document["paths"][case.operation.path][case.operation.method.lower()]
    event = operation["responses"]["200"]["content"][_EVENTS]["schema"]["x-event"]
    schema = {
        "anyOf": [event, {"$ref": "#/components/schemas/Error"}],
        "components": document["components"],
    }
    lines = [line for line in response.text.split("\n") if line and not line.startswith(":")]
    data = [line for line in lines if line.startswith("data: ")]
    assert data, "an empty stream"
    assert all(line.startswith(("data: ", "event: ")) for line in lines), lines
    for line in data:
        if line != "data: [DONE]":
            jsonschema.validate(json.loads(line[6:]), schema)


@schemathesis.check
def errors_say_what_is_wrong(_ctx: Any, response: Any, _case: Any) -> None:
    """Every error has the one shape, a string code, a request id, and no trace of our insides."""
    assert response.headers["x-request-id"], "no request id"
    if response.status_code < 400:
        return
    error = response.json()["error"]
    assert error["message"]
    assert isinstance(error["code"], str)
    assert "Traceback" not in response.text
