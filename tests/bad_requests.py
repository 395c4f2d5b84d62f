"""Requests that must be refused, and how: used against the stand-in engine and the real one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

HUGE: Final = 10**40


@dataclass(frozen=True)
class BadRequest:
    """A completion request, and what its refusal must say."""

    name: str
    body: dict[str, Any]
    param: str | None
    fragments: list[str] = field(default_factory=list)  # of the message
    status: int = 400
    code: str = "invalid_value"


def _with_prompt(name: str, param: str, value: Any, *fragments: str) -> BadRequest:
    return BadRequest(f"{name}", {"prompt": "a", param: value}, param, list(fragments))


BAD_REQUESTS: Final = [
    BadRequest("unknown model", {"model": "nope", "prompt": "a"}, "model", ["nope"], 404, "model_not_found"),
    BadRequest("long model name", {"model": "x" * 300, "prompt": "a"}, "model", ["256", "300"]),
    BadRequest("model of a wrong type", {"model": 5, "prompt": "a"}, "model", ["string", "5"]),
    BadRequest("no prompt", {}, "prompt", ["required"]),
    BadRequest("null prompt", {"prompt": None}, "prompt", ["required"]),
    BadRequest("empty prompt", {"prompt": ""}, "prompt", ["non-empty"]),
    BadRequest("empty list", {"prompt": []}, "prompt", ["non-empty"]),
    BadRequest("empty prompt in a list", {"prompt": ["a", ""]}, "prompt", ["non-empty"]),
    BadRequest("empty ids in a list", {"prompt": [[1], []]}, "prompt", ["non-empty"]),
    BadRequest("mixed prompt", {"prompt": [1, "a"]}, "prompt", ["list"]),
    BadRequest("prompt of a wrong type", {"prompt": {"a": 1}}, "prompt", ["object"]),
    BadRequest("boolean ids", {"prompt": [True, False]}, "prompt", ["token ids"]),
    BadRequest("id out of vocabulary", {"prompt": [99999999]}, "prompt", ["99999999", "vocabulary"]),
    BadRequest("negative id", {"prompt": [-1]}, "prompt", ["-1", "vocabulary"]),
    BadRequest("huge id", {"prompt": [HUGE]}, "prompt", ["vocabulary"]),
    BadRequest("too many prompts", {"prompt": ["a"] * 1025}, "prompt", ["1024", "1025", "--max-prompts"]),
    BadRequest(
        "prompt too long",
        {"prompt": [5] * 9000},
        "input_tokens",
        ["maximum context length is", "9000"],
        code="context_length_exceeded",
    ),
    BadRequest(
        "text too long",
        {"prompt": "word " * 50000},
        "input_tokens",
        ["maximum context length is"],
        status=400,
        code="context_length_exceeded",
    ),
    BadRequest(
        "max_tokens over the context",
        {"prompt": "a", "max_tokens": 100000},
        "max_tokens",
        ["maximum context length is", "100000"],
        code="context_length_exceeded",
    ),
    _with_prompt("max_tokens 0", "max_tokens", 0, "at least 1", "0"),
    _with_prompt("negative max_tokens", "max_tokens", -5, "at least 1", "-5"),
    _with_prompt("text for a number", "max_tokens", "5", "integer", "'5'"),
    _with_prompt("fraction for an integer", "max_tokens", 1.5, "integer", "1.5"),
    BadRequest(
        "huge max_tokens",
        {"prompt": "a", "max_tokens": HUGE},
        "max_tokens",
        ["maximum context length"],
        code="context_length_exceeded",
    ),
    _with_prompt("n 0", "n", 0, "at least 1"),
    _with_prompt("n over the limit", "n", 129, "128", "129", "--max-n"),
    _with_prompt("huge n", "n", HUGE, "128", "--max-n"),
    _with_prompt("cold", "temperature", -0.1, "at least 0", "-0.1"),
    _with_prompt("hot", "temperature", 2.1, "2", "2.1"),
    _with_prompt("huge temperature", "temperature", 1e300, "1e+300"),
    _with_prompt("temperature as text", "temperature", "1", "number", "'1'"),
    _with_prompt("top_p 0", "top_p", 0, "greater than 0"),
    _with_prompt("top_p over 1", "top_p", 1.01, "1.01"),
    _with_prompt("top_k under -1", "top_k", -2, "-2"),
    _with_prompt("min_p over 1", "min_p", 1.5, "1.5"),
    _with_prompt("presence_penalty", "presence_penalty", 2.5, "2.5"),
    _with_prompt("frequency_penalty", "frequency_penalty", -2.5, "-2.5"),
    _with_prompt("repetition_penalty", "repetition_penalty", 0, "greater than 0"),
    _with_prompt("huge seed", "seed", 2**63, str(2**63)),
    _with_prompt("very huge seed", "seed", HUGE, "seed"),
    _with_prompt("seed as text", "seed", "1", "integer"),
    _with_prompt("too many stops", "stop", ["a"] * 5, "4", "5", "--max-stop"),
    _with_prompt("empty stop", "stop", [""], "empty"),
    _with_prompt("long stop", "stop", "x" * 2000, "1024", "2000"),
    _with_prompt("stop of a wrong type", "stop", 5, "string"),
    _with_prompt("stop id out of vocabulary", "stop_token_ids", [99999999], "99999999"),
    _with_prompt("too many stop ids", "stop_token_ids", [1] * 129, "128", "129"),
    _with_prompt("bias id out of vocabulary", "logit_bias", {"99999999": 1}, "99999999"),
    _with_prompt("bias without an id", "logit_bias", {"a": 1}, "'a'"),
    _with_prompt("too many biases", "logit_bias", {str(i): 1 for i in range(1025)}, "1024", "1025"),
    _with_prompt("no allowed ids", "allowed_token_ids", [], "empty"),
    _with_prompt("allowed id out of vocabulary", "allowed_token_ids", [-1], "-1"),
    _with_prompt("empty bad word", "bad_words", [" "], "empty"),
    _with_prompt("too many bad words", "bad_words", ["a"] * 129, "128", "129"),
    _with_prompt("min_tokens over max_tokens", "min_tokens", 17, "16", "17"),
    _with_prompt("negative min_tokens", "min_tokens", -1, "-1"),
    _with_prompt("too many logprobs", "logprobs", 21, "20", "21", "--max-logprobs"),
    _with_prompt("negative logprobs", "logprobs", -1, "-1"),
    _with_prompt("boolean logprobs", "logprobs", True, "integer"),
    _with_prompt("too many prompt_logprobs", "prompt_logprobs", 1000, "20", "1000"),
    _with_prompt("stream as text", "stream", "yes", "boolean"),
    _with_prompt("stream_options without stream", "stream_options", {"include_usage": True}, "stream"),
    _with_prompt("suffix", "suffix", "end", "not supported"),
    _with_prompt("beam search", "use_beam_search", True, "not supported"),
    _with_prompt("an unknown format", "response_format", {"type": "xml"}, "json_object"),
    _with_prompt("long salt", "cache_salt", "x" * 200, "128", "200"),
    _with_prompt("truncate to nothing", "truncate_prompt_tokens", 0, "0"),
]

# Bodies that are no request at all: bytes, content type, fragments of the message.
BAD_BODIES: Final[list[tuple[bytes, str, list[str]]]] = [
    (b"", "application/json", ["empty"]),
    (b"   ", "application/json", ["empty"]),
    (b"{", "application/json", ["not valid JSON"]),
    (b'{"prompt": "a",}', "application/json", ["not valid JSON"]),
    (b"hello", "application/json", ["not valid JSON"]),
    (b"[1]", "application/json", ["object", "list"]),
    (b'"text"', "application/json", ["object", "string"]),
    (b"null", "application/json", ["object", "null"]),
    (b'{"prompt": "a", "prompt": "b"}', "application/json", ["'prompt'", "twice"]),
    (b'{"prompt": "a", "x": [{"y": 1, "y": 2}]}', "application/json", ["'y'", "twice"]),
    (b'{"prompt": "a", "temperature": NaN}', "application/json", ["not valid JSON"]),
    (b'{"prompt": "a", "temperature": Infinity}', "application/json", ["not valid JSON"]),
    (b'{"prompt": "a", "temperature": 1e999}', "application/json", ["not valid JSON"]),
    (b'{"prompt": "\\ud800"}', "application/json", ["not valid JSON"]),
    (b'{"prompt": "\xff"}', "application/json", ["not valid JSON"]),
    (b'\xef\xbb\xbf{"prompt": "a"}', "application/json", ["not valid JSON"]),
    (b'{"seed": ' + b"9" * 5000 + b', "prompt": "a"}', "application/json", []),
    (b'{"x": ' + b"[" * 5000 + b"]" * 5000 + b"}", "application/json", ["nested"]),
    (b'{"prompt": "a"}', "text/plain", ["application/json", "text/plain"]),
    (b'{"prompt": "a"}', "application/x-www-form-urlencoded", ["application/json"]),
    (b"prompt=a", "multipart/form-data; boundary=x", ["application/json"]),
]
