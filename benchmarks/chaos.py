"""What do clients see when the engine process is killed every 20 seconds, under load?

A server in float32 with base and adapter traffic, streamed and not, while adapters are loaded, replaced and
unloaded. Every request must end in a result (the very text that the same weights gave before, alone) or in
one clear error; nothing may hang, be cut, or be answered by other weights. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import uvloop
from chaos_client import BASE, Ask, ChaosClient, Verdict, digest_of
from environment import describe
from random_adapters import write_adapter
from served_process import ServedProcess

RESULTS = Path(__file__).parent / "results"
PROMPTS = [
    "The history of the city begins with",
    "def fibonacci(n):",
    "In the middle of the ocean there was",
    "The three most important rules are",
]
STATIC, MOVING = 3, 3  # adapters that stay, and contents for the names that come and go
BAD = ("CUT", "HUNG", "WRONG")


class Chaos:
    """Load, changes and kills, and the book that is kept of them."""

    def __init__(self, client: ChaosClient, folders: list[Path], server_pid: int, seed: int) -> None:
        self._client = client
        self._folders = folders
        self._server_pid = server_pid
        self._rng = random.Random(seed)
        self._is_over = asyncio.Event()
        self.ended: Counter[str] = Counter()  # of requests
        self.errors: Counter[str] = Counter()
        self.changes: Counter[str] = Counter()  # of adapters
        self.bad: list[str] = []
        self.recoveries_s: list[float] = []
        self.first_results_s: list[float] = []
        self._last_result_s = 0.0

    async def run(self, *, seconds: float, every_s: float, concurrency: int) -> None:
        """All at once, until the time is over and the last request has ended."""
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(self._ask())
            for number in range(2):
                group.create_task(self._change(f"moving-{number}"))
            group.create_task(self._kill(seconds, every_s))

    async def _ask(self) -> None:
        models = [BASE, *(f"static-{n}" for n in range(STATIC)), "moving-0", "moving-1"]
        while not self._is_over.is_set():
            ask = Ask(self._rng.choice(models), self._rng.randrange(len(PROMPTS)), self._rng.random() < 0.6)
            self._note(await self._client.ask(ask))

    def _note(self, verdict: Verdict) -> None:
        self.ended[verdict.kind] += 1
        if verdict.kind == "result":
            self._last_result_s = time.monotonic()
        elif verdict.kind == "error":
            self.errors[verdict.detail] += 1
        else:
            self.bad.append(f"{verdict.kind}: {verdict.detail}")

    async def _change(self, name: str) -> None:
        """Load a content under a name, replace it, take it away, again and again."""
        while not self._is_over.is_set():
            path = str(self._folders[STATIC + self._rng.randrange(MOVING)])
            load = {"lora_name": name, "lora_path": path, "load_inplace": True}
            for route, body in (
                ("load_lora_adapter", load),
                ("load_lora_adapter", load | {"lora_path": str(self._folders[STATIC])}),
                ("unload_lora_adapter", {"lora_name": name}),
            ):
                await self._call(route, body)
                await asyncio.sleep(self._rng.random() * 0.3)

    async def _call(self, route: str, body: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(120):
                response = await self._client.http.post(f"/v1/{route}", json=body)
        except TimeoutError:
            self.bad.append(f"HUNG: {route}")
        except httpx.TransportError as error:
            self.bad.append(f"CUT: {route}: {error!r}")
        else:
            code = "" if response.status_code == 200 else f" {response.json()['error']['code']}"
            self.changes[f"{route} {response.status_code}{code}"] += 1

    async def _kill(self, seconds: float, every_s: float) -> None:
        over_s = time.monotonic() + seconds
        while True:
            await asyncio.sleep(min(every_s, max(0.0, over_s - time.monotonic())))
            if time.monotonic() >= over_s:
                break
            pid = engine_pid(self._server_pid)
            assert pid is not None, "the engine had not come back"
            killed_s = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            await self._until_ready(pid)
            self.recoveries_s.append(time.monotonic() - killed_s)
            ready_s = time.monotonic()
            while self._last_result_s < ready_s and time.monotonic() < ready_s + 60:
                await asyncio.sleep(0.01)
            self.first_results_s.append(self._last_result_s - killed_s)
        self._is_over.set()

    async def _until_ready(self, killed_pid: int) -> None:
        while True:
            await asyncio.sleep(0.02)
            if engine_pid(self._server_pid) in (None, killed_pid):
                continue
            if (await self._client.http.get("/ready")).status_code == 200:
                return


def engine_pid(server_pid: int) -> int | None:
    """The engine: the child that was told where the socket is."""
    children = Path(f"/proc/{server_pid}/task/{server_pid}/children").read_text().split()
    for pid in children:
        with contextlib.suppress(OSError):
            if b"ipc://" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
    return None


async def take_references(client: ChaosClient, folders: list[Path]) -> dict[tuple[str, int], str]:
    """What each weights say to each prompt when nothing else runs."""
    references: dict[tuple[str, int], str] = {}
    for number, folder in [(-1, None), *enumerate(folders)]:
        name = BASE if folder is None else f"reference-{number}"
        if folder is not None:
            body = {"lora_name": name, "lora_path": str(folder)}
            (await client.http.post("/v1/load_lora_adapter", json=body)).raise_for_status()
        for prompt in range(len(PROMPTS)):
            response = await client.http.post("/v1/completions", json=client.body(Ask(name, prompt, False)))
            response.raise_for_status()
            references[digest_of(response), prompt] = response.json()["choices"][0]["text"]
        if folder is not None:
            await client.http.post("/v1/unload_lora_adapter", json={"lora_name": name})
    for prompt in range(len(PROMPTS)):
        texts = [text for (_, asked), text in references.items() if asked == prompt]
        assert len(set(texts)) == len(folders) + 1, "adapters that cannot be told apart"
    return references


async def measure(url: str, server_pid: int, folders: list[Path], args: argparse.Namespace) -> dict[str, Any]:
    """The whole run."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=args.concurrency + 8)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as http:
        client = ChaosClient(http, PROMPTS, max_tokens=args.max_tokens, hang_s=args.hang_after)
        client.references = await take_references(client, folders)
        for number in range(STATIC):
            body = {"lora_name": f"static-{number}", "lora_path": str(folders[number])}
            (await http.post("/v1/load_lora_adapter", json=body)).raise_for_status()
        chaos = Chaos(client, folders, server_pid, args.seed)
        await chaos.run(seconds=args.seconds, every_s=args.every, concurrency=args.concurrency)
        after = (await http.get("/v1/lora_adapters")).json()["data"]
    return {
        "seconds": args.seconds,
        "kill_every_s": args.every,
        "concurrency": args.concurrency,
        "max_tokens": args.max_tokens,
        "kills": len(chaos.recoveries_s),
        "kill_to_ready_s": [round(value, 2) for value in chaos.recoveries_s],
        "kill_to_ready_max_s": round(max(chaos.recoveries_s, default=0.0), 2),
        "kill_to_first_result_s": [round(value, 2) for value in chaos.first_results_s],
        "requests": dict(chaos.ended),
        "errors": dict(chaos.errors),
        "adapter_changes": dict(chaos.changes),
        "bad": chaos.bad[:50],
        "num_bad": len(chaos.bad),
        "adapters_after": {view["name"]: view["state"] for view in after},
    }


def main() -> None:
    """Run, write, and fail if anything was bad."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two kills")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--hang-after", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="chaos-cpu")
    args = parser.parse_args()
    os.environ["LORAMUX_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    with tempfile.TemporaryDirectory() as root:
        folders = [
            write_adapter(Path(root) / f"a{i}", args.model, rank=8, seed=i, size=0.05)
            for i in range(STATIC + MOVING)
        ]
        flags = ["--served-model-name", BASE, "--dtype", "float32", "--enable-lora"]
        flags += ["--allowed-local-path", root, "--adapter-store-dir", f"{root}/store"]
        with ServedProcess([str(args.model), *flags, "--uvicorn-log-level", "warning"]) as server:
            result = uvloop.run(measure(server.url, server.pid, folders, args))
    print(json.dumps(result, indent=1))
    (RESULTS / f"{args.name}.json").write_text(json.dumps({**describe(), **result}, indent=1) + "\n")
    if result["num_bad"]:
        raise SystemExit(f"{result['num_bad']} requests were lost, hung or answered wrongly")


if __name__ == "__main__":
    main()
