"""Requests that arrive together begin a few at a time."""

from __future__ import annotations

import asyncio

from loramux.server.start_gate import StartGate


def test_only_so_many_begin_in_one_turn_and_all_begin() -> None:
    turn = 0
    began: list[int] = []

    async def one(gate: StartGate) -> None:
        await gate.enter()
        began.append(turn)

    async def main() -> None:
        nonlocal turn
        gate = StartGate(3)
        tasks = [asyncio.create_task(one(gate)) for _ in range(10)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            turn += 1

    asyncio.run(main())

    assert len(began) == 10
    assert max(began.count(number) for number in began) == 3


def test_one_alone_does_not_wait() -> None:
    async def main() -> None:
        gate = StartGate(1)
        entering = gate.enter()
        try:
            entering.send(None)
        except StopIteration:
            return
        raise AssertionError("it waited")

    asyncio.run(main())
