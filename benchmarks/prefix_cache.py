"""Do prefix caching and chunked prefill pay?

First: time to first token of a prompt that starts with 1,000 tokens that were computed before (a hit) against
one whose tokens are all new (a miss), for the base model and for an adapter, in turn. Then: eight streams run
and a prompt of 2,000 tokens comes in; how long do the streams wait between two tokens, and how long does the
newcomer wait for its first, with steps of at most 128, 256, ... tokens? One server a size, asked in turn.
Writes results/NAME.json and prints two tables.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import uvloop
from environment import describe
from random_adapters import write_adapter
from served_process import ServedProcess

from loramux.server.bench_figures import Sample, percentile
from loramux.server.bench_http import Endpoint

RESULTS: Final = Path(__file__).parent / "results"
PREFIX: Final = 1000
SUFFIX: Final = 24
STREAMS: Final = 8
STREAM_TOKENS: Final = 160
NEWCOMER: Final = 2000
CHUNKS: Final = (128, 256, 512, 1024, 2048)
MODELS: Final = ("base", "adapter")


def body(model: str, prompt: list[int], output: int) -> dict[str, Any]:
    """A greedy streamed completion."""
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": output,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }


def ids(rng: random.Random, count: int) -> list[int]:
    """Random tokens."""
    return [rng.randrange(1000, 40000) for _ in range(count)]


async def ask(url: str, model: str, prompt: list[int], output: int) -> Sample:
    """One request to its end."""
    sample = await Endpoint(url, None, 300).post("/v1/completions", body(model, prompt, output))
    if sample.error:
        raise SystemExit(sample.error)
    return sample


def ttft_ms(sample: Sample) -> float:
    """Milliseconds from sending to the first token."""
    return (sample.arrivals[0] - sample.sent_at) * 1e3


async def hit_and_miss(url: str, rng: random.Random) -> dict[str, float]:
    """TTFT in ms of each model: nothing known, then the same prefix with another end."""
    found = {}
    for model in MODELS:
        prefix = ids(rng, PREFIX)
        for kind in ("miss", "hit"):
            found[f"{model} {kind}"] = ttft_ms(await ask(url, model, prefix + ids(rng, SUFFIX), 1))
    return found


async def interrupted(url: str, rng: random.Random) -> dict[str, float]:
    """Eight streams, and a long prompt in the middle of them."""
    streams = [asyncio.create_task(ask(url, "base", ids(rng, 32), STREAM_TOKENS)) for _ in range(STREAMS)]
    for _ in range(3):  # served after the streams, so they run when these have their token
        await ask(url, "base", ids(rng, 32), 1)
    newcomer = await ask(url, "base", ids(rng, NEWCOMER), 8)
    samples = await asyncio.gather(*streams)
    if max(s.arrivals[0] for s in samples) > newcomer.sent_at:
        raise SystemExit("the streams had not started when the long prompt came: the machine is too busy")
    inside, outside = [], []
    for sample in samples:
        for before, after in zip(sample.arrivals, sample.arrivals[1:], strict=False):
            is_inside = after > newcomer.sent_at and before < newcomer.arrivals[0]
            (inside if is_inside else outside).append((after - before) * 1e3)
    return {
        "ttft_ms": ttft_ms(newcomer),
        "gap_p50_ms": statistics.median(inside),
        "gap_max_ms": max(inside),
        "normal_gap_p50_ms": statistics.median(outside),
        "normal_gap_p99_ms": percentile(outside, 99) or 0.0,
    }


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure over the rounds."""
    return {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}


def measure_prefix(model: Path, root: Path, rounds: int) -> dict[str, Any]:
    """Hits and misses of one server with an adapter."""
    rng = random.Random(1)
    adapter = write_adapter(root / "adapter", model, rank=16, seed=1)
    options = ["--enable-lora", "--lora-modules", f"adapter={adapter}"]
    with ServedProcess([str(model), "--served-model-name", "base", *options]) as server:
        uvloop.run(hit_and_miss(server.url, rng))  # warm
        rows = [uvloop.run(hit_and_miss(server.url, rng)) for _ in range(rounds)]
    ratios = {m: statistics.median(r[f"{m} miss"] / r[f"{m} hit"] for r in rows) for m in MODELS}
    return {"rounds": rows, "medians_ms": medians(rows), "miss_over_hit": ratios}


def measure_chunks(model: Path, rounds: int, chunks: list[int]) -> dict[str, Any]:
    """The interruption with each size of step, in turn."""
    rng = random.Random(2)
    rows: dict[int, list[dict[str, float]]] = {size: [] for size in chunks}
    with ExitStack() as stack:
        servers = {
            size: stack.enter_context(
                ServedProcess(
                    [
                        *(str(model), "--served-model-name", "base", "--kv-cache-bytes", "300M"),
                        *("--max-num-batched-tokens", str(size)),
                    ]
                )
            )
            for size in chunks
        }
        for turn in range(rounds + 1):
            for size, server in servers.items():
                row = uvloop.run(interrupted(server.url, rng))
                if turn:  # the first one warms
                    rows[size].append(row)
    return {str(size): {"rounds": found, "medians": medians(found)} for size, found in rows.items()}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunks", type=int, nargs="+", default=list(CHUNKS))
    parser.add_argument("--name", default="prefix_cache-cpu")
    args = parser.parse_args()
    about = describe()
    with tempfile.TemporaryDirectory() as root:
        prefix = measure_prefix(args.model, Path(root), args.rounds)
    chunks = measure_chunks(args.model, args.rounds, args.chunks)
    sizes = {"prefix": PREFIX, "suffix": SUFFIX, "streams": STREAMS, "newcomer": NEWCOMER}
    result = {**about, "tokens": sizes, "prefix": prefix, "chunks": chunks}
    (RESULTS / f"{args.name}.json").write_text(json.dumps(result, indent=1))
    for model in MODELS:
        hit, miss = (prefix["medians_ms"][f"{model} {kind}"] for kind in ("hit", "miss"))
        print(f"{model}: TTFT {miss:.0f} ms new, {hit:.0f} ms known, "
              f"{prefix['miss_over_hit'][model]:.1f} times as fast")  # fmt: skip
    for size, found in chunks.items():
        print(f"steps of {size} tokens:", {name: round(v, 1) for name, v in found["medians"].items()})


if __name__ == "__main__":
    main()
