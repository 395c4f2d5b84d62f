"""The result of serve_figures.py as the Markdown tables that people read."""

from __future__ import annotations

from typing import Any

COLUMNS = {
    "tok/s": "output_tok_s",
    "steady tok/s": "steady_tok_s",
    "TTFT p50 ms": "ttft_ms_p50",
    "TTFT p99 ms": "ttft_ms_p99",
    "ITL p50 ms": "itl_ms_p50",
    "ITL p99 ms": "itl_ms_p99",
}


def markdown(result: dict[str, Any]) -> str:
    """Three tables: decoding, prefill, servers; above them, where it was measured."""
    decode = [row for row in result["medians"] if "concurrency" in row]
    prefill = [row for row in result["medians"] if "prompt_len" in row]
    return "\n".join(
        [
            _headline(result),
            "",
            *table(
                ["requests to", "streams", *COLUMNS],
                [[r["case"], r["concurrency"], *(r[key] for key in COLUMNS.values())] for r in decode],
            ),
            "",
            *table(
                ["prefill of", "tokens", "tok/s", "TTFT ms"],
                [[r["case"], r["prompt_len"], r["prefill_tok_s"], r["ttft_ms_p50"]] for r in prefill],
            ),
            "",
            *table(
                ["server", "start to ready s", "RSS MiB when ready", "RSS MiB after", "peak MiB"],
                [_server(name, server) for name, server in result["servers"].items()],
            ),
            "",
        ]
    )


def _headline(result: dict[str, Any]) -> str:
    where, versions = result["hardware"], result["versions"]
    weights = result["quantization"]
    dtype = result["dtype"] if weights is None else f"{result['dtype']}, weights {weights}"
    facts = (
        f"{where['gpu'] or where['cpu']}, {where['cores']} cores, {where['memory_gib']} GiB, "
        f"load average {where['load_before']} before",
        f"torch {versions['torch']}, Python {versions['python']}",
        f"commit {(result['commit'] or '?')[:10]}{'+' if result['uncommitted_changes'] else ''}",
        result["date"],
        f"{result['model']} {dtype}, 128 tokens in, 128 out, median of {result['rounds']} rounds",
    )
    return "; ".join(facts)


def _server(name: str, server: dict[str, Any]) -> list[Any]:
    before, after = server["memory_ready_mib"], server["memory_after_mib"]
    return [name, server["ready_s"], round(before["rss"]), round(after["rss"]), round(after["peak_rss"])]


def table(titles: list[str], rows: list[list[Any]]) -> list[str]:
    """The lines of a Markdown table; all columns but the first to the right."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.0f}" if value >= 1000 else f"{value:.1f}"
        return "-" if value is None else str(value)

    lines = [titles, ["---", *["--:"] * (len(titles) - 1)], *([cell(value) for value in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]
