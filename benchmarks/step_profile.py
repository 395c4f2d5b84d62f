"""Where does the time of an engine step go?

The engine runs in this process. Timers stand around its phases while a profiled round runs and are gone in
the plain rounds between, whose time is the step's own. Every phase is held against the machine's floor:
the bytes that it must read by the bandwidth, or its arithmetic by the speed of square products, both measured
here. Writes results/NAME.json and prints a table a case.
"""

from __future__ import annotations

import argparse
import json
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch, as the server starts its engine
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from environment import describe
from machine_floor import MachineFloor, measure_floor
from phase_timer import PhaseTimer
from random_adapters import write_adapter

from loramux.engine import core, messages, scheduler, torch_step
from loramux.engine.config import EngineConfig
from loramux.engine.core import Engine
from loramux.engine.kernels import attention
from loramux.engine.kernels.cpu import backend
from loramux.engine.kernels.cpu.threads import bind
from loramux.engine.layers import activation, linear, norm, rotary
from loramux.engine.model_input import InputBuilder
from loramux.engine.models import decoder, recorded_layers
from loramux.engine.types import Request, SequenceOutput, TokenSampling
from loramux.resolvers.inspect import inspect_adapter

RESULTS: Final = Path(__file__).parent / "results"
EIGHT: Final = (8, 8, 8, 8, 8, 8, 16, 64)
RANKS: Final = EIGHT + (8, 16) * 32  # the eight, and 64 more
PROMPT: Final = 128
PREFILL: Final = 1024
STEPS: Final = 24  # of one round, decoding
HEAD: Final = "head"
LORA: Final = "LoRA"  # of decoded tokens, part of the sites' phases
LAYERS: Final = "layers"  # in one call


@dataclass(frozen=True, slots=True)
class Case:
    """What runs in each step."""

    name: str
    sequences: int
    adapters: range  # which of RANKS, in turn; empty = the base
    prompt: int  # tokens computed in the step itself; 0 = the sequences decode

    @property
    def tokens(self) -> int:
        """Computed in one step."""
        return self.sequences * max(self.prompt, 1)


_BASE, _EIGHT, _MANY = range(0), range(len(EIGHT)), range(len(EIGHT), len(RANKS))
CASES: Final = (
    *(
        Case(f"decode {n}, {'adapters' if adapters else 'base'}", n, adapters, 0)
        for n in (1, 8, 32)
        for adapters in (_BASE, _EIGHT)
    ),
    Case("decode 64, base", 64, _BASE, 0),
    Case("decode 64, 64 adapters", 64, _MANY, 0),
    *(
        Case(f"prefill {PREFILL}, {'adapter' if adapters else 'base'}", 1, adapters, PREFILL)
        for adapters in (_BASE, _EIGHT)
    ),
)


def timer_of(engine: Engine) -> PhaseTimer:
    """Timers around everything in a step that has a name."""
    timer = PhaseTimer()
    sites = {}
    for layer in engine.runner.model._layers:
        sites |= {id(getattr(layer, name)): name for name in ("qkv", "attn_out", "mlp_in", "mlp_out")}
    timer.time(core.Engine, "step", "engine loop")
    timer.time(scheduler.Scheduler, "schedule", "schedule")
    timer.time(scheduler.Scheduler, "update", "update")
    timer.time(InputBuilder, "build", "input")
    timer.time(torch_step.TorchSteps, "_sample", "sample: rows")
    timer.time(torch_step, "sample", "sample")
    timer.time(decoder.Decoder, "forward", "decoder loop")
    timer.time(decoder.Decoder, "logits", HEAD)
    timer.time(recorded_layers.RecordedLayers, "__call__", LAYERS)
    timer.time(decoder.Decoder, "_embed", "embed")
    timer.time(rotary.Rotary, "angles", "angles")
    timer.time(linear.LoraLinear, "__call__", lambda args: sites[id(args[0])])
    timer.time(linear, "apply_lora", LORA)
    timer.time(norm.RMSNorm, "__call__", "norm")
    timer.time(norm.RMSNorm, "after_add", "norm")
    timer.time(norm.LayerNorm, "__call__", "norm")
    timer.time(activation.Activation, "__call__", "activation")
    for kind in (backend.CpuAttention, attention.TorchAttention):
        timer.time(kind, "plan", "input: attention")
        timer.time(kind, "store", "rotate, store")
        timer.time(kind, "attend", "attention")
    timer.time(messages, "encode", "messages")
    return timer


def request(name: str, rng: random.Random, prompt: int, output: int, adapter: str | None) -> Request:
    """Greedy, random ids."""
    return Request(
        request_id=name,
        prompt_token_ids=[rng.randrange(1000, 40000) for _ in range(prompt)],
        sampling=TokenSampling(max_tokens=output, temperature=0.0),
        adapter=adapter,
    )


def step(engine: Engine) -> tuple[float, list[SequenceOutput]]:
    """One step with what the process adds to it: seconds, outputs."""
    began = time.perf_counter()
    outputs = engine.step()
    messages.encode([messages.Outputs(outputs)])
    return time.perf_counter() - began, outputs


def rounds(engine: Engine, case: Case, adapters: list[str], rng: random.Random) -> Iterator[None]:
    """Bring the engine to where the next step is one of the case; yields before each such step."""
    own = [
        adapters[case.adapters[i % len(case.adapters)]] if case.adapters else None
        for i in range(case.sequences)
    ]
    if case.prompt:
        for turn in range(6):
            engine.add_request(request(f"p{turn}", rng, case.prompt, 1, own[0]))
            yield
        return
    for index, adapter in enumerate(own):
        engine.add_request(request(f"s{index}", rng, PROMPT, STEPS + 4, adapter))
    first: set[str] = set()
    while len(first) < case.sequences:
        first |= {out.request_id for out in step(engine)[1]}
    for _ in range(STEPS):
        yield
    while engine.has_work():
        step(engine)


def take_cycles(engine: Engine) -> dict[str, int]:
    """Of the step's operations by kind, if its layers were one call."""
    recorded = engine.runner.model._recorded
    return {} if recorded is None else dict(recorded.take_cycles())


def split_layers(phases: dict[str, float], cycles: dict[str, int]) -> dict[str, float]:
    """The time of the one call in place of that, by kind of operation, as its cycles are distributed."""
    total = sum(cycles.values())
    if not total:
        return phases
    seconds = phases.pop(LAYERS)
    return phases | {kind: phases.get(kind, 0.0) + seconds * n / total for kind, n in cycles.items()}


def measure(
    engine: Engine, case: Case, adapters: list[str], rng: random.Random, *, turns: int
) -> tuple[float, dict[str, float]]:
    """(seconds of a step without timers, seconds of each phase), medians; plain and timed rounds in turn."""
    timer = timer_of(engine)
    plain: list[float] = []
    timed: list[dict[str, float]] = []
    for _ in rounds(engine, case, adapters, rng):  # warm: compiled code, caches
        step(engine)
    for _ in range(turns):
        for _ in rounds(engine, case, adapters, rng):
            plain.append(step(engine)[0])
        for _ in rounds(engine, case, adapters, rng):
            take_cycles(engine)
            with timer:
                step(engine)
            timed.append(split_layers(timer.take(), take_cycles(engine)))
    names = {name for phases in timed for name in phases}
    return statistics.median(plain), {
        name: statistics.median(phases.get(name, 0.0) for phases in timed) for name in names
    }


def floors(engine: Engine, case: Case, floor: MachineFloor) -> dict[str, float]:
    """The least seconds of the phases that have much to read or to compute."""
    c = engine.runner.model_config
    size = engine.runner.dtype.itemsize
    weight_size = 1 if engine.config.quantization == "int8" else size
    found = {
        site.name: c.num_layers
        * floor.seconds(
            site.in_features * site.out_features * weight_size,
            2 * case.tokens * site.in_features * site.out_features,
        )
        for site in c.sites
    }
    head = c.vocab_size * c.embed_dim
    found[HEAD] = floor.seconds(head * weight_size, 2 * case.sequences * head)
    context = PREFILL / 2 if case.prompt else PROMPT + STEPS / 2
    pairs = case.tokens * context  # of a query with a key
    kv_bytes = case.sequences * context * 2 * c.num_kv_heads * c.head_dim * size
    flops = 4 * pairs * c.num_heads * c.head_dim
    found["attention"] = c.num_layers * floor.seconds(kv_bytes, flops)
    if case.adapters:
        ranks = [RANKS[case.adapters[i % len(case.adapters)]] for i in range(case.sequences)]
        read = sum(RANKS[i] for i in case.adapters[: case.sequences])  # each adapter once
        numbers = sum(len(site.parts) * site.in_features + site.out_features for site in c.sites)
        flops = 2 * sum(ranks) * max(case.prompt, 1) * numbers
        found[LORA] = c.num_layers * floor.seconds(read * numbers * size, flops)
    return found


def report(case: Case, plain: float, phases: dict[str, float], least: dict[str, float]) -> dict[str, Any]:
    """Print a table; the same as a dictionary, in ms."""
    total = sum(phases.values())
    print(f"\n{case.name}: {plain * 1e3:.2f} ms a step ({total * 1e3:.2f} with timers), "
          f"floor {sum(least.values()) * 1e3:.2f} ms = {sum(least.values()) / plain:.0%}")  # fmt: skip
    rows = {}
    for name, seconds in sorted(phases.items(), key=lambda item: -item[1]):
        bound = least.get(name)
        rows[name] = {"ms": seconds * 1e3, "share": seconds / total}
        text = ""
        if bound is not None:
            rows[name] |= {"floor_ms": bound * 1e3, "of_floor": bound / seconds}
            text = f"{bound * 1e3:9.3f} {bound / seconds:6.0%}"
        print(f"  {name:16} {seconds * 1e3:9.3f} ms {seconds / total:6.1%} {text}")
    for name in least.keys() - rows.keys():
        rows[name] = {"floor_ms": least[name] * 1e3}
        print(f"  {name:16} {'':9}    {'':6}  {least[name] * 1e3:9.3f}")
    return {
        "case": case.name,
        "step_ms": plain * 1e3,
        "timed_ms": total * 1e3,
        "floor_ms": sum(least.values()) * 1e3,
        "of_floor": sum(least.values()) / plain,
        "phases": rows,
    }


def operators(engine: Engine, case: Case, adapters: list[str], rng: random.Random) -> str:
    """Torch's own table of operators over one round."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in rounds(engine, case, adapters, rng):
            step(engine)
    return profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15)


def start(model: Path, root: Path, options: dict[str, Any]) -> tuple[Engine, list[str]]:
    """An engine with all adapters on the device; their digests."""
    engine = Engine(
        EngineConfig(
            model=str(model), enable_lora=True, num_lanes=sum(RANKS), enable_prefix_caching=False, **options
        )
    )
    digests = []
    for index, rank in enumerate(RANKS):
        folder = write_adapter(root / f"a{index}", model, rank=rank, seed=index)
        spec = inspect_adapter(folder, engine.info.lora_sites, max_lora_rank=max(RANKS))
        engine.load_adapter(spec)
        digests.append(spec.digest)
    bind()  # as in a process of its own
    return engine, digests


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--operators", action="store_true", help="also torch's table of operators")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--quantization", default=None, help="of the weights: int8")
    parser.add_argument("--name", default="step_profile-cpu")
    args = parser.parse_args()
    rng = random.Random(0)
    about = describe()
    options = {"num_threads": args.threads, "quantization": args.quantization}
    with tempfile.TemporaryDirectory() as root:
        engine, adapters = start(args.model, Path(root), options)
        floor = measure_floor(engine.runner.dtype)
        measured = []
        for case in CASES:
            if args.only not in case.name:
                continue
            plain, phases = measure(engine, case, adapters, rng, turns=args.turns)
            measured.append((case, plain, phases))
            floor = floor.best_of(measure_floor(engine.runner.dtype))
            if args.operators:
                print(operators(engine, case, adapters, rng))
        print(f"floor: {floor.bytes_per_s / 1e9:.1f} GB/s, {floor.flops_per_s / 1e9:.0f} GFLOP/s")
        found = [report(*one, floors(engine, one[0], floor)) for one in measured]
        engine.close()
    limits = {"bytes_per_s": floor.bytes_per_s, "flops_per_s": floor.flops_per_s}
    result = {**about, **options, "threads": torch.get_num_threads(), "floor": limits, "cases": found}
    (RESULTS / f"{args.name}.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
