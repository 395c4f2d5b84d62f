"""Layers in one call yield the same bits as layer by layer, and are used wherever they can be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loramux.engine.busy import BusyFlag
from loramux.engine.core import Engine
from loramux.engine.kernels.attention import KVCache
from loramux.engine.kernels.cpu import threads
from loramux.engine.kernels.cpu.product import is_available
from loramux.engine.model_input import ModelInput
from loramux.engine.models.decoder import Decoder
from loramux.engine.torch_step import TorchSteps
from loramux.resolvers.inspect import inspect_adapter
from tests.adapter_files import write_adapter
from tests.engine.test_adapter_residency import TARGETS, finish, request, start
from tests.tiny_models import make_tiny

needs_pairs = pytest.mark.skipif(not is_available(), reason="needs AVX512-BF16")
RANKS = [4, 8, 33]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 17},
    "qwen2": {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1},  # and biases
    "qwen3": {},  # norms of q's and k's heads
}


class BothWays:
    """Computes each step in one call where it can, then layer by layer."""

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.by_layer = copy.copy(model)
        self.by_layer._recorded = None
        self.rows: list[int] = []  # of the steps in one call

    def forward(self, batch: ModelInput, caches: list[KVCache]) -> Tensor:
        recorded = self.model._recorded
        assert recorded is not None
        hidden = self.model.forward(batch, caches).clone()
        if recorded.takes(batch):
            self.rows.append(len(batch.token_ids))
        assert torch.equal(hidden, self.by_layer.forward(batch, caches))
        return hidden

    def logits(self, hidden: Tensor, tables: Any) -> Tensor:
        return self.model.logits(hidden, tables)


def both_ways(engine: Engine) -> BothWays:
    steps = engine.runner._steps
    assert isinstance(steps, TorchSteps)
    both = BothWays(engine.runner.model)
    steps._model = both  # type: ignore[assignment]
    return both


def load(engine: Engine, folder: Path) -> list[str]:
    digests = []
    for index, rank in enumerate(RANKS):
        target = TARGETS if index else TARGETS[:2]
        sites = engine.info.lora_sites
        made = write_adapter(
            folder / str(index), sites, rank=rank, alpha=16 * rank, target_modules=target, seed=index
        )
        spec = inspect_adapter(made, sites, max_lora_rank=64)
        engine.load_adapter(spec)
        digests.append(spec.digest)
    return digests


@needs_pairs
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_steps_in_one_call_equal_those_by_layer(family: str, num_threads: int, tmp_path: Path) -> None:
    model = make_tiny(family, tmp_path / "model", head_dim=32, **FAMILIES[family])
    engine = start(model, num_threads=num_threads, dtype="bfloat16", num_lanes=128)
    both = both_ways(engine)
    adapters: list[str | None] = [None, *load(engine, tmp_path)]
    rounds: list[list[str | None]] = [[None], adapters[1:2], adapters]

    for round_, own in enumerate(rounds):
        for count in (1, 3, 20):
            for i in range(count):
                name, prompt = f"{round_}-{count}-{i}", [(1 + i + j) % 120 for j in range(3 + 7 * i)]
                engine.add_request(request(name, prompt, own[i % len(own)], max_tokens=6 + i % 3))
            finish(engine, {})

    assert {1, 3, 20} <= set(both.rows)
    engine.close()


@needs_pairs
def test_layers_are_the_same_while_the_server_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_SERVERS", [])
    flag = BusyFlag(tmp_path)
    flag.put_up()
    threads.heed(flag)  # the first thread walks alone, a layer at a time
    engine = start(make_tiny("llama", tmp_path / "model", head_dim=32), num_threads=2, dtype="bfloat16")
    both = both_ways(engine)

    for i, adapter in enumerate([None, *load(engine, tmp_path)]):
        engine.add_request(request(str(i), [1 + i, 2, 3], adapter, max_tokens=4))
    finish(engine, {})

    assert both.rows
    engine.close()
    flag.close()


@needs_pairs
@pytest.mark.parametrize(("family", "dtype"), [("opt", "bfloat16"), ("llama", "float32")])
def test_other_models_are_computed_by_layer(family: str, dtype: str, tmp_path: Path) -> None:
    engine = start(make_tiny(family, tmp_path / "model"), dtype=dtype)

    assert engine.runner.model._recorded is None
    engine.close()


@needs_pairs
def test_more_sequences_than_a_recording_has_room_for(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model", head_dim=32)
    engine = start(model, num_threads=2, dtype="bfloat16", num_kv_blocks=400, max_num_seqs=150)
    both = both_ways(engine)

    for i in range(140):
        engine.add_request(request(f"r{i}", [1 + i % 100, 2, 3], None, max_tokens=4 + i // 100 * 3))
    tokens: dict[str, list[int]] = {}
    finish(engine, tokens)

    assert [len(tokens[f"r{i}"]) for i in (0, 139)] == [4, 7]
    assert both.rows
    assert max(both.rows) == 40
    engine.close()
