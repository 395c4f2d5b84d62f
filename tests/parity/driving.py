"""Drive an engine in this process, and compare what it says with a reference."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from loramux.engine.config import EngineConfig
from loramux.engine.core import Engine
from loramux.engine.types import AdapterSpec, Request, TokenLogprobs, TokenSampling
from loramux.resolvers.inspect import inspect_adapter
from tests.parity.reference import Greedy
from tests.parity.zoo import Checkpoint

ATOL = 1e-4  # of log-probabilities; the reference itself moves by 5e-5 between cached and full forwards
MAX_STEPS = 20_000  # an engine that makes no progress fails instead of hanging

_ids = itertools.count()


@dataclass
class Answer:
    """Everything an engine said about one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0


class Served:
    """An engine with the adapters of a checkpoint loaded; requests name them by their short names."""

    def __init__(self, checkpoint: Checkpoint, adapters: Iterable[str] = (), **config: Any) -> None:
        self.checkpoint = checkpoint
        names = list(adapters)
        settings = {
            "dtype": "float32",
            "device": "cpu",
            "num_kv_blocks": 512,
            "num_threads": 1,
            "enable_lora": bool(names),
            **config,
        }
        self.engine = Engine(EngineConfig(model=str(checkpoint.folder), **settings))
        self.vocab_size = self.engine.info.vocab_size
        self.digests: dict[str, str] = {}
        for name in names:
            self.load(name, checkpoint.adapters[name])

    def load(self, name: str, folder: Any) -> None:
        """Inspect an adapter's folder and load it under a short name."""
        spec = self.spec(folder)
        self.engine.load_adapter(spec)
        self.digests[name] = spec.digest

    def spec(self, folder: Any) -> AdapterSpec:
        """Inspect an adapter's folder for this engine."""
        info = self.engine.info
        return inspect_adapter(folder, info.lora_sites, max_lora_rank=info.max_lora_rank)

    def request(
        self, prompt: list[int], adapter: str | None = None, *, salt: str = "", **sampling: Any
    ) -> Request:
        """A request; greedy and 64 tokens long unless `sampling` says otherwise."""
        return Request(
            request_id=f"r{next(_ids)}",
            prompt_token_ids=prompt,
            sampling=TokenSampling(**{"temperature": 0.0, "max_tokens": 64, **sampling}),
            adapter=None if adapter is None else self.digests[adapter],
            cache_salt=salt,
        )

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        """Serve the requests together until all have ended; answers in the order of the requests."""
        answers = {request.request_id: Answer() for request in requests}
        for request in requests:
            self.engine.add_request(request)
        self.drain(answers)
        return list(answers.values())

    def drain(self, answers: dict[str, Answer]) -> None:
        """Step until nothing is left, filling `answers` by request id."""
        for _ in range(MAX_STEPS):
            if not self.engine.has_work():
                break
            self.step(answers)
        assert not self.engine.has_work(), f"still busy after {MAX_STEPS} steps"
        assert all(answer.finish_reason for answer in answers.values())
        stats = self.engine.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.kv_blocks_used == 0, "blocks are still held after the last sequence ended"
        self.engine.scheduler.check_invariants()

    def step(self, answers: dict[str, Answer]) -> None:
        """One engine step."""
        for output in self.engine.step():
            answer = answers[output.request_id]
            assert answer.finish_reason is None, "output after the end"
            answer.tokens += output.token_ids
            answer.logprobs += output.logprobs or []
            answer.prompt_logprobs = output.prompt_logprobs or answer.prompt_logprobs
            answer.num_cached_tokens = max(answer.num_cached_tokens, output.num_cached_tokens)
            answer.finish_reason, answer.stop_reason = output.finish_reason, output.stop_reason

    def ask(self, prompt: list[int], adapter: str | None = None, **options: Any) -> Answer:
        """Serve one request alone."""
        return self.run([self.request(prompt, adapter, **options)])[0]


def assert_greedy(answer: Answer, expected: Greedy) -> None:
    """The same tokens, and for every logprob that was asked for the same value."""
    assert answer.tokens == expected.tokens[: len(answer.tokens)]
    assert len(answer.tokens) == len(expected.tokens)
    assert answer.finish_reason == "length"
    for token, said, row in zip(answer.tokens, answer.logprobs, expected.logprobs, strict=False):
        assert_logprobs(said, token, row)


def assert_logprobs(said: TokenLogprobs, token: int, row: torch.Tensor) -> None:
    """`said` reports `token` and the top-k of `row` ([vocab_size] log-probabilities)."""
    assert said.token_ids[0] == token
    ids = torch.tensor(said.token_ids)
    values = torch.tensor(said.logprobs)
    torch.testing.assert_close(values, row[ids], rtol=0, atol=ATOL)
    best = row.topk(len(ids) - 1).values
    torch.testing.assert_close(values[1:], best, rtol=0, atol=ATOL)
    assert len(set(said.token_ids[1:])) == len(ids) - 1
    surely_better, maybe_better = (int((row > row[token] + slack).sum()) for slack in (ATOL, -ATOL))
    assert surely_better + 1 <= said.rank <= max(maybe_better, 1)


def assert_prompt_logprobs(answer: Answer, prompt: list[int], rows: torch.Tensor) -> None:
    """One entry a prompt token, None for the first; `rows[i]` is the distribution of token i + 1."""
    said = answer.prompt_logprobs
    assert said is not None
    assert len(said) == len(prompt)
    assert said[0] is None
    for token, entry, row in zip(prompt[1:], said[1:], rows, strict=False):
        assert entry is not None
        assert_logprobs(entry, token, row)
