"""Medians, ratios and tables of a comparison with peers."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from serve_report import table

Row = dict[str, Any]
OWN = "loramux"
WHOLE = "\\*"  # marks a ratio of output tok/s
OFF, ON, MIXED = "base, LoRA off", "base", "8 adapters"


def medians(rows: list[Row]) -> list[Row]:
    """One row for each peer, case and measure: the median of every number over its rounds without errors."""
    merged = []
    for peer, case, measure in dict.fromkeys((r["peer"], r["case"], r["measure"]) for r in rows):
        same = [r for r in rows if (r["peer"], r["case"], r["measure"]) == (peer, case, measure)]
        good = [r for r in same if not r["errors"]]
        one: Row = {"peer": peer, "case": case, "measure": measure, "rounds": len(good)}
        for key, value in (good or same)[0].items():
            numbers = [r[key] for r in good if isinstance(r[key], float)]
            one.setdefault(key, statistics.median(numbers) if numbers else value)
        merged.append(one)
    return merged


def ratios(rows: list[Row]) -> list[Row]:
    """Each ratio of two cases: the median over the rounds of the ratio inside a round, and its range.

    The rate is steady tok/s (prefill: tok/s); where one side never had all its streams decoding at once,
    output tok/s on both sides, and `whole` says so.
    """
    peers = list(dict.fromkeys(r["peer"] for r in rows))
    others = [name for name in peers if name != OWN]
    pairs = [((OWN, case), (name, case)) for case in (OFF, MIXED) for name in others]
    pairs += [((name, case), (name, OFF)) for name in peers for case in (MIXED, ON)]
    measures = list(dict.fromkeys(r["measure"] for r in rows))
    return [one for pair in pairs for m in measures if (one := _ratio(rows, *pair, m)) is not None]


def _ratio(rows: list[Row], over: tuple[str, str], under: tuple[str, str], measure: str) -> Row | None:
    def good(which: tuple[str, str]) -> dict[int, Row]:
        return {
            r["round"]: r
            for r in rows
            if (r["peer"], r["case"]) == which and r["measure"] == measure and not r["errors"]
        }

    above, below = good(over), good(under)
    both = sorted(set(above) & set(below))
    key = "prefill_tok_s" if measure.startswith("prefill") else "steady_tok_s"
    whole = any(side[n].get(key) is None for side in (above, below) for n in both)
    if whole:
        key = "output_tok_s"
    values = [above[n][key] / below[n][key] for n in both if above[n].get(key) and below[n].get(key)]
    if not values:
        return None
    return {
        "over": " / ".join(over),
        "under": " / ".join(under),
        "measure": measure,
        "ratio": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "rounds": len(values),
        "whole": whole,
    }


def markdown(result: dict[str, Any]) -> str:
    """The tables that people read."""
    rows = result["medians"]
    decode = [r for r in rows if "concurrency" in r]
    prefill = [r for r in rows if "prompt_len" in r]
    columns = ("output_tok_s", "steady_tok_s", "ttft_ms_p50", "ttft_ms_p99", "itl_ms_p50", "itl_ms_p99")
    titles = ["tok/s", "steady tok/s", "TTFT p50 ms", "TTFT p99 ms", "ITL p50 ms", "ITL p99 ms"]
    parts = [
        [_headline(result)],
        table(
            ["peer", "requests to", "streams", *titles, "rounds"],
            [
                [r["peer"], r["case"], r["concurrency"], *(_good(r, key) for key in columns), r["rounds"]]
                for r in sorted(decode, key=lambda r: (r["concurrency"], r["case"]))
            ],
        ),
        table(
            ["peer", "prefill of", "tokens", "tok/s", "TTFT ms", "rounds"],
            [
                [
                    r["peer"],
                    r["case"],
                    r["prompt_len"],
                    _good(r, "prefill_tok_s"),
                    _good(r, "ttft_ms_p50"),
                    r["rounds"],
                ]
                for r in sorted(prefill, key=lambda r: r["case"])
            ],
        ),
        _ratio_table(result["ratios"]),
        table(
            [
                "server",
                "start to first answer s",
                "RSS MiB when ready",
                "RSS MiB after",
                "PSS MiB after",
                "idle CPU %",
            ],
            [_server(name, one) for name, one in result["servers"].items()],
        ),
        list(_notes(result)),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def _headline(result: dict[str, Any]) -> str:
    where = result["hardware"]
    return "; ".join(
        (
            f"{where['cpu']}, {where['cores']} cores, {where['memory_gib']} GiB",
            f"load average {where['load_before']} before",
            f"commit {(result['commit'] or '?')[:10]}{'+' if result['uncommitted_changes'] else ''}",
            result["date"],
            f"{result['model']} {result['dtype']}",
            f"{result['input_len']} tokens in, {result['output_len']} out",
            f"{result['rounds']} interleaved rounds ({result['slow_rounds']} for the slow)",
            f"{result['seconds'] / 60:.0f} minutes",
        )
    )


def _good(row: Row, key: str) -> Any:
    return row[key] if row["rounds"] else "failed"


def _ratio_table(found: list[Row]) -> list[str]:
    measures = list(dict.fromkeys(r["measure"] for r in found))
    lines = []
    for over, under in dict.fromkeys((r["over"], r["under"]) for r in found):
        cells = {r["measure"]: r for r in found if (r["over"], r["under"]) == (over, under)}
        lines.append([over, under, *(_cell(cells.get(m)) for m in measures)])
    return table(["ratio of", "to", *measures], lines) if lines else []


def _cell(one: Row | None) -> str:
    if one is None:
        return "-"
    return f"{one['ratio']:.2f}{WHOLE if one['whole'] else ''} ({one['low']:.2f} to {one['high']:.2f})"


def _server(name: str, one: dict[str, Any]) -> list[Any]:
    before, after = one["memory_ready_mib"], one.get("memory_after_mib") or one["memory_ready_mib"]
    idle = one.get("idle_cpu")
    return [
        name,
        f"{statistics.median(one['ready_s']):.1f} of {len(one['ready_s'])}",
        round(before["rss"]),
        round(after["rss"]),
        round(after["pss"]),
        "-" if idle is None else round(100 * idle),
    ]


def _notes(result: dict[str, Any]) -> Iterator[str]:
    yield f"{WHOLE} output tok/s, prefill included: one side never had all streams decoding at once."
    yield "In brackets: the lowest and the highest of the rounds."
    yield ""
    for peer in result["peers"].values():
        yield f"- {peer['name']} ({peer['level']}): {peer['settings']}."
    for name, why in result["failures"].items():
        yield f"- Not measured: {name}: {_short(why)}"
    for r in result["medians"]:
        if not r["rounds"]:
            yield f"- Failed: {r['peer']}, {r['case']}, {r['measure']}: {_short(r['first_error'])}"
    if agree := result["texts_agree"]:
        yield f"- Greedy texts of {agree['tokens']} tokens equal to loramux's: " + ", ".join(
            f"{name} {same} of {count}" for name, (same, count) in agree["peers"].items()
        )


def _short(reason: str) -> str:
    """One line of a message that may be a whole log."""
    return " ".join(reason.split())[-300:]
