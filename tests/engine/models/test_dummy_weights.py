"""`--load-format dummy`: a model from its config.json alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from loramux.engine.config import EngineConfig
from loramux.engine.core import Engine
from loramux.engine.errors import AdapterIncompatible, InvalidConfig
from loramux.engine.models.families import load_model_config
from loramux.engine.models.weights import BaseWeights, open_weights
from loramux.engine.parallel.shard import whole_model
from loramux.engine.types import Request, TokenSampling
from tests.tiny_models import FAMILIES, make_tiny

CPU = torch.device("cpu")


def config_alone(tmp_path: Path, family: str) -> Path:
    """A folder with a model's config.json and nothing else."""
    made = make_tiny(family, tmp_path / "made")
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(made / "config.json", folder)
    return folder


def tokens_of(engine: Engine) -> list[int]:
    sampling = TokenSampling(temperature=0.0, max_tokens=6)
    engine.add_request(Request(request_id="a", prompt_token_ids=[5, 9, 11], sampling=sampling))
    found: list[int] = []
    while engine.has_work():
        for output in engine.step():
            found += output.token_ids
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_files_answers_the_same_for_the_same_seed(tmp_path: Path, family: str) -> None:
    folder = config_alone(tmp_path, family)

    def answer(seed: int) -> list[int]:
        engine = Engine(EngineConfig(model=str(folder), load_format="dummy", seed=seed, num_kv_blocks=64))
        try:
            return tokens_of(engine)
        finally:
            engine.close()

    assert len(answer(0)) == 6
    assert answer(0) == answer(0)


def test_tensors_do_not_depend_on_the_order_but_on_seed_and_name(tmp_path: Path) -> None:
    folder = config_alone(tmp_path, "llama")
    model = load_model_config(folder)

    def weights(seed: int, *names: str) -> list[torch.Tensor]:
        config = EngineConfig(model=str(folder), load_format="dummy", seed=seed)
        with open_weights(config, whole_model(model), dtype=torch.float32, device=CPU) as source:
            return [source.take(name, (40, 30)) for name in names]

    a, b = weights(0, "a.weight", "b.weight")
    later_b, later_a = weights(0, "b.weight", "a.weight")

    assert torch.equal(a, later_a)
    assert torch.equal(b, later_b)
    assert not torch.equal(a, b)
    assert not torch.equal(a, *weights(1, "a.weight"))
    assert 0.8 < float(a.var() * 30) < 1.2


def test_an_adapter_that_needs_the_files_is_refused() -> None:
    with (
        pytest.raises(AdapterIncompatible, match="--load-format dummy"),
        BaseWeights(None, torch.float32).open(),
    ):
        pass


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="auto, safetensors, dummy, got 'gguf'"):
        EngineConfig(model="m", load_format="gguf")


def test_the_parts_of_a_site_are_read_into_their_place(tmp_path: Path) -> None:
    folder = make_tiny("qwen2", tmp_path / "model")
    model = load_model_config(folder)
    config = EngineConfig(model=str(folder))
    whole = torch.zeros(48, 48)

    with open_weights(config, whole_model(model), dtype=torch.float32, device=CPU) as source:
        source.fill(whole[8:32], "model.layers.0.self_attn.k_proj.weight")
        taken = source.take("model.layers.0.self_attn.k_proj.weight", (24, 48))

    assert torch.equal(whole[8:32], taken)
    assert not whole[:8].any()
    assert not whole[32:].any()
