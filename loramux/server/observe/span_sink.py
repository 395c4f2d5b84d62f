"""Where spans go, if anywhere. OpenTelemetry is an extra, imported only if the operator wants spans."""

from __future__ import annotations

import importlib
from typing import Protocol, cast

from loramux.engine.errors import InvalidConfig
from loramux.server.observe.call_record import CallRecord


class SpanSink(Protocol):
    """Takes one span a request, and sends it off without anybody waiting."""

    def send(self, call: CallRecord) -> None:
        """Queue the span of a request that is over."""
        ...

    def close(self) -> None:
        """Send what is queued; blocks for a few seconds at most."""
        ...


class _OtlpModule(Protocol):
    def OtlpSink(self, endpoint: str) -> SpanSink:
        """Its constructor."""
        ...


def open_span_sink(endpoint: str | None) -> SpanSink | None:
    """The sink for `--otlp-traces-endpoint`; None without one.

    Raises:
        InvalidConfig: the extra is not installed.
    """
    if endpoint is None:
        return None
    try:
        # Not an import statement: everybody else must be able to start without the extra.
        module = cast(_OtlpModule, importlib.import_module("loramux.server.observe.otlp"))
    except ModuleNotFoundError as error:
        raise InvalidConfig(
            f"--otlp-traces-endpoint needs the extra: pip install 'loramux[otlp]' ({error})",
            param="--otlp-traces-endpoint",
        ) from error
    return module.OtlpSink(endpoint)
