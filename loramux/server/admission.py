"""Who may queue: caps on sequences and prompt tokens, for the server, each key and each adapter.

A call is counted once it is planned, before the engine or the client hears of it, so that a refusal is
a real status: 429 where the caller's own limit (or that of the adapter it names) is reached, 503 where
the server is full. Both say when to come back, from how fast the line in question has been moving.

Queued means: admitted and without a first token. The server cannot see the engine's own waiting line
change between two steps, but a first token is a sure sign that a sequence has left it.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Final

from loramux.engine.errors import InvalidRequest, Overloaded
from loramux.server.access.caller import Caller
from loramux.server.admission_config import AdmissionConfig
from loramux.server.errors import RateLimited

REASONS: Final = (
    *("server_requests", "server_tokens", "key_requests", "key_tokens", "adapter_requests", "queue_wait"),
    *("buffered_bytes", "connections", "header_bytes", "header_timeout", "read_timeout", "write_timeout"),
)

_WINDOW_S: Final = 30  # over which a line's speed is measured
_SHORTEST_S, _LONGEST_S = 1.0, 60.0  # of a Retry-After
_ROUNDS: Final = 3  # 500 clients at a queue of 128: 78 refusals a second with 1, 20 with 3
_UNKNOWN_S: Final = 10.0  # a Retry-After while nothing has moved yet


class Line:
    """Sequences and tokens in one place, and how fast they have been leaving it."""

    __slots__ = ("_began_s", "_left", "_next_free_s", "sequences", "tokens")

    def __init__(self, now_s: float) -> None:
        self.sequences = 0
        self.tokens = 0
        self._began_s = now_s
        self._left: deque[list[int]] = deque()  # [second, sequences, tokens] of the last _WINDOW_S
        self._next_free_s = now_s  # when the last one that was turned away was told to come

    def enter(self, sequences: int, tokens: int) -> None:
        """Count what comes in."""
        self.sequences += sequences
        self.tokens += tokens

    def leave(self, sequences: int, tokens: int, now_s: float) -> None:
        """Count what goes."""
        self.sequences -= sequences
        self.tokens -= tokens
        second = int(now_s)
        if not self._left or self._left[-1][0] != second:
            self._forget_before(second - _WINDOW_S)
            self._left.append([second, 0, 0])
        self._left[-1][1] += sequences
        self._left[-1][2] += tokens

    def retry_after_s(self, over_sequences: int, over_tokens: int, now_s: float) -> float:
        """When somebody who was turned away finds room, if the line keeps its speed.

        Everybody who is turned away takes a place in a line of their own, so that they do not all come
        back at once. Some never come back, so that line is never longer than `_ROUNDS` times the time in
        which all that is here now leaves.

        Args:
            over_sequences: how many must leave first.
            over_tokens: and how many tokens.
            now_s: the time.
        """
        self._forget_before(int(now_s) - _WINDOW_S)
        elapsed_s = min(max(now_s - self._began_s, 1.0), _WINDOW_S)
        sequences_a_s = sum(entry[1] for entry in self._left) / elapsed_s
        tokens_a_s = sum(entry[2] for entry in self._left) / elapsed_s
        if sequences_a_s <= 0 or (over_tokens > 0 and tokens_a_s <= 0):
            return _UNKNOWN_S if now_s - self._began_s < _WINDOW_S else _LONGEST_S
        wait_s = max(over_sequences, 1) / sequences_a_s
        if over_tokens > 0:
            wait_s = max(wait_s, over_tokens / tokens_a_s)
        all_gone_s = max(self.sequences / sequences_a_s, wait_s)
        self._next_free_s = min(max(self._next_free_s, now_s) + wait_s, now_s + _ROUNDS * all_gone_s)
        return min(max(self._next_free_s - now_s, _SHORTEST_S), _LONGEST_S)

    def _forget_before(self, second: int) -> None:
        while self._left and self._left[0][0] < second:
            self._left.popleft()


class Ticket:
    """The place of one call. `release` must be called in the end, whatever happens."""

    __slots__ = ("_admission", "_lines", "_queued", "_queued_tokens", "_sequences", "_tokens")

    def __init__(
        self, admission: Admission, lines: list[tuple[dict[str, Line], str]], sequences: int, tokens: int
    ) -> None:
        self._admission = admission
        self._lines = lines
        self._sequences = self._queued = sequences
        self._tokens = self._queued_tokens = tokens

    def started(self, tokens: int) -> None:
        """One sequence with so many prompt tokens got its first token: it is no longer queued."""
        if self._queued:
            self._queued -= 1
            self._queued_tokens -= tokens
            self._admission.queue.leave(1, tokens, self._admission.now_s())

    def release(self) -> None:
        """Give everything back. A second call does nothing."""
        now_s = self._admission.now_s()
        if self._queued:
            self._admission.queue.leave(self._queued, self._queued_tokens, now_s)
            self._queued = self._queued_tokens = 0
        for lines, name in self._lines:
            line = lines[name]
            line.leave(self._sequences, self._tokens, now_s)
            if not line.sequences:
                del lines[name]  # names cannot pile up
        self._lines = []


class BodyRoom:
    """The memory that the body of one request takes while it is received and parsed."""

    __slots__ = ("_admission", "taken")

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.taken = 0  # bytes

    def take(self, size: int) -> None:
        """Count so many bytes more.

        Raises:
            Overloaded: all bodies together are more than the server keeps.
        """
        admission = self._admission
        limit = admission.max_buffered_bytes
        if admission.buffered_bytes + size > limit:
            admission.rejections["buffered_bytes"] += 1
            raise Overloaded(f"requests of {limit} bytes are being received (--max-buffered-bytes)")
        self.taken += size
        admission.buffered_bytes += size


class Admission:
    """Counts what waits and runs, and turns away what is too much.

    Args:
        config: the caps.
        max_buffered_bytes: of all bodies that are being received or parsed.
        now_s: a monotonic clock.
    """

    def __init__(
        self,
        config: AdmissionConfig,
        *,
        max_buffered_bytes: int = 512 << 20,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.max_buffered_bytes = max_buffered_bytes
        self.buffered_bytes = 0
        self.now_s = now_s
        self.queue = Line(now_s())
        self.rejections: Counter[str] = Counter(dict.fromkeys(REASONS, 0))  # by reason, for metrics
        self._keys: dict[str, Line] = {}
        self._adapters: dict[str, Line] = {}

    @contextlib.contextmanager
    def body_room(self) -> Iterator[BodyRoom]:
        """Room for one body, given back at the end."""
        room = BodyRoom(self)
        try:
            yield room
        finally:
            self.buffered_bytes -= room.taken

    def check_open(self, caller: Caller) -> None:
        """Refuse at once, before a body is read, where not even one sequence has room.

        Raises:
            RateLimited: this caller is at its limit.
            Overloaded: the server is full.
        """
        self._check_key(caller, 1, 0)
        self._check_server(1, 0)

    def admit(self, caller: Caller, adapter: str | None, *, sequences: int, tokens: int) -> Ticket:
        """Take a call in, whole or not at all.

        Args:
            caller: who sends it.
            adapter: name of the adapter it asks for; None = the base model.
            sequences: prompts x n.
            tokens: of their prompts; a prompt with n choices counts n times.

        Raises:
            InvalidRequest: it asks for more than could ever be admitted.
            RateLimited: the caller or the adapter is at its limit.
            Overloaded: the server is full.
        """
        self._check_possible(sequences, tokens)
        self._check_key(caller, sequences, tokens)
        self._check_adapter(adapter, sequences)
        self._check_server(sequences, tokens)
        lines: list[tuple[dict[str, Line], str]] = []
        for table, name in ((self._keys, caller.key_id), (self._adapters, adapter)):
            if name is not None:
                table.setdefault(name, Line(self.now_s())).enter(sequences, tokens)
                lines.append((table, name))
        self.queue.enter(sequences, tokens)
        return Ticket(self, lines, sequences, tokens)

    def waited_too_long(self) -> Overloaded:
        """The error for a call that got no first token in time."""
        self.rejections["queue_wait"] += 1
        limit_s = self.config.max_queue_wait_s
        return Overloaded(
            f"the request waited {limit_s:g} s in the queue (the server's --max-queue-wait)",
            retry_after_s=self.queue.retry_after_s(1, 0, self.now_s()),
        )

    def _check_possible(self, sequences: int, tokens: int) -> None:
        limit, limit_tokens = self.config.max_num_queued_reqs, self.config.max_num_queued_tokens
        if sequences > limit:
            raise _too_much("sequences", sequences, limit, "the server's --max-num-queued-reqs")
        if tokens > limit_tokens:
            raise _too_much("prompt tokens", tokens, limit_tokens, "the server's --max-num-queued-tokens")

    def _check_key(self, caller: Caller, sequences: int, tokens: int) -> None:
        if caller.key_id is None:
            return
        line = self._keys.get(caller.key_id)
        here, here_tokens = (line.sequences, line.tokens) if line else (0, 0)
        limit = self.config.max_key_requests if caller.max_requests is None else caller.max_requests
        if limit and sequences > limit:
            raise _too_much("sequences", sequences, limit, "your key's limit")
        if limit and here + sequences > limit:
            what = f"your key may have {limit} sequences queued and running, and has {here}"
            self._refuse_caller("key_requests", what, line, here + sequences - limit, 0)
        limit = self.config.max_key_tokens if caller.max_tokens is None else caller.max_tokens
        if limit and tokens > limit:
            raise _too_much("prompt tokens", tokens, limit, "your key's limit")
        if limit and here_tokens + tokens > limit:
            what = f"your key may have {limit} prompt tokens queued and running, and has {here_tokens}"
            self._refuse_caller("key_tokens", what, line, 0, here_tokens + tokens - limit)

    def _check_adapter(self, adapter: str | None, sequences: int) -> None:
        limit = self.config.max_adapter_requests
        if adapter is None or not limit:
            return
        line = self._adapters.get(adapter)
        here = line.sequences if line else 0
        if sequences > limit:
            raise _too_much("sequences", sequences, limit, "the server's --max-adapter-requests")
        if here + sequences > limit:
            what = f"an adapter may have {limit} sequences queued and running, and {adapter!r} has {here}"
            what += " (the server's --max-adapter-requests)"
            self._refuse_caller("adapter_requests", what, line, here + sequences - limit, 0)

    def _refuse_caller(
        self, reason: str, what: str, line: Line | None, over_sequences: int, over_tokens: int
    ) -> None:
        self.rejections[reason] += 1
        wait_s = _SHORTEST_S
        if line is not None:
            wait_s = line.retry_after_s(over_sequences, over_tokens, self.now_s())
        raise RateLimited(f"Too many requests: {what}.", retry_after_s=wait_s)

    def _check_server(self, sequences: int, tokens: int) -> None:
        over = self.queue.sequences + sequences - self.config.max_num_queued_reqs
        over_tokens = self.queue.tokens + tokens - self.config.max_num_queued_tokens
        if over > 0:
            reason, what = "server_requests", f"{self.queue.sequences} sequences (--max-num-queued-reqs)"
        elif over_tokens > 0:
            reason, what = "server_tokens", f"{self.queue.tokens} prompt tokens (--max-num-queued-tokens)"
        else:
            return
        self.rejections[reason] += 1
        wait_s = self.queue.retry_after_s(max(over, 0), max(over_tokens, 0), self.now_s())
        raise Overloaded(f"the server's queue is full: it holds {what}", retry_after_s=wait_s)


def _too_much(what: str, number: int, limit: int, whose: str) -> InvalidRequest:
    """No waiting would help: the call alone is over the limit."""
    message = f"the call has {number} {what} (prompts x n), at most {limit} can be admitted ({whose})"
    return InvalidRequest(message, param="n" if what == "sequences" else "prompt")
