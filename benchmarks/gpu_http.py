"""The server process over HTTP: latencies, adapters against base, and streams beside 20 loads a second."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import uvloop
from gpu_shapes import AdapterShelf, Shape
from served_process import ServedProcess

from loramux.server import bench, bench_figures
from loramux.server.bench_figures import Sample

ROUNDS: Final = 3
LOADS_PER_S: Final = 20
RANK: Final = 16


class HttpCells:
    """Cells of one model; servers are started once each."""

    def __init__(
        self, shape: Shape, model: Path, root: Path, flags: list[str], *, context: int, is_small: bool
    ) -> None:
        self._shape, self._root, self._context, self._is_small = shape, root, context, is_small
        self._shelf = AdapterShelf(root / "shelf", model, {})
        self._flags = [str(model), "--served-model-name", "base", "--load-format", "dummy", *flags]
        self._seed = 0

    def latencies(self) -> Iterator[dict[str, Any]]:
        """First tokens and gaps, with LoRA off and on; both servers are up, one is asked at a time."""
        modules = [f"a{i}={folder}" for i, folder in enumerate(self._shelf.folders(RANK, 8))]
        lora = ["--enable-lora", "--max-lora-rank", str(RANK), "--lora-modules", *modules]
        share = ["--gpu-memory-utilization", "0.42", "--allowed-local-path", str(self._root)]
        streams = 4 if self._is_small else 64
        adapters = [f"a{i}" for i in range(8)]
        with (
            ServedProcess([*self._flags, *share, *lora]) as server,
            ServedProcess([*self._flags, *share]) as plain,
        ):
            yield {"name": "http start", "start_s": server.ready_s, "memory_mib": server.memory_mib()}
            yield {"name": "http T=512", **self._prefill(server.url, 512)}
            cases = {
                f"http B={streams} base": (server.url, ["base"], streams),
                f"http B={streams} base, LoRA off": (plain.url, ["base"], streams),
                f"http B={streams} 8 x r{RANK}": (server.url, adapters, streams),
                "http B=1 base": (server.url, ["base"], 1),
                f"http B=1 r{RANK}": (server.url, adapters[:1], 1),
            }
            rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
            for turn in range(1 if self._is_small else ROUNDS):
                for name, (url, models, count) in cases.items():
                    rounds[name].append(self._streams(url, models, count))
                    if turn == 0:
                        yield {"name": name, **rounds[name][0]}
            yield from ({"name": name, **_medians(runs)} for name, runs in rounds.items())

    def loading(self, seconds: float) -> Iterator[dict[str, Any]]:
        """Gaps of 32 base streams while adapters are loaded and unloaded, and while none is."""
        flags = ["--enable-lora", "--max-lora-rank", str(RANK), "--allow-runtime-lora-updating"]
        streams = 2 if self._is_small else 32
        with ServedProcess([*self._flags, *flags, "--allowed-local-path", str(self._root)]) as server:
            self._streams(server.url, ["base"], streams)
            for loads in (0, LOADS_PER_S, 0, LOADS_PER_S):
                folders = self._shelf.folders(RANK, int(loads * seconds))
                samples, load_ms = uvloop.run(self._beside(server.url, streams, folders, seconds))
                found = {k: v for k, v in _figures(samples).items() if v is not None}
                name = f"http {streams} streams" + (", loading" if loads else "")
                yield {"name": name, **found, "loads": len(load_ms),
                       "load_ms_p50": bench_figures.percentile(load_ms, 50)}  # fmt: skip

    async def _beside(
        self, url: str, streams: int, folders: list[Path], seconds: float
    ) -> tuple[list[Sample], list[float]]:
        """Streams that run for about so long, and loads spread over that time."""
        self._seed += 1
        load = self._workload(url, ["base"], streams, output_len=self._context - 200)
        client = bench.Client(load, None)
        tasks = [
            asyncio.create_task(client.send(client.body("base", 128, load.output_len)))
            for _ in range(streams)
        ]
        await asyncio.sleep(seconds / 10)
        async with httpx.AsyncClient(base_url=url, timeout=60) as loader:
            began = time.perf_counter()

            async def one(index: int, folder: Path) -> float:
                await asyncio.sleep(max(0.0, began + index * seconds / len(folders) - time.perf_counter()))
                fields = {"lora_name": folder.name, "lora_path": str(folder)}
                sent = time.perf_counter()
                (await loader.post("/v1/load_lora_adapter", json=fields)).raise_for_status()
                took = time.perf_counter() - sent
                (await loader.post("/v1/unload_lora_adapter", json=fields)).raise_for_status()
                return took * 1e3

            load_ms = await asyncio.gather(*(one(*item) for item in enumerate(folders)))
            await asyncio.sleep(max(0.0, began + seconds - time.perf_counter()))
        end = time.perf_counter()
        samples = await asyncio.gather(*tasks)
        for sample in samples:
            if sample.error:
                raise RuntimeError(sample.error)
            sample.arrivals = [at for at in sample.arrivals if began <= at <= end]
        return samples, list(load_ms)

    def _workload(self, url: str, models: list[str], streams: int, **fields: Any) -> bench.Workload:
        self._seed += 1
        sizes = {"input_len": 128, "output_len": 16 if self._is_small else 256} | fields
        return bench.Workload(
            base_url=url, model=models, concurrency=[streams], num_prompts=streams, seed=self._seed,
            vocab_size=self._shape.vocab, **sizes,
        )  # fmt: skip

    def _streams(self, url: str, models: list[str], streams: int) -> dict[str, Any]:
        run: dict[str, Any] = uvloop.run(bench.run(self._workload(url, models, streams)))["runs"][0]
        if run["errors"]:
            raise RuntimeError(run["first_error"])
        return {key: value for key, value in run.items() if key.endswith(("_s", "_p50", "_p99"))}

    def _prefill(self, url: str, tokens: int) -> dict[str, Any]:
        load = self._workload(url, ["base"], 1, prefill_len=min(tokens, self._context // 2))
        run: dict[str, Any] = uvloop.run(bench.run(load))["prefill"]
        return {"ttft_ms_p50": run["ttft_ms_p50"], "tok_s": run["prefill_tok_s"], "error": run["first_error"]}


def _figures(samples: list[Sample]) -> dict[str, float | None]:
    gaps = [1e3 * (b - a) for s in samples for a, b in zip(s.arrivals, s.arrivals[1:], strict=False)]
    return {
        "itl_ms_p50": bench_figures.percentile(gaps, 50),
        "itl_ms_p99": bench_figures.percentile(gaps, 99),
        "itl_ms_max": max(gaps, default=None),
    }


def _medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    keys = [key for key, value in runs[0].items() if isinstance(value, float)]
    return {key: statistics.median(run[key] for run in runs) for key in keys} | {"rounds": len(runs)}
