"""The engine in this process, one cell after the other: decoding, prompts, adapters that come from below."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any, Final

from gpu_machine import busy_share, host_s
from gpu_shapes import AdapterShelf, Machine, Shape

from loramux.engine.block_manager import hash_block, prefix_seed
from loramux.engine.core import Engine
from loramux.engine.types import AdapterSpec, Request, TokenSampling
from loramux.server.bench_figures import percentile

WARM_STEPS: Final = 4
PROFILED_STEPS: Final = 16
RECORD_STEPS: Final = 24  # of the determinism check


SAMPLING: Final[dict[str, dict[str, Any]]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 0.8},
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "Qwen's defaults": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
}


@dataclass(frozen=True)
class Cell:
    """What decodes."""

    rows: int
    adapters: int = 0  # distinct ones, request i takes adapter i mod adapters
    rank: int = 0
    context: int = 1024
    profiled: bool = False
    sampling: str = "greedy"  # of SAMPLING

    @property
    def name(self) -> str:
        """Says everything."""
        lora = f"{self.adapters} x r{self.rank}" if self.adapters else "base"
        end = "" if self.sampling == "greedy" else f", {self.sampling}"
        return f"decode B={self.rows} {lora} ctx={self.context}{end}"


class CellRunner:
    """Runs cells on one engine."""

    def __init__(self, engine: Engine, shape: Shape, machine: Machine, shelf: AdapterShelf) -> None:
        self.engine, self.shape, self.machine, self.shelf = engine, shape, machine, shelf
        self._rng = random.Random(0)
        self._number = 0

    def fits(self, cell: Cell) -> bool:
        """True if the lanes and the KV cache hold it."""
        info = self.engine.info
        tokens = cell.rows * (cell.context + 128)
        lanes = cell.adapters * -(-cell.rank // 8) * 8
        return lanes <= info.num_lanes and tokens <= info.num_kv_blocks * info.block_size

    def decode(self, cell: Cell, steps: int) -> dict[str, Any]:
        """Time steps in which every row decodes."""
        specs = self.shelf.specs(cell.rank, cell.adapters)
        with self._loaded(specs) as adapters:
            requests = self._decoding(cell, adapters, steps + WARM_STEPS + 3 * PROFILED_STEPS)
            times = self._times(requests, steps)
            found = asdict(cell) | {"name": cell.name} | self._figures(cell, times)
            if cell.profiled:
                found |= self._profile()
            self._end([r.request_id for r in requests])
        return found

    def repeats(self, cell: Cell) -> dict[str, Any]:
        """Run the same batch twice; whether the tokens are the same."""
        with self._loaded(self.shelf.specs(cell.rank, cell.adapters)) as adapters:
            rng = self._rng.getstate()
            texts = []
            for _ in range(2):
                self._rng.setstate(rng)
                requests = self._decoding(cell, adapters, RECORD_STEPS)
                ids: dict[str, list[int]] = {r.request_id: [] for r in requests}
                while self.engine.has_work():
                    for out in self.engine.step():
                        ids[out.request_id] += out.token_ids
                texts.append(list(ids.values()))
        same = sum(a == b for a, b in zip(*texts, strict=True))
        return {"name": f"twice the same: {cell.name}", "rows": cell.rows, "same": same / cell.rows}

    def prompt(self, tokens: int, rank: int, repeats: int = 3) -> dict[str, Any]:
        """Time to the first token of a lone prompt; its adapter, if any, is on the device."""
        with self._loaded(self.shelf.specs(rank, 1 if rank else 0)) as adapters:
            adapter = adapters[0] if adapters else None
            times = [self.first_token_s(tokens, adapter) for _ in range(repeats + 1)][1:]
        best = sorted(times)[len(times) // 2]
        floor = self.machine.prefill_s(self.shape, tokens)
        name = f"prompt T={tokens} {f'r{rank}' if rank else 'base'}"
        return {"name": name, "tokens": tokens, "rank": rank, "ttft_ms": best * 1e3, "tok_s": tokens / best,
                "floor_ms": floor * 1e3, "of_floor": floor / best}  # fmt: skip

    def cold(self, tokens: int, rank: int, repeats: int = 5) -> Iterator[dict[str, Any]]:
        """First tokens of adapters on the device, in host memory, and on disk (in the page cache)."""
        for tier in ("device", "host", "disk"):
            times = []
            for turn in range(repeats + 1):
                others = self.engine.info.num_lanes // (-(-rank // 8) * 8) if tier == "host" else 0
                with self._loaded(self.shelf.specs(rank, others)):
                    spec = self.shelf.specs(rank, 1)[0]
                    load = self.engine.restore_adapter if tier == "disk" else self.engine.load_adapter
                    load(spec)
                    is_there = self.engine.adapters.is_on_device(spec.digest)
                    assert is_there == (tier == "device"), f"{tier}: the adapter is elsewhere"
                    took = self.first_token_s(tokens, spec.digest)
                    times += [took] if turn else []
                    self._unload([spec])
            median = sorted(times)[len(times) // 2]
            name = f"first token, r{rank} on {tier}, T={tokens}"
            yield {"name": name, "tier": tier, "rank": rank, "tokens": tokens, "ttft_ms": median * 1e3}

    def churn(self, adapters: list[str], streams: int, seconds: float, *, zipf: bool) -> dict[str, Any]:
        """Short requests, always as many as streams, whose adapters are drawn; tokens a second."""
        weights = list(accumulate(1 / (i + 1) if zipf else 1.0 for i in range(len(adapters))))
        began, until, tokens, sent = time.perf_counter(), time.perf_counter() + seconds, 0, 0
        running = 0
        while time.perf_counter() < until:
            while running < streams:
                adapter = self._rng.choices(adapters, cum_weights=weights)[0]
                self.engine.add_request(self._request(128, 64, adapter))
                running, sent = running + 1, sent + 1
            for out in self.engine.step():
                tokens += len(out.token_ids)
                running -= out.finish_reason is not None
        took = time.perf_counter() - began
        self._end(
            [seq.request_id for seq in [*self.engine.scheduler.running, *self.engine.scheduler.waiting]]
        )
        return {"adapters": len(adapters), "zipf": zipf, "streams": streams, "tok_s": tokens / took,
                "requests": sent, "device_evictions": self.engine.stats().device_evictions}  # fmt: skip

    def first_token_s(self, tokens: int, adapter: str | None) -> float:
        """Seconds from a request to its only token."""
        request = self._request(tokens, 1, adapter)
        began = time.perf_counter()
        self.engine.add_request(request)
        while self.engine.has_work():
            if self.engine.step():
                return time.perf_counter() - began
        raise RuntimeError("the request failed")

    def _decoding(self, cell: Cell, adapters: list[str], outputs: int) -> list[Request]:
        """Requests whose prompts are taken for computed, but for their ends."""
        owners = [adapters[i % len(adapters)] if adapters else None for i in range(cell.rows)]
        requests = [self._request(cell.context, outputs + 2, owner, cell.sampling) for owner in owners]
        for request in requests:
            self._pretend_computed(request)
            self.engine.add_request(request)
        return requests

    def _times(self, requests: list[Request], steps: int) -> list[float]:
        """When each step of all rows ended."""
        seen: dict[str, int] = dict.fromkeys((r.request_id for r in requests), 0)
        while min(seen.values()) < WARM_STEPS:
            for out in self.engine.step():
                seen[out.request_id] += len(out.token_ids)
                assert out.finish_reason is None, "the warm-up took too long"
        times = [time.perf_counter()]
        while len(times) <= steps:
            if self.engine.step():
                times.append(time.perf_counter())
        return times

    def _figures(self, cell: Cell, times: list[float]) -> dict[str, Any]:
        gaps = [(b - a) * 1e3 for a, b in pairwise(times)]
        step_s = (times[-1] - times[0]) / len(gaps)
        floor = self.machine.decode_s(self.shape, cell.rows, cell.context, [cell.rank] * cell.adapters)
        return {
            "step_ms": step_s * 1e3,
            "tok_s": cell.rows / step_s,
            "itl_ms_p50": percentile(gaps, 50),
            "itl_ms_p99": percentile(gaps, 99),
            "floor_ms": floor * 1e3,
            "of_floor": floor / step_s,
        }

    def _profile(self) -> dict[str, Any]:
        engine = self.engine
        phases = {
            "schedule": (engine.scheduler, "schedule"),
            "launch": (engine.runner, "launch"),
            "update": (engine.scheduler, "update"),
        }
        found: dict[str, Any] = {"host_ms": host_s(engine.step, phases, PROFILED_STEPS) * 1e3}
        busy = busy_share(engine.step, PROFILED_STEPS)
        if busy is not None:
            found |= {"busy": busy[0], "kernels_ms": dict(busy[1])}
        return found

    def _loaded(self, specs: list[AdapterSpec]) -> _Loaded:
        return _Loaded(self.engine, specs, self._unload)

    def _unload(self, specs: list[AdapterSpec]) -> None:
        gone: list[object] = []
        for spec in specs:
            self.engine.begin_unload(spec.digest, gone.append)
        while len(gone) < len(specs):
            self.engine.step()

    def _end(self, request_ids: list[str]) -> None:
        self.engine.abort(request_ids)
        while self.engine.has_work():
            self.engine.step()
        self.engine.step()

    def _request(self, tokens: int, outputs: int, adapter: str | None, sampled: str = "greedy") -> Request:
        self._number += 1
        ids = self._rng.choices(range(3, self.shape.vocab), k=tokens)
        sampling = TokenSampling(max_tokens=outputs, **SAMPLING[sampled])
        return Request(
            request_id=f"r{self._number}", prompt_token_ids=ids, sampling=sampling, adapter=adapter
        )

    def _pretend_computed(self, request: Request) -> None:
        """Offer a prompt's blocks to the prefix cache, whatever lies in them: decoding is as fast."""
        blocks, ids = self.engine.scheduler.blocks, request.prompt_token_ids
        size = blocks.block_size
        taken = blocks.allocate((len(ids) - 1) // size)
        assert taken is not None, "the KV cache is too small for this cell"
        parent = prefix_seed(request.adapter, request.cache_salt)
        for index, block in enumerate(taken):
            parent = hash_block(parent, ids[index * size : (index + 1) * size])
            blocks.publish(block, parent, request.adapter)
        blocks.release(taken)


@dataclass
class _Loaded:
    """Adapters that are loaded within a `with`; their digests."""

    engine: Engine
    specs: list[AdapterSpec]
    unload: Callable[[list[AdapterSpec]], None]

    def __enter__(self) -> list[str]:
        for spec in self.specs:
            self.engine.load_adapter(spec)
        return [spec.digest for spec in self.specs]

    def __exit__(self, *_: object) -> None:
        self.unload(self.specs)


def grid(shape_name: str) -> list[Cell]:
    """Every cell, the goals' first, then by context; base before its adapters."""
    if shape_name == "tiny":
        return [
            Cell(1, context=32),
            Cell(4, context=32, profiled=True),
            Cell(4, 1, 8, 32),
            Cell(4, 4, 16, 32),
            *(Cell(4, context=32, sampling=kind) for kind in SAMPLING if kind != "greedy"),
            Cell(64, 64, 64, 32),
        ]
    goals = [Cell(rows, profiled=rows == 64) for rows in (1, 8, 32, 64, 128)]
    goals += [
        Cell(1, 1, 16),
        Cell(32, 8, 16),
        Cell(32, 32, 16),
        Cell(32, 8, 64),
        Cell(64, 8, 16, profiled=True),
    ]
    goals += [
        Cell(rows, sampling=kind, profiled=rows == 64) for rows in (1, 64) for kind in list(SAMPLING)[1:]
    ]
    rest = [
        Cell(rows, count, rank, context)
        for context in (1024, 128, 4096)
        for rows in (1, 8, 32, 64, 128)
        for rank in (0, 16, 64, 8)
        for count in ((0,) if not rank else sorted({min(n, rows) for n in (1, 8, 32, rows)}))
    ]
    return list(
        dict.fromkeys([*goals, *(cell for cell in rest if _plain(cell) not in set(map(_plain, goals)))])
    )


def _plain(cell: Cell) -> tuple[int, int, int, int]:
    """A cell whatever its profile and its sampling."""
    return cell.rows, cell.adapters, cell.rank, cell.context
