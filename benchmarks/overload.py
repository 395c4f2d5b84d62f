"""What happens when far more clients ask than a server can answer?

Measures the uncontended maximum with as many clients as sequences run at once, then lets many more ask
for minutes. Every request must end in an answer or in a refusal that says when to come back; `/health` must
answer at once all the time; memory must stay flat; and the server must get as much done as before.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvloop
from environment import describe
from nginx_front import Nginx, check_streaming, find_nginx
from overload_client import HUNG, LOST, Clients, Load, Tally
from served_process import ServedProcess

RESULTS = Path(__file__).parent / "results"
PROBE = Path(__file__).parent / "overload_probe.py"


@contextlib.asynccontextmanager
async def watched_health(url: str) -> AsyncGenerator[list[tuple[float, int]], None]:
    """Milliseconds and status of every `/health` asked inside the block."""
    answers: list[tuple[float, int]] = []
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(PROBE), url, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdout = process.stdout

    async def read() -> None:
        async for line in stdout:
            took, status = line.split()
            answers.append((float(took), int(status)))

    reading = asyncio.create_task(read())
    try:
        yield answers
    finally:
        process.stdin.close()
        await reading
        await process.wait()


@contextlib.asynccontextmanager
async def watched_memory(pid: int | None) -> AsyncGenerator[list[dict[str, float]], None]:
    """MiB of the server and of its engine, every few seconds."""
    samples: list[dict[str, float]] = []

    async def watch() -> None:
        began = time.monotonic()
        while pid is not None:
            samples.append({"second": round(time.monotonic() - began), **rss_mib(pid)})
            await asyncio.sleep(2)

    task = asyncio.create_task(watch())
    try:
        yield samples
    finally:
        task.cancel()


def rss_mib(pid: int) -> dict[str, float]:
    """Resident memory of the server process, and of all its children together."""

    def of(process: int) -> float:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        return 0.0

    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {"server": round(of(pid), 1), "engine": round(sum(of(int(child)) for child in children), 1)}


async def measure(load: Load, pid: int | None, args: argparse.Namespace) -> dict[str, Any]:
    """Both phases against a running server."""
    await Clients(load, args.base_clients, seed=1).run(min(3.0, args.base_seconds))  # warm up
    began = time.monotonic()
    base = await Clients(load, args.base_clients, seed=2).run(args.base_seconds)
    base_rate = base.tokens / (time.monotonic() - began)
    async with watched_health(load.url) as health, watched_memory(pid) as memory:
        began = time.monotonic()
        tally = await Clients(load, args.clients, seed=3).run(args.seconds)
        elapsed_s = time.monotonic() - began
    rate = tally.tokens / elapsed_s
    return {
        "clients": args.clients,
        "seconds": round(elapsed_s, 1),
        "uncontended": {"clients": args.base_clients, "tokens_a_second": round(base_rate, 1)},
        "tokens_a_second": round(rate, 1),
        "of_uncontended": round(rate / base_rate, 3) if base_rate else None,
        "health": summary_of_health(health),
        "requests": summary_of(tally),
        "memory_mib": summary_of_memory(memory),
    }


def summary_of(tally: Tally) -> dict[str, Any]:
    """How requests ended, and when refused clients were told to come back."""
    waits = sorted(tally.waits_s)
    latencies = sorted(tally.latencies_s)
    return {
        "kinds": dict(tally.kinds),
        "lost": tally.kinds[LOST],
        "hung": tally.kinds[HUNG],
        "refused_without_retry_after": sum(
            count for kind, count in tally.kinds.items() if kind.endswith("without Retry-After")
        ),
        "retry_after_s": {"min": waits[0], "median": statistics.median(waits), "max": waits[-1]}
        if waits
        else None,
        "latency_s": {"p50": _quantile(latencies, 0.5), "p99": _quantile(latencies, 0.99)},
        "examples": tally.last_answer,
    }


def summary_of_memory(samples: list[dict[str, float]]) -> dict[str, list[float]]:
    """Twenty samples of the whole run, each process by itself."""
    kept = samples[:: max(1, len(samples) // 20)]
    return {name: [sample[name] for sample in kept] for name in (kept[0] if kept else ())}


def summary_of_health(answers: list[tuple[float, int]]) -> dict[str, Any]:
    """Quantiles in milliseconds."""
    times = sorted(took for took, _ in answers)
    return {
        "count": len(times),
        "not_200": sum(status != 200 for _, status in answers),
        "p50_ms": _quantile(times, 0.5),
        "p99_ms": _quantile(times, 0.99),
        "max_ms": times[-1] if times else None,
    }


def _quantile(ordered: list[float], share: float) -> float | None:
    return round(ordered[min(int(share * len(ordered)), len(ordered) - 1)], 3) if ordered else None


async def run(url: str, pid: int | None, args: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for, against one server."""
    load = Load(
        url=url,
        model=args.served_name,
        prompt_tokens=args.prompt_tokens,
        max_tokens=args.max_tokens,
        hang_s=args.hang_s,
        vocabulary=args.vocabulary,
    )
    if args.front != "nginx":
        return await measure(load, pid, args)
    program = args.nginx or find_nginx(Path(args.nginx_folder))
    with Nginx(program, url) as nginx:
        front = await check_streaming(nginx.url, url, args.served_name, max_tokens=64)
        return {"nginx": front, **await measure(replace(load, url=nginx.url), pid, args)}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="a model folder; not needed with --url")
    parser.add_argument("--url", help="measure this running server instead of starting one")
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--base-clients", type=int, default=32)
    parser.add_argument("--base-seconds", type=float, default=20)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=256, help="prompts are ids below this")
    parser.add_argument("--hang-s", type=float, default=150, help="a request that takes longer hangs")
    parser.add_argument("--served-name", default="overloaded")
    parser.add_argument("--front", choices=("none", "nginx"), default="none")
    parser.add_argument("--nginx", help="the nginx to use")
    parser.add_argument("--nginx-folder", default="/tmp/nginx-unpacked", help="where Debian's is unpacked")
    parser.add_argument(
        "--server-flags", default="--max-num-seqs=32 --max-num-queued-reqs=128 --kv-cache-bytes=256M"
    )
    parser.add_argument("--name", default="overload-cpu", help="results/NAME.json; empty writes nothing")
    return parser.parse_args()


def main() -> None:
    """Measure, print and write."""
    args = parse_args()
    if args.url:
        result = uvloop.run(run(args.url, None, args))
    else:
        flags = ["--disable-uvicorn-access-log", "--served-model-name", args.served_name]
        with ServedProcess([args.model, *flags, *args.server_flags.split()]) as server:
            result = uvloop.run(run(server.url, server.pid, args))
            result["server_flags"] = args.server_flags
    print(json.dumps(result, indent=1))
    if args.name:
        (RESULTS / f"{args.name}.json").write_text(json.dumps({**describe(), **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
