"""The figures of `loramux bench`: from the times of single events to one line a run.

What they mean:
    output tok/s    completion tokens (the server's own count) / time from the first send to the last byte
    steady tok/s    the same, only over the time in which all wanted streams were decoding
    TTFT            time to first token: from sending a request to its first event with a choice
    ITL             inter-token latency: time between two such events of one stream
    prefill tok/s   prompt tokens / TTFT of a lone request that asks for one token (--prefill-len)
"""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Sample:
    """One request's story; times are `time.perf_counter` seconds."""

    model: str
    sent_at: float = 0.0
    ended_at: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # one an event that carried a choice
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The value below which `percent` % of them lie, interpolated; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def steady_rate(samples: Sequence[Sample], streams: int) -> float | None:
    """Tokens a second over the time in which `streams` streams were between first and last token.

    None when there was no such time, e.g. since streams ended before the last one began.
    """
    starts = sorted(s.arrivals[0] for s in samples)
    ends = sorted(s.arrivals[-1] for s in samples)
    arrivals = sorted(
        (t, s.completion_tokens / len(s.arrivals)) for s in samples for t in s.arrivals
    )  # an event may hold several tokens, or none
    times = [t for t, _ in arrivals]
    seconds = tokens = 0.0
    for begin, end in _full_spans(starts, ends, streams):
        seconds += end - begin
        inside = arrivals[bisect.bisect_right(times, begin) : bisect.bisect_right(times, end)]
        tokens += sum(weight for _, weight in inside)
    return tokens / seconds if seconds > 0 else None


def _full_spans(starts: list[float], ends: list[float], streams: int) -> Iterator[tuple[float, float]]:
    """The spans in which at least `streams` of the intervals are open."""
    events = sorted([(t, 1) for t in starts] + [(t, -1) for t in ends])
    running = 0
    begin = 0.0
    for at, change in events:
        if change > 0 and running == streams - 1:
            begin = at
        elif change < 0 and running == streams:
            yield begin, at
        running += change


def summarise(samples: Sequence[Sample], concurrency: int) -> dict[str, Any]:
    """The figures of one run; times in milliseconds, None where nothing was measured."""
    good = [s for s in samples if s.error is None]
    ttft = [1000 * (s.arrivals[0] - s.sent_at) for s in good]
    itl = [1000 * (b - a) for s in good for a, b in zip(s.arrivals, s.arrivals[1:], strict=False)]
    wall = max(s.ended_at for s in samples) - min(s.sent_at for s in samples)
    output_tokens = sum(s.completion_tokens for s in good)
    return {
        "concurrency": concurrency,
        "requests": len(samples),
        "errors": len(samples) - len(good),
        "first_error": next((s.error for s in samples if s.error is not None), None),
        "wall_s": wall,
        "prompt_tokens": sum(s.prompt_tokens for s in good),
        "output_tokens": output_tokens,
        "output_tok_s": output_tokens / wall,
        "steady_tok_s": steady_rate(good, min(concurrency, len(samples))),
        "ttft_ms_p50": percentile(ttft, 50),
        "ttft_ms_p99": percentile(ttft, 99),
        "itl_ms_p50": percentile(itl, 50),
        "itl_ms_p99": percentile(itl, 99),
    }


_COLUMNS = (
    ("streams", "concurrency"),
    ("requests", "requests"),
    ("errors", "errors"),
    ("tok/s", "output_tok_s"),
    ("steady tok/s", "steady_tok_s"),
    ("TTFT p50 ms", "ttft_ms_p50"),
    ("TTFT p99 ms", "ttft_ms_p99"),
    ("ITL p50 ms", "itl_ms_p50"),
    ("ITL p99 ms", "itl_ms_p99"),
)


def summarise_prefill(samples: Sequence[Sample], prompt_len: int) -> dict[str, Any]:
    """The figures of lone one-token requests: the median of their rates."""
    good = [s for s in samples if s.error is None]
    rates = [(s.prompt_tokens or prompt_len) / (s.arrivals[0] - s.sent_at) for s in good]
    return {
        "prompt_len": prompt_len,
        "requests": len(samples),
        "errors": len(samples) - len(good),
        "first_error": next((s.error for s in samples if s.error is not None), None),
        "prefill_tok_s": statistics.median(rates) if rates else None,
        "ttft_ms_p50": percentile([1000 * (s.arrivals[0] - s.sent_at) for s in good], 50),
    }


def runs_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every run of a result, the prefill's included."""
    return [*result["runs"], *([result["prefill"]] if result["prefill"] else [])]


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown table, with a line for the prefill and one for the first error."""

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)

    rows = [[title for title, _ in _COLUMNS]]
    rows += [[cell(run[key]) for _, key in _COLUMNS] for run in result["runs"]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = [
        "| " + " | ".join(text.rjust(w) for text, w in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|")
    if not result["runs"]:
        lines = []
    if prefill := result["prefill"]:
        rate, ttft = cell(prefill["prefill_tok_s"]), cell(prefill["ttft_ms_p50"])
        lines.append(f"prefill of {prefill['prompt_len']} tokens: {rate} tok/s (TTFT {ttft} ms)")
    lines += [f"first error: {run['first_error']}" for run in runs_of(result) if run["first_error"]][:1]
    return "\n".join(lines)
