"""An engine that is lost a hundred times: nothing hangs, nothing is mixed up, nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from loramux.engine.config import EngineConfig
from loramux.engine.errors import EngineDead
from loramux.engine.types import AdapterSpec, Request, TokenSampling
from loramux.server.engine_care import EngineCare
from loramux.server.engine_keeper import EngineKeeper

FAKE_ENGINE = (sys.executable, "-m", "tests.server.fake_engine")
NUM_KILLS = int(os.environ.get("NUM_ENGINE_KILLS", "25"))  # 200 were tried once


def spec(number: int) -> AdapterSpec:
    """An adapter that the stand-in engine takes."""
    return AdapterSpec(digest=f"{number:064x}", path="/none", rank=8, nbytes=number, modules=[], files=[])


def request(name: str, text: str, adapter: int | None = None, *, max_tokens: int = 3) -> Request:
    """A request whose answer is its prompt, in upper case if it names an adapter."""
    return Request(
        request_id=name,
        prompt_token_ids=list(text.encode()),
        sampling=TokenSampling(max_tokens=max_tokens),
        adapter=None if adapter is None else f"{adapter:064x}",
    )


async def ask(keeper: EngineKeeper, asked: Request) -> str | EngineDead:
    """The whole answer, or the one error."""
    tokens: list[int] = []
    try:
        async with keeper.open([asked]) as sequences:
            async for output in sequences:
                tokens += output.token_ids
    except EngineDead as error:
        return error
    return bytes(tokens).decode()


def in_a_loop(test: Callable[[], Awaitable[None]]) -> None:
    """Run an async test, with a limit that no hang outlives."""

    async def limited() -> None:
        async with asyncio.timeout(120):
            await test()

    asyncio.run(limited())


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_every_request_ends_in_its_answer_or_one_error_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rng = random.Random(5)

    async def test() -> None:
        keeper = EngineKeeper(EngineConfig(model="tiny", enable_lora=True), command=FAKE_ENGINE)
        await keeper.start()
        for number in range(4):
            await keeper.load_adapter(spec(number), pinned=number == 0)
        files = open_files()
        held = {0, 1, 2, 3}
        for kill in range(NUM_KILLS):
            asked = [request(f"{kill}-{n}", "abc", n % 4 if n % 4 in held else None) for n in range(12)]
            slow = [request(f"{kill}-s{n}", "!slow", max_tokens=1000) for n in range(3)]
            work = [asyncio.create_task(ask(keeper, each)) for each in asked + slow]
            leaving = asyncio.create_task(_toggle(keeper, spec(3), is_held=3 in held))
            held ^= {3}
            await asyncio.sleep(rng.random() * 0.02)
            assert keeper.pid is not None
            os.kill(keeper.pid, signal.SIGKILL)
            answers = await asyncio.gather(*work)
            await leaving

            for each, answer in zip(asked, answers, strict=False):
                assert isinstance(answer, EngineDead) or answer == ("ABC" if each.adapter else "abc")
            assert all(isinstance(answer, EngineDead) for answer in answers[len(asked) :])
            for number in sorted(held):
                assert await ask(keeper, request(f"{kill}-then-{number}", "abc", number)) == "ABC"
            assert await ask(keeper, request(f"{kill}-then", "abc")) == "abc"
            stats = await keeper.stats()
            assert set(stats.host_adapters) == {spec(number).digest for number in held}
        assert keeper.num_restarts == NUM_KILLS
        assert open_files() <= files
        assert len([path for path in tmp_path.iterdir() if path.name.startswith("loramux-")]) == 1
        await keeper.stop()

    in_a_loop(test)

    assert list(tmp_path.glob("loramux-*")) == []


async def _toggle(keeper: EngineKeeper, adapter: AdapterSpec, *, is_held: bool) -> None:
    """Unload it, or load it."""
    if is_held:
        await keeper.unload_adapter(adapter.digest)
    else:
        await keeper.load_adapter(adapter)


def test_an_engine_that_finishes_nothing_is_given_up() -> None:
    async def test() -> None:
        care = EngineCare(max_restarts=2)
        keeper = EngineKeeper(EngineConfig(model="tiny"), command=FAKE_ENGINE, care=care)
        await keeper.start()
        for number in range(3):
            answer = await ask(keeper, request(f"r{number}", "!crash"))
            assert isinstance(answer, EngineDead)
        await keeper.wait_dead()

        assert keeper.num_restarts == 2
        assert keeper.problem == "the engine is not running"
        answer = await ask(keeper, request("late", "abc"))
        assert isinstance(answer, EngineDead)
        await keeper.stop()

    in_a_loop(test)


def test_a_load_is_tried_twice_and_then_fails_once() -> None:
    async def test() -> None:
        keeper = EngineKeeper(EngineConfig(model="tiny", enable_lora=True), command=FAKE_ENGINE)
        await keeper.start()
        poison = AdapterSpec(
            digest="f" * 64, path="/none", rank=8, nbytes=1, modules=[], files=[], base_model="!crash"
        )

        with pytest.raises(EngineDead):
            await keeper.load_adapter(poison)

        assert await ask(keeper, request("after", "abc")) == "abc"
        assert keeper.num_restarts == 2
        await keeper.stop()

    in_a_loop(test)


def test_a_server_that_stops_while_the_engine_restarts_leaves_no_process(tmp_path: Path) -> None:
    async def test() -> None:
        others = _children()
        model = tmp_path / "model"
        model.mkdir()
        keeper = EngineKeeper(EngineConfig(model=str(model)), command=FAKE_ENGINE)
        await keeper.start()
        (model / "hold").touch()
        assert keeper.pid is not None
        os.kill(keeper.pid, signal.SIGKILL)
        waiting = asyncio.create_task(ask(keeper, request("waits", "abc")))
        while keeper.problem is None or _children() == others:
            await asyncio.sleep(0.01)

        await keeper.stop()

        assert isinstance(await waiting, EngineDead)
        assert _children() == others

    in_a_loop(test)


def _children() -> set[str]:
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())
