"""How a request is scheduled never changes its answer: chunks, cached prefixes, preemption, company."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity.driving import (
    Answer,
    Served,
    assert_greedy,
    assert_prompt_logprobs,
)
from tests.parity.zoo import Checkpoint, Zoo
from tests.tiny_models import FAMILIES, random_prompt

ADAPTERS = ["r4", "r8", "r16", "r33"]
MIXED: list[str | None] = [None, *ADAPTERS]
EDGES = (15, 16, 17, 31, 32, 33)  # around the borders of 16-token blocks
Row = tuple[list[int], str | None]

CHECKPOINTS = [*FAMILIES, "llama-compiled", "mistral-compiled"]


def mixed_rows(count: int, *, shortest: int = 5, longest: int = 60) -> list[Row]:
    """`count` prompts of different lengths, each with the next of base and the four adapters."""
    span = longest - shortest + 1
    return [
        (random_prompt(shortest + (17 * i) % span, seed=200 + i), MIXED[i % len(MIXED)]) for i in range(count)
    ]


def assert_rows(checkpoint: Checkpoint, rows: list[Row], answers: list[Answer], steps: int) -> None:
    for (prompt, adapter), answer in zip(rows, answers, strict=True):
        assert_greedy(answer, checkpoint.reference.greedy(prompt, adapter, steps))


@pytest.mark.parametrize("budget", [1, 7, 16])
@pytest.mark.parametrize("family", CHECKPOINTS)
def test_chunked_prefill_changes_nothing(zoo: Zoo, family: str, budget: int) -> None:
    checkpoint = zoo[family]
    served = Served(checkpoint, ADAPTERS, max_num_batched_tokens=budget)
    rows = mixed_rows(6)

    answers = served.run([served.request(p, a, max_tokens=16, logprobs=5) for p, a in rows])

    assert_rows(checkpoint, rows, answers, 16)


@pytest.mark.parametrize("name", ["mistral-sliding", "qwen2-sliding", "llama-rope-dynamic", "opt-350m-like"])
def test_chunks_and_company_change_nothing_in_special_attention(zoo: Zoo, name: str) -> None:
    checkpoint = zoo[name]
    served = Served(checkpoint, ADAPTERS, max_num_batched_tokens=16)
    rows = mixed_rows(6, shortest=40, longest=90)

    answers = served.run([served.request(p, a, logprobs=5) for p, a in rows])

    assert_rows(checkpoint, rows, answers, 64)


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_prefix_cache_hits_change_nothing(zoo: Zoo, family: str) -> None:
    checkpoint = zoo[family]
    served = Served(checkpoint, ["r8"])
    prompt = random_prompt(50, seed=1)

    for adapter in (None, "r8"):
        first = served.ask(prompt, adapter, logprobs=20)
        second = served.ask(prompt, adapter, logprobs=20)

        assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 48)
        for answer in (first, second):
            assert_greedy(answer, checkpoint.reference.greedy(prompt, adapter))


def test_generated_tokens_are_a_cached_prefix_of_the_next_turn(zoo: Zoo) -> None:
    checkpoint = zoo["llama"]
    served = Served(checkpoint, ["r4"])
    prompt = random_prompt(20, seed=2)
    turn = served.ask(prompt, "r4", max_tokens=40)
    longer = [*prompt, *turn.tokens, *random_prompt(5, seed=3)]

    answer = served.ask(longer, "r4", logprobs=20)

    assert answer.num_cached_tokens == 48  # of 20 + 40 + 5 tokens; the KV of the 60th was never needed
    assert_greedy(answer, checkpoint.reference.greedy(longer, "r4"))


def test_prefix_is_shared_only_with_the_same_adapter_and_salt(zoo: Zoo) -> None:
    served = Served(zoo["llama"], ["r4", "r8"])
    prompt = random_prompt(50, seed=4)
    served.ask(prompt, "r4", salt="alice")

    others: list[tuple[str | None, str]] = [("r4", ""), ("r4", "bob"), ("r8", "alice"), (None, "alice")]
    for adapter, salt in others:
        assert served.ask(prompt, adapter, salt=salt, max_tokens=1).num_cached_tokens == 0

    assert served.ask(prompt, "r4", salt="alice", max_tokens=1).num_cached_tokens == 48


def test_prefix_caching_can_be_turned_off(zoo: Zoo) -> None:
    served = Served(zoo["llama"], enable_prefix_caching=False)
    prompt = random_prompt(50, seed=4)

    answers = [served.ask(prompt, max_tokens=4) for _ in range(2)]

    assert [answer.num_cached_tokens for answer in answers] == [0, 0]
    assert answers[0].tokens == answers[1].tokens


def test_shared_prefix_of_different_lengths_under_dynamic_rope(zoo: Zoo) -> None:
    checkpoint = zoo["llama-rope-dynamic"]  # trained for 64 tokens
    served = Served(checkpoint, ["r8"])
    long = random_prompt(100, seed=5)
    rows: list[Row] = [(long[:length], adapter) for adapter in (None, "r8") for length in (50, 80, 100)]

    for row in (*rows, *rows):
        assert_rows(checkpoint, [row], [served.ask(*row, logprobs=5)], 64)


@pytest.mark.parametrize("name", [*CHECKPOINTS, "mistral-sliding", "llama-rope-dynamic"])
def test_preemption_changes_nothing(zoo: Zoo, name: str) -> None:
    checkpoint = zoo[name]
    served = Served(checkpoint, ADAPTERS, num_kv_blocks=20, max_model_len=200)
    rows = mixed_rows(10, shortest=10, longest=40)

    answers = served.run([served.request(p, a, logprobs=5) for p, a in rows])

    assert served.engine.stats().num_preemptions > 0
    assert_rows(checkpoint, rows, answers, 64)


def test_preemption_without_prefix_cache_and_with_chunks_changes_nothing(zoo: Zoo) -> None:
    checkpoint = zoo["qwen2"]
    served = Served(
        checkpoint,
        ADAPTERS,
        num_kv_blocks=20,
        max_model_len=200,
        enable_prefix_caching=False,
        max_num_batched_tokens=24,
    )
    rows = mixed_rows(10, shortest=10, longest=40)

    answers = served.run([served.request(p, a, logprobs=5) for p, a in rows])

    assert served.engine.stats().num_preemptions > 0
    assert_rows(checkpoint, rows, answers, 64)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 17, 32])
def test_batch_size_changes_nothing(zoo: Zoo, size: int) -> None:
    checkpoint = zoo["llama"]
    served = Served(checkpoint, ADAPTERS)
    rows = mixed_rows(32)[-size:]

    answers = served.run([served.request(p, a, max_tokens=24, logprobs=5) for p, a in rows])

    assert_rows(checkpoint, rows, answers, 24)


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_block_borders_change_nothing(zoo: Zoo, family: str) -> None:
    checkpoint = zoo[family]
    served = Served(checkpoint, ["r16"])
    rows: list[Row] = [(random_prompt(n, seed=100 + n), a) for n in (1, *EDGES) for a in (None, "r16")]

    for _ in range(2):  # the second time with cached prefixes
        answers = served.run([served.request(p, a, max_tokens=20, logprobs=5) for p, a in rows])

        assert_rows(checkpoint, rows, answers, 20)


@pytest.mark.parametrize("block_size", [1, 8, 64])
def test_block_size_changes_nothing(zoo: Zoo, block_size: int) -> None:
    checkpoint = zoo["mistral-sliding"]
    served = Served(checkpoint, ADAPTERS, block_size=block_size, num_kv_blocks=1024)
    rows = mixed_rows(5)

    answers = served.run([served.request(p, a, max_tokens=32, logprobs=5) for p, a in rows])

    assert_rows(checkpoint, rows, answers, 32)


@pytest.mark.parametrize("budget", [16, 2048])
@pytest.mark.parametrize("family", CHECKPOINTS)
def test_prompt_logprobs_match_the_reference(zoo: Zoo, family: str, budget: int) -> None:
    checkpoint = zoo[family]
    served = Served(checkpoint, ADAPTERS, max_num_batched_tokens=budget)
    rows = mixed_rows(6, shortest=30)
    options: dict[str, Any] = {"max_tokens": 2, "prompt_logprobs": served.vocab_size}

    for _ in range(2):  # the second time the prefix is cached, but its log-probabilities are wanted
        answers = served.run([served.request(p, a, **options) for p, a in rows])

        for (prompt, adapter), answer in zip(rows, answers, strict=True):
            expected = checkpoint.reference.logprobs(prompt, adapter)
            assert_prompt_logprobs(answer, prompt, expected)


def test_zero_logprobs_report_only_the_chosen_tokens(zoo: Zoo) -> None:
    checkpoint = zoo["llama"]
    served = Served(checkpoint)
    prompt = random_prompt(20, seed=1)

    answer = served.ask(prompt, max_tokens=8, logprobs=0, prompt_logprobs=0)

    assert [entry.token_ids for entry in answer.logprobs] == [[token] for token in answer.tokens]
    assert_greedy(answer, checkpoint.reference.greedy(prompt, steps=8))
    assert_prompt_logprobs(answer, prompt, checkpoint.reference.logprobs(prompt))


def test_more_adapters_than_lanes_are_all_answered(zoo: Zoo) -> None:
    checkpoint = zoo["llama"]
    served = Served(checkpoint, ADAPTERS, num_lanes=48)  # they need 8 + 8 + 16 + 40
    rows = mixed_rows(15)

    for _ in range(2):
        answers = served.run([served.request(p, a, max_tokens=24, logprobs=5) for p, a in rows])

        assert_rows(checkpoint, rows, answers, 24)
    stats = served.engine.stats()
    assert stats.lanes_total == 48
    assert stats.lanes_used <= 48
    assert len(stats.host_adapters) == 4


def test_adapters_evicted_from_host_memory_come_back_from_disk(zoo: Zoo) -> None:
    checkpoint = zoo["llama"]
    served = Served(checkpoint, ADAPTERS, num_lanes=48, max_cpu_loras=2)
    rows = mixed_rows(5)

    for row in (*rows, *rows):
        assert_rows(checkpoint, [row], [served.ask(*row, max_tokens=24, logprobs=5)], 24)
    stats = served.engine.stats()
    assert stats.host_evictions > 0
    assert len(stats.host_adapters) <= 2


def test_unloaded_adapter_leaves_no_trace_for_the_next(zoo: Zoo) -> None:
    checkpoint = zoo["llama"]
    served = Served(checkpoint, ["r33"])
    prompt = random_prompt(40, seed=6)
    served.ask(prompt, "r33")
    served.engine.unload_adapter(served.digests["r33"])

    assert served.engine.stats().host_adapters == []
    served.load("r4", checkpoint.adapters["r4"])  # into the lanes that r33 left

    assert_greedy(served.ask(prompt, "r4", logprobs=5), checkpoint.reference.greedy(prompt, "r4"))
    assert_greedy(served.ask(prompt, logprobs=5), checkpoint.reference.greedy(prompt))


def test_adapter_unloaded_in_mid_stream_serves_its_sequences_to_the_end(zoo: Zoo) -> None:
    checkpoint = zoo["llama"]
    served = Served(checkpoint, ["r8"])
    prompt = random_prompt(40, seed=6)
    request = served.request(prompt, "r8")
    answers = {request.request_id: Answer()}
    served.engine.add_request(request)
    for _ in range(10):
        served.step(answers)

    served.engine.unload_adapter(served.digests["r8"])
    served.drain(answers)

    assert_greedy(answers[request.request_id], checkpoint.reference.greedy(prompt, "r8"))
    assert served.engine.stats().host_adapters == []


def test_abort_frees_blocks_and_leaves_the_others_alone(zoo: Zoo) -> None:
    checkpoint = zoo["llama"]
    served = Served(checkpoint, ADAPTERS, max_num_seqs=4)
    rows = mixed_rows(6)
    requests = [served.request(p, a) for p, a in rows]
    answers = {request.request_id: Answer() for request in requests}
    for request in requests:
        served.engine.add_request(request)
    for _ in range(12):
        served.step(answers)
    before = served.engine.stats()

    running, waiting = requests[1].request_id, requests[5].request_id
    served.engine.abort([running, waiting, "unknown"])

    after = served.engine.stats()
    assert (before.num_running, before.num_waiting) == (4, 2)
    assert after.kv_blocks_used < before.kv_blocks_used
    assert after.num_running + after.num_waiting == 4
    del answers[running], answers[waiting]  # a further output for them would now fail
    served.drain(answers)
    kept = [row for index, row in enumerate(rows) if index not in (1, 5)]
    assert_rows(checkpoint, kept, list(answers.values()), 64)


def test_requests_that_arrive_later_join_the_batch(zoo: Zoo) -> None:
    checkpoint = zoo["qwen3"]
    served = Served(checkpoint, ADAPTERS)
    rows = mixed_rows(8)
    answers: dict[str, Answer] = {}

    for prompt, adapter in rows:
        request = served.request(prompt, adapter, max_tokens=32)
        answers[request.request_id] = Answer()
        served.engine.add_request(request)
        for _ in range(3):
            served.step(answers)
    served.drain(answers)

    assert_rows(checkpoint, rows, list(answers.values()), 32)


def test_arrivals_aborts_and_every_shortage_at_once_change_nothing(zoo: Zoo) -> None:
    checkpoint = zoo["mistral-sliding"]
    served = Served(
        checkpoint,
        ADAPTERS,
        num_kv_blocks=24,
        max_model_len=200,
        max_num_batched_tokens=20,
        max_num_seqs=7,
        num_lanes=48,
        max_cpu_loras=2,
    )
    rows = mixed_rows(24, shortest=3, longest=50)
    answers: dict[str, Answer] = {}
    ids: list[str] = []

    for index, (prompt, adapter) in enumerate(rows):
        request = served.request(prompt, adapter, max_tokens=40, logprobs=5)
        answers[request.request_id] = Answer()
        ids.append(request.request_id)
        served.engine.add_request(request)
        for _ in range(2):
            served.step(answers)
        if index % 6 == 5:  # an older one goes away, wherever it is by now
            gone = ids[index - 3]
            served.engine.abort([gone])
            del answers[gone]
        served.engine.scheduler.check_invariants()
    served.drain(answers)

    kept = [row for request_id, row in zip(ids, rows, strict=True) if request_id in answers]
    assert served.engine.stats().num_preemptions > 0
    assert_rows(checkpoint, kept, list(answers.values()), 40)
