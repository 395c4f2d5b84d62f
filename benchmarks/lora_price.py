"""What do requests to the base model pay for a server that also has adapters?

Two servers of the same code differ by some percent, from where their memory happens to lie. So servers are
started in pairs, LoRA off and LoRA on with eight adapters loaded; the two of a pair are asked in turn, base
requests only, and each pair yields one ratio for each number of streams, the median of its rounds. The figure
is the median of the pairs. Writes results/NAME.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import uvloop
from environment import describe
from random_adapters import write_adapter
from served_process import ServedProcess

from loramux.server import bench

RANKS = (8, 8, 8, 8, 8, 8, 16, 64)
RESULTS = Path(__file__).parent / "results"


def start_pair(stack: ExitStack, model: Path, modules: list[str], number: int) -> dict[str, ServedProcess]:
    """LoRA off and on, started in turns of order; they end with the stack."""
    common = [str(model), "--served-model-name", "base"]
    lora = ["--enable-lora", "--max-lora-rank", str(max(RANKS)), "--lora-modules", *modules]
    flags = {"off": common, "on": [*common, *lora]}
    order = sorted(flags, reverse=bool(number % 2))
    return {name: stack.enter_context(ServedProcess(flags[name])) for name in order}


def steady(server: ServedProcess, streams: int, seed: int) -> float:
    """Steady tok/s of base requests."""
    load = bench.Workload(
        base_url=server.url,
        model=["base"],
        concurrency=[streams],
        num_prompts=max(streams, 2),
        warmup=0,
        seed=seed,
    )
    row = uvloop.run(bench.run(load))["runs"][0]
    if row["errors"]:
        raise SystemExit(f"{row['errors']} requests failed: {row['first_error']}")
    found: float = row["steady_tok_s"]
    return found


def measure_pair(pair: dict[str, ServedProcess], args: argparse.Namespace, seeds: Iterator[int]) -> list[Any]:
    """A row for each round and number of streams; the order of the two turns with the round."""
    rows = []
    for server in pair.values():  # not measured
        steady(server, 2, next(seeds))
    for round_ in range(args.rounds):
        for streams in args.concurrency:
            order = sorted(pair, reverse=bool(round_ % 2))
            speed = {name: steady(pair[name], streams, next(seeds)) for name in order}
            rows.append({"streams": streams, **speed, "ratio": speed["on"] / speed["off"]})
    return rows


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--name", default="lora_price-cpu")
    args = parser.parse_args()
    about = describe()
    seeds = itertools.count(1)  # a seed twice would be a prefix cache hit
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        adapters = [
            write_adapter(Path(folder) / f"a{i}", args.model, rank=rank, seed=i)
            for i, rank in enumerate(RANKS)
        ]
        modules = [f"{path.name}={path}" for path in adapters]
        for number in range(args.pairs):
            with ExitStack() as stack:
                pairs.append(measure_pair(start_pair(stack, args.model, modules, number), args, seeds))
    ratios = {
        streams: [
            statistics.median(row["ratio"] for row in rows if row["streams"] == streams) for rows in pairs
        ]
        for streams in args.concurrency
    }
    for streams, found in ratios.items():
        told = ", ".join(f"{ratio:.3f}" for ratio in sorted(found))
        print(f"{streams:3} streams: LoRA on / off {statistics.median(found):.3f} (pairs: {told})")
    result = {**about, "rounds": args.rounds, "ratios_of_pairs": ratios, "pairs": pairs}
    (RESULTS / f"{args.name}.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
