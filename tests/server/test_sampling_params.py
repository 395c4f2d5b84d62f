"""Sampling parameters: ranges, limits, and their translation for the engine."""

from __future__ import annotations

from typing import Any

import pytest

from loramux.engine.errors import ContextTooLong, InvalidRequest
from loramux.engine.types import EngineInfo, TokenSampling
from loramux.server.limits import Limits
from loramux.server.sampling_params import SamplingParams, check_limits, seed_of_choice, to_token_sampling
from tests.server.tiny_text import EOS, VOCAB_SIZE, tiny_tokenizer

INFO = EngineInfo(
    architecture="Fake",
    dtype="float32",
    device="cpu",
    vocab_size=VOCAB_SIZE,
    max_model_len=100,
    num_kv_blocks=8,
    block_size=16,
    enable_lora=False,
    max_lora_rank=0,
    num_lanes=0,
    lora_sites={},
    load_seconds=0.0,
)


def translate(params: SamplingParams, prompt_len: int = 10) -> TokenSampling:
    return to_token_sampling(params, tiny_tokenizer(), INFO, prompt_len=prompt_len, eos_token_ids=[EOS])


def test_defaults_are_plain_sampling_of_16_tokens() -> None:
    assert translate(SamplingParams()) == TokenSampling(max_tokens=16, eos_token_ids=[EOS])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 1.5),
        ("n", True),
        ("temperature", -0.01),
        ("temperature", 2.01),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "1"),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("min_p", -0.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("logprobs", -1),
        ("prompt_logprobs", -1),
        ("stop", ["a", ""]),
        ("bad_words", [""]),
        ("allowed_token_ids", []),
        ("logit_bias", {1: float("nan")}),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=field) as caught:
        SamplingParams(**{field: value})

    assert caught.value.param == field


@pytest.mark.parametrize("value", [0, 1, 2, 0.5, 2.0])
def test_temperatures_in_range_are_taken(value: float) -> None:
    assert translate(SamplingParams(temperature=value)).temperature == value


def test_tiny_temperatures_are_greedy_or_raised() -> None:
    assert translate(SamplingParams(temperature=1e-6)).temperature == 0.0
    assert translate(SamplingParams(temperature=0.001)).temperature == 0.01


def test_off_values_of_vllm_are_understood() -> None:
    sampling = translate(SamplingParams(top_k=-1, seed=-1))

    assert (sampling.top_k, sampling.seed) == (0, None)


def test_max_tokens_is_cut_to_what_the_context_holds() -> None:
    assert translate(SamplingParams(max_tokens=100), prompt_len=90).max_tokens == 10
    assert translate(SamplingParams(max_tokens=None), prompt_len=90).max_tokens == 10


@pytest.mark.parametrize(("prompt_len", "max_tokens"), [(100, 1), (101, 1), (10, 101)])
def test_what_does_not_fit_the_context_is_refused_in_known_words(prompt_len: int, max_tokens: int) -> None:
    with pytest.raises(ContextTooLong, match=r"maximum context length is 100 tokens\. However, "):
        translate(SamplingParams(max_tokens=max_tokens), prompt_len=prompt_len)


def test_min_tokens_that_no_longer_fit_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="min_tokens"):
        translate(SamplingParams(max_tokens=50, min_tokens=20), prompt_len=90)


@pytest.mark.parametrize(
    "params",
    [
        {"stop_token_ids": [VOCAB_SIZE]},
        {"logit_bias": {-1: 1.0}},
        {"allowed_token_ids": [0, VOCAB_SIZE]},
    ],
)
def test_ids_out_of_vocabulary_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="out of vocabulary"):
        translate(SamplingParams(**params))


def test_bias_is_clamped_and_end_tokens_can_be_ignored() -> None:
    sampling = translate(SamplingParams(logit_bias={1: 500.0, 2: -500}, ignore_eos=True))

    assert sampling.logit_bias == {1: 100.0, 2: -100.0}
    assert sampling.eos_token_ids == []


def test_bad_words_are_banned_with_and_without_a_space() -> None:
    sampling = translate(SamplingParams(bad_words=["ab", "ab"]))

    assert sampling.bad_words_token_ids == [[97, 98], [32, 97, 98]]


def test_choices_get_seeds_of_their_own() -> None:
    assert [seed_of_choice(7, choice) for choice in range(3)] == [7, 8, 9]
    assert seed_of_choice(None, 3) is None
    assert seed_of_choice(2**63 - 1, 1) == -(2**63)


def test_stop_strings_need_text() -> None:
    with pytest.raises(InvalidRequest, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


@pytest.mark.parametrize(
    ("params", "flag"),
    [
        ({"n": 3}, "--max-n"),
        ({"stop": ["a", "b", "c"]}, "--max-stop"),
        ({"logprobs": 3}, "--max-logprobs"),
        ({"prompt_logprobs": 3}, "--max-logprobs"),
        ({"bad_words": ["a", "b", "c"]}, "--max-bad-words"),
    ],
)
def test_limits_are_named_with_their_flag(params: dict[str, Any], flag: str) -> None:
    limits = Limits(n=2, stop=2, logprobs=2, bad_words=2)

    with pytest.raises(InvalidRequest, match=flag):
        check_limits(SamplingParams(**params), limits)
    check_limits(SamplingParams(n=2, stop=["a", "b"], logprobs=2), limits)
