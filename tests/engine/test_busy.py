"""While the server has one of two cores, the engine's first thread computes alone, and the same."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from loramux.engine.busy import BusyFlag
from loramux.engine.client import EngineClient
from loramux.engine.config import EngineConfig
from loramux.engine.kernels.cpu import product, threads
from loramux.engine.kernels.cpu.lora import LoraKernel
from loramux.engine.kernels.lora import SiteLanes
from loramux.engine.types import Request, TokenSampling

FAKE_ENGINE = (sys.executable, "-m", "tests.server.fake_engine")


@pytest.fixture
def flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BusyFlag:
    """One that the kernels heed."""
    monkeypatch.setattr(threads, "_SERVERS", [])
    flag = BusyFlag(tmp_path)
    threads.heed(flag)
    return flag


@pytest.fixture
def restless(flag: BusyFlag) -> Iterator[BusyFlag]:
    """A flag that goes up and down at any time."""
    is_over = threading.Event()

    def toggle() -> None:
        while not is_over.wait(1e-5):
            if flag.is_up():
                asyncio.run(flag.lower_when_written())
            else:
                flag.put_up()

    thread = threading.Thread(target=toggle)
    thread.start()
    yield flag
    is_over.set()
    thread.join()


def test_another_process_sees_it(tmp_path: Path) -> None:
    flag = BusyFlag(tmp_path)
    program = f"from loramux.engine.busy import *; f = BusyFlag(Path({str(tmp_path)!r})); print(f.is_up()); "
    other = [sys.executable, "-c", program + "f.put_up()"]

    answers = [subprocess.run(other, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    was_up = flag.is_up()
    asyncio.run(flag.lower_when_written())

    assert answers == ["False\n", "True\n"]
    assert was_up
    assert not flag.is_up()


def test_the_streams_write_before_it_is_lowered(tmp_path: Path) -> None:
    flag = BusyFlag(tmp_path)
    seen: list[bool] = []

    async def test() -> None:
        queue: asyncio.Queue[int] = asyncio.Queue()

        async def stream() -> None:
            await queue.get()
            seen.append(flag.is_up())

        task = asyncio.create_task(stream())
        await asyncio.sleep(0)
        flag.put_up()
        queue.put_nowait(1)
        await flag.lower_when_written()
        await task

    asyncio.run(test())

    assert seen == [True]


def test_the_server_lowers_it_when_tokens_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def test() -> list[bool]:
        client = EngineClient(EngineConfig(model="tiny"), command=FAKE_ENGINE)
        await client.start()
        flag = BusyFlag(next(tmp_path.glob("loramux-*")))
        flag.put_up()
        states = [flag.is_up()]
        request = Request(
            request_id="r", prompt_token_ids=list(b"abc"), sampling=TokenSampling(max_tokens=4, seed=0)
        )
        async for _ in client.generate(request):
            pass
        await client.stats()  # its answer comes after the tokens
        for _ in range(10):
            await asyncio.sleep(0)
        states.append(flag.is_up())
        await client.stop()
        return states

    assert asyncio.run(test()) == [True, False]


def test_few_rows_are_computed_alone_while_it_is_up(flag: BusyFlag) -> None:
    before = threads.is_alone(1)
    flag.put_up()

    assert [before, threads.is_alone(1), threads.is_alone(128), threads.is_alone(129)] == [
        False,
        True,
        True,
        False,
    ]


@pytest.mark.skipif(not product.is_available(), reason="needs AVX512-BF16")
@pytest.mark.parametrize("num_rows", [1, 12, 40])
def test_products_are_the_same_at_any_time(restless: BusyFlag, num_rows: int) -> None:
    torch.manual_seed(0)
    linear = product.PackedLinear(torch.randn(1152, 576).bfloat16(), None)
    x = torch.randn(num_rows, 576).bfloat16()
    widths = [576, 384, 192]
    pool = SiteLanes(
        a=torch.randn(32, 3, 576).bfloat16(),
        b=[torch.randn(32, width).bfloat16() for width in widths],
        offsets=[0, 576, 960, 1152],
    )
    plan = LoraKernel(torch.bfloat16, 3, 576).plan(np.array([(0, num_rows, 8, 16)]))
    seen = set()

    def results() -> tuple[torch.Tensor, torch.Tensor]:
        return linear(x), plan.multiply(linear, x, pool.address)

    first = results()
    for _ in range(300):
        seen.add(restless.is_up())
        assert all(map(torch.equal, results(), first))

    assert seen == {False, True}
