"""Published attacks on servers of this kind, as requests: one entry for each advisory or report.

Only what concerns a server of text models is here. Attacks on features that do not exist (images,
pickled messages) are entries as well: their refusal must not change by accident.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

MANY: Final = 500_000
CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"


@dataclass(frozen=True)
class Attack:
    """One request, and how it must be answered."""

    name: str  # begins with the advisory's id
    body: dict[str, Any] | Callable[[], dict[str, Any]] | str  # a text is the whole body as it is sent
    status: int | tuple[int, ...] = 400
    code: str | None = "invalid_value"
    path: str = COMPLETIONS
    text: str = ""  # part of the message

    def encode(self) -> bytes:
        """The body as bytes, made before the clock runs."""
        if isinstance(self.body, str):
            return self.body.encode()
        body = self.body() if callable(self.body) else self.body
        if self.path not in (CHAT, COMPLETIONS):
            return json.dumps(body).encode()
        base: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
        if self.path == COMPLETIONS:
            base = {"prompt": "a", "max_tokens": 8}
        return json.dumps({**base, **body}).encode()


def nested(depth: int, kind: str = "object") -> dict[str, Any]:
    """A JSON schema with so many levels."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
        if kind == "array":
            schema = {"type": "array", "items": schema["properties"]["a"]}
    return schema


def deep(before: str, depth: int, after: str) -> str:
    """A chat with a schema that is deeper than Python can write."""
    schema = '{"type": "object", "properties": {"a": ' * depth + "{}" + "}}" * depth
    return f'{{"messages": [{{"role": "user", "content": "hi"}}], {before}{schema}{after}}}'


def exponential(depth: int) -> dict[str, Any]:
    """A schema of a few hundred bytes that means 2^depth alternatives."""
    definitions = {
        f"d{i}": {"anyOf": [{"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}}] * 2}
        for i in range(depth)
    }
    definitions[f"d{depth}"] = {"type": "string"}  # type: ignore[dict-item]
    return {"$defs": definitions, "$ref": "#/$defs/d0"}


def tool(parameters: Any) -> dict[str, Any]:
    """A chat with one tool that must be called."""
    function = {"name": "f", "parameters": parameters}
    return {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}


def image(url: str, kind: str = "image_url") -> dict[str, Any]:
    """A message with a part that is no text."""
    return {"messages": [{"role": "user", "content": [{"type": kind, kind: {"url": url}}]}]}


def schema_format(schema: Any) -> dict[str, Any]:
    """OpenAI's field for a schema."""
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


COUNTS: Final = [
    Attack("CVE-2026-34756 huge n", {"n": 10**9}, text="--max-n"),
    Attack("CVE-2026-34756 huge n in a chat", {"n": 10**9}, path=CHAT, text="--max-n"),
    Attack("CVE-2026-34756 n times prompts", {"prompt": ["a"] * 1024, "n": 128}, text="--max-sequences"),
    Attack("CVE-2024-8939 best_of", {"best_of": 10**9}, text="best_of"),
    Attack("GHSA-4fv6-24cq-h5pw bad_words", lambda: {"bad_words": ["a"] * MANY}),
    Attack("GHSA-4fv6-24cq-h5pw bad_words that are long", {"bad_words": ["a" * 10**6]}, text="1024"),
    Attack("GHSA-m9fh-2f8w-jhw9 logit_bias", lambda: {"logit_bias": {str(i): 1 for i in range(MANY)}}),
    Attack("GHSA-83mh-6mwq-3hg9 batch of prompts", lambda: {"prompt": ["a"] * 200_000}),
    Attack("GHSA-83mh-6mwq-3hg9 batch of conversations", {"messages": [[{"role": "user"}]] * 9}, path=CHAT),
    Attack(
        "GHSA-83mh-6mwq-3hg9 messages",
        lambda: {"messages": [{"role": "user", "content": "a"}] * 30_000},
        path=CHAT,
        text="--max-messages",
    ),
    Attack("vllm#51447 stop list", lambda: {"stop": ["a", "b"] * (MANY // 2)}),
    Attack(
        "vllm#51447 stop list below the limit of values",
        lambda: {"stop": ["ab"] * 200_000},
        text="--max-stop",
    ),
    Attack("vllm#54721 equal stop strings", {"stop": ["a"] * 5}, text="--max-stop"),
    Attack("vllm#54721 long stop string", {"stop": "a" * 10**6}, text="1024"),
    Attack("GHSA-rp22-rc8r-qjmh stop_token_ids", lambda: {"stop_token_ids": [1] * MANY}, text="128"),
    Attack("GHSA-rp22-rc8r-qjmh allowed_token_ids", lambda: {"allowed_token_ids": [1] * MANY}, text="1024"),
    Attack("vllm#44968 stop id out of vocabulary", {"stop_token_ids": [2**31]}, text="vocabulary"),
    Attack("vllm#44968 negative stop id", {"stop_token_ids": [-1]}, text="vocabulary"),
    Attack("vllm#44968 stop id of 200 bits", {"stop_token_ids": [2**200]}, text="vocabulary"),
    Attack("vllm#44968 allowed id out of vocabulary", {"allowed_token_ids": [2**63]}, text="vocabulary"),
    Attack("vllm#44968 biased id out of vocabulary", {"logit_bias": {"4294967296": 1}}, text="vocabulary"),
    Attack("vllm#44968 prompt id out of vocabulary", {"prompt": [2**63]}, text="vocabulary"),
    Attack("vllm#44968 long prompt of mixed kinds", lambda: {"prompt": [1, "a"] * 150_000}),
    Attack("local#264 prompt_logprobs -1", {"prompt_logprobs": -1}, text="prompt_logprobs"),
    Attack(
        "local#266 prompt_logprobs as large as the vocabulary",
        {"prompt_logprobs": 10**5},
        text="--max-logprobs",
    ),
    Attack("local#264 logprobs -1", {"logprobs": -1}, text="logprobs"),
    Attack("local#266 logprobs", {"logprobs": 10**5}, text="--max-logprobs"),
    Attack(
        "local#266 top_logprobs", {"logprobs": True, "top_logprobs": 10**5}, path=CHAT, text="--max-logprobs"
    ),
    Attack(
        "local#266 echo of a long prompt with logprobs",
        {"prompt": "a" * 6000, "echo": True, "logprobs": 20, "max_tokens": 1},
        status=200,
        code=None,
    ),
    Attack("huge max_tokens", {"max_tokens": 10**30}, code="context_length_exceeded"),
    Attack("huge priority", {"priority": 10**30}, text="priority"),
    Attack("huge truncate_prompt_tokens", {"truncate_prompt_tokens": 10**30}, status=(200, 400), code=None),
    Attack(
        "text beyond the context", lambda: {"prompt": "word, " * (5 << 20)}, code="context_length_exceeded"
    ),
    Attack(
        "text that might just fit the context",
        lambda: {"prompt": "ab " * 280_000},
        code="context_length_exceeded",
    ),
    Attack("text full of quotes", lambda: {"prompt": '"\\' * (4 << 20)}, code="context_length_exceeded"),
    Attack("text full of brackets", lambda: {"prompt": "[{" * (8 << 20)}, code="context_length_exceeded"),
    Attack(
        "text beyond the context in a chat",
        lambda: {"messages": [{"role": "user", "content": "x " * (8 << 20)}]},
        path=CHAT,
        code="context_length_exceeded",
    ),
    Attack("a million lists", lambda: {"x": [[]] * 10**6}, text="--max-json-values"),
    Attack("a million objects", lambda: {"x": [{"a": 1}] * 10**6}, text="--max-json-values"),
    Attack("a million keys", lambda: {"x": {str(i): i for i in range(10**6)}}, text="--max-json-values"),
    Attack(
        "a million numbers that nobody asked for", lambda: {"x": list(range(10**6))}, status=200, code=None
    ),
]

PENALTIES: Final = [
    Attack(f"CVE-2026-44223 {name} {value}", {name: value, "max_tokens": 4}, text=name)
    for name, values in {
        "presence_penalty": (1e308, -1e308, 2.01),
        "frequency_penalty": (1e308, -1e308, -2.01),
        "repetition_penalty": (0, -1.0, 1e308, 1e-320),
        "temperature": (1e308, -1e-9),
        "top_p": (0, 1e308),
        "min_p": (-1, 1e308),
        "top_k": (-2, 2**64),
    }.items()
    for value in values
]

GRAMMARS: Final = [
    Attack("CVE-2025-48942 json that is no schema", {"structured_outputs": {"json": "not json"}}),
    Attack("CVE-2025-48942 json_schema that is a list", schema_format([1]), path=CHAT),
    Attack("CVE-2025-48942 unknown type", schema_format({"type": "blorp"}), path=CHAT),
    Attack("CVE-2025-48942 reference to nowhere", schema_format({"$ref": "#/$defs/none"}), path=CHAT),
    Attack(
        "CVE-2025-48942 reference to the internet",
        schema_format({"$ref": "http://169.254.169.254/x"}),
        path=CHAT,
    ),
    Attack("CVE-2025-48943 bad regex", {"structured_outputs": {"regex": "[unclosed"}}),
    Attack("CVE-2025-48943 lookahead", {"structured_outputs": {"regex": "(?=a)(?!b)a"}}),
    Attack(
        "CVE-2025-48943 bad regex in a schema", schema_format({"type": "string", "pattern": "("}), path=CHAT
    ),
    Attack(
        "CVE-2025-57809 recursion in a schema",
        schema_format(nested(60)),
        path=CHAT,
        status=(200, 400),
        code=None,
    ),
    Attack(
        "CVE-2025-57809 deep schema",
        deep(
            '"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": ', 2000, "}}"
        ),
        path=CHAT,
        text="--max-json-depth",
    ),
    Attack(
        "CVE-2025-57809 deep parentheses", {"structured_outputs": {"regex": "(" * 4000 + "a" + ")" * 4000}}
    ),
    Attack(
        "CVE-2025-57809 grammar that calls itself",
        {"structured_outputs": {"grammar": "start: start"}},
        status=(200, 400),
        code=None,
    ),
    Attack(
        "GHSA-q9q8-922v-2c42 counted repetitions",
        {"structured_outputs": {"regex": "(((a{1,1000}){1,1000}){1,1000})b"}},
        status=(200, 400),
        code=None,
    ),
    Attack(
        "GHSA-q9q8-922v-2c42 long regex",
        {"structured_outputs": {"regex": "a?" * 10**5}},
        text="--max-regex-bytes",
    ),
    Attack(
        "GHSA-q9q8-922v-2c42 large schema",
        lambda: schema_format({"enum": [str(i) for i in range(50_000)]}),
        path=CHAT,
        text="--max-schema-bytes",
    ),
    Attack(
        "GHSA-q9q8-922v-2c42 many choices", {"structured_outputs": {"choice": ["a"] * 10**5}}, text="--max-"
    ),
    Attack(
        "GHSA-rwxx-mrjm-wc2m alternatives",
        schema_format(exponential(24)),
        path=CHAT,
        status=(200, 400),
        code=None,
    ),
    Attack(
        "GHSA-rwxx-mrjm-wc2m large bounds",
        schema_format({"type": "array", "items": {"type": "string", "minLength": 10**6}, "minItems": 10**6}),
        path=CHAT,
        status=(200, 400),
        code=None,
    ),
    Attack("malformed grammar", {"structured_outputs": {"grammar": 'start: "a" (("b'}}),
    Attack(
        "CVE-2025-29770 many different grammars",
        {"structured_outputs": {"choice": ["x", "y"]}},
        status=200,
        code=None,
    ),
]

TOOLS: Final = [
    Attack(
        "CVE-2025-48944 bad pattern",
        tool({"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}, "required": ["a"]}),
        path=CHAT,
    ),
    Attack(
        "CVE-2025-48944 bad type",
        tool({"type": "object", "properties": {"a": {"type": "blorp"}}, "required": ["a"]}),
        path=CHAT,
    ),
    Attack("CVE-2025-48944 parameters that are text", tool("x"), path=CHAT),
    Attack(
        "CVE-2025-48944 parameters that are deep",
        deep('"tools": [{"type": "function", "function": {"name": "f", "parameters": ', 2000, "}}]"),
        path=CHAT,
        text="--max-json-depth",
    ),
    Attack(
        "many tools",
        lambda: {"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(5000)]},
        path=CHAT,
        text="--max-tools",
    ),
    Attack(
        "tool without a name",
        {"tools": [{"type": "function", "function": {}}], "tool_choice": "required"},
        path=CHAT,
    ),
]

TEMPLATES: Final = [
    *(
        Attack(f"CVE-2025-62426 {name}", {"chat_template_kwargs": {name: value}}, path=CHAT, text=name)
        for name, value in {
            "chat_template": "{{ 1 }}",
            "tokenize": False,
            "messages": [],
            "tools": [],
            "add_generation_prompt": "x",
        }.items()
    ),
    Attack(
        "CVE-2025-62426 __class__",
        {"chat_template_kwargs": {"__class__": 1, "self": 2}},
        path=CHAT,
        status=(200, 400),
        code=None,
    ),
    Attack(
        "CVE-2025-61620 chat_template",
        {"chat_template": "{% for i in range(10**9) %}{% endfor %}"},
        path=CHAT,
        text="chat templates",
    ),
    Attack("CVE-2024-8768 empty prompt", {"prompt": ""}),
    Attack("CVE-2024-8768 no prompts", {"prompt": []}),
    Attack("CVE-2024-8768 an empty prompt among others", {"prompt": ["a", ""]}),
    Attack("CVE-2024-8768 empty ids", {"prompt": [[]]}),
    Attack("CVE-2024-8768 no messages", {"messages": []}, path=CHAT),
]

_UNSUPPORTED: Final = "unsupported_content_type"
MEDIA: Final = [
    Attack("CVE-2026-22773 tiny image", image("data:image/png;base64,AAAA"), path=CHAT, code=_UNSUPPORTED),
    Attack(
        "CVE-2026-5497 frames",
        lambda: {
            "messages": [
                {"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:,x"}}] * 5000}
            ]
        },
        path=CHAT,
        code=_UNSUPPORTED,
    ),
    Attack("CVE-2026-22778 broken image", image("data:image/jpeg;base64,////"), path=CHAT, code=_UNSUPPORTED),
    Attack(
        "CVE-2025-6242 metadata service", image("http://169.254.169.254/latest"), path=CHAT, code=_UNSUPPORTED
    ),
    Attack(
        "CVE-2026-24779 two parsers", image("http://a.example\\@127.0.0.1/"), path=CHAT, code=_UNSUPPORTED
    ),
    Attack("audio", image("data:,x", "input_audio"), path=CHAT, code=_UNSUPPORTED),
    Attack(
        "CVE-2026-0599 image in plain text",
        {"prompt": "![](http://169.254.169.254/x)"},
        status=200,
        code=None,
    ),
    Attack("CVE-2025-62164 prompt_embeds", {"prompt_embeds": "gASVAAAAAAAAAA=="}, text="prompt_embeds"),
]

ELSEWHERE: Final = [
    Attack(
        "a million ids to detokenize",
        lambda: {"tokens": [97] * 10**6},
        path="/detokenize",
        status=(200, 400),
        code=None,
    ),
    Attack(
        "a megabyte to tokenize",
        lambda: {"prompt": "ab " * 350_000},
        path="/tokenize",
        status=(200, 400),
        code=None,
    ),
    Attack(
        "a megabyte of chat to tokenize",
        lambda: {"messages": [{"role": "user", "content": "ab " * 200_000}]},
        path="/tokenize",
        status=(200, 400),
        code=None,
    ),
    Attack("ids out of vocabulary to detokenize", {"tokens": [2**70]}, path="/detokenize"),
    Attack(
        "a megabyte cut to one token",
        lambda: {"prompt": "ab " * 350_000, "truncate_prompt_tokens": 1},
        status=(200, 400),
        code=None,
    ),
    Attack(
        "many prompts of some length, the last one empty",
        lambda: {"prompt": [*(["ab " * 400] * 800), ""]},
    ),
    Attack(
        "many messages of some length",
        lambda: {"messages": [{"role": "user", "content": "ab <|end|>" * 40}] * 200},
        path=CHAT,
        status=(200, 400),
        code=None,
    ),
    Attack(
        "prompt of ids that fills the context",
        lambda: {"prompt": [97] * 99_000, "max_tokens": 1},
        status=200,
        code=None,
    ),
]

ATTACKS: Final = [*ELSEWHERE, *COUNTS, *PENALTIES, *GRAMMARS, *TOOLS, *TEMPLATES, *MEDIA]
