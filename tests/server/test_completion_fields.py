"""Fields of `/v1/completions` beyond the plain ones, over HTTP, with the stand-in engine."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.running_server import running_server
from tests.server.fake_serve import COMMAND
from tests.server.test_completions import complete, stream


@pytest.fixture(scope="module")
def strict_http(text_model: Path) -> Iterator[httpx.Client]:
    """A server whose operator decided about answers."""
    flags = (
        *("--enable-force-include-usage", "--stream-interval=3", "--return-tokens-as-token-ids"),
        *("--enable-per-request-metrics", "--served-model-name=tiny"),
    )
    with running_server(str(text_model), *flags, command=COMMAND) as server, server.client() as client:
        yield client


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("as_stream", [False, True])
def test_scoring_harness_gets_a_value_for_every_prompt_token_but_the_first(
    http: httpx.Client, max_tokens: int, as_stream: bool
) -> None:
    prompts = [list(b"the cat sat"), list(b"on")]
    body = {"prompt": prompts, "echo": True, "max_tokens": max_tokens, "logprobs": 1, "temperature": 0}

    choices = _stream_choices(http, **body) if as_stream else complete(http, **body)["choices"]

    for choice, prompt in zip(sorted(choices, key=lambda c: c["index"]), prompts, strict=True):
        logprobs = choice["logprobs"]
        assert {len(values) for values in logprobs.values()} == {len(prompt) + max_tokens}
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        # what lm-eval does with it: the continuation's sum, and whether it is the greedy one
        context = 1
        values = logprobs["token_logprobs"][context:]
        best = [max(top.values()) for top in logprobs["top_logprobs"][context:]]
        assert sum(values) == pytest.approx(-0.5 * (len(prompt) - context + max_tokens))
        assert values == best


def _stream_choices(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    """The chunks of each choice put together."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in stream(http, **body):
        for piece in chunk["choices"]:
            choice = found.setdefault(piece["index"], {**piece, "text": "", "logprobs": {}})
            choice["text"] += piece["text"]
            for name, values in (piece["logprobs"] or {}).items():
                choice["logprobs"].setdefault(name, []).extend(values)
    return list(found.values())


def test_stream_and_whole_answer_carry_the_same_logprobs(http: httpx.Client) -> None:
    body = {"prompt": ["grün 🌿", "ab STOP c"], "echo": True, "logprobs": 2, "n": 2, "stop": "STOP"}

    whole = complete(http, **body)["choices"]
    pieces = sorted(_stream_choices(http, **body), key=lambda choice: int(choice["index"]))

    assert [choice["logprobs"] for choice in pieces] == [choice["logprobs"] for choice in whole]
    assert [choice["text"] for choice in pieces] == [choice["text"] for choice in whole]


def test_offsets_point_to_the_character_that_a_token_begins_or_continues(http: httpx.Client) -> None:
    choice = complete(http, prompt="aé🌿b", logprobs=0)["choices"][0]

    offsets = choice["logprobs"]["text_offset"]
    assert offsets[:9] == [0, 1, 2, 2, 3, 3, 3, 3, 4]
    assert all(first <= second for first, second in pairwise(offsets))


def test_echo_and_prompt_logprobs_each_show_as_many_alternatives_as_they_asked_for(
    http: httpx.Client,
) -> None:
    choice = complete(http, prompt="ab", echo=True, logprobs=1, prompt_logprobs=3)["choices"][0]

    assert len(choice["logprobs"]["top_logprobs"][1]) == 1  # the token is its own best alternative
    assert len(choice["prompt_logprobs"][1]) == 3
    assert choice["prompt_logprobs"][1]["100"]["logprob"] == -9999.0


@pytest.mark.parametrize("as_stream", [False, True])
def test_every_choice_shows_the_prompt_that_the_first_one_looked_at(
    http: httpx.Client, as_stream: bool
) -> None:
    body = {"prompt": ["ab", "xyz"], "n": 3, "echo": True, "logprobs": 1, "max_tokens": 2}

    choices = _stream_choices(http, **body) if as_stream else complete(http, **body)["choices"]

    assert len(choices) == 6
    for choice in choices:
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert len(choice["logprobs"]["tokens"]) == len("ab" if choice["index"] < 3 else "xyz") + 2


def test_stream_shows_the_prompt_though_the_first_token_is_held_back(http: httpx.Client) -> None:
    choices = _stream_choices(http, prompt="stop here", stop="stop", prompt_logprobs=0)

    assert [len(choice["prompt_logprobs"]) for choice in choices if "prompt_logprobs" in choice] == [9]


def test_named_tokens_are_among_the_alternatives(http: httpx.Client) -> None:
    logprobs = complete(http, prompt="a", logprobs=1, logprob_token_ids=[65, 97], max_tokens=1)

    top = logprobs["choices"][0]["logprobs"]["top_logprobs"][0]
    assert set(top) == {"a", "A"}


def test_truncation_takes_from_either_side(http: httpx.Client) -> None:
    def cut(**body: Any) -> str:
        answer = complete(http, prompt="start middle end", **body)
        text: str = answer["choices"][0]["text"]
        return text

    assert cut(truncate_prompt_tokens=3) == "end"
    assert cut(truncate_prompt_tokens=5, truncation_side="right") == "start"
    assert cut(truncate_prompt_tokens=-1) == "start middle end"


def test_echo_shows_what_truncation_left_over(http: httpx.Client) -> None:
    choice = complete(http, prompt="start end", truncate_prompt_tokens=3, echo=True, max_tokens=0, logprobs=0)

    assert choice["choices"][0]["text"] == "end"
    assert choice["choices"][0]["logprobs"]["tokens"] == ["e", "n", "d"]


def test_chunks_hold_as_many_tokens_as_the_request_says(http: httpx.Client) -> None:
    chunks = stream(http, prompt="abcdefgh", stream_interval=3, return_token_ids=True)

    assert [len(chunk["choices"][0]["token_ids"]) for chunk in chunks] == [1, 3, 3, 2]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abcdefgh"


def test_interval_keeps_choices_apart(http: httpx.Client) -> None:
    chunks = stream(http, prompt=["abcdefgh", "xyz"], stream_interval=100)

    texts = [
        "".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == i) for i in (0, 1)
    ]
    assert texts == ["abcdefgh", "xyz"]
    assert len(chunks) == 4


def test_operator_decides_about_usage_interval_and_names_of_tokens(strict_http: httpx.Client) -> None:
    chunks = stream(strict_http, prompt="abcdefgh", logprobs=0)

    assert [len(chunk["choices"][0]["logprobs"]["tokens"]) for chunk in chunks[:-1]] == [1, 3, 3, 2]
    assert chunks[0]["choices"][0]["logprobs"]["tokens"] == ["token_id:97"]
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 4, 7, 9, 9]
    assert (
        complete(strict_http, prompt="a", logprobs=0, return_tokens_as_token_ids=False)["choices"][0][
            "logprobs"
        ]["tokens"][0]
        == "a"
    )


def test_metrics_tell_the_times_of_a_request_with_one_choice(strict_http: httpx.Client) -> None:
    one = complete(strict_http, prompt="abcdefgh")["metrics"]
    several = complete(strict_http, prompt="abcdefgh", n=2)["metrics"]

    assert one["time_to_first_token_ms"] > 0
    assert one["generation_time_ms"] >= 0
    assert one["mean_itl_ms"] == pytest.approx(one["generation_time_ms"] / 8)
    assert several is None


def test_metrics_are_not_shown_unless_the_operator_wants_it(http: httpx.Client) -> None:
    assert "metrics" not in complete(http, prompt="a")


def test_priority_may_come_in_a_header(http: httpx.Client) -> None:
    body = {"prompt": "a", "priority": 3}

    fine = http.post("/v1/completions", json=body, headers={"x-vllm-priority": "-5"})
    wrong = http.post("/v1/completions", json=body, headers={"x-vllm-priority": "high"})

    assert fine.status_code == 200
    assert wrong.status_code == 400
    assert wrong.json()["error"]["param"] == "x-vllm-priority"


@pytest.mark.parametrize(
    "body",
    [
        {"best_of": 1},
        {"n": 2, "best_of": 2},
        {"length_penalty": 1.0},
        {"spaces_between_special_tokens": False},
        {"user": "u", "metadata": {"a": 1}, "store": True, "session_id": "s", "service_tier": "auto"},
        {"vllm_xargs": {"a": 1}, "kv_transfer_params": {"do_remote_decode": False}},
        {"mm_processor_kwargs": {}, "media_io_kwargs": None, "repetition_detection": None},
    ],
)
def test_fields_that_change_nothing_here_are_accepted(http: httpx.Client, body: dict[str, Any]) -> None:
    assert complete(http, prompt="ok", **body)["choices"][0]["text"] == "ok"


@pytest.mark.parametrize(
    ("body", "param", "fragments"),
    [
        ({"best_of": 3}, "best_of", ["n=1", "3"]),
        ({"length_penalty": 0.5}, "length_penalty", ["beam"]),
        ({"repetition_detection": {"max_pattern_size": 4}}, "repetition_detection", ["not supported"]),
        ({"thinking_token_budget": 100}, "thinking_token_budget", ["max_tokens"]),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds", ["not supported"]),
        ({"mm_processor_kwargs": {"a": 1}}, "mm_processor_kwargs", ["not supported"]),
        ({"logprobs": 21}, "logprobs", ["20", "21", "--max-logprobs"]),
        ({"prompt_logprobs": -1}, "prompt_logprobs", ["at least 0", "-1"]),
        (
            {"prompt": "x" * 500, "n": 128, "echo": True, "logprobs": 20},
            "prompt_logprobs",
            ["1048576", str(500 * 128 * 21), "--max-prompt-logprob-values"],
        ),
        ({"prompt_logprobs": 10**9}, "prompt_logprobs", ["20"]),
        ({"logprob_token_ids": [1]}, "logprob_token_ids", ["logprobs"]),
        ({"logprobs": 1, "logprob_token_ids": [10**6]}, "logprob_token_ids", ["vocabulary"]),
        ({"logprobs": 1, "logprob_token_ids": list(range(129))}, "logprob_token_ids", ["128", "129"]),
        ({"stream_interval": 0}, "stream_interval", ["at least 1"]),
        ({"truncation_side": "middle"}, "truncation_side", ["left", "right"]),
        ({"priority": 10**30}, "priority", ["priority"]),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    http: httpx.Client, body: dict[str, Any], param: str, fragments: list[str]
) -> None:
    response = http.post("/v1/completions", json={"prompt": "a", **body})

    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    for fragment in fragments:
        assert fragment in error["message"]
