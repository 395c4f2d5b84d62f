from __future__ import annotations

import os
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from loramux.engine.adapters.lanes import LaneSpan
from loramux.engine.adapters.weights import LanePool, read_adapter
from loramux.engine.errors import AdapterIncompatible, AdapterNotFound
from loramux.engine.models.families import ModelConfig, load_model_config
from loramux.engine.models.weights import BaseWeights
from loramux.engine.parallel.shard import whole_model
from loramux.engine.types import AdapterSpec
from loramux.resolvers.inspect import inspect_adapter
from tests.adapter_files import random_tensors, safetensors_bytes, with_number, write_adapter
from tests.tiny_models import make_tiny

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def config(model: Path) -> ModelConfig:
    return load_model_config(model)


@pytest.fixture(scope="module")
def base(model: Path) -> BaseWeights:
    return BaseWeights(model, torch.float32)


@pytest.fixture
def spec(config: ModelConfig, tmp_path: Path) -> AdapterSpec:
    write_adapter(tmp_path / "a", config.lora_sites(), rank=4, alpha=8, target_modules=TARGETS)
    return inspect_adapter(tmp_path / "a", config.lora_sites(), max_lora_rank=64)


def test_scale_is_folded_into_b_and_a_is_as_stored(
    config: ModelConfig, base: BaseWeights, spec: AdapterSpec
) -> None:
    adapter = read_adapter(spec, whole_model(config), torch.float32, base)
    twice = [msgspec.structs.replace(module, scale=2 * module.scale) for module in spec.modules]
    doubled = read_adapter(
        msgspec.structs.replace(spec, modules=twice), whole_model(config), torch.float32, base
    )

    name = "model.layers.0.self_attn.q_proj"
    assert adapter.modules[name].a.shape == (4, config.hidden_size)
    assert torch.equal(adapter.modules[name].a, doubled.modules[name].a)
    torch.testing.assert_close(adapter.modules[name].b * 2, doubled.modules[name].b)


def test_file_rewritten_after_the_inspection_is_refused(
    config: ModelConfig, base: BaseWeights, spec: AdapterSpec
) -> None:
    file = Path(spec.path) / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(0, 0))

    with pytest.raises(AdapterIncompatible, match="changed while it was being loaded"):
        read_adapter(spec, whole_model(config), torch.float32, base)


def test_folder_gone_after_the_inspection_is_refused(
    config: ModelConfig, base: BaseWeights, spec: AdapterSpec
) -> None:
    (Path(spec.path) / "adapter_model.safetensors").unlink()

    with pytest.raises(AdapterNotFound, match="its files are gone"):
        read_adapter(spec, whole_model(config), torch.float32, base)


def test_host_weights_do_not_follow_a_file_that_is_overwritten_later(
    config: ModelConfig, base: BaseWeights, spec: AdapterSpec
) -> None:
    adapter = read_adapter(spec, whole_model(config), torch.float32, base)
    before = {name: (module.a.clone(), module.b.clone()) for name, module in adapter.modules.items()}
    file = Path(spec.path) / "adapter_model.safetensors"

    with file.open("r+b") as writer:  # in place: whoever maps the file sees the change
        writer.write(bytes(file.stat().st_size))

    for name, (a, b) in before.items():
        assert torch.equal(adapter.modules[name].a, a)
        assert torch.equal(adapter.modules[name].b, b)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_number_that_is_not_finite_in_the_lanes_dtype_is_refused(
    config: ModelConfig, base: BaseWeights, tmp_path: Path, value: float
) -> None:
    sites = config.lora_sites()
    folder = tmp_path / "bad"
    write_adapter(folder, sites, rank=4, alpha=8, target_modules=TARGETS)
    modules = [name for name in sites if name.endswith(tuple(TARGETS))]
    tensors = random_tensors({name: sites[name] for name in modules}, rank=4)
    key = next(iter(tensors))
    tensors[key] = with_number(tensors[key], value)
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors))
    spec = inspect_adapter(folder, sites, max_lora_rank=64)

    with pytest.raises(AdapterIncompatible, match="not finite"):
        read_adapter(spec, whole_model(config), torch.float16, base)


def test_lanes_of_a_former_adapter_leave_no_trace(
    config: ModelConfig, base: BaseWeights, spec: AdapterSpec
) -> None:
    device = torch.device("cpu")
    pool = LanePool(config, 16, dtype=torch.float32, device=device)
    fresh = LanePool(config, 16, dtype=torch.float32, device=device)
    site = pool.site(0, "qkv")
    assert site is not None
    for tensor in (site.a, *site.b):
        tensor.fill_(7.0)
    adapter = read_adapter(spec, whole_model(config), torch.float32, base)

    pool.write(adapter, LaneSpan(8, 8, 4))
    fresh.write(adapter, LaneSpan(8, 8, 4))

    clean = fresh.site(0, "qkv")
    assert clean is not None
    assert torch.equal(site.a[8:], clean.a[8:])
    assert all(torch.equal(b[8:], c[8:]) for b, c in zip(site.b, clean.b, strict=True))
    assert bool((site.a[:8] == 7.0).all())
