"""Spans over OTLP, as a collector gets them; and which trace headers count."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from starlette.datastructures import Headers

from loramux.engine.errors import InvalidConfig
from loramux.server.config import read_config
from loramux.server.observe.span_sink import open_span_sink
from loramux.server.observe.trace_context import new_trace, read_trace
from tests.running_server import running_server
from tests.server.fake_serve import COMMAND

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"


class Collector:
    """A collector on this machine that keeps what it was sent."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.path: Future[str] = Future()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                assert self.headers.get("content-encoding") in (None, "identity")
                collector.requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()
                if not collector.path.done():
                    collector.path.set_result(self.path)

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def spans(self) -> list[Span]:
        """Every span so far."""
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()
    thread = Thread(target=collector.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield collector
    finally:
        collector.server.shutdown()
        thread.join()
        collector.server.server_close()


def attributes(span: Span) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for pair in span.attributes:
        kind = pair.value.WhichOneof("value")
        assert kind is not None
        values[pair.key] = getattr(pair.value, kind)
    return values


def test_a_span_a_request_reaches_the_collector_in_the_callers_trace(text_model: Path) -> None:
    with collecting() as collector:
        flags = (str(text_model), "--served-model-name=tiny", f"--otlp-traces-endpoint={collector.url}")
        with running_server(*flags, command=COMMAND) as server, server.client() as client:
            client.get("/v1/models")
            headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "tracestate": "vendor=1"}
            body = {"model": "tiny", "prompt": "hello", "n": 2, "max_tokens": 9, "temperature": 0.5}
            traced = client.post("/v1/completions", json=body, headers=headers)
            unsampled = {"traceparent": f"00-{'a' * 32}-{PARENT_ID}-00"}
            client.post("/v1/completions", json=body, headers=unsampled)
            refused = client.post("/v1/completions", json={"model": "who", "prompt": "x"})
            assert collector.path.result(10) == "/v1/traces"

    ours, failed = sorted(collector.spans(), key=lambda span: span.start_time_unix_nano)
    assert ours.trace_id.hex() == TRACE_ID
    assert ours.parent_span_id.hex() == PARENT_ID
    assert ours.trace_state == "vendor=1"
    assert traced.headers["traceresponse"] == f"00-{TRACE_ID}-{ours.span_id.hex()}-01"
    assert (ours.name, ours.kind) == ("llm_request", Span.SPAN_KIND_SERVER)
    found = attributes(ours)
    assert 0 < found.pop("gen_ai.latency.time_to_first_token") <= found.pop("gen_ai.latency.e2e") < 10
    assert found.pop("gen_ai.latency.time_in_model_decode") >= 0
    assert found == {
        "gen_ai.request.id": traced.headers["x-request-id"],
        "gen_ai.request.n": 2,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.response.model": "tiny",
        "gen_ai.response.finish_reasons": "stop",
        "gen_ai.usage.num_sequences": 2,
        "gen_ai.usage.prompt_tokens": 5,
        "gen_ai.usage.completion_tokens": 12,
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
    }
    assert attributes(failed)["error.type"] == "model_not_found"
    assert failed.trace_id.hex() == refused.headers["traceresponse"].split("-")[1]
    services = {
        pair.value.string_value
        for request in collector.requests
        for pair in request.resource_spans[0].resource.attributes
        if pair.key == "service.name"
    }
    assert services == {"loramux"}


def test_a_collector_that_is_down_costs_no_request(text_model: Path) -> None:
    flags = (str(text_model), "--otlp-traces-endpoint=http://127.0.0.1:9/v1/traces")
    with running_server(*flags, command=COMMAND) as server, server.client() as client:
        answers = [client.post("/v1/completions", json={"prompt": "hello"}) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [200] * 3


def test_without_the_extra_the_start_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    monkeypatch.delitem(sys.modules, "loramux.server.observe.otlp", raising=False)

    with pytest.raises(InvalidConfig, match=r"pip install 'loramux\[otlp\]'"):
        open_span_sink("http://127.0.0.1:4318")


@pytest.mark.parametrize("endpoint", ["grpc://host:4317", "host:4318", ""])
def test_only_http_endpoints_are_taken(endpoint: str) -> None:
    with pytest.raises(InvalidConfig, match="--otlp-traces-endpoint must be an http"):
        read_config(["model", f"--otlp-traces-endpoint={endpoint}"], {})


def test_a_valid_traceparent_is_followed() -> None:
    trace = read_trace(Headers({"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}))

    assert trace is not None
    assert (trace.trace_id, trace.parent_id, trace.flags) == (TRACE_ID, PARENT_ID, 1)
    assert trace.span_id != PARENT_ID


def test_a_version_of_the_future_is_read_as_far_as_it_is_known() -> None:
    trace = read_trace(Headers({"traceparent": f"cc-{TRACE_ID}-{PARENT_ID}-01-what-comes"}))

    assert trace is not None
    assert trace.response_header.startswith(f"00-{TRACE_ID}-")


@pytest.mark.parametrize(
    "value",
    [
        "",
        "garbage",
        f"ff-{TRACE_ID}-{PARENT_ID}-01",
        f"00-{TRACE_ID}-{PARENT_ID}-01-more",
        f"00-{TRACE_ID.upper()}-{PARENT_ID}-01",
        f"00-{'0' * 32}-{PARENT_ID}-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        f"00-{TRACE_ID}-{PARENT_ID}",
        f"00-{TRACE_ID}-{PARENT_ID}-01\n",
    ],
)
def test_a_wrong_traceparent_is_as_good_as_none(value: str) -> None:
    assert read_trace(Headers({"traceparent": value})) is None


def test_two_traceparents_are_as_good_as_none() -> None:
    raw = [(b"traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01".encode())] * 2

    assert read_trace(Headers(raw=raw)) is None


def test_new_traces_differ() -> None:
    assert len({new_trace().trace_id for _ in range(100)}) == 100
