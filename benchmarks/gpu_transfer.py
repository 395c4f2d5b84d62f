"""What is an adapter's way onto a GPU made of: file, bus, kernel?

Random weights in the shape of a real model; nothing is downloaded. For each rank, milliseconds (least of
several): `read` from the page cache into page-locked memory, `copy` of the same bytes to the device and
nothing else, `write` = copy, kernel, and the event that says so; and the way by the host, tensor by tensor.

    python benchmarks/gpu_transfer.py --shape llama --out DIR
    TRITON_INTERPRET=1 python benchmarks/gpu_transfer.py --shape tiny --device cpu --out DIR  # does it work?
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from environment import describe
from gpu_shapes import SHAPES
from random_adapters import write_adapter

from loramux.engine.adapters.lane_memory import LaneLayout
from loramux.engine.adapters.lanes import LaneSpan
from loramux.engine.adapters.packed import CHUNK_BYTES, PackedAdapter
from loramux.engine.adapters.transfer import STAGING_BYTES, LaneTransfer
from loramux.engine.adapters.weights import LanePool, read_adapter
from loramux.engine.models.families import load_model_config
from loramux.engine.models.weights import BaseWeights
from loramux.engine.parallel.shard import whole_model
from loramux.resolvers.inspect import inspect_adapter

RANKS: Final = (8, 16, 64)
TRIES: Final = 5
HOST_BYTES: Final = 1 << 30


def main() -> None:
    """Measure each rank."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu_transfer.py: torch finds no CUDA device here; nothing was measured")
    if arguments.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit(
            "gpu_transfer.py: --device cpu needs TRITON_INTERPRET=1 and proves nothing but itself"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        model = SHAPES[arguments.shape].write(Path(folder) / "model")
        for rank in RANKS:
            rows.append(measure(model, rank, torch.device(arguments.device)))
            print(*(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
            result = {"environment": describe(), "shape": arguments.shape, "rows": rows}
            path = arguments.out / f"transfer-{arguments.shape}.json"
            path.write_text(json.dumps(result, indent=1))


def measure(model: Path, rank: int, device: torch.device) -> dict[str, Any]:
    """The parts of one adapter's way, in milliseconds."""
    config = load_model_config(model)
    shard, dtype = whole_model(config), torch.bfloat16
    folder = write_adapter(model.parent / f"r{rank}", model, rank=rank, seed=0)
    spec = inspect_adapter(folder, config.lora_sites(), max_lora_rank=rank)
    span = LaneSpan(0, -(-rank // 8) * 8, rank)
    pool = LanePool(config, span.count, dtype=dtype, device=device, layout=LaneLayout.JOINED)
    scatter = importlib.import_module("loramux.engine.kernels.gpu.scatter").scatter
    transfer = LaneTransfer(pool, shard, scatter, host_bytes=HOST_BYTES, device=device)
    staging = torch.empty(STAGING_BYTES, dtype=torch.uint8, device=device)

    def read() -> PackedAdapter:
        adapter = transfer.read(spec)
        assert adapter is not None
        return adapter

    adapter = read()
    base = BaseWeights(None, dtype)

    def copy() -> None:
        for start, part in adapter.memory.parts(0, adapter.memory.nbytes, at_most=CHUNK_BYTES):
            place = start % (STAGING_BYTES - CHUNK_BYTES)
            staging[place : place + len(part)].copy_(part, non_blocking=True)

    def by_the_host() -> None:
        pool.write(read_adapter(spec, shard, dtype, base), span)

    found: dict[str, Any] = {"rank": rank, "mb": round(spec.nbytes / 1e6, 1)}
    for name, part in (
        ("read", read),
        ("copy", copy),
        ("write", lambda: transfer.write(adapter, span)),
        ("by_the_host", by_the_host),
    ):
        found[f"{name}_ms"] = round(_best_ms(part, device), 3)
    found["copy_gb_s"] = round(spec.nbytes / 1e6 / max(found["copy_ms"], 1e-3), 1)
    return found


def _best_ms(part: Callable[[], object], device: torch.device) -> float:
    found = []
    for _ in range(TRIES):
        began_s = time.perf_counter()
        part()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - began_s))
    return min(found)


if __name__ == "__main__":
    main()
