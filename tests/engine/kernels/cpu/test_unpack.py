"""Adapters that the compiled kernel unpacks lie in their lanes bit for bit as torch puts them there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from loramux.engine.adapters.lanes import LaneSpan
from loramux.engine.adapters.packed import PackedAdapter
from loramux.engine.adapters.unpacking import LaneUnpacker
from loramux.engine.adapters.weights import LanePool, read_adapter
from loramux.engine.errors import AdapterIncompatible, AdapterNotFound
from loramux.engine.models.families import ModelConfig, load_model_config
from loramux.engine.models.weights import BaseWeights
from loramux.engine.parallel.shard import Shard, shard_model, whole_model
from loramux.engine.types import AdapterSpec
from loramux.resolvers.inspect import inspect_adapter
from tests.adapter_files import (
    WEIGHTS_FILE,
    peft_config,
    random_tensors,
    safetensors_bytes,
    with_number,
    write_adapter,
    write_folder,
)
from tests.tiny_models import make_tiny

CPU = torch.device("cpu")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LANES = 64
ROOT = Path(__file__).parents[4]
BESIDE_A_THREAD = """
import sys, threading

import numpy as np

from loramux.engine.kernels.cpu.intrinsics import BFLOAT16
from loramux.engine.kernels.cpu.unpack import compile_for, unpack

lanes, features = 64, 4096
source, target = (np.zeros((lanes, features), dtype=np.uint16) for _ in range(2))
row = [0, features, 1, 0, lanes, features, target.ctypes.data, features, 0]  # columns of `Column`
table, flags = np.array([row] * 50, dtype=np.int64), np.zeros(50, dtype=np.int64)
begin = source.ctypes.data
compile_for(BFLOAT16)
lock, ran = threading.Lock(), []

def run():
    with lock:
        ran.append(True)

with lock:
    threading.Thread(target=run, daemon=True).start()
    sys.setswitchinterval(1000)  # s: nobody is interrupted, a thread runs only when another lets go
for _ in range(200):  # milliseconds each
    if ran:
        break
    unpack(BFLOAT16, table, 0, len(table), begin, lanes, flags)
sys.exit(0 if ran else 1)
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
    }
    return load_model_config(make_tiny("llama", tmp_path_factory.mktemp("model"), head_dim=16, **sizes))


def pool_of(shard: Shard, dtype: torch.dtype) -> LanePool:
    """Lanes in which something lay before."""
    pool = LanePool(shard.own, LANES, dtype=dtype, device=CPU)
    assert pool.kernel is not None, "shapes that the compiled kernels do not take"
    for lanes in tensors_of(pool):
        lanes.fill_(7.0)
    return pool


def tensors_of(pool: LanePool) -> Iterator[torch.Tensor]:
    for site in pool.sites:
        yield from (site.a, *site.b)


def inspected(folder: Path, config: ModelConfig) -> AdapterSpec:
    return inspect_adapter(folder, config.lora_sites(), max_lora_rank=64)


def packed(unpacker: LaneUnpacker, spec: AdapterSpec) -> PackedAdapter:
    adapter = unpacker.read(spec)
    assert adapter is not None
    return adapter


def check_equal(spec: AdapterSpec, shard: Shard, dtype: torch.dtype) -> None:
    """Both ways fill the same lanes with the same bits, say the same of ranks, and touch no others."""
    span = LaneSpan(8, -(-spec.rank // 8) * 8, spec.rank)
    by_torch, compiled = pool_of(shard, dtype), pool_of(shard, dtype)
    by_torch.write(read_adapter(spec, shard, dtype, BaseWeights(None, dtype)), span)
    unpacker = LaneUnpacker(compiled, shard)

    unpacker.write(packed(unpacker, spec), span)

    for expected, lanes in zip(tensors_of(by_torch), tensors_of(compiled), strict=True):
        assert torch.equal(lanes, expected)
    for right, site in zip(by_torch.sites, compiled.sites, strict=True):
        assert np.array_equal(site.ranks, right.ranks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stored", ["BF16", "F16", "F32"])
def test_every_dtype_of_files_and_lanes(
    config: ModelConfig, tmp_path: Path, stored: str, dtype: torch.dtype
) -> None:
    folder = write_adapter(tmp_path, config.lora_sites(), rank=20, target_modules=ALL, dtype=stored)

    check_equal(inspected(folder, config), whole_model(config), dtype)


@pytest.mark.parametrize("rank", [1, 3, 8, 16, 31, 40])
def test_ranks_that_do_and_do_not_fill_their_lanes(config: ModelConfig, tmp_path: Path, rank: int) -> None:
    folder = write_adapter(tmp_path, config.lora_sites(), rank=rank, target_modules=["v_proj", "down_proj"])

    check_equal(inspected(folder, config), whole_model(config), torch.bfloat16)


def test_ranks_by_module(config: ModelConfig, tmp_path: Path) -> None:
    chosen = {name: site for name, site in config.lora_sites().items() if name.endswith(ALL)}
    ranks = {name: 3 + 5 * (index % 4) for index, name in enumerate(chosen)}
    settings = peft_config(target_modules=list(ALL), rank_pattern=ranks)
    spec = inspected(write_folder(tmp_path, settings, random_tensors(chosen, rank=ranks)), config)

    check_equal(spec, whole_model(config), torch.bfloat16)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_a_tensor_parallel_engine_takes_its_features(
    config: ModelConfig, tmp_path: Path, rank: int
) -> None:
    folder = write_adapter(tmp_path, config.lora_sites(), rank=8, target_modules=ALL, dtype="BF16")

    check_equal(inspected(folder, config), shard_model(config, rank, 2), torch.float32)


@pytest.mark.parametrize("half", ["A", "B"])
@pytest.mark.parametrize("value", [np.nan, -np.inf, 3.4e38])
def test_numbers_that_are_not_finite_are_refused_before_there_are_lanes(
    config: ModelConfig, tmp_path: Path, value: float, half: str
) -> None:
    shard, sites = whole_model(config), config.lora_sites()
    write_adapter(tmp_path, sites, target_modules=["o_proj"])
    tensors = random_tensors({name: site for name, site in sites.items() if name.endswith("o_proj")})
    key = f"base_model.model.model.layers.1.self_attn.o_proj.lora_{half}.weight"
    tensors[key] = with_number(tensors[key], value)
    (tmp_path / WEIGHTS_FILE).write_bytes(safetensors_bytes(tensors))
    pool = pool_of(shard, torch.bfloat16)
    unpacker = LaneUnpacker(pool, shard)
    before = [lanes.clone() for lanes in tensors_of(pool)]

    with pytest.raises(AdapterIncompatible, match=rf"{key} of the adapter holds .* not finite"):
        unpacker.read(inspected(tmp_path, config))

    assert all(torch.equal(*lanes) for lanes in zip(tensors_of(pool), before, strict=True))


def test_adapters_that_need_arithmetic_are_left_to_torch(config: ModelConfig, tmp_path: Path) -> None:
    shard = whole_model(config)
    unpacker = LaneUnpacker(pool_of(shard, torch.bfloat16), shard)
    spec = inspected(write_adapter(tmp_path, config.lora_sites()), config)
    first, *others = spec.modules

    def read(**fields: Any) -> PackedAdapter | None:
        changed = msgspec.structs.replace(first, **fields)
        return unpacker.read(msgspec.structs.replace(spec, modules=[changed, *others]))

    assert read() is not None
    assert read(magnitude=first.b) is None
    assert read(module="lm_head") is None
    assert read(b=msgspec.structs.replace(first.b, offset=first.b.offset + 2)) is None


def test_files_that_are_gone_or_changed_are_refused(config: ModelConfig, tmp_path: Path) -> None:
    shard = whole_model(config)
    unpacker = LaneUnpacker(pool_of(shard, torch.bfloat16), shard)
    spec = inspected(write_adapter(tmp_path, config.lora_sites()), config)
    (tmp_path / WEIGHTS_FILE).touch()

    with pytest.raises(AdapterIncompatible, match="changed while it was being loaded"):
        unpacker.read(spec)
    (tmp_path / WEIGHTS_FILE).unlink()
    with pytest.raises(AdapterNotFound, match="its files are gone"):
        unpacker.read(spec)


def test_another_thread_has_the_interpreter_meanwhile() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BESIDE_A_THREAD], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120
    )

    assert done.returncode == 0


BITS = """
import sys
import numpy as np
from loramux.engine.kernels.cpu import vector_ir
vector_ir._HAS_PAIR_PRODUCTS = sys.argv[1] == "pairs"
from loramux.engine.kernels.cpu.dtypes import TAGS
from loramux.engine.kernels.cpu.unpack import unpack
import torch

source = np.zeros(48, dtype=np.uint32)
out = torch.zeros(16, dtype=torch.bfloat16)
for bits in (0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFF8000, 0x7F800000, 0xFF800000, 0x7F7FFFFF):
    source[3] = bits
    flags = np.zeros(1, dtype=np.int64)
    one = np.array([1.0], dtype=np.float32).view(np.int32)[0]
    table = np.array([[0, 16, 1, 2, 1, 16, out.data_ptr(), 16, one]], dtype=np.int64)
    unpack(TAGS[torch.bfloat16], table, 0, 1, source.ctypes.data, 1, flags)
    assert flags[0] == 1, hex(bits)
    assert not out.any(), hex(bits)
"""


@pytest.mark.parametrize("processor", ["pairs", "no pairs"])
def test_no_bits_that_are_not_finite_pass_on_any_processor(tmp_path: Path, processor: str) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}  # of kernels for another processor
    subprocess.run([sys.executable, "-c", BITS, processor], env=environment, check=True)
