"""Compiles grammars beside the step loop, and keeps what it compiled for the next request.

A sequence whose grammar is not compiled yet waits in the scheduler's queue, as one does whose adapter
is not on the device yet, and others go ahead. A compilation cannot be interrupted: one that takes too
long fails its requests, and its thread is left alone until it ends and replaced meanwhile.
"""

from __future__ import annotations

import contextlib
import math
import queue
import socket
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from llguidance import LLMatcher, LLTokenizer

from loramux.engine.background import roam, step_back, wait_readable
from loramux.engine.errors import InvalidRequest, LoramuxError
from loramux.engine.grammar import PARAM, GrammarMatcher, compile_grammar, load_tokenizer
from loramux.engine.types import GrammarSpec

CACHE_UNITS: Final = 128  # a grammar counts one, and one more for each UNIT_S that it took
UNIT_S: Final = 0.05  # compiled size is not known; it grows with the time
CACHE_TEXT_BYTES: Final = 4 << 20
NUM_THREADS: Final = 2  # a slow grammar holds up one of them
MAX_ABANDONED: Final = 2  # threads left behind by compilations that took too long


@dataclass(slots=True)
class _Job:
    spec: GrammarSpec
    matchers: list[GrammarMatcher] = field(default_factory=list)
    began_s: float | None = None  # set by its thread
    thread: threading.Thread | None = None
    is_abandoned: bool = False


@dataclass(frozen=True, slots=True)
class _Compiled:
    matcher: LLMatcher
    units: int


class GrammarCompiler:
    """Gives sequences their matchers. All methods belong to the step loop."""

    def __init__(self, tokenizer_folder: Path, *, timeout_s: float) -> None:
        """Args:
        tokenizer_folder: has tokenizer.json; read at the first use.
        timeout_s: longest compilation of one grammar.
        """
        self._folder = tokenizer_folder
        self._timeout_s = timeout_s
        self._tokenizer: LLTokenizer | None = None
        self._load_lock = threading.Lock()  # threads only
        self._cache: OrderedDict[GrammarSpec, _Compiled] = OrderedDict()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[_Job, LLMatcher | LoramuxError, float]] = queue.SimpleQueue()
        self._pending: dict[GrammarSpec, _Job] = {}
        self._num_abandoned = 0
        self._threads: list[threading.Thread] = []  # started by the first grammars
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)

    @property
    def wake_fd(self) -> int:
        """Readable when a compilation has ended."""
        return self._wake_read.fileno()

    @property
    def tokenizer(self) -> LLTokenizer | None:
        """The tokenizer; there is one once a matcher is ready."""
        return self._tokenizer

    def warm_up(self) -> None:
        """Load the tokenizer in the background: for a time when nobody is held up by it."""
        if not self._threads:
            self._start_thread()

    def open(self, request_id: str, spec: GrammarSpec) -> GrammarMatcher:
        """A matcher for one sequence: ready at once if the grammar is known, else later."""
        matcher = GrammarMatcher(request_id)
        known = self._cache.get(spec)
        if known is not None:
            self._cache.move_to_end(spec)
            matcher.start(known.matcher)
            return matcher
        job = self._pending.get(spec)
        if job is None:
            job = self._pending[spec] = _Job(spec)
            self._start_thread()
            self._jobs.put(job)
        job.matchers.append(matcher)
        return matcher

    def advance(self) -> list[tuple[str, LoramuxError]]:
        """Take in what was compiled; returns the requests that failed, and why.

        Called once a step; costs next to nothing when nothing is compiled.
        """
        if not self._pending and self._done.empty():
            return []
        failures: list[tuple[str, LoramuxError]] = []
        with contextlib.suppress(BlockingIOError):
            self._wake_read.recv(4096)
        while not self._done.empty():
            job, result, seconds = self._done.get()
            if job.is_abandoned:
                self._num_abandoned -= 1
                continue
            del self._pending[job.spec]
            if isinstance(result, LoramuxError):
                failures += [
                    (m.request_id, type(result)(result.message, param=result.param)) for m in job.matchers
                ]
                continue
            self._remember(job.spec, _Compiled(result, 1 + math.floor(seconds / UNIT_S)))
            for matcher in job.matchers:
                matcher.start(result)
        return failures + self._give_up_slow()

    def wait(self, timeout_s: float, *others: int) -> None:
        """Sleep until a compilation has ended, or another descriptor is readable."""
        wait_readable(timeout_s, self._wake_read.fileno(), *others)

    def close(self) -> None:
        """End the threads after their current jobs."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(1.0)
        self._wake_read.close()
        self._wake_write.close()

    def _remember(self, spec: GrammarSpec, compiled: _Compiled) -> None:
        self._cache[spec] = compiled
        while len(self._cache) > 1 and (
            sum(entry.units for entry in self._cache.values()) > CACHE_UNITS
            or sum(len(entry.text) for entry in self._cache) > CACHE_TEXT_BYTES
        ):
            self._cache.popitem(last=False)

    def _give_up_slow(self) -> list[tuple[str, LoramuxError]]:
        now = time.monotonic()
        slow = [
            job
            for job in self._pending.values()
            if job.began_s is not None and now - job.began_s > self._timeout_s
        ]
        failures: list[tuple[str, LoramuxError]] = []
        for job in slow:
            if self._num_abandoned >= MAX_ABANDONED:
                break  # its requests wait on
            job.is_abandoned = True
            self._num_abandoned += 1
            del self._pending[job.spec]
            message = (
                f"the grammar takes longer than {self._timeout_s:g} s to compile (--grammar-compile-timeout)"
            )
            failures += [(m.request_id, InvalidRequest(message, param=PARAM)) for m in job.matchers]
            self._threads = [thread for thread in self._threads if thread is not job.thread]
            self._start_thread()
        return failures

    def _start_thread(self) -> None:
        if len(self._threads) < NUM_THREADS:
            self._threads.append(threading.Thread(target=self._run, name="grammar-compiler", daemon=True))
            self._threads[-1].start()

    def _run(self) -> None:
        roam()
        step_back()
        with contextlib.suppress(LoramuxError):  # the first grammar will say it
            self._load()
        while (job := self._jobs.get()) is not None:
            job.thread = threading.current_thread()
            job.began_s = began_s = time.monotonic()
            try:
                result: LLMatcher | LoramuxError = self._compile(job)
            except LoramuxError as error:
                result = error
            except Exception as error:  # noqa: BLE001 - a thread's top: one bad grammar must not end it
                result = InvalidRequest(f"the grammar cannot be compiled: {error!r}", param=PARAM)
            self._done.put((job, result, time.monotonic() - began_s))
            with contextlib.suppress(OSError):  # closed meanwhile
                self._wake_write.send(b"\0")
            if job.is_abandoned:
                return

    def _compile(self, job: _Job) -> LLMatcher:
        tokenizer = self._load()
        job.began_s = time.monotonic()  # its own time only
        return compile_grammar(job.spec, tokenizer)

    def _load(self) -> LLTokenizer:
        with self._load_lock:
            if self._tokenizer is None:
                self._tokenizer = load_tokenizer(self._folder)
            return self._tokenizer
