"""The engine's load in a response header, for load balancers that ask for it (ORCA, as vLLM has it)."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from loramux.engine.types import EngineStats

REQUEST_HEADER = "endpoint-load-metrics-format"  # TEXT or JSON, in any case
RESPONSE_HEADER = "endpoint-load-metrics"


def load_report(form: str, stats: EngineStats) -> Mapping[str, str]:
    """The response header in the form that the request's header asks for; none in an unknown one."""
    used = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
    metrics = {"kv_cache_usage_perc": used, "num_requests_waiting": float(stats.num_waiting)}
    match form.strip().upper():
        case "TEXT":
            text = ", ".join(f"named_metrics.{name}={value}" for name, value in metrics.items())
        case "JSON":
            text = msgspec.json.encode({"named_metrics": metrics}).decode()
        case _:
            return {}
    return {RESPONSE_HEADER: f"{form.strip().upper()} {text}"}
