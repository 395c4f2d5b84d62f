"""A stand-in for the engine process: real messages over the real socket, tokens that tests can foresee.

It repeats the bytes of the prompt (without special tokens) and then ends; an adapter makes letters
upper case, a seed puts `SEED:` in front. Words in the prompt ask for trouble:

    !slow     one token each 10 ms, without end        !crash    the process kills itself
    !stuck    no output at all                         !refuse   the request fails
    !salt     the answer is the request's cache salt     !say:X!end   the answer is X
    !grammar  the answer is the request's grammar      !weird    a token that no vocabulary has; once
                                                                 more, one token later

and so does the base model that an adapter's config names:

    !stuck    the load never ends                      !refuse   the load fails
    !crash    the process kills itself
    !stuck-once   it never ends, if the model's folder has a file `stuck-once`, which is deleted
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from itertools import cycle, islice
from pathlib import Path

import msgspec
import zmq

from loramux.engine import messages
from loramux.engine.config import EngineConfig
from loramux.engine.messages import FromEngine, ToEngine
from loramux.engine.types import (
    EngineInfo,
    EngineStats,
    FreedMemory,
    Request,
    SequenceOutput,
    TokenLogprobs,
    TokenSampling,
)
from tests.adapter_files import llama_sites
from tests.server.tiny_text import EOS, VOCAB_SIZE

MAX_MODEL_LEN = 512
SLOW_S = 0.01


class FakeEngine:
    """Answers requests one token a step."""

    def __init__(self, config: EngineConfig, pair: zmq.Socket[bytes]) -> None:
        self._config = config
        self._pair = pair
        self._answers: dict[str, list[int]] = {}
        self._requests: dict[str, Request] = {}
        self._digests: dict[str, int] = {}  # -> bytes
        self._leaving: dict[str, tuple[int, int]] = {}  # digest -> call that waits for it, bytes
        self._stopping = False
        self._parent = os.getppid()

    def run(self) -> None:
        """Serve until told to stop."""
        self._send([messages.Ready(self._info())])
        while not self._stopping and os.getppid() == self._parent:
            if self._pair.poll(0 if self._runnable() else 200):
                out: list[FromEngine] = []
                for message in messages.decode_to_engine(self._pair.recv()):
                    out += self._handle(message)
                self._send(out)
            elif not self._runnable():
                self._send([messages.Heartbeat()])
            outputs = [self._step(request) for request in self._runnable()]
            if outputs:
                self._send([messages.Outputs(outputs)])
            self._send(self._see_off())
            if any(_text(request).count("!slow") for request in self._requests.values()):
                time.sleep(SLOW_S)

    def _runnable(self) -> list[Request]:
        return [request for request in self._requests.values() if "!stuck" not in _text(request)]

    def _handle(self, message: ToEngine) -> list[FromEngine]:
        match message:
            case messages.AddRequest(request):
                return self._add(request)
            case messages.Abort(request_ids):
                for request_id in request_ids:
                    self._requests.pop(request_id, None)
            case messages.LoadAdapter(call_id, spec):
                once = Path(self._config.model) / "stuck-once"
                if spec.base_model == "!stuck-once" and once.exists():
                    once.unlink()
                    return []
                if spec.base_model == "!crash":
                    os.kill(os.getpid(), signal.SIGKILL)
                if spec.base_model == "!refuse":
                    return [messages.Reply(call_id, "AdapterIncompatible", "refused", "r")]
                self._digests[spec.digest] = spec.nbytes
                return [] if spec.base_model == "!stuck" else [messages.Reply(call_id)]
            case messages.RestoreAdapters(specs):
                self._digests |= {spec.digest: spec.nbytes for spec in specs}
            case messages.GetStats(call_id):
                stats = EngineStats(
                    num_running=len(self._requests),
                    host_adapters=sorted({*self._digests, *self._leaving}),
                    host_bytes=sum(self._digests.values()),
                )
                return [messages.Reply(call_id, stats=stats)]
            case messages.Shutdown():
                self._stopping = True
            case messages.UnloadAdapter(call_id, digest):
                if digest not in self._digests:
                    return [messages.Reply(call_id, "AdapterNotFound", "not loaded")]
                self._leaving[digest] = (call_id, self._digests.pop(digest))
        return []

    def _see_off(self) -> list[FromEngine]:
        """Answer the unloads whose last request has ended."""
        used = {request.adapter for request in self._requests.values()}
        gone = [digest for digest in self._leaving if digest not in used]
        replies: list[FromEngine] = []
        for digest in gone:
            call_id, nbytes = self._leaving.pop(digest)
            freed = FreedMemory(lanes=8, host_bytes=nbytes, kv_blocks=0)
            replies.append(messages.Reply(call_id, freed=freed))
        return replies

    def _add(self, request: Request) -> list[FromEngine]:
        text = _text(request)
        if "!crash" in text:
            os.kill(os.getpid(), signal.SIGKILL)
        if "!refuse" in text or request.adapter not in (None, *self._digests):
            return [messages.RequestFailed(request.request_id, "InvalidRequest", "refused", "prompt")]
        self._requests[request.request_id] = request
        self._answers[request.request_id] = []
        return []

    def _step(self, request: Request) -> SequenceOutput:
        sampling = request.sampling
        answer = self._answers[request.request_id]
        wanted = _wanted(request)
        ends = "!slow" not in _text(request) and bool(sampling.eos_token_ids)
        token = next(islice(cycle(wanted), len(answer), None))
        if ends and len(answer) >= max(len(wanted), sampling.min_tokens):
            token = EOS
        if 0 < _text(request).count("!weird") <= len(answer) + 1:
            token = -1
        answer.append(token)
        reason = "length" if len(answer) >= sampling.max_tokens else None
        stop_reason = None
        if token in sampling.eos_token_ids:
            reason = "stop"
        elif token in sampling.stop_token_ids:
            reason, stop_reason = "stop", token
        if reason is not None:
            self._requests.pop(request.request_id)
        is_first = len(answer) == 1
        return SequenceOutput(
            request.request_id,
            [token],
            reason,
            stop_reason,
            num_cached_tokens=16 if is_first and len(request.prompt_token_ids) > 16 else 0,
            logprobs=None if sampling.logprobs is None else [_with_named(token, sampling)],
            prompt_logprobs=_prompt_logprobs(request) if is_first else None,
        )

    def _info(self) -> EngineInfo:
        config = self._config
        return EngineInfo(
            architecture="FakeForCausalLM",
            dtype="float32",
            device="cpu",
            vocab_size=VOCAB_SIZE,
            max_model_len=config.max_model_len or MAX_MODEL_LEN,
            num_kv_blocks=64,
            block_size=16,
            enable_lora=config.enable_lora,
            max_lora_rank=config.max_lora_rank,
            num_lanes=config.lane_pool,
            lora_sites=llama_sites(vocabulary=VOCAB_SIZE),
            load_seconds=0.0,
        )

    def _send(self, batch: list[FromEngine]) -> None:
        if batch:
            self._pair.send(messages.encode(batch))


def _text(request: Request) -> str:
    return bytes(token for token in request.prompt_token_ids if token < 256).decode("utf-8", "replace")


def _wanted(request: Request) -> list[int]:
    data = bytes(token for token in request.prompt_token_ids if token < 256) or b"."
    if b"!salt" in data:
        data = repr(request.cache_salt).encode()
    if b"!grammar" in data and request.sampling.grammar is not None:
        data = request.sampling.grammar.text.encode()
    if b"!say:" in data:
        data = data.rpartition(b"!say:")[2].partition(b"!end")[0]
    if request.adapter is not None:
        data = data.upper()
    if request.sampling.seed is not None:
        data = f"{request.sampling.seed}:".encode() + data
    return list(data)


def _logprobs(token: int, top: int) -> TokenLogprobs:
    """The token at -0.5 and as many neighbours at -0.5, -1.5, ...; the third one is impossible."""
    neighbours = [(token + step) % VOCAB_SIZE for step in range(top)]
    values = [-math.inf if step == 2 else -0.5 - step for step in range(top)]
    return TokenLogprobs([token, *neighbours], [-0.5, *values], 1)


def _with_named(token: int, sampling: TokenSampling) -> TokenLogprobs:
    """The same, with the tokens that the request names at -8."""
    found = _logprobs(token, sampling.logprobs or 0)
    named = [id_ for id_ in sampling.logprob_token_ids if id_ not in found.token_ids[1:]]
    return TokenLogprobs([*found.token_ids, *named], [*found.logprobs, *(-8.0 for _ in named)], 1)


def _prompt_logprobs(request: Request) -> list[TokenLogprobs | None] | None:
    top = request.sampling.prompt_logprobs
    if top is None:
        return None
    return [None, *(_logprobs(token, top) for token in request.prompt_token_ids[1:])]


def main(address: str, config_json: str) -> int:
    """Connect and serve; a model called `broken`, or with a file of that name, fails to start.

    While there is a file `hold`, the start waits.
    """
    config = msgspec.json.decode(config_json, type=EngineConfig)
    context = zmq.Context()
    pair: zmq.Socket[bytes] = context.socket(zmq.PAIR)
    pair.setsockopt(zmq.LINGER, 1000)
    pair.connect(address)
    if config.model.endswith("broken") or (Path(config.model) / "broken").exists():
        failed = messages.StartFailed("UnsupportedModel", "architecture Broken is not supported")
        pair.send(messages.encode([failed]))
    else:
        while (Path(config.model) / "hold").exists():
            time.sleep(0.01)
        FakeEngine(config, pair).run()
    pair.close()
    context.term()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
