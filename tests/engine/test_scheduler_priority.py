"""`--scheduling-policy priority`: who waits, and who gives way."""

from __future__ import annotations

import msgspec

from loramux.engine.types import Request
from tests.engine.test_scheduler import finish, ids, make, request, step


def at(priority: int, name: str, prompt: int = 5, max_tokens: int = 3, first_token: int = 0) -> Request:
    plain = request(name, prompt=prompt, max_tokens=max_tokens, first_token=first_token)
    return msgspec.structs.replace(plain, priority=priority)


def test_lower_numbers_start_first_and_equals_by_arrival() -> None:
    scheduler = make(max_num_seqs=1, by_priority=True)
    for name, priority in (("a", 5), ("b", -1), ("c", 0), ("d", -1)):
        scheduler.add(at(priority, name), 0.0)

    order = list(finish(scheduler))

    assert order == ["b", "d", "c", "a"]


def test_without_the_policy_the_number_means_nothing() -> None:
    scheduler = make(max_num_seqs=1)
    for name, priority in (("a", 5), ("b", -1), ("c", 0)):
        scheduler.add(at(priority, name), 0.0)

    assert list(finish(scheduler)) == ["a", "b", "c"]


def test_what_runs_is_not_stopped_by_what_arrives() -> None:
    scheduler = make(max_num_seqs=1, by_priority=True)
    scheduler.add(at(9, "running"), 0.0)
    step(scheduler)
    scheduler.add(at(0, "urgent"), 0.0)

    assert ids(step(scheduler)[0]) == ["running"]


def test_least_important_gives_its_blocks_up_even_if_it_is_the_oldest() -> None:
    scheduler = make(blocks=6, cache=False, by_priority=True)
    scheduler.add(at(7, "batch", prompt=8, max_tokens=9), 0.0)
    scheduler.add(at(0, "chat", prompt=8, max_tokens=9, first_token=50), 0.0)
    finished: list[str] = []
    while scheduler.has_work():
        finished += [output.request_id for output in step(scheduler)[1] if output.finish_reason]

    assert scheduler.num_preemptions > 0
    assert finished == ["chat", "batch"]


def test_preempted_sequence_goes_before_its_equals_and_behind_more_important_ones() -> None:
    scheduler = make(blocks=6, cache=False, by_priority=True)
    scheduler.add(at(0, "chat", prompt=8, max_tokens=9), 0.0)
    scheduler.add(at(3, "batch", prompt=8, max_tokens=9, first_token=50), 0.0)
    step(scheduler)
    scheduler.add(at(3, "batch 2"), 0.0)
    scheduler.add(at(1, "urgent"), 0.0)
    while not scheduler.num_preemptions:
        step(scheduler)

    assert [seq.request_id for seq in scheduler.waiting] == ["urgent", "batch", "batch 2"]
