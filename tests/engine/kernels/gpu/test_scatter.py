"""Adapters that are unpacked on the device lie in their lanes bit for bit as those unpacked on the host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from loramux.engine.adapters.arena import PAGE_BYTES
from loramux.engine.adapters.lane_memory import LaneLayout
from loramux.engine.adapters.lanes import LaneSpan, LaneTable
from loramux.engine.adapters.packed import Column, PackedAdapter
from loramux.engine.adapters.residency import AdapterResidency
from loramux.engine.adapters.store import AdapterStore
from loramux.engine.adapters.transfer import LaneTransfer
from loramux.engine.adapters.weights import LanePool, read_adapter
from loramux.engine.errors import AdapterIncompatible, AdapterNotFound
from loramux.engine.kernels.gpu.scatter import reference_lanes, scatter
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

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LANES = 40


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return load_model_config(make_tiny("llama", tmp_path_factory.mktemp("model")))


def pool_of(
    shard: Shard, dtype: torch.dtype, device: torch.device, layout: LaneLayout = LaneLayout.APART
) -> LanePool:
    """Lanes in which something lay before."""
    pool = LanePool(shard.own, LANES, dtype=dtype, device=device, layout=layout)
    for lanes in tensors_of(pool, shard.own):
        lanes.fill_(7.0)
    return pool


def tensors_of(pool: LanePool, config: ModelConfig) -> Iterator[torch.Tensor]:
    for layer in range(config.num_layers):
        for site in config.sites:
            lanes = pool.site(layer, site.name)
            assert lanes is not None
            yield from (lanes.a, *lanes.b)


def transfer_of(pool: LanePool, shard: Shard, **options: Any) -> LaneTransfer:
    sizes: dict[str, Any] = {"host_bytes": 4 << 20, "staging_bytes": 1 << 20} | options
    return LaneTransfer(pool, shard, scatter, device=DEVICE, **sizes)


def inspected(folder: Path, config: ModelConfig) -> AdapterSpec:
    return inspect_adapter(folder, config.lora_sites(), max_lora_rank=64)


def packed(transfer: LaneTransfer, spec: AdapterSpec) -> PackedAdapter:
    adapter = transfer.read(spec)
    assert adapter is not None
    return adapter


def check_equal(
    spec: AdapterSpec,
    shard: Shard,
    dtype: torch.dtype,
    layout: LaneLayout = LaneLayout.APART,
    **options: Any,
) -> None:
    """Both ways fill the same lanes with the same bits, and touch no others."""
    span = LaneSpan(8, -(-spec.rank // 8) * 8, spec.rank)
    on_host, on_device = pool_of(shard, dtype, torch.device("cpu")), pool_of(shard, dtype, DEVICE, layout)
    on_host.write(read_adapter(spec, shard, dtype, BaseWeights(None, dtype)), span)
    transfer = transfer_of(on_device, shard, **options)

    transfer.write(packed(transfer, spec), span)

    for expected, lanes in zip(tensors_of(on_host, shard.own), tensors_of(on_device, shard.own), strict=True):
        assert torch.equal(lanes.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stored", ["BF16", "F16", "F32"])
def test_every_dtype_of_files_and_lanes(
    config: ModelConfig, tmp_path: Path, stored: str, dtype: torch.dtype
) -> None:
    folder = write_adapter(tmp_path, config.lora_sites(), rank=4, target_modules=ALL, dtype=stored)

    check_equal(inspected(folder, config), whole_model(config), dtype)


@pytest.mark.parametrize("rank", [1, 8, 20])
def test_ranks_that_do_and_do_not_fill_their_lanes(config: ModelConfig, tmp_path: Path, rank: int) -> None:
    folder = write_adapter(tmp_path, config.lora_sites(), rank=rank, target_modules=["v_proj", "down_proj"])

    check_equal(inspected(folder, config), whole_model(config), torch.bfloat16)


def test_ranks_by_module_in_batches_of_the_staging_memory(config: ModelConfig, tmp_path: Path) -> None:
    chosen = {name: site for name, site in config.lora_sites().items() if name.endswith(ALL)}
    ranks = {name: 3 + 5 * (index % 4) for index, name in enumerate(chosen)}
    settings = peft_config(target_modules=list(ALL), rank_pattern=ranks)
    spec = inspected(write_folder(tmp_path, settings, random_tensors(chosen, rank=ranks)), config)

    check_equal(spec, whole_model(config), torch.bfloat16)
    largest = spec.rank * 80 * 4 + 16
    check_equal(spec, whole_model(config), torch.bfloat16, staging_bytes=largest)


@pytest.mark.parametrize("layout", [LaneLayout.JOINED, LaneLayout.BEHIND_WEIGHT])
def test_lanes_that_lie_among_other_things(config: ModelConfig, tmp_path: Path, layout: LaneLayout) -> None:
    folder = write_adapter(tmp_path, config.lora_sites(), rank=4, target_modules=ALL, dtype="BF16")

    check_equal(inspected(folder, config), whole_model(config), torch.bfloat16, layout)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_a_tensor_parallel_engine_takes_its_features(
    config: ModelConfig, tmp_path: Path, rank: int
) -> None:
    folder = write_adapter(tmp_path, config.lora_sites(), rank=8, target_modules=ALL, dtype="BF16")

    check_equal(inspected(folder, config), shard_model(config, rank, 2), torch.bfloat16)


def test_each_row_of_the_table_is_what_the_reference_says(config: ModelConfig, tmp_path: Path) -> None:
    shard = whole_model(config)
    pool = pool_of(shard, torch.bfloat16, DEVICE)
    transfer = transfer_of(pool, shard)
    spec = inspected(write_adapter(tmp_path, config.lora_sites(), target_modules=ALL), config)
    adapter = packed(transfer, spec)

    transfer.write(adapter, LaneSpan(0, 8, 4))

    by_address = {
        part.data_ptr(): part
        for layer in range(config.num_layers)
        for site in config.sites
        if (lanes := pool.site(layer, site.name)) is not None
        for part in (*lanes.a.unbind(1), *lanes.b)
    }
    source = torch.cat([part for _, part in adapter.memory.parts(0, adapter.nbytes, at_most=1 << 20)])
    assert len(by_address) == len(adapter.table) == 2 * 7 * config.num_layers
    for row in torch.from_numpy(adapter.table):
        expected = reference_lanes(row, source, 8, torch.bfloat16)
        assert torch.equal(by_address[int(row[Column.TARGET])][:8].cpu(), expected)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e38])
def test_numbers_that_are_not_finite_never_reach_the_lanes(
    config: ModelConfig, tmp_path: Path, value: float
) -> None:
    shard, sites = whole_model(config), config.lora_sites()
    write_adapter(tmp_path, sites, target_modules=["o_proj"])
    tensors = random_tensors({name: site for name, site in sites.items() if name.endswith("o_proj")})
    key = "base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight"
    tensors[key] = with_number(tensors[key], value)
    (tmp_path / WEIGHTS_FILE).write_bytes(safetensors_bytes(tensors))
    pool = pool_of(shard, torch.float16, DEVICE)
    transfer = transfer_of(pool, shard)
    adapter = packed(transfer, inspected(tmp_path, config))

    with pytest.raises(AdapterIncompatible, match=rf"{key} of the adapter holds .* not finite"):
        transfer.write(adapter, LaneSpan(16, 8, 4))

    assert all(bool(lanes.isfinite().all()) for lanes in tensors_of(pool, config))
    good = inspected(write_adapter(tmp_path / "good", sites, target_modules=["o_proj"]), config)
    transfer.write(packed(transfer, good), LaneSpan(16, 8, 4))


def test_adapters_that_need_arithmetic_are_left_to_the_host(config: ModelConfig, tmp_path: Path) -> None:
    shard = whole_model(config)
    pool = pool_of(shard, torch.bfloat16, DEVICE)
    transfer = transfer_of(pool, shard)
    spec = inspected(write_adapter(tmp_path, config.lora_sites()), config)
    first, *others = spec.modules

    def read(**fields: Any) -> PackedAdapter | None:
        changed = msgspec.structs.replace(first, **fields)
        return transfer.read(msgspec.structs.replace(spec, modules=[changed, *others]))

    assert read() is not None
    assert read(magnitude=first.b) is None
    assert read(module="lm_head") is None
    assert read(b=msgspec.structs.replace(first.b, offset=first.b.offset + 2)) is None
    assert transfer_of(pool, shard, staging_bytes=1000).read(spec) is None


def test_files_that_are_gone_or_changed_are_refused(config: ModelConfig, tmp_path: Path) -> None:
    shard = whole_model(config)
    transfer = transfer_of(pool_of(shard, torch.bfloat16, DEVICE), shard)
    spec = inspected(write_adapter(tmp_path, config.lora_sites()), config)
    (tmp_path / WEIGHTS_FILE).touch()

    with pytest.raises(AdapterIncompatible, match="changed while it was being loaded"):
        transfer.read(spec)
    (tmp_path / WEIGHTS_FILE).unlink()
    with pytest.raises(AdapterNotFound, match="its files are gone"):
        transfer.read(spec)


def test_lanes_are_right_however_adapters_come_and_go(config: ModelConfig, tmp_path: Path) -> None:
    """Lanes for two, page-locked memory for two, host memory for three: nothing stays where it was."""
    shard = whole_model(config)
    pool = LanePool(config, 16, dtype=torch.bfloat16, device=DEVICE)
    transfer = transfer_of(pool, shard, host_bytes=2 * PAGE_BYTES)
    residency = AdapterResidency(
        AdapterStore(LaneTable(16), max_host_adapters=3),
        read=lambda spec: packed(transfer, spec),
        fill=torch.inference_mode()(transfer.write),
        forget_host=lambda digest: None,
        keep_tables=lambda residents: None,
        forget_kv=lambda digest: 0,
        fail_waiting=lambda digest, error: None,
    )
    specs = [
        inspected(write_adapter(tmp_path / str(seed), config.lora_sites(), rank=8, seed=seed), config)
        for seed in range(5)
    ]
    for spec in specs:
        residency.restore(spec)

    for index in np.random.default_rng(0).integers(len(specs), size=12):
        spec = specs[index]
        residency.store.lease(spec.digest)
        span = None
        while span is None:
            residency.store.prefetch(spec.digest)
            residency.advance()
            residency.wait(0.1)
            residency.advance()
            span = residency.store.acquire(spec.digest)
        expected = LanePool(config, 16, dtype=torch.bfloat16, device=torch.device("cpu"))
        expected.write(read_adapter(spec, shard, torch.bfloat16, BaseWeights(None, torch.bfloat16)), span)
        for right, lanes in zip(tensors_of(expected, config), tensors_of(pool, config), strict=True):
            assert torch.equal(lanes[span.first : span.end].cpu(), right[span.first : span.end])
        residency.store.lanes.unpin(spec.digest)
        residency.store.release(spec.digest)
    assert residency.store.num_host_evictions > 0
    assert residency.store.lanes.num_evictions > 0
    residency.loader.close()
