"""Structured output through the official client, and grammars meant to do harm, on a real server."""

from __future__ import annotations

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from typing import Any, Final

import httpx
import jsonschema
import pytest
from openai import BadRequestError, OpenAI
from pydantic import BaseModel, ConfigDict, Field

MODEL: Final = "smollm2"


class Mood(StrEnum):
    GOOD = "good"
    BAD = "bad"


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")
    city: str = Field(max_length=12)
    zip: str = Field(pattern=r"^\d{5}$")


class Person(BaseModel):
    """Nested models, an enum, an optional: $defs, $ref and anyOf in the schema."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)
    mood: Mood
    home: Place
    other: Place | None


MESSAGES: Final[list[Any]] = [{"role": "user", "content": "Invent a person."}]


@pytest.mark.parametrize("model", [MODEL, "json"])
def test_parse_gives_the_clients_own_class(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.parse(
        model=model, messages=MESSAGES, response_format=Person, temperature=1.0, seed=1, max_tokens=300
    )

    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_a_stream_parses_as_well(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, response_format=Person, seed=3, max_tokens=300
    ) as stream:
        for _ in stream:
            pass
        answer = stream.get_final_completion()

    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_every_choice_of_a_call_fits(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        n=2,
        seed=1,
        max_tokens=300,
        logprobs=True,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": Person.model_json_schema(), "strict": True},
        },
    )

    texts = [choice.message.content or "" for choice in answer.choices]
    assert len(set(texts)) > 1
    for text in texts:
        jsonschema.validate(json.loads(text), Person.model_json_schema())


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"regex": r"\d{4}-\d{2}"}, r"\d{4}-\d{2}"),
        ({"choice": ["Paris", "Rome"]}, "Paris|Rome"),
        ({"grammar": 'root ::= "x" [0-9]{1,3} "!"'}, r"x\d+!"),
        ({"json": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}}, r"(?s)\[.*\]"),
        ({"regex": "[a-c]{2}", "choice": None}, "[a-c]{2}"),
    ],
)
def test_completions_keep_to_structured_outputs(
    client: OpenAI, constraint: dict[str, Any], pattern: str
) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="Answer:", max_tokens=60, seed=4, extra_body={"structured_outputs": constraint}
    )

    assert answer.choices[0].finish_reason == "stop"
    assert re.fullmatch(pattern, answer.choices[0].text)


def test_stop_strings_and_lengths_still_end_a_text(client: OpenAI) -> None:
    digits = {"structured_outputs": {"regex": "[0-9]+"}}
    cut = client.completions.create(model=MODEL, prompt="Pi: ", max_tokens=5, seed=1, extra_body=digits)
    stopped = client.completions.create(
        model=MODEL, prompt="Pi: ", max_tokens=60, stop=["1"], seed=1, logit_bias={"33": 5}, extra_body=digits
    )

    assert re.fullmatch("[0-9]+", cut.choices[0].text)
    assert cut.choices[0].finish_reason == "length"
    assert "1" not in stopped.choices[0].text


def test_a_schema_that_is_none_is_refused_by_name(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "strange"}, "strict": True},
            },
        )

    assert caught.value.param == "response_format"
    assert "strange" in caught.value.message


_RULES: Final = "\n".join(f"x{i}: x{(i + 1) % 1500} x{(i + 2) % 1500}?" for i in range(1500))
BOMBS: Final[list[dict[str, Any]]] = [
    {"json": {"type": "integer", "multipleOf": 999983}},
    {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    {"regex": "(" * 8000},
    {"regex": "(.*a.{25}b.*){3}"},
    {"json": {"$ref": "#"}},
    {"json": {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(40_000)}}},
    {"json": {"type": "string", "pattern": "(.*a.{30}){5}", "minLength": 3000, "maxLength": 5000}},
    {"grammar": 'start: x{0,1000}\nx: y{0,1000}\ny: z{0,1000}\nz: "a" | "b"'},
    {"grammar": "start: " + " | ".join(f"x{i}" for i in range(1500)) + "\n" + _RULES},
    {"grammar": "root ::= " + "(" * 30_000},
    {"choice": ["x" * 60] * 1500},
]


def test_bombs_hold_up_nobody(http: httpx.Client, client: OpenAI) -> None:
    gaps: list[float] = []
    ended = threading.Event()

    def read() -> None:
        last_s = time.perf_counter()
        stream = client.completions.create(
            model=MODEL, prompt="Once", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
        )
        for _ in stream:
            now_s = time.perf_counter()
            gaps.append(now_s - last_s)
            last_s = now_s
            if ended.is_set():
                stream.close()
                return

    def throw(bomb: dict[str, Any]) -> tuple[int, float]:
        began_s = time.perf_counter()
        body = {"model": MODEL, "prompt": "x", "max_tokens": 8, "structured_outputs": bomb}
        return http.post("/v1/completions", json=body).status_code, time.perf_counter() - began_s

    with ThreadPoolExecutor(5) as pool:
        reader = pool.submit(read)
        results = list(pool.map(throw, BOMBS))
        ended.set()
        reader.result()

    assert {status for status, _ in results} <= {200, 400}
    assert [status for status, _ in results].count(400) >= 8
    assert max(seconds for _, seconds in results) < 45.0
    assert max(gaps[1:]) < 3.0, sorted(gaps)[-5:]
    assert http.get("/health").status_code == 200
