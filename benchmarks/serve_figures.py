"""How fast does `loramux serve` answer, with and without adapters?

Starts two servers on free ports, one with LoRA off, one with eight random adapters (ranks 8 x 6, 16 and 64,
all linear layers), and measures in interleaved rounds: 1, 8 and 32 streams of 128 prompt and 128 output
tokens, and the prefill of 1024 tokens. The figures are medians over the rounds. Writes results/NAME.json and
results/NAME.md.
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
from typing import Any, NamedTuple

import uvloop
from environment import describe
from random_adapters import write_adapter
from serve_report import markdown
from served_process import ServedProcess

from loramux.server import bench

RANKS = (8, 8, 8, 8, 8, 8, 16, 64)
PREFILL_ADAPTER = "a6"  # rank 16
RESULTS = Path(__file__).parent / "results"


class Case(NamedTuple):
    """Requests of one kind: to which server, for which models."""

    name: str
    server: ServedProcess
    models: list[str]
    prefill_model: str
    prefill_name: str


def start(stack: ExitStack, args: argparse.Namespace) -> list[Case]:
    """Start the servers; they end with the stack."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    common = [str(args.model), "--served-model-name", "base", "--dtype", args.dtype]
    common += [] if args.quantization is None else ["--quantization", args.quantization]
    adapters = {
        f"a{i}": write_adapter(folder / f"a{i}", args.model, rank=r, seed=i) for i, r in enumerate(RANKS)
    }
    cases = []
    if not args.only_lora:
        off = stack.enter_context(ServedProcess(common))
        cases.append(Case("base, LoRA off", off, ["base"], "base", "base, LoRA off"))
    lora = ["--enable-lora", "--max-lora-rank", str(max(RANKS)), "--lora-modules"]
    modules = [f"{name}={path}" for name, path in adapters.items()]
    on = stack.enter_context(ServedProcess([*common, *lora, *modules]))
    cases.append(Case("base", on, ["base"], "base", "base"))
    cases.append(Case("8 adapters", on, list(adapters), PREFILL_ADAPTER, "adapter, rank 16"))
    return cases


def measure(case: Case, args: argparse.Namespace, seeds: Iterator[int]) -> list[dict[str, Any]]:
    """One round of one case: a row for each concurrency and one for the prefill."""
    rows = []
    for streams in args.concurrency:
        load = bench.Workload(
            base_url=case.server.url,
            model=case.models,
            concurrency=[streams],
            num_prompts=max(streams, 2),
            warmup=0,
            seed=next(seeds),
        )
        rows.append(uvloop.run(bench.run(load))["runs"][0])
    load = bench.Workload(
        base_url=case.server.url,
        model=[case.prefill_model],
        concurrency=[],
        warmup=0,
        prefill_len=args.prefill_len,
        seed=next(seeds),
    )
    rows.append(uvloop.run(bench.run(load))["prefill"])
    for row in rows:
        if row["errors"]:
            raise SystemExit(f"{case.name}: {row['errors']} requests failed: {row['first_error']}")
    *decode, prefill = rows
    return [*({"case": case.name, **row} for row in decode), {"case": case.prefill_name, **prefill}]


def medians(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each case and concurrency (or prompt length): the median of every number."""

    def key(row: dict[str, Any]) -> tuple[str, int, int]:
        return row["case"], row.get("concurrency", 0), row.get("prompt_len", 0)

    merged = []
    for same in ([row for row in rows if key(row) == k] for k in dict.fromkeys(map(key, rows))):
        one = dict(same[0])
        for name, value in same[0].items():
            values = [row[name] for row in same if row[name] is not None]
            if isinstance(value, float) and values:
                one[name] = statistics.median(values)
        merged.append(one)
    return merged


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything; returns what the JSON file holds."""
    result: dict[str, Any] = {
        **describe(),
        "model": args.model.name,
        "dtype": args.dtype,
        "quantization": args.quantization,
        "rounds": args.rounds,
    }
    seeds = itertools.count(args.seed)  # a seed twice would be a prefix cache hit
    with ExitStack() as stack:
        cases = start(stack, args)
        servers = {case.name: case.server for case in cases if case.models == ["base"]}
        labels = {"base, LoRA off": "LoRA off", "base": "8 adapters loaded"}
        result["servers"] = {
            labels[name]: {"ready_s": server.ready_s, "memory_ready_mib": server.memory_mib()}
            for name, server in servers.items()
        }
        for case in cases:  # a short request to each model, not measured
            uvloop.run(bench.run(bench.Workload(base_url=case.server.url, model=case.models, concurrency=[])))
        rows: list[dict[str, Any]] = []
        for number in range(1, args.rounds + 1):
            for case in cases:
                print(f"round {number} of {args.rounds}: {case.name}", flush=True)
                rows += measure(case, args, seeds)
        for name, server in servers.items():
            result["servers"][labels[name]]["memory_after_mib"] = server.memory_mib()
    return {**result, "medians": medians(rows), "all_rounds": rows}


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a Llama-shaped model folder")
    parser.add_argument("--name", default="serve", help="of the files under results/")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", default=None, help="of the servers' weights: int8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prefill-len", type=int, default=1024)
    parser.add_argument("--only-lora", action="store_true", help="do not start the server with LoRA off")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    result = run(args)
    tables = markdown(result)

    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{args.name}.md").write_text(tables)
    print(tables)


if __name__ == "__main__":
    main()
