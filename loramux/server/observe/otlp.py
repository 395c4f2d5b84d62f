"""Spans over OTLP/HTTP, with vLLM's names. Import only through `span_sink.py`: this needs `loramux[otlp]`.

The SDK's batch processor keeps at most 2048 spans and sends them from a thread of its own; a collector that
is down costs a log line, never a request.
"""

from __future__ import annotations

import time
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)
from opentelemetry.util.types import AttributeValue

from loramux.server.observe.call_record import CallRecord
from loramux.server.observe.trace_context import TraceContext, new_trace
from loramux.version import __version__

_SPAN_NAME = "llm_request"
_EXPORT_TIMEOUT_S = 3.0


class OtlpSink:
    """See `span_sink.SpanSink`.

    Args:
        endpoint: address of the collector; without a path, `/v1/traces` is added.
    """

    def __init__(self, endpoint: str) -> None:
        bare = urlsplit(endpoint).path in ("", "/")
        address = f"{endpoint.rstrip('/')}/v1/traces" if bare else endpoint
        self._ids = _GivenIds()
        self._provider = TracerProvider(resource=_resource(), id_generator=self._ids, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=address, timeout=_EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
        self._tracer = self._provider.get_tracer("loramux", __version__)

    def send(self, call: CallRecord) -> None:
        """Queue the span of a request that is over."""
        trace = call.trace or new_trace()
        self._ids.given = trace
        # The record's clock is monotonic; spans want the time of day.
        offset_s = time.time() - time.monotonic()
        span = self._tracer.start_span(
            _SPAN_NAME,
            context=set_span_in_context(_parent(trace)) if trace.parent_id else None,
            kind=SpanKind.SERVER,
            start_time=int((call.started_s + offset_s) * 1e9),
            attributes=_attributes(call),
        )
        if call.error is not None:
            span.set_status(Status(StatusCode.ERROR, call.error))
        span.end(int((call.ended_s + offset_s) * 1e9))

    def close(self) -> None:
        """Send what is queued."""
        self._provider.force_flush(int(_EXPORT_TIMEOUT_S * 1000))
        self._provider.shutdown()


class _GivenIds(IdGenerator):
    """The ids of the trace context, which clients have been told."""

    def __init__(self) -> None:
        self.given = new_trace()

    def generate_span_id(self) -> int:
        return int(self.given.span_id, 16)

    def generate_trace_id(self) -> int:
        return int(self.given.trace_id, 16)


def _parent(trace: TraceContext) -> NonRecordingSpan:
    return NonRecordingSpan(
        SpanContext(
            int(trace.trace_id, 16),
            int(trace.parent_id or "0", 16),
            is_remote=True,
            trace_flags=TraceFlags(trace.flags),
            trace_state=TraceState.from_header([trace.state]) if trace.state else TraceState(),
        )
    )


def _resource() -> Resource:
    """The environment's description of this service (OTEL_SERVICE_NAME, ...), ours where it says nothing."""
    own = {SERVICE_NAME: "loramux", SERVICE_VERSION: __version__}
    found = Resource.create()
    if str(found.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        return found.merge(Resource(own))
    return Resource({SERVICE_VERSION: __version__}).merge(found)


def _attributes(call: CallRecord) -> dict[str, AttributeValue]:
    """vLLM's attributes first, then ours; nothing of prompts or answers."""
    first_s = call.first_token_s
    attributes: dict[str, AttributeValue | None] = {
        "gen_ai.request.id": call.request_id,
        "gen_ai.response.model": call.model,
        "gen_ai.latency.e2e": call.ended_s - call.started_s,
        "gen_ai.latency.time_to_first_token": first_s,
        "http.request.method": call.method,
        "http.route": call.route,
        "http.response.status_code": call.status,
        "error.type": call.error,
        "loramux.adapter": f"{call.adapter}@{call.adapter_version}" if call.adapter else None,
        "loramux.key_id": call.key_id,
    }
    if call.sequences:
        last_s = max(sequence.last_s for sequence in call.sequences)
        begun = [sequence for sequence in call.sequences if sequence.queue_s is not None]
        queue_s = max((sequence.queue_s or 0.0 for sequence in begun), default=None)
        prefill_s = max((sequence.prefill_s or 0.0 for sequence in begun), default=None)
        decode_s = last_s - call.started_s - first_s if first_s is not None else None
        attributes |= {
            "gen_ai.request.n": call.n,
            "gen_ai.request.max_tokens": call.max_tokens,
            "gen_ai.request.temperature": call.temperature,
            "gen_ai.request.top_p": call.top_p,
            "gen_ai.usage.num_sequences": len(call.sequences),
            "gen_ai.usage.prompt_tokens": call.num_prompt_tokens,
            "gen_ai.usage.completion_tokens": call.num_output_tokens,
            "gen_ai.latency.time_in_queue": queue_s,
            "gen_ai.latency.time_in_model_prefill": prefill_s,
            "gen_ai.latency.time_in_model_decode": decode_s,
            "gen_ai.latency.time_in_model_inference": (
                prefill_s + decode_s if prefill_s is not None and decode_s is not None else None
            ),
            "gen_ai.response.finish_reasons": call.finish_reason,
        }
    return {name: value for name, value in attributes.items() if value is not None}
