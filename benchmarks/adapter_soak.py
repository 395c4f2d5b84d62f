"""Does memory stay flat when adapters come and go for a long time?

A server on a tiny random model; thousands of load/unload cycles and in-place reloads over HTTP. Prints and
writes resident memory before and after, and what is left in lanes and host memory.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import uvloop
from environment import describe
from random_adapters import write_adapter
from served_process import ServedProcess

RESULTS = Path(__file__).parent / "results"


async def soak(url: str, folders: list[Path], cycles: int, server: ServedProcess) -> dict[str, Any]:
    """Warm up, then cycles of load/unload and as many reloads; memory in MiB at each end."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:

        async def call(route: str, **fields: Any) -> None:
            answer = await client.post(f"/v1/{route}", json=fields)
            if answer.status_code != 200:
                raise SystemExit(f"{route}: {answer.status_code} {answer.text}")

        async def load_unload(count: int) -> None:
            for i in range(count):
                await call(
                    "load_lora_adapter", lora_name=f"n{i % 7}", lora_path=str(folders[i % len(folders)])
                )
                await call("unload_lora_adapter", lora_name=f"n{i % 7}")

        async def reload(count: int) -> None:
            await call("load_lora_adapter", lora_name="live", lora_path=str(folders[0]))
            for i in range(count):
                path = str(folders[(i + 1) % len(folders)])
                await call("load_lora_adapter", lora_name="live", lora_path=path, load_inplace=True)
            await call("unload_lora_adapter", lora_name="live")

        began = time.monotonic()
        await load_unload(500)
        await reload(500)
        start = server.memory_mib()["rss"]
        await load_unload(cycles)
        middle = server.memory_mib()["rss"]
        await reload(cycles)
        end = server.memory_mib()["rss"]
        load = (await client.get("/load")).json()
    return {
        "cycles": cycles,
        "rss_mib": {"start": start, "after_load_unload": middle, "after_reloads": end},
        "end_over_start": end / start,
        "seconds": time.monotonic() - began,
        "load_after": load,
    }


def main() -> None:
    """Soak and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--cycles", type=int, default=10_000)
    parser.add_argument("--name", default="adapter_soak")
    args = parser.parse_args()
    os.environ["LORAMUX_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    with tempfile.TemporaryDirectory() as root:
        folders = [write_adapter(Path(root) / f"a{i}", args.model, rank=4 + i, seed=i) for i in range(5)]
        arguments = [str(args.model), "--enable-lora", "--allowed-local-path", root]
        store = ["--adapter-store-dir", f"{root}/store", "--disable-uvicorn-access-log"]
        with ServedProcess([*arguments, *store]) as server:
            result = uvloop.run(soak(server.url, folders, args.cycles, server))
    print(json.dumps(result, indent=1))
    (RESULTS / f"{args.name}.json").write_text(json.dumps({**describe(), **result}, indent=1))


if __name__ == "__main__":
    main()
