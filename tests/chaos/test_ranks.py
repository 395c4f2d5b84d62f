"""A tensor-parallel engine that loses a process: the next one answers with the very same weights."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from loramux.engine.config import EngineConfig
from loramux.engine.errors import EngineDead
from loramux.engine.types import Request, TokenSampling
from loramux.resolvers.inspect import inspect_adapter
from loramux.server.engine_care import EngineCare
from loramux.server.engine_keeper import EngineKeeper
from tests.tiny_models import make_adapter, make_tiny, random_prompt

TIMEOUT_S = 120.0  # that no hang outlives


def request(name: str, adapter: str | None, max_tokens: int) -> Request:
    sampling = TokenSampling(max_tokens=max_tokens, temperature=0.0)
    prompt = random_prompt(12, seed=1)
    return Request(request_id=name, prompt_token_ids=prompt, sampling=sampling, adapter=adapter)


async def ask(keeper: EngineKeeper, asked: Request) -> list[int]:
    async with keeper.open([asked]) as outputs:
        return [token async for output in outputs for token in output.token_ids]


def ranks_of(keeper: EngineKeeper) -> tuple[int, int]:
    """Process ids of the two ranks."""
    tasks = Path(f"/proc/{keeper.pid}/task").iterdir()
    (worker,) = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    assert keeper.pid is not None
    return keeper.pid, worker


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_a_lost_rank_is_an_engine_lost(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "model")
    adapter = make_adapter(folder, tmp_path / "adapter", r=8, targets=["q_proj", "down_proj"])
    config = EngineConfig(
        model=str(folder), device="cpu", num_threads=2, enable_lora=True, tensor_parallel_size=2
    )

    async def test() -> None:
        keeper = EngineKeeper(config, care=EngineCare(restart_wait_s=TIMEOUT_S))
        info = await keeper.start()
        spec = inspect_adapter(adapter, info.lora_sites, max_lora_rank=info.max_lora_rank)
        await keeper.load_adapter(spec)
        engine, worker = ranks_of(keeper)
        before = [await ask(keeper, request(f"a-{who}", who, 8)) for who in (None, spec.digest)]
        endless = asyncio.create_task(ask(keeper, request("b", spec.digest, 400)))
        while not (await keeper.stats()).num_running:
            await asyncio.sleep(0)

        os.kill(worker, signal.SIGKILL)

        with pytest.raises(EngineDead, match="another process of the tensor-parallel engine ended"):
            await endless
        after = [await ask(keeper, request(f"c-{who}", who, 8)) for who in (None, spec.digest)]
        assert after == before
        assert before[0] != before[1]
        assert keeper.num_restarts == 1
        assert not is_there(engine)

        engine, worker = ranks_of(keeper)
        os.kill(engine, signal.SIGKILL)
        while is_there(worker):
            await asyncio.sleep(0.01)
        await keeper.stop()

    async def limited() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await test()

    asyncio.run(limited())
