"""Do running streams notice that an adapter is loaded?

Eight streams of the base model run while, once a second, a short request is sent to an adapter. In the
"warm" rounds the adapters are resident; in the "loading" rounds each is loaded right before (rank 8 and rank
64 in turn) and unloaded after. Compared are the streams' inter-token gaps, round by round in turn, and the
first token of a cold adapter against a warm one. Writes results/NAME.json and prints a table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import uvloop
from environment import describe
from random_adapters import write_adapter
from served_process import ServedProcess

from loramux.server.bench_figures import Sample
from loramux.server.bench_http import Endpoint

RESULTS = Path(__file__).parent / "results"
STREAMS = 8
OUTPUT_TOKENS = 320
RANKS = (8, 64, 8, 64)
PAUSE_S = 0.7


def body(model: str, rng: random.Random, prompt: int, output: int) -> dict[str, Any]:
    """A streamed completion of random ids."""
    return {
        "model": model,
        "prompt": [rng.randrange(1000, 40000) for _ in range(prompt)],
        "max_tokens": output,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }


async def change(client: httpx.AsyncClient, route: str, **fields: str) -> float:
    """Call an adapter route; the seconds it took."""
    began = time.perf_counter()
    answer = await client.post(f"/v1/{route}", json=fields)
    if answer.status_code != 200:
        raise SystemExit(f"{route} {fields}: {answer.status_code} {answer.text}")
    return time.perf_counter() - began


async def visit(
    url: str, folders: list[Path], rng: random.Random, *, loads: bool, stop: asyncio.Event
) -> dict[str, list[float]]:
    """Short requests to the adapters, one after the other; loads and unloads each if asked to."""
    seen: dict[str, list[float]] = {"load_s": [], **{f"ttft_{rank}": [] for rank in set(RANKS)}}
    endpoint = Endpoint(url, None, 120)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        for turn in range(1000):
            if stop.is_set():
                break
            index = turn % len(folders)
            name = f"cold-{rng.random()}" if loads else f"warm{index}"
            if loads:
                seen["load_s"].append(
                    await change(client, "load_lora_adapter", lora_name=name, lora_path=str(folders[index]))
                )
            sample = await endpoint.post("/v1/completions", body(name, rng, 16, 4))
            if sample.error:
                raise SystemExit(sample.error)
            seen[f"ttft_{RANKS[index]}"].append(sample.arrivals[0] - sample.sent_at)
            if loads:
                await change(client, "unload_lora_adapter", lora_name=name)
            await asyncio.sleep(PAUSE_S)
    return seen


async def one_round(url: str, folders: list[Path], rng: random.Random, kind: str) -> dict[str, Any]:
    """Eight streams to their end, with or without visitors; gaps in ms."""
    endpoint = Endpoint(url, None, 300)
    stop = asyncio.Event()
    visitor = (
        None
        if kind == "alone"
        else asyncio.create_task(visit(url, folders, rng, loads=kind == "loading", stop=stop))
    )
    samples = await asyncio.gather(
        *(endpoint.post("/v1/completions", body("base", rng, 64, OUTPUT_TOKENS)) for _ in range(STREAMS))
    )
    stop.set()
    seen = await visitor if visitor else {}
    return {"kind": kind, **gaps(samples), **{k: statistics.median(v) for k, v in seen.items() if v}}


def gaps(samples: list[Sample]) -> dict[str, float]:
    """Percentiles of the time between tokens while all streams run."""
    for sample in samples:
        if sample.error:
            raise SystemExit(sample.error)
    start = max(s.arrivals[0] for s in samples)
    found = sorted(
        (b - a) * 1000
        for s in samples
        for a, b in zip(s.arrivals, s.arrivals[1:], strict=False)
        if a >= start
    )
    return {"p50_ms": found[len(found) // 2], "p99_ms": found[int(len(found) * 0.99)], "max_ms": found[-1]}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="load_stall-cpu")
    args = parser.parse_args()
    os.environ["LORAMUX_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as root:
        cold = [write_adapter(Path(root) / f"c{i}", args.model, rank=r, seed=i) for i, r in enumerate(RANKS)]
        warm = [
            write_adapter(Path(root) / f"w{i}", args.model, rank=r, seed=9 + i) for i, r in enumerate(RANKS)
        ]
        modules = [f"warm{i}={folder}" for i, folder in enumerate(warm)]
        arguments = [
            str(args.model),
            "--served-model-name",
            "base",
            "--enable-lora",
            "--lora-modules",
            *modules,
        ]
        with ServedProcess([*arguments, "--allowed-local-path", root]) as server:
            rounds = [
                uvloop.run(one_round(server.url, cold, rng, kind))
                for _ in range(args.rounds)
                for kind in ("alone", "warm", "loading")
            ]
    kinds = {
        kind: {
            name: statistics.median(r[name] for r in rounds if r["kind"] == kind and name in r)
            for name in sorted({n for r in rounds if r["kind"] == kind for n in r} - {"kind"})
        }
        for kind in ("alone", "warm", "loading")
    }
    ratio = statistics.median(
        b["p99_ms"] / a["p99_ms"]
        for a, b in zip(
            (r for r in rounds if r["kind"] == "warm"),
            (r for r in rounds if r["kind"] == "loading"),
            strict=True,
        )
    )
    result = {**describe(), "rounds": rounds, "medians": kinds, "p99_loading_over_warm": ratio}
    (RESULTS / f"{args.name}.json").write_text(json.dumps(result, indent=1))
    for kind, figures in kinds.items():
        print(kind, {name: round(value, 4) for name, value in figures.items()})
    print("p99 gap, loading / warm:", round(ratio, 3))


if __name__ == "__main__":
    main()
