"""What the device of a run can do, and how busy it is: everything that touches CUDA and not the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_shapes import Machine
from machine_floor import measure_floor

_COPY_BYTES = 2 << 30
_GEMM_SIZE = 8192
_TRIES = 10


def measure_machine(device: torch.device) -> Machine:
    """Copy a large array, multiply two matrices; a second or two."""
    if device.type != "cuda":
        floor = measure_floor(torch.float32)
        return Machine(floor.bytes_per_s, floor.flops_per_s)
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = _best_s(lambda: target.copy_(source))
    matrix = torch.randn((_GEMM_SIZE, _GEMM_SIZE), dtype=torch.bfloat16, device=device)
    out = torch.empty_like(matrix)
    product_s = _best_s(lambda: torch.mm(matrix, matrix, out=out))
    return Machine(2 * _COPY_BYTES / copy_s, 2 * _GEMM_SIZE**3 / product_s)


def _best_s(call: Callable[[], object]) -> float:
    """Least seconds of a call on the device."""
    found = []
    for _ in range(_TRIES):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1000)
    return min(found)


def busy_share(step: Callable[[], object], steps: int) -> tuple[float, list[tuple[str, float]]] | None:
    """Share of the time in which the device computes, and the kernels with most of it; None without a GPU.

    Returns:
        The share; (kernel, ms a step), the longest ten.
    """
    if not torch.cuda.is_available():
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    spans: list[tuple[float, float]] = []
    by_name: dict[str, float] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spans.append((event.time_range.start, event.time_range.end))
            took = event.time_range.end - event.time_range.start
            by_name[event.name] = by_name.get(event.name, 0.0) + took
    if not spans:
        return None
    spans.sort()
    busy, reached = 0.0, spans[0][0]
    for begin, end in spans:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    top = sorted(by_name.items(), key=lambda item: -item[1])[:10]
    return busy / (reached - spans[0][0]), [(name, us / 1000 / steps) for name, us in top]


def host_s(step: Callable[[], object], phases: dict[str, tuple[Any, str]], steps: int) -> float:
    """Seconds a step that the host works: the time inside the named functions, none of which waits."""
    spent = 0.0
    originals = {name: getattr(owner, attribute) for name, (owner, attribute) in phases.items()}

    def timed(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            began = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                spent += time.perf_counter() - began

        return call

    try:
        for name, (owner, attribute) in phases.items():
            setattr(owner, attribute, timed(originals[name]))
        for _ in range(steps):
            step()
    finally:
        for owner, attribute in phases.values():
            delattr(owner, attribute)  # the instance's own; the class's is underneath
    return spent / steps
