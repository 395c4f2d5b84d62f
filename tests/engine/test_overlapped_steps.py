"""Steps that are planned while the last one runs: what they say, what they hold, what they wait for."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.engine.adapters.lanes import LaneTable
from loramux.engine.adapters.store import AdapterStore
from loramux.engine.block_manager import BlockManager
from loramux.engine.scheduler import Scheduler
from loramux.engine.step import SampledToken, ScheduledBatch, StepResult
from loramux.engine.types import Request, SequenceOutput, TokenSampling
from tests.parity.driving import Answer, Served
from tests.parity.zoo import Checkpoint, make_checkpoint
from tests.tiny_models import random_prompt

BLOCK_SIZE = 4
STOP = 1000  # a token of the pretended model


def token_after(request: Request, num_tokens: int) -> int:
    """A pretended model: counts, and stops where `seed` says."""
    return STOP if num_tokens == request.sampling.seed else num_tokens


@dataclass
class Device:
    """Computes steps in their order, each when it is asked for; knows what a running step uses."""

    scheduler: Scheduler
    running: deque[tuple[ScheduledBatch, StepResult, list[int]]] = field(default_factory=deque)
    outputs: list[SequenceOutput] = field(default_factory=list)

    def launch(self, now: float) -> bool:
        batch = self.scheduler.schedule(now)
        if batch is None:
            return False
        sampled = {
            item.seq.request_id: SampledToken(token_after(item.seq.request, item.end))
            for item in batch.sequences
            if item.samples
        }
        blocks = [block for item in batch.sequences for block in item.seq.block_ids]
        self.running.append((batch, StepResult(sampled), blocks))
        self.check()
        return True

    def take(self, now: float) -> None:
        batch, result, _ = self.running.popleft()
        self.outputs += self.scheduler.update(batch, result, now)
        self.check()

    def step(self, now: float) -> None:
        """As the engine steps: start one, await the one before."""
        serve_adapters(self.scheduler.adapters)
        started = self.launch(now)
        if self.running and (not started or len(self.running) > 1):
            self.take(now)

    def check(self) -> None:
        """Nobody else has what a running step uses."""
        self.scheduler.check_invariants()
        for batch, _, blocks in self.running:
            held = [block for item in batch.sequences for block in item.seq.block_ids]
            assert set(blocks) <= set(held)
            for item in batch.sequences:
                if item.seq.adapter is not None:
                    assert self.scheduler.adapters.lanes.span(item.seq.adapter) == item.seq.lanes


def serve_adapters(store: AdapterStore) -> None:
    jobs = store.take_jobs()
    for digest in jobs.reads:
        store.host_ready(digest, 100)
    for digest, _ in jobs.copies:
        store.device_ready(digest)


def make(*, blocks: int = 64, lanes: int = 16, max_num_seqs: int = 4, budget: int = 64) -> Scheduler:
    return Scheduler(
        blocks=BlockManager(blocks, BLOCK_SIZE),
        adapters=AdapterStore(LaneTable(lanes)),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
    )


def request(
    name: str, prompt: int = 5, max_tokens: int = 4, adapter: str | None = None, stop_at: int | None = None
) -> Request:
    """Args:
    stop_at: length of the sequence after which the pretended model stops.
    """
    sampling = TokenSampling(max_tokens=max_tokens, temperature=0.0, seed=stop_at, stop_token_ids=[STOP])
    return Request(request_id=name, prompt_token_ids=list(range(prompt)), sampling=sampling, adapter=adapter)


def test_a_sequence_goes_on_before_its_last_token_is_known() -> None:
    device = Device(make())
    device.scheduler.add(request("a"), 0.0)

    assert device.launch(0.0)
    assert device.launch(0.0)

    starts = [(batch.sequences[0].start, batch.sequences[0].end) for batch, *_ in device.running]
    assert starts == [(0, 5), (5, 6)]


def test_no_step_is_planned_beyond_max_tokens() -> None:
    device = Device(make())
    device.scheduler.add(request("a", max_tokens=2), 0.0)

    assert [device.launch(0.0) for _ in range(3)] == [True, True, False]


def test_what_ended_unforeseen_leaves_with_the_step_that_computes_it() -> None:
    device = Device(make())
    device.scheduler.adapters.add("x", 8)
    for _ in range(2):  # from the disk to the host, from there into lanes
        device.scheduler.adapters.prefetch("x")
        serve_adapters(device.scheduler.adapters)
    device.scheduler.add(request("a", adapter="x", stop_at=5), 0.0)
    device.scheduler.adapters.retire("x")
    device.launch(0.0)
    device.launch(0.0)

    device.take(0.0)

    assert [output.finish_reason for output in device.outputs] == ["stop"]
    assert device.scheduler.has_work()
    assert device.scheduler.blocks.num_used == 2
    assert device.scheduler.adapters.take_dropped().gone == []

    device.take(0.0)

    assert [output.token_ids for output in device.outputs] == [[STOP]]
    assert not device.scheduler.has_work()
    assert device.scheduler.blocks.num_used == 0
    assert device.scheduler.adapters.take_dropped().gone == ["x"]


@pytest.mark.parametrize(
    "sampling",
    [
        TokenSampling(max_tokens=9, repetition_penalty=1.1),
        TokenSampling(max_tokens=9, presence_penalty=0.5),
        TokenSampling(max_tokens=9, frequency_penalty=0.5),
        TokenSampling(max_tokens=9, bad_words_token_ids=[[4, 5]]),
    ],
)
def test_a_step_waits_for_tokens_that_somebody_reads(sampling: TokenSampling) -> None:
    device = Device(make())
    device.scheduler.add(Request(request_id="a", prompt_token_ids=[1, 2], sampling=sampling), 0.0)

    assert device.launch(0.0)
    assert not device.launch(0.0)
    device.take(0.0)
    assert device.launch(0.0)


def test_nobody_is_preempted_while_a_step_runs() -> None:
    device = Device(make(blocks=3))
    device.scheduler.add(request("a", prompt=4, max_tokens=8), 0.0)
    device.scheduler.add(request("b", prompt=4, max_tokens=8), 0.0)
    device.launch(0.0)

    assert not device.launch(0.0)
    device.take(0.0)
    assert device.launch(0.0)
    assert device.scheduler.num_preemptions == 1


@given(seed=st.integers(0, 2**32), blocks=st.integers(8, 24), lanes=st.sampled_from([8, 16, 32]))
@settings(max_examples=150, deadline=None)
def test_any_mix_of_events_ends_with_every_token_and_nothing_held(seed: int, blocks: int, lanes: int) -> None:
    rng = random.Random(seed)
    scheduler = make(blocks=blocks, lanes=lanes, budget=rng.choice([4, 8, 64]))
    device = Device(scheduler)
    for digest in ("x", "y", "z"):
        scheduler.adapters.add(digest, 8)
    requests: dict[str, Request] = {}
    aborted: set[str] = set()
    for event in range(80):
        kind = rng.random()
        if kind < 0.3:
            prompt, count = rng.randint(1, 16), rng.randint(1, 14)
            stop_at = rng.choice([None, prompt + rng.randint(0, 9)])
            adapter = rng.choice([None, "x", "y", "z"])
            requests[str(event)] = request(str(event), prompt, count, adapter, stop_at)
            scheduler.add(requests[str(event)], event)
        elif kind < 0.36 and requests:
            aborted.add(name := rng.choice(list(requests)))
            scheduler.abort(name)
            device.check()
        else:
            device.step(float(event))
    for event in range(10_000):
        if not scheduler.has_work():
            break
        device.step(100.0 + event)

    tokens: dict[str, list[int]] = {name: [] for name in requests}
    for output in device.outputs:
        tokens[output.request_id] += output.token_ids
    for name, asked in requests.items():
        told = expected(asked)
        assert tokens[name] == told or (name in aborted and tokens[name] == told[: len(tokens[name])])
    assert not scheduler.has_work()
    assert scheduler.blocks.num_used == 0
    scheduler.check_invariants()


def expected(asked: Request) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < asked.sampling.max_tokens and STOP not in tokens:
        tokens.append(token_after(asked, len(asked.prompt_token_ids) + len(tokens)))
    return tokens


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint("llama", tmp_path_factory.mktemp("overlap"))


def workload(served: Served, seed: int) -> Iterator[Request]:
    """Requests of every kind that a step may meet."""
    rng = random.Random(seed)
    shared = random_prompt(40, seed=seed)
    for index in range(24):
        prompt = shared[: rng.choice([17, 33, 40])] + random_prompt(rng.randint(1, 30), seed=seed + index)
        fields: dict[str, Any] = rng.choice(
            [
                {},
                {"logprobs": 3},
                {"prompt_logprobs": 2},
                {"temperature": 1.0, "seed": rng.randint(0, 99), "top_k": rng.choice([0, 20])},
                {"repetition_penalty": 1.3, "frequency_penalty": 0.2},
                {"bad_words_token_ids": [[rng.randint(3, 130)], [5, 6]]},
                {"stop_token_ids": rng.sample(range(3, 131), 40)},
                {"stop_token_ids": rng.sample(range(3, 131), 60), "min_tokens": 7},
            ]
        )
        adapter = rng.choice([None, *served.digests])
        yield served.request(prompt, adapter, max_tokens=rng.randint(1, 20), **fields)


@pytest.mark.parametrize("num_kv_blocks", [11, 200])
@pytest.mark.parametrize("seed", range(10))
def test_overlapped_steps_say_what_steps_in_a_row_say(
    checkpoint: Checkpoint, seed: int, num_kv_blocks: int
) -> None:
    answers: list[list[Answer]] = []
    preemptions = []
    for ahead in (False, True):
        served = Served(
            checkpoint,
            checkpoint.adapters,
            async_scheduling=ahead,
            num_kv_blocks=num_kv_blocks,
            max_model_len=112,
            max_num_seqs=6,
            max_num_batched_tokens=48,
            num_lanes=48,  # fewer than the adapters need: they come and go
        )
        answers.append(arriving_by_and_by(served, list(workload(served, seed))))
        preemptions.append(served.engine.stats().num_preemptions)
        served.engine.close()

    assert [a.tokens for a in answers[1]] == [a.tokens for a in answers[0]]
    for one, other in zip(*answers, strict=True):
        assert (one.finish_reason, one.stop_reason) == (other.finish_reason, other.stop_reason)
        assert [p.token_ids for p in one.logprobs] == [p.token_ids for p in other.logprobs]
        assert (one.prompt_logprobs is None) == (other.prompt_logprobs is None)
        assert len(one.prompt_logprobs or []) == len(other.prompt_logprobs or [])
    assert (sum(preemptions) > 0) == (num_kv_blocks == 11)


def arriving_by_and_by(served: Served, requests: list[Request]) -> list[Answer]:
    answers = {request.request_id: Answer() for request in requests}
    for index, one in enumerate(requests):
        served.engine.add_request(one)
        if index % 3 == 0:
            served.step(answers)
    served.drain(answers)
    return list(answers.values())
