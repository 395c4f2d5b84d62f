"""Grammars are tried before their request is queued, in processes that can be ended.

A grammar that was tried is remembered, good or bad, so that a schema which comes with every request
costs once, and so does a bomb. Equal grammars that arrive together are tried once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from loramux.engine.errors import InvalidRequest, Overloaded
from loramux.engine.types import GrammarSpec
from loramux.server.limits import Limits
from loramux.server.structured import requested_grammar

logger = logging.getLogger(__name__)

CHECK_COMMAND: Final = (sys.executable, "-m", "loramux.engine.grammar_check")
_LENGTH_BYTES: Final = 4  # of a frame's length; see the command
_MAX_PROCESSES: Final = 2
_START_TIMEOUT_S: Final = 60.0
_MAX_REMEMBERED: Final = 512
_MAX_REMEMBERED_CHARS: Final = 4 << 20


class _Verdict(msgspec.Struct, frozen=True, array_like=True):
    spec: GrammarSpec | None
    reason: str = ""


class GrammarChecker:
    """Says whether a grammar can be used, within a time that holds.

    Args:
        tokenizer_folder: has tokenizer.json.
        limits: what one grammar may be, and how many may be tried at a time.
        timeout_s: for one grammar.
        command: the program that tries grammars.
    """

    def __init__(
        self,
        tokenizer_folder: Path,
        *,
        limits: Limits,
        timeout_s: float,
        command: Sequence[str] = CHECK_COMMAND,
    ) -> None:
        self._arguments = (*command, str(tokenizer_folder), str(timeout_s))
        self._limits = limits
        self._timeout_s = timeout_s
        self._remembered: OrderedDict[GrammarSpec, _Verdict] = OrderedDict()
        self._num_chars = 0  # of what is remembered
        self._flights: dict[GrammarSpec, asyncio.Task[_Verdict]] = {}
        self._idle: list[_Process] = []
        self._slots = asyncio.Semaphore(_MAX_PROCESSES)

    async def requested(
        self, response_format: Mapping[str, Any] | None, structured_outputs: Mapping[str, Any] | None
    ) -> GrammarSpec | None:
        """The grammar that these fields of a request ask for, tried; None if they ask for none.

        Args:
            response_format: OpenAI's field.
            structured_outputs: vLLM's.

        Raises:
            InvalidRequest: it cannot be used; `param` is the field at fault.
            Overloaded: too many others are being tried.
        """
        asked = requested_grammar(response_format, structured_outputs, self._limits)
        return None if asked is None else await self.check(asked.spec, param=asked.param)

    async def check(self, spec: GrammarSpec, *, param: str) -> GrammarSpec:
        """Try a grammar; returns what to give to the engine.

        Raises:
            InvalidRequest, Overloaded: as `requested`.
        """
        verdict = self._remembered.get(spec)
        if verdict is None:
            verdict = await self._wait(self._flight(spec))
        else:
            self._remembered.move_to_end(spec)
        if verdict.spec is None:
            is_hopeful = param == "response_format" and "Unimplemented keys" in verdict.reason
            hint = "; strict: false ignores such keywords" if is_hopeful else ""
            raise InvalidRequest(f"{param}: {verdict.reason}{hint}", param=param)
        return verdict.spec

    async def aclose(self) -> None:
        """End the processes."""
        flights = list(self._flights.values())
        for task in flights:
            task.cancel()
        await asyncio.gather(*flights, return_exceptions=True)
        for process in self._idle:
            await process.end()
        self._idle.clear()

    async def _wait(self, flight: asyncio.Task[_Verdict]) -> _Verdict:
        """Its verdict; a caller that leaves does not end it, since others may wait for it, too."""
        try:
            return await asyncio.shield(flight)
        except asyncio.CancelledError:
            if flight.cancelled():
                raise Overloaded("the server is shutting down") from None
            raise

    def _flight(self, spec: GrammarSpec) -> asyncio.Task[_Verdict]:
        task = self._flights.get(spec)
        if task is not None:
            return task
        limit = self._limits.grammars_in_flight
        if len(self._flights) >= limit:
            raise Overloaded(f"{limit} grammars are being compiled already (--max-grammars-in-flight)")
        task = self._flights[spec] = asyncio.get_running_loop().create_task(self._try(spec))
        task.add_done_callback(lambda _: self._flights.pop(spec, None))
        return task

    async def _try(self, spec: GrammarSpec) -> _Verdict:
        began_s = time.monotonic()
        async with self._slots:
            try:
                verdict = await self._ask(spec)
            except _NoTokenizer as error:
                return _Verdict(None, str(error))  # not remembered: the grammar is not at fault
            except TimeoutError:
                limit = f"{self._timeout_s:g} s (the server's --grammar-compile-timeout)"
                verdict = _Verdict(None, f"the grammar takes longer than {limit} to compile")
            except _Ended:
                verdict = _Verdict(None, "the grammar is too complex: it takes too much memory to compile")
        if verdict.spec is None:
            seconds = time.monotonic() - began_s
            logger.debug("a grammar was refused after %.3f s: %s", seconds, verdict.reason)
        self._remember(spec, verdict)
        return verdict

    async def _ask(self, spec: GrammarSpec) -> _Verdict:
        """A process's verdict.

        Raises:
            TimeoutError: it takes too long.
            _Ended: the process died of it.
            _NoTokenizer: no process can be had.
        """
        if self._idle:
            with contextlib.suppress(_Ended):  # or of something else, while it had nothing to do
                return await self._ask_process(self._idle.pop(), spec)
        return await self._ask_process(_Process(), spec)

    async def _ask_process(self, process: _Process, spec: GrammarSpec) -> _Verdict:
        try:
            await process.start(self._arguments)
            verdict = await asyncio.wait_for(process.ask(spec), self._timeout_s)
        except BaseException:
            await process.end()
            raise
        self._idle.append(process)
        return verdict

    def _remember(self, spec: GrammarSpec, verdict: _Verdict) -> None:
        self._remembered[spec] = verdict
        self._num_chars += len(spec.text)
        while len(self._remembered) > _MAX_REMEMBERED or self._num_chars > _MAX_REMEMBERED_CHARS:
            oldest, _ = self._remembered.popitem(last=False)
            self._num_chars -= len(oldest.text)


class _NoTokenizer(Exception):
    """The program cannot try any grammar of this model."""


class _Ended(Exception):
    """The process has ended."""


class _Process:
    """One process that tries grammars, one after the other."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, arguments: Sequence[str]) -> None:
        """Start the program, unless it runs, and wait until it can take grammars."""
        if self._process is not None and self._process.returncode is None:
            return
        self._process = await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # what native code says when it runs out of memory
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,  # Ctrl-C reaches the server only
        )
        try:
            ready = await asyncio.wait_for(self._read(), _START_TIMEOUT_S)
        except (TimeoutError, EOFError) as error:
            raise _NoTokenizer("grammars cannot be compiled on this server now") from error
        if ready.reason:
            raise _NoTokenizer(ready.reason)

    async def ask(self, spec: GrammarSpec) -> _Verdict:
        """What the program says about a grammar.

        Raises:
            _Ended: it ended.
        """
        assert self._process is not None
        assert self._process.stdin is not None
        frame = msgspec.msgpack.encode(spec)
        try:
            self._process.stdin.write(len(frame).to_bytes(_LENGTH_BYTES, "big") + frame)
            await self._process.stdin.drain()
            return await self._read()
        except (EOFError, ConnectionError) as error:
            raise _Ended from error

    async def end(self) -> None:
        """Kill it."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def _read(self) -> _Verdict:
        assert self._process is not None
        assert self._process.stdout is not None
        head = await self._process.stdout.readexactly(_LENGTH_BYTES)
        frame = await self._process.stdout.readexactly(int.from_bytes(head, "big"))
        return msgspec.msgpack.decode(frame, type=_Verdict)
