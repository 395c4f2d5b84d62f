"""How near is the engine to what the GPU can do, and what do adapters cost?

Shapes of real models with random weights; nothing is downloaded. A part takes at most --budget-s seconds,
its cells come in the order of their importance, and results are written after each cell:
OUT/PART.json and OUT/PART.md, and OUT/goals.md over all parts in OUT. GPU.md says what to run when.

    python benchmarks/gpu_engine.py --part engine-llama --out DIR
    python benchmarks/gpu_engine.py --part engine-llama --shape tiny --device cpu --out DIR   # does it work?
"""

from __future__ import annotations

import argparse
import json
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch, as the server starts its engine

import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import gpu_peers
import torch
from environment import describe
from gpu_cells import Cell, CellRunner, grid
from gpu_goals import COLUMNS, Results, cell_lines, goal_lines
from gpu_http import HttpCells
from gpu_machine import measure_machine
from gpu_shapes import SHAPES, AdapterShelf, Shape

from loramux.engine.config import EngineConfig
from loramux.engine.core import Engine

Cells = Generator[dict[str, Any], None, None]
ENGINE_CONTEXT: Final = 8448  # longest prompt, 8192, and its output
ENGINE_LANES: Final = 4096  # 64 adapters of rank 64
CHURN_LANES: Final = 1024  # 64 of rank 16
HOST_BYTES: Final = 32 << 30  # of adapters: as many as there are lanes, and some more


@dataclass
class Run:
    """What a part is given, and when it has to end."""

    shape_name: str
    device: torch.device
    folder: Path  # for models and adapters; gone at the end
    deadline: float  # time.perf_counter

    @property
    def shape(self) -> Shape:
        """The model's."""
        return SHAPES[self.shape_name]

    @property
    def is_small(self) -> bool:
        """True if it is only about whether everything works."""
        return self.shape_name == "tiny"

    @property
    def left_s(self) -> float:
        """Seconds until the budget is spent."""
        return self.deadline - time.perf_counter()

    @property
    def http_context(self) -> int:
        """Tokens of a request to the server, at most."""
        return min(4096, self.shape.context)

    def model(self) -> Path:
        """The folder of the model."""
        return self.shape.write(self.folder / "model")


@contextmanager
def started(run: Run, lanes: int, **options: Any) -> Iterator[tuple[CellRunner, dict[str, Any]]]:
    """An engine with adapters at hand, and the cell of its start."""
    machine = measure_machine(run.device)
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    small = {"num_threads": 2, "kv_cache_bytes": 32 << 20, "dtype": "float32"} if run.is_small else {}
    began = time.perf_counter()
    engine = Engine(
        EngineConfig(
            model=str(run.model()),
            load_format="dummy",
            device=run.device.type,
            enable_lora=True,
            num_lanes=512 if run.is_small else lanes,
            max_lora_rank=64,
            max_model_len=min(ENGINE_CONTEXT, run.shape.context),
            max_num_batched_tokens=min(8192, run.shape.context),
            host_lora_bytes=1 << 30 if run.is_small else HOST_BYTES,
            **options | small,
        )
    )
    start = {"name": "start", "start_s": time.perf_counter() - began, "load_s": engine.info.load_seconds,
             "bytes_per_s": machine.bytes_per_s, "flops_per_s": machine.flops_per_s}  # fmt: skip
    for thread in threading.enumerate():
        if thread.name == "arena":  # locks host memory, which is not what is measured
            thread.join()
    shelf = AdapterShelf(run.folder / "shelf", Path(engine.config.model), engine.info.lora_sites)
    try:
        yield CellRunner(engine, run.shape, machine, shelf), start
    finally:
        engine.close()


def engine_part(run: Run) -> Cells:
    """Decoding, prompts, first tokens; the goals' cells first."""
    steps = 4 if run.is_small else 40
    with started(run, ENGINE_LANES) as (runner, start):
        yield start
        cells = grid(run.shape_name)
        num_goals = 5 if run.is_small else 16
        base: dict[tuple[int, int], float] = {}

        def decode(cell: Cell) -> dict[str, Any]:
            if not runner.fits(cell):
                return {"name": cell.name, "error": "does not fit"}
            found = runner.decode(cell, steps)
            where = cell.rows, cell.context
            if not cell.adapters and cell.sampling == "greedy":
                base[where] = found["step_ms"]
            return found | ({"over_base": found["step_ms"] / base[where]} if where in base else {})

        for cell in cells[:num_goals]:
            yield decode(cell)
        for tokens in (128,) if run.is_small else (2048, 512, 8192):
            for rank in (0, 16, 64):
                yield runner.prompt(tokens, rank)
        rows, context = (4, 32) if run.is_small else (32, 1024)
        yield runner.repeats(Cell(rows, 8, 16, context))
        for cell in cells[num_goals:]:
            yield decode(cell)


def load_part(run: Run) -> Cells:
    """Adapters that are not on the device: cold requests, 1000 of them by Zipf, loads beside streams."""
    seconds = 0.5 if run.is_small else 15.0
    with started(run, CHURN_LANES) as (runner, start):
        yield start | {"name": "start, load"}
        yield from runner.cold(32 if run.is_small else 512, 16, repeats=1 if run.is_small else 5)
        for count in (8, 1000):
            specs = runner.shelf.specs(16, count)
            for spec in specs:
                runner.engine.restore_adapter(spec)
            digests = [spec.digest for spec in specs]
            streams = 4 if run.is_small else 64
            for _ in range(2):  # the first brings what is wanted most into lanes
                found = runner.churn(digests, streams, seconds, zipf=count > 8)
            yield {"name": f"{count} adapters", **found}
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    yield from _http(run).loading(1.0 if run.is_small else 12.0)


def http_part(run: Run) -> Cells:
    """The server's latencies."""
    yield from _http(run).latencies()


def peers_part(run: Run) -> Cells:
    """Whatever peer is installed."""
    yield from gpu_peers.cells(run.model(), run.shape, run.device)


def _http(run: Run) -> HttpCells:
    small = ["--num-threads", "1", "--kv-cache-bytes", str(32 << 20), "--dtype", "float32"]
    flags = ["--device", run.device.type, "--max-model-len", str(run.http_context)]
    flags += ["--no-enable-prefix-caching", *(small if run.is_small else [])]
    return HttpCells(
        run.shape, run.model(), run.folder, flags, context=run.http_context, is_small=run.is_small
    )


PARTS: Final[dict[str, tuple[str, Callable[[Run], Cells]]]] = {
    "engine-llama": ("llama", engine_part),
    "load": ("llama", load_part),
    "http": ("llama", http_part),
    "peers": ("llama", peers_part),
    "engine-qwen": ("qwen", engine_part),
}


def write(out: Path, part: str, about: dict[str, Any], results: Results) -> None:
    """The part's files, and the goals' table over all parts in the folder that they apply to."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{part}.json").write_text(json.dumps({**about, "cells": results}, indent=1))
    everything: Results = {}
    for name in PARTS:
        path = out / f"{name}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        if found.get("goals_apply"):
            everything |= found["cells"]
    (out / "goals.md").write_text("\n".join(goal_lines(everything)) + "\n")
    (out / f"{part}.md").write_text("\n".join([f"# {part}", "", *cell_lines(results), ""]))


def measure(run: Run, part: str, out: Path) -> Results:
    """All cells for which there is time."""
    goals_apply = run.shape_name == "llama" and run.device.type == "cuda"
    about = {**describe(), "part": part, "shape": asdict(run.shape), "goals_apply": goals_apply}
    results: Results = {}
    longest = 0.0
    cells = PARTS[part][1](run)
    while run.left_s > 1.5 * longest:
        began = time.perf_counter()
        cell = next(cells, None)
        if cell is None:
            break
        if results:  # the first is the start, which comes once
            longest = max(longest, time.perf_counter() - began)
        name = cell.pop("name")
        results[name] = {key: value for key, value in cell.items() if value is not None}
        write(out, part, about, results)
        print(name, {key: value for key, value in results[name].items() if key in COLUMNS}, flush=True)
    cells.close()
    return results


def main() -> None:
    """Measure a part and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=540)
    parser.add_argument("--shape", choices=SHAPES, help="another one than the part's")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu_engine.py: torch finds no CUDA device here; nothing was measured")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        shape = args.shape or PARTS[args.part][0]
        run = Run(shape, torch.device(args.device), Path(folder), began + args.budget_s)
        measure(run, args.part, args.out)
    print((args.out / "goals.md").read_text())


if __name__ == "__main__":
    main()
