"""`/v1/completions` over HTTP, with the stand-in engine."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest


def complete(http: httpx.Client, **body: Any) -> dict[str, Any]:
    """A successful completion."""
    response = http.post("/v1/completions", json={"model": "tiny", "max_tokens": 64, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def stream(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream that ends with [DONE]."""
    response = http.post("/v1/completions", json={"model": "tiny", "max_tokens": 64, "stream": True, **body})
    assert response.status_code == 200, response.text
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def test_answer_has_every_field_that_clients_read(http: httpx.Client) -> None:
    answer = complete(http, prompt="hello")

    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert isinstance(answer["created"], int)
    assert answer["model"] == "tiny"
    assert answer["choices"] == [
        {"index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 6,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_max_tokens_defaults_to_16_and_null_equals_absent(http: httpx.Client) -> None:
    response = http.post(
        "/v1/completions",
        json={"model": None, "prompt": "x" * 30, "max_tokens": None, "stop": None, "n": None, "seed": None},
    )

    assert response.json()["choices"][0]["text"] == "x" * 16
    assert response.json()["choices"][0]["finish_reason"] == "length"
    assert response.json()["model"] == "tiny"


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        (["ab", "cd"], ["ab", "cd"]),
        ([104, 105], ["hi"]),
        ([[104, 105], [65]], ["hi", "A"]),
    ],
)
def test_prompts_may_be_texts_or_token_ids(http: httpx.Client, prompt: Any, texts: list[str]) -> None:
    answer = complete(http, prompt=prompt)

    assert [choice["text"] for choice in answer["choices"]] == texts


def test_choices_are_numbered_prompt_by_prompt_and_seeded_each(http: httpx.Client) -> None:
    answer = complete(http, prompt=["a", "b"], n=2, seed=7)

    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in answer["choices"]] == ["7:a", "8:a", "7:b", "8:b"]
    assert answer["usage"]["prompt_tokens"] == 2


def test_stop_string_ends_the_text_and_is_named(http: httpx.Client) -> None:
    choice = complete(http, prompt="one two three", stop=["two", "zzz"])["choices"][0]

    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("one ", "stop", "two")


def test_stop_string_can_be_kept(http: httpx.Client) -> None:
    body = {"prompt": "one two three", "stop": "two", "include_stop_str_in_output": True}

    assert complete(http, **body)["choices"][0]["text"] == "one two"
    assert "".join(chunk["choices"][0]["text"] for chunk in stream(http, **body)) == "one two"


def test_stop_token_id_ends_the_text_and_is_the_reason(http: httpx.Client) -> None:
    choice = complete(http, prompt="one two", stop_token_ids=[ord("t")])["choices"][0]

    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("one ", "stop", ord("t"))


def test_ignore_eos_runs_to_max_tokens(http: httpx.Client) -> None:
    choice = complete(http, prompt="ab", ignore_eos=True, max_tokens=5)["choices"][0]

    assert (choice["text"], choice["finish_reason"]) == ("ababa", "length")


def test_echo_puts_the_prompt_in_front(http: httpx.Client) -> None:
    assert complete(http, prompt="ab", echo=True)["choices"][0]["text"] == "abab"
    assert complete(http, prompt=[97, 98], echo=True)["choices"][0]["text"] == "abab"


def test_echo_with_no_tokens_gives_only_the_prompt_with_its_logprobs(http: httpx.Client) -> None:
    answer = complete(http, prompt="abc", echo=True, max_tokens=0, logprobs=1)

    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"] == {
        "text_offset": [0, 1, 2],
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -0.5, -0.5],
        "top_logprobs": [None, {"b": -0.5}, {"c": -0.5}],
    }
    assert answer["usage"]["completion_tokens"] == 0


def test_logprobs_hold_the_token_and_the_alternatives_and_no_infinity(http: httpx.Client) -> None:
    logprobs = complete(http, prompt="ab", logprobs=3, max_tokens=1)["choices"][0]["logprobs"]

    assert logprobs["tokens"] == ["a"]
    assert logprobs["top_logprobs"] == [{"a": -0.5, "b": -1.5, "c": -9999.0}]


def test_logprobs_name_parts_of_a_character_by_their_bytes(http: httpx.Client) -> None:
    logprobs = complete(http, prompt="é", logprobs=0, max_tokens=2)["choices"][0]["logprobs"]

    assert logprobs["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"]


def test_prompt_logprobs_are_objects_by_token_id(http: httpx.Client) -> None:
    choice = complete(http, prompt="ab", prompt_logprobs=1, max_tokens=1)["choices"][0]

    assert choice["prompt_logprobs"] == [None, {"98": {"logprob": -0.5, "rank": 1, "decoded_token": "b"}}]


def test_token_ids_come_back_when_asked_for(http: httpx.Client) -> None:
    choice = complete(http, prompt="ab", return_token_ids=True, max_tokens=2)["choices"][0]

    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([97, 98], [97, 98])


def test_prompt_can_be_cut_to_its_last_tokens(http: httpx.Client) -> None:
    assert complete(http, prompt="x" * 600 + "end", truncate_prompt_tokens=3)["choices"][0]["text"] == "end"


@pytest.mark.parametrize("form", ["TEXT", "json", "BIN"])
def test_load_balancers_are_told_the_load_if_they_ask(http: httpx.Client, form: str) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    told = http.post("/v1/completions", json=body, headers={"endpoint-load-metrics-format": form})
    plain = http.post("/v1/completions", json=body)

    report = told.headers.get("endpoint-load-metrics", "")
    assert (told.status_code, "endpoint-load-metrics" in plain.headers) == (200, False)
    if form == "BIN":
        assert report == ""
    elif form == "TEXT":
        names = dict(part.split("=") for part in report.removeprefix("TEXT ").split(", "))
        assert names.keys() == {"named_metrics.kv_cache_usage_perc", "named_metrics.num_requests_waiting"}
        assert all(float(value) >= 0 for value in names.values())
    else:
        values = json.loads(report.removeprefix("JSON "))["named_metrics"]
        assert values.keys() == {"kv_cache_usage_perc", "num_requests_waiting"}


def test_stream_pieces_join_to_the_whole_text(http: httpx.Client) -> None:
    chunks = stream(http, prompt="grün 🌿 ok")

    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "grün 🌿 ok"
    assert not any("\ufffd" in chunk["choices"][0]["text"] for chunk in chunks)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"]][-1] == "stop"
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


def test_stream_of_several_choices_ends_each_once(http: httpx.Client) -> None:
    chunks = stream(http, prompt=["ab", "wxyz"], n=2)

    texts = dict.fromkeys(range(4), "")
    ends: list[int] = []
    for chunk in chunks:
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["text"]
        ends += [choice["index"]] if choice["finish_reason"] else []
    assert texts == {0: "ab", 1: "ab", 2: "wxyz", 3: "wxyz"}
    assert sorted(ends) == [0, 1, 2, 3]


def test_stream_holds_back_what_may_become_a_stop_string(http: httpx.Client) -> None:
    chunks = stream(http, prompt="a STOP b", stop="STOP")

    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", " ", ""]
    assert chunks[-1]["choices"][0]["stop_reason"] == "STOP"


def test_stream_echoes_once(http: httpx.Client) -> None:
    chunks = stream(http, prompt="ab", echo=True)

    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abab"


def test_usage_comes_in_a_last_chunk_when_asked_for(http: httpx.Client) -> None:
    chunks = stream(http, prompt="abc", stream_options={"include_usage": True})

    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 7
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_usage_comes_in_every_chunk_when_asked_for(http: httpx.Client) -> None:
    chunks = stream(
        http, prompt="abc", stream_options={"include_usage": True, "continuous_usage_stats": True}
    )

    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 4]


def test_stream_headers_keep_proxies_from_buffering(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"prompt": "a", "stream": True})

    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "\r" not in response.text


def test_adapter_is_chosen_by_name_and_named_in_the_answer(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"model": "org/loud one:v1", "prompt": "abc"})

    answer = response.json()
    assert answer["choices"][0]["text"] == "ABC"
    assert answer["model"] == "org/loud one:v1"
    name, digest = response.headers["x-loramux-adapter"].split(" ")
    assert name == "org/loud%20one:v1@1"
    assert digest.startswith("sha256:")
    assert digest[:23] in answer["system_fingerprint"]


def test_base_model_answers_without_the_adapter_header(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"model": "alias", "prompt": "abc"})

    assert response.json()["model"] == "alias"
    assert "x-loramux-adapter" not in response.headers
    assert response.json()["system_fingerprint"].endswith("-base")
