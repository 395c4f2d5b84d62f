"""Who is turned away, with which status, and when they are told to come back."""

from __future__ import annotations

import contextlib
import json
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux.engine.errors import InvalidRequest, Overloaded
from loramux.server.access.caller import ANYONE, Caller
from loramux.server.admission import REASONS, Admission, Ticket
from loramux.server.admission_config import AdmissionConfig
from loramux.server.errors import RateLimited
from tests.running_server import RunningServer, running_server
from tests.server.fake_serve import COMMAND


class Clock:
    """A time that only the test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def admission(clock: Clock, **caps: Any) -> Admission:
    """With these caps, and else the defaults."""
    return Admission(AdmissionConfig(**caps), now_s=clock)


def test_queue_is_full_at_its_cap_and_has_room_when_a_sequence_starts() -> None:
    gate = admission(Clock(), max_num_queued_reqs=4)
    ticket = gate.admit(ANYONE, None, sequences=4, tokens=40)

    with pytest.raises(Overloaded, match=r"4 sequences \(--max-num-queued-reqs"):
        gate.admit(ANYONE, None, sequences=1, tokens=10)
    with pytest.raises(Overloaded):
        gate.check_open(ANYONE)
    ticket.started(10)
    gate.check_open(ANYONE)
    gate.admit(ANYONE, None, sequences=1, tokens=10)

    assert (gate.queue.sequences, gate.queue.tokens) == (4, 40)
    assert gate.rejections["server_requests"] == 2


def test_prompt_tokens_fill_the_queue_as_well() -> None:
    gate = admission(Clock(), max_num_queued_tokens=100)
    gate.admit(ANYONE, None, sequences=1, tokens=90)

    with pytest.raises(Overloaded, match=r"90 prompt tokens \(--max-num-queued-tokens"):
        gate.admit(ANYONE, None, sequences=1, tokens=11)
    gate.admit(ANYONE, None, sequences=1, tokens=10)

    assert gate.rejections["server_tokens"] == 1


def test_limit_of_a_key_counts_what_runs_and_is_the_keys_alone() -> None:
    gate = admission(Clock(), max_key_requests=2)
    mine, yours = Caller(key_id="a"), Caller(key_id="b")
    ticket = gate.admit(mine, None, sequences=2, tokens=20)
    ticket.started(10)
    ticket.started(10)

    with pytest.raises(RateLimited, match="your key may have 2 sequences"):
        gate.admit(mine, None, sequences=1, tokens=10)
    gate.admit(yours, None, sequences=2, tokens=20)
    gate.admit(ANYONE, None, sequences=9, tokens=90)
    ticket.release()
    gate.admit(mine, None, sequences=2, tokens=20)


def test_limits_of_a_keys_entry_win_over_the_flags() -> None:
    gate = admission(Clock(), max_key_requests=2, max_key_tokens=10)
    caller = Caller(key_id="a", max_requests=5, max_tokens=50)

    gate.admit(caller, None, sequences=4, tokens=40)

    with pytest.raises(RateLimited, match="50 prompt tokens"):
        gate.admit(caller, None, sequences=1, tokens=11)


def test_limit_of_an_adapter_leaves_room_for_others() -> None:
    gate = admission(Clock(), max_adapter_requests=2)
    gate.admit(ANYONE, "a", sequences=2, tokens=20)

    with pytest.raises(RateLimited, match="'a' has 2"):
        gate.admit(ANYONE, "a", sequences=1, tokens=10)
    gate.admit(ANYONE, "b", sequences=2, tokens=20)
    gate.admit(ANYONE, None, sequences=2, tokens=20)


@pytest.mark.parametrize(
    ("caps", "sequences", "tokens"),
    [
        ({"max_num_queued_reqs": 3}, 4, 4),
        ({"max_num_queued_tokens": 3}, 1, 4),
        ({"max_key_requests": 3}, 4, 4),
        ({"max_key_tokens": 3}, 1, 4),
        ({"max_adapter_requests": 3}, 4, 4),
    ],
)
def test_what_can_never_be_admitted_is_not_worth_a_retry(
    caps: dict[str, int], sequences: int, tokens: int
) -> None:
    gate = admission(Clock(), **caps)

    with pytest.raises(InvalidRequest, match="at most 3"):
        gate.admit(Caller(key_id="a"), "x", sequences=sequences, tokens=tokens)


def test_release_gives_everything_back_once_and_forgets_names() -> None:
    gate = admission(Clock())
    ticket = gate.admit(Caller(key_id="a"), "x", sequences=3, tokens=30)
    ticket.started(10)

    ticket.release()
    ticket.release()
    ticket.started(10)

    assert (gate.queue.sequences, gate.queue.tokens) == (0, 0)
    assert (gate._keys, gate._adapters) == ({}, {})


def test_retry_after_is_the_time_in_which_the_queue_will_have_moved() -> None:
    clock = Clock()
    gate = admission(clock, max_num_queued_reqs=40)
    ticket = gate.admit(ANYONE, None, sequences=40, tokens=400)
    for _ in range(20):  # two sequences a second
        clock.now_s += 0.5
        ticket.started(10)
        gate.admit(ANYONE, None, sequences=1, tokens=10)

    waits = []
    for _ in range(3):
        with pytest.raises(Overloaded) as caught:
            gate.admit(ANYONE, None, sequences=4, tokens=40)
        waits.append(caught.value.retry_after_s)

    assert waits == pytest.approx([2.0, 4.0, 6.0], rel=0.1)


@pytest.mark.parametrize(("starts", "a_second", "expected"), [(3000, 1000, 1.0), (10, 0.1, 60.0)])
def test_retry_after_stays_within_bounds(starts: int, a_second: float, expected: float) -> None:
    clock = Clock()
    gate = admission(clock, max_num_queued_reqs=100)
    tickets = [gate.admit(ANYONE, None, sequences=100, tokens=100)]
    for _ in range(starts):
        clock.now_s += 1 / a_second
        tickets[-1].started(1)
        tickets.append(gate.admit(ANYONE, None, sequences=1, tokens=1))

    for _ in range(50):
        with pytest.raises(Overloaded) as caught:
            gate.admit(ANYONE, None, sequences=10, tokens=10)

    assert caught.value.retry_after_s == pytest.approx(expected, rel=0.2)


def test_retry_after_does_not_guess_while_nothing_moves() -> None:
    clock = Clock()
    gate = admission(clock, max_num_queued_reqs=1)
    gate.admit(ANYONE, None, sequences=1, tokens=1)

    with pytest.raises(Overloaded) as early:
        gate.check_open(ANYONE)
    clock.now_s += 100
    with pytest.raises(Overloaded) as late:
        gate.check_open(ANYONE)

    assert (early.value.retry_after_s, late.value.retry_after_s) == (10.0, 60.0)


def test_every_reason_has_a_count_from_the_start() -> None:
    assert admission(Clock()).rejections == dict.fromkeys(REASONS, 0)


# Over HTTP


@pytest.fixture(scope="module")
def small_server(text_model: Path, adapter_folder: Path) -> Iterator[RunningServer]:
    """A server with room for little."""
    with running_server(
        *(
            str(text_model),
            "--served-model-name=tiny",
            "--enable-lora",
            f"--lora-modules=shout={adapter_folder}",
        ),
        *("--max-num-queued-reqs=4", "--max-num-queued-tokens=200", "--max-adapter-requests=2"),
        *("--max-queue-wait=30", "--sse-keep-alive-interval=0.2", "--api-key", "one", "two"),
        *("--max-key-requests=6", "--max-key-tokens=1000"),
        command=COMMAND,
    ) as server:
        yield server


def until(condition: Callable[[], bool]) -> None:
    """Ask again and again; each question is a round trip."""
    for _ in range(5000):
        if condition():
            return
    pytest.fail("it never came true")


def load(http: httpx.Client) -> dict[str, Any]:
    """What the server says about its load."""
    answer: dict[str, Any] = http.get("/load").json()
    return answer


@pytest.fixture
def http(small_server: RunningServer) -> Iterator[httpx.Client]:
    """A client of a server that has nothing to do."""
    with small_server.client() as client:
        client.headers["authorization"] = "Bearer one"
        yield client
        until(lambda: load(client)["num_running"] == 0)


def hold(server: RunningServer, http: httpx.Client, num_sequences: int, **body: Any) -> socket.socket:
    """Send a request and wait until the engine has it; closing the connection ends it."""
    before = load(http)["num_running"]
    key = body.pop("key", "one")
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    connection.sendall(head.encode() + data)
    until(lambda: load(http)["num_running"] == before + num_sequences)
    return connection


def assert_refused(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status, response.text
    assert response.json()["error"]["code"] == code
    assert 1 <= int(response.headers["retry-after"]) <= 60
    exact_ms = int(response.headers["retry-after-ms"])
    assert exact_ms <= 1000 * int(response.headers["retry-after"]) < exact_ms + 1000


@pytest.mark.parametrize("is_stream", [False, True])
def test_full_queue_is_a_503_before_the_first_byte(
    small_server: RunningServer, http: httpx.Client, is_stream: bool
) -> None:
    with hold(small_server, http, 4, prompt=["!stuck"] * 2, n=2):
        body = {"prompt": "hello", "stream": is_stream}

        response = http.post("/v1/completions", json=body)

        assert_refused(response, 503, "overloaded")
        assert "--max-num-queued-reqs" in response.json()["error"]["message"]
        assert http.get("/health").status_code == 200
    until(lambda: load(http)["num_running"] == 0)
    assert http.post("/v1/completions", json=body).status_code == 200


def test_full_queue_is_told_before_the_body_is_read(small_server: RunningServer, http: httpx.Client) -> None:
    with hold(small_server, http, 4, prompt="!stuck", n=4):
        host, port = small_server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer one\r\n"
                b"content-type: application/json\r\ncontent-length: 1000000\r\n\r\n"
            )
            assert connection.recv(100).startswith(b"HTTP/1.1 503 ")


def test_prompt_tokens_fill_the_queue_over_http(small_server: RunningServer, http: httpx.Client) -> None:
    with hold(small_server, http, 1, prompt="!stuck" + "x" * 150):
        response = http.post("/v1/completions", json={"prompt": "y" * 100})
        short = http.post("/v1/completions", json={"prompt": "y"})

    assert_refused(response, 503, "overloaded")
    assert short.status_code == 200


def test_running_sequences_leave_the_queue(small_server: RunningServer, http: httpx.Client) -> None:
    slow = {"prompt": "!slow", "max_tokens": 400, "ignore_eos": True}
    with hold(small_server, http, 4, **slow, n=4), hold(small_server, http, 2, **slow, n=2):
        other = http.post("/v1/completions", json={"prompt": "a"}, headers={"authorization": "Bearer two"})
        mine = http.post("/v1/completions", json={"prompt": "a"})

    assert other.status_code == 200
    assert_refused(mine, 429, "rate_limit_exceeded")
    assert "your key" in mine.json()["error"]["message"]


def test_busy_adapter_is_a_429_and_the_base_model_answers(
    small_server: RunningServer, http: httpx.Client
) -> None:
    with hold(small_server, http, 2, model="shout", prompt="!stuck", n=2):
        busy = http.post("/v1/completions", json={"model": "shout", "prompt": "a"})
        base = http.post("/v1/completions", json={"model": "tiny", "prompt": "a"})

    assert_refused(busy, 429, "rate_limit_exceeded")
    assert "'shout'" in busy.json()["error"]["message"]
    assert base.status_code == 200


def test_call_that_never_fits_is_a_400(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"prompt": "a", "n": 5})

    assert response.status_code == 400
    assert "--max-num-queued-reqs" in response.json()["error"]["message"]


@pytest.fixture(scope="module")
def impatient_server(text_model: Path) -> Iterator[RunningServer]:
    """A server on which nobody waits for long."""
    with running_server(
        *(str(text_model), "--served-model-name=tiny", "--max-queue-wait=0.5"),
        "--sse-keep-alive-interval=0.2",
        command=COMMAND,
    ) as server:
        yield server


def test_call_that_waits_too_long_is_a_503_and_leaves_the_engine(impatient_server: RunningServer) -> None:
    with impatient_server.client() as http:
        response = http.post("/v1/completions", json={"prompt": "!stuck", "n": 2})

        assert_refused(response, 503, "overloaded")
        assert "--max-queue-wait" in response.json()["error"]["message"]
        until(lambda: load(http)["num_running"] == 0)


def test_stream_that_waits_too_long_ends_with_an_error_event(impatient_server: RunningServer) -> None:
    with impatient_server.client() as http:
        response = http.post("/v1/completions", json={"prompt": "!stuck", "stream": True})

    assert response.status_code == 200
    parts = response.text.strip().split("\n\n")
    assert set(parts[:-1]) == {": keep-alive"}
    assert '"code":"overloaded"' in parts[-1]


def test_call_that_has_begun_may_take_its_time(impatient_server: RunningServer) -> None:
    with impatient_server.client() as http:
        body = {"prompt": "!slow", "max_tokens": 100, "ignore_eos": True}

        assert http.post("/v1/completions", json=body).status_code == 200


@given(
    st.lists(
        st.tuples(st.sampled_from(["admit", "start", "release"]), st.integers(0, 3), st.integers(1, 4)),
        max_size=60,
    )
)
def test_counts_are_those_of_the_calls_that_are_inside(steps: list[tuple[str, int, int]]) -> None:
    gate = admission(Clock(), max_num_queued_reqs=8, max_key_requests=6, max_adapter_requests=6)
    inside: list[tuple[Ticket, str, int, list[int]]] = []  # ticket, name, sequences, tokens that wait
    for action, number, sequences in steps:
        name = f"n{number}"
        if action == "admit":
            with contextlib.suppress(Overloaded):
                caller = Caller(key_id=name)
                ticket = gate.admit(caller, name, sequences=sequences, tokens=7 * sequences)
                inside.append((ticket, name, sequences, [7] * sequences))
        elif inside and action == "start":
            ticket, _, _, waiting = inside[number % len(inside)]
            if waiting:
                ticket.started(waiting.pop())
        elif inside:
            inside.pop(number % len(inside))[0].release()

        queued = [len(waiting) for _, _, _, waiting in inside]
        assert (gate.queue.sequences, gate.queue.tokens) == (sum(queued), 7 * sum(queued))
        for table in (gate._keys, gate._adapters):
            expected = Counter[str]()
            for _, owner, count, _ in inside:
                expected[owner] += count
            assert {owner: line.sequences for owner, line in table.items()} == dict(expected)
            assert all(line.sequences <= 6 for line in table.values())
        assert gate.queue.sequences <= 8
