"""Random loads, unloads, requests, aborts and evictions on a real tiny engine, step by step."""

from __future__ import annotations

import itertools
import tempfile
from functools import cache
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loramux.engine.config import EngineConfig
from loramux.engine.core import Engine
from loramux.engine.types import AdapterSpec, Request, TokenSampling
from loramux.resolvers.inspect import inspect_adapter
from tests.adapter_files import write_adapter
from tests.tiny_models import make_tiny

TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
RANKS = [8, 4, 16, 20, 8, 12]
PROMPTS = [[5, 6, 7], list(range(20)), list(range(40))]
MAX_TOKENS = 6


def start(**config: int) -> Engine:
    return Engine(
        EngineConfig(
            model=str(folder() / "model"),
            dtype="float32",
            num_threads=1,
            num_kv_blocks=24,
            max_model_len=128,
            max_num_seqs=4,
            max_num_batched_tokens=16,
            enable_lora=True,
            **config,  # type: ignore[arg-type]
        )
    )


@cache
def folder() -> Path:
    root = Path(tempfile.mkdtemp(prefix="loramux-machine-"))
    make_tiny("llama", root / "model")
    return root


@cache
def specs() -> list[AdapterSpec]:
    """Two versions of each of three adapters."""
    sites = start(num_lanes=8).info.lora_sites
    found = []
    for index, rank in enumerate(RANKS):
        path = write_adapter(
            folder() / f"a{index}", sites, rank=rank, alpha=16 * rank, target_modules=TARGETS, seed=index
        )
        found.append(inspect_adapter(path, sites, max_lora_rank=64))
    return found


@cache
def alone(adapter: int | None, prompt: int) -> list[int]:
    """What a fresh engine answers."""
    engine = start(num_lanes=64)
    digest = None
    if adapter is not None:
        engine.load_adapter(specs()[adapter])
        digest = specs()[adapter].digest
    engine.add_request(make_request("alone", prompt, digest))
    tokens: list[int] = []
    while engine.has_work():
        for output in engine.step():
            tokens += output.token_ids
    return tokens


def make_request(name: str, prompt: int, digest: str | None) -> Request:
    sampling = TokenSampling(max_tokens=MAX_TOKENS, temperature=0.0)
    return Request(request_id=name, prompt_token_ids=PROMPTS[prompt], sampling=sampling, adapter=digest)


class EngineMachine(RuleBasedStateMachine):
    """Every stream that ends has the tokens of its adapter's version, whatever happened meanwhile."""

    async_scheduling = False

    def __init__(self) -> None:
        super().__init__()
        self.engine = start(num_lanes=32, max_cpu_loras=2, async_scheduling=self.async_scheduling)
        self.names: dict[int, int] = {}  # name -> index of the version that it stands for
        self.running: dict[str, tuple[int | None, int]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ids = itertools.count()

    @rule(name=st.integers(0, 2), version=st.integers(0, 1))
    def load_or_replace(self, name: int, version: int) -> None:
        index = 2 * name + version
        before = self.names.get(name)
        self.engine.load_adapter(specs()[index])
        self.names[name] = index
        if before is not None and before != index:
            self.engine.unload_adapter(specs()[before].digest)

    @rule(name=st.integers(0, 2))
    def unload(self, name: int) -> None:
        if name in self.names:
            self.engine.unload_adapter(specs()[self.names.pop(name)].digest)

    @rule(name=st.integers(-1, 2), prompt=st.integers(0, 2))
    def request(self, name: int, prompt: int) -> None:
        index = self.names.get(name)
        digest = None if index is None else specs()[index].digest
        request_id = str(next(self.ids))
        self.engine.add_request(make_request(request_id, prompt, digest))
        self.running[request_id] = (index, prompt)

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.running:
            request_id = data.draw(st.sampled_from(sorted(self.running)))
            self.engine.abort([request_id])
            del self.running[request_id]

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            self._take()

    @invariant()
    def consistent(self) -> None:
        self.engine.scheduler.check_invariants()

    def teardown(self) -> None:
        while self.engine.has_work():
            self._take()
        assert self.engine.take_failures() == []
        assert not self.running
        assert self.engine.stats().kv_blocks_used == 0
        self.engine.close()

    def _take(self) -> None:
        for output in self.engine.step():
            tokens = self.tokens.setdefault(output.request_id, [])
            tokens += output.token_ids
            if output.finish_reason is not None:
                assert tokens == alone(*self.running.pop(output.request_id))


class OverlappedEngineMachine(EngineMachine):
    """The same with the next step planned while the last one runs."""

    async_scheduling = True


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestOverlappedEngineMachine = OverlappedEngineMachine.TestCase
TestOverlappedEngineMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
