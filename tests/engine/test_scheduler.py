from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.engine.adapters.lanes import LaneTable
from loramux.engine.adapters.store import AdapterStore
from loramux.engine.block_manager import BlockManager
from loramux.engine.scheduler import MAX_DEFERRAL_S, Scheduler
from loramux.engine.step import SampledToken, ScheduledBatch, StepResult
from loramux.engine.types import Request, SequenceOutput, TokenSampling


def make(
    *,
    blocks: int = 64,
    lanes: int = 16,
    max_num_seqs: int = 8,
    budget: int = 64,
    cache: bool = True,
    by_priority: bool = False,
) -> Scheduler:
    return Scheduler(
        blocks=BlockManager(blocks, 4, enable_prefix_caching=cache),
        adapters=AdapterStore(LaneTable(lanes)),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        by_priority=by_priority,
    )


def request(
    name: str, prompt: int = 5, max_tokens: int = 3, adapter: str | None = None, first_token: int = 0
) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=list(range(first_token, first_token + prompt)),
        sampling=TokenSampling(max_tokens=max_tokens, temperature=0.0),
        adapter=adapter,
    )


def answer(batch: ScheduledBatch) -> StepResult:
    """A model whose next token is the number of tokens so far."""
    return StepResult({i.seq.request_id: SampledToken(i.end) for i in batch.sequences if i.samples})


def load(scheduler: Scheduler) -> list[str]:
    """A loader that is done at once; returns what it copied into lanes."""
    copied: list[str] = []
    while True:
        jobs = scheduler.adapters.take_jobs()
        if not jobs.reads and not jobs.copies:
            return copied
        for digest in jobs.reads:
            scheduler.adapters.host_ready(digest, 100)
        for digest, _ in jobs.copies:
            scheduler.adapters.device_ready(digest)
            copied.append(digest)


def step(
    scheduler: Scheduler, now: float = 0.0, copied: list[str] | None = None
) -> tuple[ScheduledBatch, list[SequenceOutput]]:
    for seq in list(scheduler.waiting) if not scheduler.running else ():
        if seq.adapter is not None:
            scheduler.adapters.prefetch(seq.adapter)
    for _ in range(3):  # the first may only ask for adapters
        arrived = load(scheduler)
        if copied is not None:
            copied += arrived
        batch = scheduler.schedule(now)
        scheduler.check_invariants()
        if batch is not None:
            break
    assert batch is not None
    outputs = scheduler.update(batch, answer(batch))
    scheduler.check_invariants()
    return batch, outputs


def finish(scheduler: Scheduler) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for _ in range(10_000):
        if not scheduler.has_work():
            return tokens
        for output in step(scheduler)[1]:
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    raise AssertionError("the scheduler makes no progress")


def ids(batch: ScheduledBatch) -> list[str]:
    return [item.seq.request_id for item in batch.sequences]


def test_long_prompt_is_read_in_chunks_of_the_budget() -> None:
    scheduler = make(budget=8)
    scheduler.add(request("a", prompt=20), 0.0)

    counts = [step(scheduler)[0].sequences[0].count for _ in range(3)]

    assert counts == [8, 8, 4]


def test_decode_goes_before_prompts() -> None:
    scheduler = make(budget=8)
    scheduler.add(request("a", prompt=4, max_tokens=9), 0.0)
    step(scheduler)
    scheduler.add(request("b", prompt=20), 0.0)

    batch, _ = step(scheduler)

    assert [(i.seq.request_id, i.count) for i in batch.sequences] == [("a", 1), ("b", 7)]


def test_shared_prefix_is_computed_once() -> None:
    scheduler = make()
    scheduler.add(request("a", prompt=13), 0.0)
    finish(scheduler)
    scheduler.add(request("b", prompt=13), 0.0)

    batch, outputs = step(scheduler)

    assert batch.sequences[0].start == 12
    assert outputs[0].num_cached_tokens == 12


def test_whole_prompt_in_the_cache_still_computes_its_last_token() -> None:
    scheduler = make()
    scheduler.add(request("a", prompt=12), 0.0)
    finish(scheduler)
    scheduler.add(request("b", prompt=12), 0.0)

    batch, _ = step(scheduler)

    assert batch.sequences[0].start == 8


def test_prefix_is_not_shared_between_adapters() -> None:
    scheduler = make()
    for digest in ("x", "y"):
        scheduler.adapters.add(digest, 8)
        scheduler.add(request(digest, prompt=13, adapter=digest), 0.0)
    finish(scheduler)
    scheduler.add(request("base", prompt=13), 0.0)

    _, outputs = step(scheduler)

    assert outputs[0].num_cached_tokens == 0


def test_youngest_is_preempted_and_all_finish() -> None:
    scheduler = make(blocks=6, cache=False)
    scheduler.add(request("a", prompt=8, max_tokens=9), 0.0)
    scheduler.add(request("b", prompt=8, max_tokens=9), 0.0)

    tokens = finish(scheduler)

    assert scheduler.num_preemptions > 0
    assert tokens == {"a": list(range(8, 17)), "b": list(range(8, 17))}
    assert scheduler.blocks.num_used == 0


def test_abort_frees_everything_wherever_the_sequence_is() -> None:
    scheduler = make(max_num_seqs=1)
    scheduler.add(request("running"), 0.0)
    scheduler.add(request("waiting"), 0.0)
    step(scheduler)

    scheduler.abort("waiting")
    scheduler.abort("running")
    scheduler.abort("unknown")

    assert not scheduler.has_work()
    assert scheduler.blocks.num_used == 0
    scheduler.check_invariants()


def test_result_of_a_sequence_aborted_during_the_step_is_dropped() -> None:
    scheduler = make()
    scheduler.add(request("a"), 0.0)
    batch = scheduler.schedule(0.0)
    assert batch is not None

    scheduler.abort("a")
    outputs = scheduler.update(batch, answer(batch))

    assert outputs == []


def test_adapter_without_room_lets_others_go_ahead() -> None:
    scheduler = make(lanes=8)
    for digest in ("x", "y"):
        scheduler.adapters.add(digest, 8)
    scheduler.add(request("first", adapter="x", max_tokens=9), 0.0)
    scheduler.add(request("deferred", adapter="y"), 0.0)
    scheduler.add(request("base"), 0.0)

    step(scheduler)
    batch, _ = step(scheduler)

    assert set(ids(batch)) == {"first", "base"}


def test_deferred_adapter_does_not_starve() -> None:
    scheduler = make(lanes=8, max_num_seqs=2)
    for digest in ("x", "y"):
        scheduler.adapters.add(digest, 8)
    scheduler.add(request("x0", adapter="x"), 0.0)
    scheduler.add(request("y", adapter="y"), 0.0)
    served: list[str] = []
    now = 0.0
    for i in range(1, 60):  # a steady stream of x would keep its lanes for ever
        scheduler.add(request(f"x{i}", adapter="x"), now)
        served += [o.request_id for o in step(scheduler, now)[1]]
        now += 0.2

    assert "y" in served
    assert served.index("y") < 4 * (MAX_DEFERRAL_S / 0.2 + 3)


def test_evicted_adapter_comes_back_with_a_copy() -> None:
    scheduler = make(lanes=8)
    for digest in ("x", "y"):
        scheduler.adapters.add(digest, 8)
    copied: list[str] = []
    for name, digest in (("1", "x"), ("2", "y"), ("3", "x")):
        scheduler.add(request(name, adapter=digest), 0.0)
        step(scheduler, copied=copied)
        finish(scheduler)

    assert copied == ["x", "y", "x"]


def test_retiring_adapter_goes_with_its_last_sequence() -> None:
    scheduler = make()
    scheduler.adapters.add("x", 8)
    scheduler.add(request("a", adapter="x", max_tokens=1), 0.0)
    scheduler.adapters.retire("x")
    assert scheduler.adapters.take_dropped().gone == []

    step(scheduler)

    assert scheduler.adapters.take_dropped().gone == ["x"]
    assert scheduler.adapters.lanes.num_used == 0


def test_kv_of_a_gone_adapter_is_freed() -> None:
    scheduler = make()
    scheduler.adapters.add("x", 8)
    scheduler.add(request("a", prompt=13, adapter="x"), 0.0)
    scheduler.add(request("b", prompt=13), 0.0)
    finish(scheduler)

    freed = scheduler.blocks.forget("x")

    assert freed == 3
    scheduler.check_invariants()
    scheduler.add(request("c", prompt=13), 0.0)
    assert step(scheduler)[1][0].num_cached_tokens == 12


def test_adapters_of_the_queue_are_fetched_ahead() -> None:
    scheduler = make(max_num_seqs=1, lanes=16)
    for digest in ("x", "y", "z"):
        scheduler.adapters.add(digest, 8)
        scheduler.add(request(digest, adapter=digest, max_tokens=9), 0.0)

    step(scheduler)
    for _ in range(3):
        scheduler.schedule(0.0)
        load(scheduler)

    assert set(scheduler.adapters.on_device) == {"x", "y"}  # no room for "z", which waits on the host
    assert scheduler.adapters.is_on_host("z")


def test_unreadable_adapter_fails_only_those_who_wait_for_it() -> None:
    scheduler = make()
    scheduler.adapters.add("x", 8)
    scheduler.add(request("a", adapter="x"), 0.0)
    scheduler.add(request("b"), 0.0)
    scheduler.adapters.prefetch("x")
    scheduler.adapters.take_jobs()

    scheduler.adapters.read_failed("x")

    assert scheduler.fail_waiting("x") == ["a"]
    assert set(finish(scheduler)) == {"b"}


@given(seed=st.integers(0, 2**32), blocks=st.integers(8, 24), lanes=st.sampled_from([8, 16, 32]))
@settings(max_examples=60, deadline=None)
def test_any_mix_of_events_ends_with_every_token_and_nothing_held(seed: int, blocks: int, lanes: int) -> None:
    rng = random.Random(seed)
    scheduler = make(blocks=blocks, lanes=lanes, max_num_seqs=4, budget=rng.choice([4, 8, 64]))
    digests = ["x", "y", "z"]
    for digest in digests:
        scheduler.adapters.add(digest, 8)
    wanted: dict[str, int] = {}
    tokens: dict[str, list[int]] = {}
    prompts: dict[str, int] = {}
    for event in range(60):
        kind = rng.random()
        if kind < 0.4:
            name = str(event)
            prompts[name], wanted[name] = rng.randint(1, 16), rng.randint(1, 14)
            adapter = rng.choice([None, *digests])
            scheduler.add(request(name, prompts[name], wanted[name], adapter, rng.randint(0, 2)), event)
        elif kind < 0.5 and wanted:
            name = rng.choice(list(wanted))
            scheduler.abort(name)
            if len(tokens.get(name, [])) < wanted[name]:
                del wanted[name]
        elif scheduler.has_work():
            for output in step(scheduler, float(event))[1]:
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
    for name, more in finish(scheduler).items():
        tokens.setdefault(name, []).extend(more)

    for name, count in wanted.items():
        assert tokens[name] == list(range(prompts[name], prompts[name] + count))
    assert scheduler.blocks.num_used == 0
    scheduler.check_invariants()
