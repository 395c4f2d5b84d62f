"""How does throughput fall when more adapters are in use than lanes hold?

One server with lanes for eight rank-8 adapters and 64 adapters registered; eight streams at a time draw their
adapter from the first 1, 2, 4, ... 64 of them, uniformly and by Zipf. Writes results/NAME.json and prints
tok/s against the number of adapters, and relative to eight.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import uvloop
from environment import describe
from random_adapters import write_adapter
from served_process import ServedProcess

from loramux.server import bench

RESULTS = Path(__file__).parent / "results"
COUNTS = (1, 4, 8, 16, 32, 64)
STREAMS, REQUESTS, RANK = 8, 48, 8


def measure(url: str, names: list[str], choice: str, seed: int) -> dict[str, Any]:
    """One run over these adapters."""
    load = bench.Workload(
        base_url=url,
        model=names,
        model_choice=choice,
        concurrency=[STREAMS],
        num_prompts=REQUESTS,
        input_len=32,
        output_len=48,
        warmup=0,
        seed=seed,
    )
    run: dict[str, Any] = uvloop.run(bench.run(load))["runs"][0]
    if run["errors"]:
        raise SystemExit(f"{run['errors']} requests failed: {run['first_error']}")
    return run


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="many_adapters")
    args = parser.parse_args()
    seeds = itertools.count(1)
    with tempfile.TemporaryDirectory() as root:
        modules = [
            f"a{i}={write_adapter(Path(root) / f'a{i}', args.model, rank=RANK, seed=i)}"
            for i in range(max(COUNTS))
        ]
        lanes = ["--num-lanes", str(8 * RANK)]
        arguments = [str(args.model), "--served-model-name", "base", "--enable-lora", *lanes]
        with ServedProcess([*arguments, "--lora-modules", *modules]) as server:
            rows = [
                {
                    "choice": choice,
                    "adapters": count,
                    **measure(server.url, [f"a{i}" for i in range(count)], choice, next(seeds)),
                }
                for _ in range(args.rounds)
                for choice in ("uniform", "zipf")
                for count in COUNTS
            ]
            memory = server.memory_mib()
    table = [
        {
            "choice": choice,
            "adapters": count,
            "tok_s": statistics.median(
                r["output_tok_s"] for r in rows if (r["choice"], r["adapters"]) == (choice, count)
            ),
            "ttft_ms_p50": statistics.median(
                r["ttft_ms_p50"] for r in rows if (r["choice"], r["adapters"]) == (choice, count)
            ),
        }
        for choice in ("uniform", "zipf")
        for count in COUNTS
    ]
    for row in table:
        eight = next(r["tok_s"] for r in table if (r["choice"], r["adapters"]) == (row["choice"], 8))
        row["over_eight"] = row["tok_s"] / eight
        print({name: round(v, 3) if isinstance(v, float) else v for name, v in row.items()})
    result = {**describe(), "table": table, "all_rounds": rows, "memory_mib": memory}
    (RESULTS / f"{args.name}.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
