"""Every family and every variation of it answers as transformers and PEFT do."""

from __future__ import annotations

import pytest

from tests.parity.driving import Served, assert_greedy
from tests.parity.zoo import VARIATIONS, Zoo
from tests.tiny_models import FAMILIES, random_prompt

ADAPTERS = ["r4", "r8", "r16", "r33"]
MIXED: list[str | None] = [None, *ADAPTERS]
PROMPTS = [random_prompt(length, seed=length) for length in (40, 7, 23, 64, 33)]


@pytest.mark.parametrize("name", VARIATIONS)
def test_base_and_one_adapter_match_the_reference(zoo: Zoo, name: str) -> None:
    checkpoint = zoo[name]
    served = Served(checkpoint, ["r8"])
    prompt = PROMPTS[0]

    for adapter in (None, "r8"):
        answer = served.ask(prompt, adapter, logprobs=served.vocab_size)

        assert len(answer.logprobs) == 64
        assert_greedy(answer, checkpoint.reference.greedy(prompt, adapter))


@pytest.mark.parametrize("name", VARIATIONS)
def test_adapters_change_the_reference(zoo: Zoo, name: str) -> None:
    reference = zoo[name].reference
    base = reference.greedy(PROMPTS[0])

    for adapter in ADAPTERS:
        assert reference.greedy(PROMPTS[0], adapter).tokens != base.tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_base_without_lora_matches_the_reference(zoo: Zoo, family: str) -> None:
    checkpoint = zoo[family]
    served = Served(checkpoint)

    answers = served.run([served.request(prompt, logprobs=served.vocab_size) for prompt in PROMPTS])

    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert_greedy(answer, checkpoint.reference.greedy(prompt))


@pytest.mark.parametrize("family", [*FAMILIES, "llama-compiled", "qwen3-compiled", "opt-compiled"])
def test_mixed_batch_of_base_and_four_ranks_matches_the_reference(zoo: Zoo, family: str) -> None:
    checkpoint = zoo[family]
    served = Served(checkpoint, ADAPTERS)
    rows = list(zip(PROMPTS, MIXED, strict=True))

    answers = served.run([served.request(p, a, logprobs=served.vocab_size) for p, a in rows])

    for (prompt, adapter), answer in zip(rows, answers, strict=True):
        assert_greedy(answer, checkpoint.reference.greedy(prompt, adapter))
