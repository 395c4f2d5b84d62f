"""What the engine tells about itself: times of sequences, totals of steps, loads and evictions."""

from __future__ import annotations

from pathlib import Path

import msgspec

from loramux.engine.tally import Tally
from loramux.engine.types import EngineStats, SequenceTiming
from loramux.resolvers.inspect import inspect_adapter
from tests.adapter_files import write_adapter
from tests.engine.test_adapter_residency import alone, start
from tests.engine.test_scheduler import answer, make, request
from tests.tiny_models import make_tiny


def test_a_sequence_is_timed_from_arrival_to_first_step_to_first_token() -> None:
    scheduler = make(budget=4)  # the prompt of 6 takes two steps
    scheduler.add(request("a", prompt=6, max_tokens=3), 10.0)

    timings = []
    for began_s, ended_s in ((12.0, 13.0), (13.0, 15.0), (16.0, 17.0), (18.0, 19.0)):
        batch = scheduler.schedule(began_s)
        assert batch is not None
        timings += [output.timing for output in scheduler.update(batch, answer(batch), ended_s)]

    first = SequenceTiming(queue_s=2.0, prefill_s=3.0)
    assert timings == [first, None, first]


def test_the_last_output_says_how_often_a_sequence_was_preempted() -> None:
    scheduler = make(blocks=4, cache=False)
    for name in ("a", "b"):
        scheduler.add(request(name, prompt=7, max_tokens=6), 0.0)

    last: dict[str, SequenceTiming | None] = {}
    now = 1.0
    while scheduler.has_work():
        batch = scheduler.schedule(now)
        assert batch is not None
        for output in scheduler.update(batch, answer(batch), now + 0.5):
            if output.finish_reason is not None:
                last[output.request_id] = output.timing
        now += 1.0

    assert last["a"] == SequenceTiming(1.0, 0.5, num_preemptions=0)
    assert last["b"] is not None
    assert last["b"].num_preemptions == scheduler.num_preemptions > 0
    assert last["b"].prefill_s == 0.5  # of its first token, not of what was computed again


def test_a_tally_counts_a_value_at_the_first_bound_not_below_it() -> None:
    tally = Tally((1.0, 8.0))

    for value in (1, 2, 8, 9):
        tally.add(value)

    assert tally.distribution().counts == [1, 2, 1]
    assert tally.distribution().total == 20.0


def test_stats_cross_the_process_border_whole() -> None:
    tally = Tally((1.0,))
    tally.add(0.5)
    stats = EngineStats(started_at=1.5, step_tokens=tally.distribution())

    assert msgspec.msgpack.decode(msgspec.msgpack.encode(stats), type=EngineStats) == stats


def test_an_engine_counts_its_steps_and_what_moves_up_and_out(tmp_path: Path) -> None:
    engine = start(make_tiny("llama", tmp_path / "model"), num_lanes=16)
    sites = engine.info.lora_sites
    for seed in range(3):  # 16 lanes hold two of rank 8
        folder = write_adapter(tmp_path / f"adapter-{seed}", sites, rank=8, seed=seed)
        spec = inspect_adapter(folder, sites, max_lora_rank=64)
        engine.load_adapter(spec)
        alone(engine, [1, 2, 3, 4, 5], spec.digest)

    stats = engine.stats()
    engine.close()

    assert stats.started_at > 1.7e9
    assert stats.cpu_s > 0
    assert stats.resident_bytes > 10 << 20
    assert stats.device_evictions == 1
    assert sum(stats.host_load_s.counts) == 3
    assert sum(stats.device_load_s.counts) == 3
    assert sum(stats.step_tokens.counts) == 3 * 24
    assert stats.step_tokens.total == 3 * (5 + 23)
    assert (stats.num_running, stats.num_waiting, stats.num_deferred) == (0, 0, 0)
