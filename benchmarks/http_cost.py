"""What does HTTP cost? CPU seconds of the server process for 1,000 streamed tokens at 64 streams.

The engine is the tests' stand-in, which makes one token a stream each 10 ms, so that the figure is the cost
of what lies between an engine's outputs and the socket: decoding frames, text, JSON, events. Two lengths of
answers tell the cost of a token from that of a request. `--root` measures another checkout with the same
interpreter: before and after a change. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvloop
from environment import describe

HERE = Path(__file__).parent
RESULTS = HERE / "results"
LENGTHS = (50, 250)  # tokens an answer
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "!slow"}]}),
    "completion": ("/v1/completions", {"prompt": "!slow"}),
    "chat, top_logprobs 5": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "!slow"}], "logprobs": True, "top_logprobs": 5},
    ),
    "completion, n 4": ("/v1/completions", {"prompt": "!slow", "n": 4}),
}


class Server:
    """`loramux serve` of a checkout, with the stand-in engine."""

    def __init__(self, root: Path, model: Path) -> None:
        flags = [str(model), "--port=0", "--served-model-name=x", "--uvicorn-log-level=warning"]
        environ = {**os.environ, "PYTHONPATH": str(root)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.server.fake_serve", *flags, "--disable-uvicorn-access-log"],
            cwd=root,
            env=environ,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if match := re.search(r"ready on (\S+)", line):
                self.url = match[1]
                threading.Thread(target=self._process.stderr.read, daemon=True).start()  # keep it flowing
                return
        raise SystemExit(f"the server of {root} did not start")

    def cpu_s(self) -> float:
        """Processor time that the server process has used; the engine's is not in it."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """End it."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(30)


async def ask(url: str, path: str, body: dict[str, Any]) -> int:
    """Stream one answer; returns the number of its events that hold a choice."""
    address = urlsplit(url)
    assert address.hostname is not None
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 200"), answer[:500]
    assert b"data: [DONE]" in answer, answer[-500:]
    return answer.count(b'"choices":[{')


async def burst(url: str, path: str, body: dict[str, Any], streams: int, requests: int) -> int:
    """So many requests, `streams` at a time; returns the events."""
    gate = asyncio.Semaphore(streams)

    async def one() -> int:
        async with gate:
            return await ask(url, path, body)

    return sum(await asyncio.gather(*(one() for _ in range(requests))))


def measure(server: Server, case: str, args: argparse.Namespace) -> dict[str, float]:
    """CPU seconds of one case: of a thousand tokens, of a request, and of both together."""
    path, fields = CASES[case]
    choices = fields.get("n", 1)
    streams = args.streams // choices
    costs: list[float] = []
    walls: list[float] = []
    for length in LENGTHS:
        body = {**fields, "model": "x", "max_tokens": length, "ignore_eos": True, "stream": True}
        uvloop.run(burst(server.url, path, body, streams, streams))  # warm
        began_s, cpu_s = time.perf_counter(), server.cpu_s()
        uvloop.run(burst(server.url, path, body, streams, streams * 2))
        costs.append((server.cpu_s() - cpu_s) / (streams * 2))
        walls.append(streams * 2 * choices * length / (time.perf_counter() - began_s))
    tokens = [length * choices for length in LENGTHS]
    per_token = (costs[1] - costs[0]) / (tokens[1] - tokens[0])
    return {
        "cpu_s_per_1000_tokens": per_token * 1000,
        "cpu_ms_per_request": (costs[0] - per_token * tokens[0]) * 1000,
        "cpu_s_per_1000_tokens_all_in": costs[1] / tokens[1] * 1000,
        "tokens_per_s": walls[1],
    }


def main() -> None:
    """Measure some checkouts in turns and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, action="append", help="a checkout; this one unless given")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="http_cost")
    args = parser.parse_args()
    roots = [root.resolve() for root in args.root or [HERE.parent]]
    rounds: dict[str, dict[str, list[dict[str, float]]]] = {}
    folder = tempfile.mkdtemp(prefix="http-cost-")
    for _ in range(args.rounds):
        for root in roots:
            model = Path(folder) / commit(root)
            write = (
                "import sys; from pathlib import Path; from tests.server.tiny_text import write_text_model"
            )
            command = [sys.executable, "-c", f"{write}; write_text_model(Path(sys.argv[1]))", str(model)]
            subprocess.run(command, cwd=root, check=True)
            server = Server(root, model)
            for case in CASES:
                figures = measure(server, case, args)
                rounds.setdefault(str(commit(root)), {}).setdefault(case, []).append(figures)
            server.stop()
    medians = {
        name: {
            case: {key: round(statistics.median(run[key] for run in runs), 4) for key in runs[0]}
            for case, runs in cases.items()
        }
        for name, cases in rounds.items()
    }
    result = {"streams": args.streams, "commits": medians, "rounds": rounds}
    print(json.dumps(medians, indent=1))
    (RESULTS / f"{args.name}.json").write_text(json.dumps({**describe(), **result}, indent=1) + "\n")


def commit(root: Path) -> str:
    """What a checkout stands at."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


if __name__ == "__main__":
    main()
