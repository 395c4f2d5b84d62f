"""Sampling options do what a plain reading of their definition does, alone and in mixed batches."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from loramux.engine.layers.sampler import SamplingRow, sample
from loramux.engine.types import TokenSampling
from tests.parity.driving import Answer, Served, assert_logprobs
from tests.parity.reference import Reference
from tests.parity.sampling_reference import assert_drawn_from, probabilities, processed
from tests.parity.zoo import Zoo
from tests.tiny_models import random_prompt

PROMPT = random_prompt(30, seed=1)
STEPS = 48
NUM_DRAWS = 800

GREEDY_OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "presence": {"presence_penalty": 1.5},
    "negative-presence": {"presence_penalty": -1.0},
    "frequency": {"frequency_penalty": 0.9},
    "repetition": {"repetition_penalty": 1.4},
    "encouraged-repetition": {"repetition_penalty": 0.8},
    "all-penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
    "bias": {"logit_bias": {5: 4.0, 77: -100.0, 130: 3.5}},
    "bias-and-penalties": {"logit_bias": {9: 5.0}, "frequency_penalty": 0.7, "repetition_penalty": 1.1},
    "allowed": {"allowed_token_ids": list(range(10, 50))},
    "allowed-and-bias": {"allowed_token_ids": [3, 4, 5, 6], "logit_bias": {4: 1.0, 99: 50.0}},
    "one-allowed": {"allowed_token_ids": [42]},
}
DISTRIBUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 1.7},
    "top-k": {"temperature": 1.0, "top_k": 5},
    "top-k-1": {"temperature": 1.5, "top_k": 1},
    "top-k-beyond-vocabulary": {"temperature": 1.0, "top_k": 1000},
    "top-p": {"temperature": 1.0, "top_p": 0.6},
    "tiny-top-p": {"temperature": 1.0, "top_p": 0.001},
    "min-p": {"temperature": 1.0, "min_p": 0.15},
    "hot-min-p": {"temperature": 2.0, "min_p": 0.3},
    "top-k-and-top-p": {"temperature": 1.3, "top_k": 12, "top_p": 0.7},
    "everything": {"temperature": 1.2, "top_k": 30, "top_p": 0.9, "min_p": 0.05, "logit_bias": {8: 3.0}},
    "repetition": {"temperature": 1.0, "repetition_penalty": 1.5},
    "allowed": {"temperature": 1.0, "allowed_token_ids": [7, 8, 9, 10, 11]},
}


@pytest.fixture(scope="module")
def served(zoo: Zoo) -> Served:
    return Served(zoo["llama"], ["r4", "r8"])


@pytest.fixture(scope="module")
def reference(zoo: Zoo) -> Reference:
    return zoo["llama"].reference


def expected_tokens(reference: Reference, options: dict[str, Any]) -> list[int]:
    sampling = TokenSampling(max_tokens=STEPS, temperature=0.0, **options)

    def steer(row: torch.Tensor, output: list[int]) -> torch.Tensor:
        return processed(row, PROMPT, output, sampling)

    return reference.steered(PROMPT, STEPS, steer)


@pytest.mark.parametrize("name", GREEDY_OPTIONS)
def test_greedy_with_option_matches_plain_reading(served: Served, reference: Reference, name: str) -> None:
    options = GREEDY_OPTIONS[name]

    answer = served.ask(PROMPT, max_tokens=STEPS, **options)

    assert answer.tokens == expected_tokens(reference, options)


def test_rows_of_one_batch_keep_their_own_options(served: Served, reference: Reference) -> None:
    requests = [served.request(PROMPT, max_tokens=STEPS, **options) for options in GREEDY_OPTIONS.values()]
    noise = [served.request(PROMPT, "r8", temperature=1.0, seed=i, top_p=0.8) for i in range(5)]

    answers = served.run([*noise[:3], *requests, *noise[3:]])

    for options, answer in zip(GREEDY_OPTIONS.values(), answers[3:], strict=False):
        assert answer.tokens == expected_tokens(reference, options)


def test_bad_words_of_one_and_of_several_tokens_never_appear(served: Served, reference: Reference) -> None:
    plain = reference.greedy(PROMPT, steps=STEPS).tokens
    words = [[plain[3]], plain[7:9], plain[12:15]]
    options: dict[str, Any] = {"bad_words_token_ids": words}

    answer = served.ask(PROMPT, max_tokens=STEPS, **options)

    assert answer.tokens == expected_tokens(reference, options)
    assert answer.tokens != plain
    for word in words:
        spans = [answer.tokens[i : i + len(word)] for i in range(STEPS)]
        assert word not in spans


def test_bad_word_is_forbidden_even_when_it_would_start_in_the_prompt(
    served: Served, reference: Reference
) -> None:
    first = reference.greedy(PROMPT, steps=1).tokens[0]
    options: dict[str, Any] = {"bad_words_token_ids": [[PROMPT[-1], first]]}

    answer = served.ask(PROMPT, max_tokens=STEPS, **options)

    assert answer.tokens == expected_tokens(reference, options)


def test_draws_follow_the_distribution_in_one_mixed_batch(served: Served, reference: Reference) -> None:
    rows = reference.logits(PROMPT)[-1], reference.logits(PROMPT, "r4")[-1]
    cases = [(options, adapter) for options in DISTRIBUTIONS.values() for adapter in (None, "r4")]
    requests = [
        served.request(PROMPT, adapter, max_tokens=1, seed=seed, **options)
        for seed in range(NUM_DRAWS)
        for options, adapter in cases
    ]

    answers = served.run(requests)

    for index, (options, adapter) in enumerate(cases):
        drawn = [answer.tokens[0] for answer in answers[index :: len(cases)]]
        sampling = TokenSampling(max_tokens=1, **options)
        logits = processed(rows[adapter is not None], PROMPT, [], sampling)
        assert_drawn_from(drawn, probabilities(logits, sampling))


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 700, "top_p": 0.3},
        {"top_k": 700, "top_p": 0.9},
        {"top_p": 0.9},
        {"min_p": 0.18, "top_p": 0.5},
    ],
)
def test_filters_reach_beyond_the_best_candidates_of_a_large_vocabulary(options: dict[str, Any]) -> None:
    logits = 0.3 * torch.randn(1500, generator=torch.Generator().manual_seed(0))  # nearly flat
    sampling = TokenSampling(max_tokens=1, temperature=1.0, **options)
    rows = [SamplingRow(sampling, seed, token_ids=[1], num_prompt=1) for seed in range(4000)]

    drawn = sample(logits.expand(len(rows), -1), rows).token_ids

    assert_drawn_from(drawn, probabilities(logits, sampling))


def test_draws_without_a_seed_follow_the_distribution(served: Served, reference: Reference) -> None:
    answers = served.run([served.request(PROMPT, max_tokens=1, temperature=1.0) for _ in range(NUM_DRAWS)])

    drawn = [answer.tokens[0] for answer in answers]
    assert_drawn_from(drawn, torch.softmax(reference.logits(PROMPT)[-1], dim=-1).tolist())


def test_later_draws_of_one_seed_are_independent(served: Served, reference: Reference) -> None:
    options: dict[str, Any] = {"max_tokens": 480, "temperature": 60.0}  # so hot that all steps are alike

    tokens = served.ask(PROMPT, seed=3, **options).tokens

    rows = reference.logits([*PROMPT, *tokens])[len(PROMPT) - 1 : -1]
    expected = torch.softmax(rows / 60.0, dim=-1).mean(0).tolist()
    assert_drawn_from(tokens, expected)
    assert_drawn_from([(b - a) % 131 for a, b in itertools.pairwise(tokens)], [1 / 131] * 131)


def test_seeded_request_gives_the_same_tokens_alone_in_a_batch_and_preempted(zoo: Zoo) -> None:
    checkpoint = zoo["llama"]
    options: dict[str, Any] = {"temperature": 1.1, "top_p": 0.95, "seed": 1234}
    roomy = Served(checkpoint, ["r4", "r8"])
    narrow = Served(checkpoint, ["r4", "r8"], num_kv_blocks=16, max_model_len=128, max_num_batched_tokens=20)
    alone = roomy.ask(PROMPT, "r4", **options).tokens

    for served in (roomy, narrow):
        others = [
            served.request(random_prompt(10 + i, seed=i), [None, "r4", "r8"][i % 3], temperature=1.0)
            for i in range(8)
        ]
        request = served.request(PROMPT, "r4", **options)
        answers = served.run([*others[:4], request, *others[4:]])

        assert answers[4].tokens == alone
    assert narrow.engine.stats().num_preemptions > 0


def test_seeds_and_requests_without_seed_differ(served: Served) -> None:
    requests = [served.request(PROMPT, temperature=1.0, max_tokens=16, seed=seed) for seed in range(8)]
    requests += [served.request(PROMPT, temperature=1.0, max_tokens=16) for _ in range(8)]

    answers = served.run(requests)

    assert len({tuple(answer.tokens) for answer in answers}) == 16


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, 2**64 - 1])
def test_any_64_bit_seed_is_accepted_and_repeats(served: Served, seed: int) -> None:
    first, second = (served.ask(PROMPT, temperature=1.0, max_tokens=8, seed=seed) for _ in range(2))

    assert first.tokens == second.tokens


def test_logprobs_come_from_the_raw_logits(served: Served, reference: Reference) -> None:
    options: dict[str, Any] = {
        "temperature": 1.6,
        "top_k": 20,
        "presence_penalty": 1.0,
        "logit_bias": {8: 4.0},
    }
    requests = [
        served.request(PROMPT, adapter, max_tokens=24, logprobs=count, seed=7, **options)
        for adapter in (None, "r8")
        for count in (0, 1, 20)
    ]

    answers = served.run(requests)

    for adapter, answer in zip([None] * 3 + ["r8"] * 3, answers, strict=True):
        rows = reference.logprobs([*PROMPT, *answer.tokens], adapter)[len(PROMPT) - 1 : -1]
        assert len(answer.logprobs) == 24
        for token, said, row in zip(answer.tokens, answer.logprobs, rows, strict=True):
            assert_logprobs(said, token, row)
    assert any(said.rank > 1 for said in answers[0].logprobs)


def first_new(tokens: list[int], start: int) -> int:
    """The first index from `start` on whose token has not appeared before."""
    return next(i for i in range(start, len(tokens)) if tokens[i] not in tokens[:i])


def ends(answer: Answer) -> tuple[int, str | None, int | None]:
    return len(answer.tokens), answer.finish_reason, answer.stop_reason


def test_stop_token_eos_and_length_end_a_sequence(served: Served, reference: Reference) -> None:
    plain = reference.greedy(PROMPT).tokens
    at = first_new(plain, 8)
    token = plain[at]

    stopped = served.ask(PROMPT, stop_token_ids=[1, token])
    ended = served.ask(PROMPT, eos_token_ids=[token, 2])
    ignored = served.ask(PROMPT, max_tokens=20)  # the server sends no eos_token_ids under ignore_eos

    assert ends(stopped) == (at + 1, "stop", token)
    assert ends(ended) == (at + 1, "stop", None)
    assert ends(ignored) == (20, "length", None)
    for answer in (stopped, ended, ignored):
        assert answer.tokens == plain[: len(answer.tokens)]


def test_stop_token_at_the_last_allowed_place_counts_as_stop(served: Served, reference: Reference) -> None:
    plain = reference.greedy(PROMPT).tokens
    at = first_new(plain, 8)

    answer = served.ask(PROMPT, max_tokens=at + 1, stop_token_ids=[plain[at]])

    assert ends(answer) == (at + 1, "stop", plain[at])


@pytest.mark.parametrize("field", ["eos_token_ids", "stop_token_ids"])
def test_min_tokens_holds_the_end_back(served: Served, reference: Reference, field: str) -> None:
    plain = reference.greedy(PROMPT).tokens
    at = first_new(plain, 8)

    for min_tokens in (at + 1, at + 2, at + 6):  # the token would be the at + 1st
        options: dict[str, Any] = {"min_tokens": min_tokens, field: [plain[at]]}
        answer = served.ask(PROMPT, max_tokens=STEPS, **options)

        expected = expected_tokens(reference, options)
        assert len(answer.tokens) >= min_tokens
        assert answer.tokens == expected[: len(answer.tokens)]
        assert plain[at] not in answer.tokens[:min_tokens]


@pytest.mark.parametrize("field", ["eos_token_ids", "stop_token_ids"])
def test_end_after_exactly_min_tokens_is_allowed(served: Served, reference: Reference, field: str) -> None:
    plain = reference.greedy(PROMPT).tokens
    at = first_new(plain, 8)
    options: dict[str, Any] = {field: [plain[at]]}

    early = served.ask(PROMPT, min_tokens=at, **options)
    held = served.ask(PROMPT, min_tokens=at + 1, max_tokens=at + 1, **options)

    assert (len(early.tokens), early.finish_reason) == (at + 1, "stop")
    assert held.tokens[:at] == plain[:at]
    assert held.tokens[at] != plain[at]
    assert held.finish_reason == "length"


def test_one_token_requests_end_at_once(served: Served, reference: Reference) -> None:
    answer = served.ask(PROMPT, max_tokens=1)

    assert ends(answer) == (1, "length", None)
    assert answer.tokens == reference.greedy(PROMPT).tokens[:1]


def test_generation_up_to_the_last_position_of_the_context(zoo: Zoo) -> None:
    checkpoint = zoo["llama"]
    served = Served(checkpoint, max_model_len=64)

    answer = served.ask(PROMPT, max_tokens=64 - len(PROMPT))

    assert answer.finish_reason == "length"
    assert answer.tokens == checkpoint.reference.greedy(PROMPT).tokens[: 64 - len(PROMPT)]
