"""The goals for one H200 and whether a run's figures reach them; and the tables of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

Results = dict[str, dict[str, Any]]  # by the name of the cell


@dataclass(frozen=True)
class Goal:
    """A figure and its limit. `value` is None where the run has not measured it."""

    number: str
    text: str
    limit: float
    value: Callable[[Results], float | None]
    at_most: bool = True

    def verdict(self, results: Results) -> tuple[float | None, str]:
        """The figure, and reached, missed or not measured."""
        value = self.value(results)
        if value is None:
            return None, "not measured"
        return value, "reached" if (value <= self.limit) == self.at_most or value == self.limit else "missed"


def figure(name: str, key: str) -> Callable[[Results], float | None]:
    """One figure of one cell."""
    return lambda results: results.get(name, {}).get(key)


def ratio(over: tuple[str, str], under: tuple[str, str]) -> Callable[[Results], float | None]:
    """One figure over another."""

    def value(results: Results) -> float | None:
        a, b = figure(*over)(results), figure(*under)(results)
        return a / b if a is not None and b else None

    return value


def difference(name: str, other: str, key: str) -> Callable[[Results], float | None]:
    """A figure of one cell less that of another."""

    def value(results: Results) -> float | None:
        a, b = figure(name, key)(results), figure(other, key)(results)
        return a - b if a is not None and b is not None else None

    return value


def decode(rows: int, lora: str = "base", context: int = 1024) -> str:
    """A decoding cell's name."""
    return f"decode B={rows} {lora} ctx={context}"


def over_base(rows: int, lora: str) -> Callable[[Results], float | None]:
    """A step with adapters over one without."""
    return ratio((decode(rows, lora), "step_ms"), (decode(rows), "step_ms"))


COLD: Final = "first token, r16 on {}, T=512"
GOALS: Final = (
    Goal("G1", "base decode B=1, ms a step", 4.15, figure(decode(1), "step_ms")),
    Goal("G1", "base decode B=32, tok/s", 5650, figure(decode(32), "tok_s"), at_most=False),
    Goal("G1", "base decode B=64, tok/s", 9200, figure(decode(64), "tok_s"), at_most=False),
    Goal("G1", "base decode B=128, tok/s", 13000, figure(decode(128), "tok_s"), at_most=False),
    Goal("G2", "1 x r16 over base, B=1", 1.04, over_base(1, "1 x r16")),
    Goal("G2", "8 x r16 over base, B=32", 1.08, over_base(32, "8 x r16")),
    Goal("G2", "32 x r16 over base, B=32", 1.19, over_base(32, "32 x r16")),
    Goal("G2", "8 x r64 over base, B=32", 1.19, over_base(32, "8 x r64")),
    Goal("G3", "base prefill T=2048, tok/s", 38000, figure("prompt T=2048 base", "tok_s"), at_most=False),
    Goal("G3", "r16 over base, T=2048", 1.05,
         ratio(("prompt T=2048 r16", "ttft_ms"), ("prompt T=2048 base", "ttft_ms"))),
    Goal("G3", "r64 over base, T=2048", 1.08,
         ratio(("prompt T=2048 r64", "ttft_ms"), ("prompt T=2048 base", "ttft_ms"))),
    Goal("G5", "decode over transformers' batching, B=64", 2.5,
         ratio((decode(64), "tok_s"), ("transformers B=64", "tok_s")), at_most=False),
    Goal("G5", "8 x r16 decode over PEFT, B=32", 10,
         ratio((decode(32, "8 x r16"), "tok_s"), ("PEFT B=32 8 x r16", "tok_s")), at_most=False),
    Goal("G6", "share of time the GPU works, B=64", 0.98, figure(decode(64), "busy"), at_most=False),
    Goal("G6", "host's work a step, B=64, ms", 1.0, figure(decode(64), "host_ms")),
    Goal("G7", "first token, T=512, engine, ms", 14, figure("prompt T=512 base", "ttft_ms")),
    Goal("G7", "first token, T=512, HTTP, ms", 18, figure("http T=512", "ttft_ms_p50")),
    Goal("G8", "r16 from host memory over warm, ms", 2,
         difference(COLD.format("host"), COLD.format("device"), "ttft_ms")),
    Goal("G8", "r16 from the page cache over warm, ms", 5,
         difference(COLD.format("disk"), COLD.format("device"), "ttft_ms")),
    Goal("G9", "p99 gap of 32 streams, 20 loads/s over none", 1.05,
         ratio(("http 32 streams, loading", "itl_ms_p99"), ("http 32 streams", "itl_ms_p99"))),
    Goal("G10", "1000 adapters by Zipf over 8", 0.85,
         ratio(("1000 adapters", "tok_s"), ("8 adapters", "tok_s")), at_most=False),
    Goal("G11", "base on a LoRA server over LoRA off, ms between tokens", 1.005,
         ratio(("http B=64 base", "itl_ms_p50"), ("http B=64 base, LoRA off", "itl_ms_p50"))),
    Goal("G12", "HTTP over engine, 64 streams, steady tok/s", 0.95,
         ratio(("http B=64 base", "steady_tok_s"), (decode(64, context=128), "tok_s")), at_most=False),
    Goal("G13", "rows with the same tokens twice", 1.0,
         figure(f"twice the same: {decode(32, '8 x r16')}", "same"), at_most=False),
    Goal("G14", "start of the engine, s", 25, figure("start", "start_s")),
)  # fmt: skip

COLUMNS: Final = (
    *("step_ms", "tok_s", "of_floor", "over_base", "ttft_ms", "ttft_ms_p50", "itl_ms_p50", "itl_ms_p99"),
    *("steady_tok_s", "busy", "host_ms", "start_s", "load_ms_p50", "same", "error"),
)


def goal_lines(results: Results) -> list[str]:
    """A Markdown table of the goals that this run could measure."""
    lines = ["| goal | what | limit | figure | |", "|---|---|---|---|---|"]
    for goal in GOALS:
        value, verdict = goal.verdict(results)
        if value is not None:
            sign = "≤" if goal.at_most else "≥"
            lines.append(f"| {goal.number} | {goal.text} | {sign} {goal.limit:g} | {value:.4g} | {verdict} |")
    return lines


def cell_lines(results: Results) -> list[str]:
    """A Markdown table of all cells."""
    used = [key for key in COLUMNS if any(key in cell for cell in results.values())]
    lines = ["| cell | " + " | ".join(used) + " |", "|---" * (1 + len(used)) + "|"]
    for name, cell in results.items():
        lines.append(f"| {name} | " + " | ".join(_text(cell.get(key)) for key in used) + " |")
    return lines


def _text(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.4g}"
