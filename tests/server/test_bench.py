"""`loramux bench` against a real asyncio HTTP server that streams tokens at known times."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from loramux.server import bench
from loramux.server.bench_figures import Sample, percentile, steady_rate
from loramux.server.bench_http import EventReader

FIRST_TOKEN_S = 0.06
TOKEN_GAP_S = 0.01


@dataclass
class StreamServer:
    """Streams `max_tokens` tokens, the first after FIRST_TOKEN_S, then one every TOKEN_GAP_S."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[bytes] = field(default_factory=list)
    most_at_once: int = 0
    _running: int = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        self.bodies.append(body)
        self.headers.append(head)
        self._running += 1
        self.most_at_once = max(self.most_at_once, self._running)
        with contextlib.suppress(ConnectionError):
            if body["model"] == "unknown":
                self._refuse(writer)
            else:
                await self._stream(writer, body)
            await writer.drain()
            writer.close()
        self._running -= 1

    def _refuse(self, writer: asyncio.StreamWriter) -> None:
        text = b'{"error": {"message": "The model `unknown` does not exist."}}'
        writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: %d\r\n\r\n%s" % (len(text), text))

    async def _stream(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        loop = asyncio.get_running_loop()
        due = loop.time() + FIRST_TOKEN_S
        for i in range(body["max_tokens"]):
            await asyncio.sleep(due - loop.time())
            due += TOKEN_GAP_S
            if body["model"] == "breaks" and i == 2:
                self._event(writer, {"error": {"message": "the engine process ended"}})
                break
            if body["model"] == "vanishes" and i == 2:
                writer.transport.abort()
                return
            self._event(writer, {"choices": [{"index": 0, "text": ' "usage":{'}], "usage": None})
        else:
            usage = {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}
            self._event(writer, {"choices": [], "usage": usage})
            self._chunk(writer, b"data: [DONE]\n\n")
        self._chunk(writer, b"")

    def _event(self, writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
        self._chunk(writer, b"data: " + json.dumps(event).encode() + b"\r\n\r\n")

    def _chunk(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))


@pytest.fixture
def server() -> Iterator[StreamServer]:
    streams = StreamServer()
    started = threading.Event()
    loop = asyncio.new_event_loop()
    stopped = asyncio.Event()

    async def serve() -> None:
        listener = await asyncio.start_server(streams.answer, "127.0.0.1", 0)
        streams.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        started.set()
        await stopped.wait()
        listener.close()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    started.wait()
    yield streams
    loop.call_soon_threadsafe(stopped.set)
    thread.join()
    loop.close()


def measure(server: StreamServer, tmp_path: Path, *flags: str, code: int = 0) -> dict[str, Any]:
    """Run the command against the server; the JSON it wrote."""
    path = tmp_path / "result.json"
    assert bench.main(["--base-url", server.url, "--json", str(path), "--warmup", "0", *flags]) == code
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def test_times_and_rates_are_those_of_the_server(server: StreamServer, tmp_path: Path) -> None:
    flags = ["--model", "base", "--concurrency", "4", "--num-prompts", "4", "--output-len", "30"]

    run = measure(server, tmp_path, *flags)["runs"][0]

    # Nothing can arrive early; how late it may be depends on who else uses the machine.
    assert 1000 * FIRST_TOKEN_S - 1 <= run["ttft_ms_p50"] < 1000 * FIRST_TOKEN_S * 5
    assert run["itl_ms_p50"] == pytest.approx(1000 * TOKEN_GAP_S, rel=0.6)
    assert run["output_tokens"] == 4 * 30
    assert run["prompt_tokens"] == 4 * 7
    assert run["output_tok_s"] == pytest.approx(run["output_tokens"] / run["wall_s"])
    assert run["steady_tok_s"] == pytest.approx(4 / TOKEN_GAP_S, rel=0.6)
    assert run["errors"] == 0


def test_no_more_streams_run_than_asked_for(server: StreamServer, tmp_path: Path) -> None:
    flags = ["--model", "base", "--concurrency", "1", "3", "--num-prompts", "6", "--output-len", "2"]

    result = measure(server, tmp_path, *flags)

    assert [run["concurrency"] for run in result["runs"]] == [1, 3]
    assert server.most_at_once == 3
    assert len(server.bodies) == 12


def test_prompts_are_distinct_token_ids_of_the_wanted_length(server: StreamServer, tmp_path: Path) -> None:
    flags = [
        "--model",
        "base",
        "--num-prompts",
        "3",
        "--input-len",
        "20",
        "--output-len",
        "1",
        "--vocab-size",
        "500",
    ]

    measure(server, tmp_path, *flags)

    prompts = [body["prompt"] for body in server.bodies]
    assert {len(prompt) for prompt in prompts} == {20}
    assert all(0 <= token < 500 for prompt in prompts for token in prompt)
    assert len({tuple(prompt) for prompt in prompts}) == 3


def test_models_are_taken_in_turn(server: StreamServer, tmp_path: Path) -> None:
    flags = ["--concurrency", "1", "--num-prompts", "4", "--output-len", "1"]

    measure(server, tmp_path, "--model", "a", "b", *flags)

    assert [body["model"] for body in server.bodies] == ["a", "b", "a", "b"]


def test_zipf_prefers_the_first_models() -> None:
    workload = bench.Workload(base_url="", model=["a", "b", "c"], model_choice="zipf")

    names = bench.choose_models(workload, 600)

    assert names.count("a") > names.count("b") > names.count("c") > 0


def test_chat_sends_text_and_the_api_key(server: StreamServer, tmp_path: Path) -> None:
    flags = ["--model", "base", "--endpoint", "chat", "--num-prompts", "1", "--input-len", "5"]

    measure(server, tmp_path, *flags, "--output-len", "1", "--api-key", "secret")

    assert server.headers[0].startswith(b"POST /v1/chat/completions ")
    assert b"authorization: Bearer secret" in server.headers[0]
    assert len(server.bodies[0]["messages"][0]["content"].split()) == 5


def test_the_api_key_is_not_in_the_result(server: StreamServer, tmp_path: Path) -> None:
    measure(
        server, tmp_path, "--model", "base", "--num-prompts", "1", "--output-len", "1", "--api-key", "secret"
    )

    assert "secret" not in (tmp_path / "result.json").read_text()


def test_prefill_is_timed_alone(server: StreamServer, tmp_path: Path) -> None:
    flags = ["--model", "base", "--num-prompts", "1", "--output-len", "1", "--prefill-len", "512"]

    prefill = measure(server, tmp_path, *flags)["prefill"]

    assert len(server.bodies[0]["prompt"]) == 512
    assert server.bodies[0]["max_tokens"] == 1
    assert prefill["requests"] == 3
    assert prefill["prefill_tok_s"] == pytest.approx(1000 * 7 / prefill["ttft_ms_p50"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("unknown", "HTTP 404: "),
        ("breaks", "the engine process ended"),
        ("vanishes", "the stream ended without [DONE]"),
    ],
)
def test_a_failed_request_is_counted_and_told(
    server: StreamServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, message: str
) -> None:
    flags = ["--num-prompts", "2", "--concurrency", "2", "--output-len", "4"]

    run = measure(server, tmp_path, "--model", "base", model, *flags, code=1)["runs"][0]

    assert (run["requests"], run["errors"]) == (2, 1)
    assert message in run["first_error"]
    assert message in capsys.readouterr().out


def test_a_dead_server_is_an_error_not_a_crash(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "m", "--num-prompts", "1", "--output-len", "1", "--warmup", "0"]

    assert bench.main(["--base-url", "http://127.0.0.1:1", *flags]) == 1

    assert "Connect" in capsys.readouterr().out


def test_a_wrong_address_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--base-url", "localhost:8000", "--model", "m"]) == 2

    assert "--base-url must look like http://HOST:PORT" in capsys.readouterr().err


def test_events_are_found_wherever_the_bytes_are_cut() -> None:
    stream = (
        b': keep-alive\n\ndata: {"choices":[{"text":"a"}],"usage":null}\r\n\r\n'
        b'data:{"choices":[{"text":"b"}]}\n\n'
        b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\ndata: [DONE]\n\n'
    )
    for size in range(1, len(stream)):
        sample = Sample(model="m")
        reader = EventReader(sample)

        for at in range(0, len(stream), size):
            reader.feed(stream[at : at + size], float(at))
        reader.close()

        assert (len(sample.arrivals), sample.prompt_tokens, sample.completion_tokens) == (2, 3, 2)
        assert sample.error is None


def test_a_stream_without_its_end_is_an_error() -> None:
    sample = Sample(model="m")
    reader = EventReader(sample)

    reader.feed(b'data: {"choices":[{"text":"a"}]}\n\n', 0.0)
    reader.close()

    assert sample.error == "the stream ended without [DONE]"


def test_the_steady_rate_counts_only_the_time_when_all_streams_decode() -> None:
    early = Sample(model="m", arrivals=[0.0, 1.0, 2.0, 3.0], completion_tokens=4)
    late = Sample(model="m", arrivals=[2.0, 3.0, 4.0, 5.0, 6.0], completion_tokens=5)

    assert steady_rate([early, late], 2) == pytest.approx(2.0)  # from 2 to 3: one token of each
    assert steady_rate([early], 2) is None


def test_percentiles_interpolate() -> None:
    assert percentile([4.0, 1.0, 2.0, 3.0], 50) == 2.5
    assert percentile([1.0], 99) == 1.0
    assert percentile([], 50) is None
