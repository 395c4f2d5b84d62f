"""What the server tells about its work: metrics, log lines, traces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loramux.engine.errors import InvalidConfig
from loramux.engine.log_format import FORMATS


@dataclass(frozen=True, slots=True, kw_only=True)
class ObserveConfig:
    """Settings of metrics, logs and traces."""

    log_format: str = "text"
    access_lines: bool = True  # a log line also for requests that ask the model for nothing
    quiet_paths: tuple[str, ...] = ()  # whose requests get none
    log_requests: bool = False  # prompts are logged
    log_outputs: bool = False  # and what the model answered
    max_log_chars: int | None = None  # of either; None = all of them
    metrics_max_adapters: int = 50  # with metrics of their own
    otlp_endpoint: str | None = None  # where spans go; None = nowhere


def observe_config(values: Mapping[str, Any]) -> ObserveConfig:
    """The part of the configuration that is about metrics, logs and traces.

    Args:
        values: of the flags that were given, by attribute name.

    Raises:
        InvalidConfig: names the flag at fault.
    """
    log_format = values.get("log_format", "text")
    if log_format not in FORMATS:
        raise InvalidConfig(
            f"--log-format must be one of {', '.join(FORMATS)}, got {log_format!r}", param="--log-format"
        )
    for name in ("max_log_len", "metrics_max_adapters"):
        if values.get(name, 0) < 0:
            flag = f"--{name.replace('_', '-')}"
            raise InvalidConfig(f"{flag} must be at least 0, got {values[name]}", param=flag)
    if values.get("enable_log_outputs") and not values.get("enable_log_requests"):
        message = "--enable-log-outputs needs --enable-log-requests"
        raise InvalidConfig(message, param="--enable-log-outputs")
    endpoint = values.get("otlp_traces_endpoint")
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        raise InvalidConfig(
            f"--otlp-traces-endpoint must be an http:// or https:// address, got {endpoint!r}",
            param="--otlp-traces-endpoint",
        )
    quiet = [path for item in values.get("disable_access_log_for_endpoints", ()) for path in item.split(",")]
    return ObserveConfig(
        log_format=log_format,
        access_lines=not values.get("disable_uvicorn_access_log", False),
        quiet_paths=tuple(path.strip() for path in quiet if path.strip()),
        log_requests=values.get("enable_log_requests", False),
        log_outputs=values.get("enable_log_outputs", False),
        max_log_chars=values.get("max_log_len"),
        metrics_max_adapters=values.get("metrics_max_adapters", 50),
        otlp_endpoint=endpoint,
    )
