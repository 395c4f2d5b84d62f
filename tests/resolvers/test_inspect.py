"""Adapters that are accepted: what the spec says, and which content gives the same digest."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loramux.engine.types import AdapterSpec, LoraSite
from loramux.resolvers.inspect import inspect_adapter
from tests.adapter_files import (
    INDEX_FILE,
    WEIGHTS_FILE,
    Tensors,
    llama_sites,
    peft_config,
    random_tensors,
    safetensors_bytes,
    tensor_ref,
    write_adapter,
    write_folder,
)

SITES = llama_sites()
Q0, V0 = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
Q1, V1 = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


def inspect(folder: Path, sites: Mapping[str, LoraSite] = SITES) -> AdapterSpec:
    return inspect_adapter(folder, sites, max_lora_rank=64)


def modules_of(spec: AdapterSpec) -> dict[str, tuple[int, float]]:
    return {module.module: (module.rank, module.scale) for module in spec.modules}


def accept(folder: Path, modules: list[str], rank: int | dict[str, int] = 4, **config: Any) -> AdapterSpec:
    """Inspect an adapter that has tensors for exactly these modules."""
    tensors = random_tensors({module: SITES[module] for module in modules}, rank=rank)
    return inspect(write_folder(folder, peft_config(**config), tensors))


def test_the_spec_says_all_the_engine_needs(tmp_path: Path) -> None:
    spec = inspect(write_adapter(tmp_path, SITES, rank=4, alpha=8))

    assert spec.rank == 4
    assert spec.base_model == "tiny"
    assert spec.path == os.path.realpath(tmp_path)
    assert spec.nbytes == 2 * 4 * 4 * (16 + 16 + 16 + 8)
    assert modules_of(spec) == {module: (4, 2.0) for module in (Q0, V0, Q1, V1)}
    first = spec.modules[0]
    assert first.a == tensor_ref(tmp_path, f"base_model.model.{Q0}.lora_A.weight")
    assert first.b == tensor_ref(tmp_path, f"base_model.model.{Q0}.lora_B.weight")
    assert first.magnitude is None
    assert spec.tables == []
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=AdapterSpec) == spec


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_every_float_dtype_is_read(tmp_path: Path, dtype: str) -> None:
    assert inspect(write_adapter(tmp_path, SITES, dtype=dtype)).rank == 4


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 16}, 4.0),
        ({"lora_alpha": 0.5}, 0.125),
        ({"lora_alpha": 16, "use_rslora": True}, 8.0),
        ({"lora_alpha": 16, "use_rslora": None}, 4.0),
        ({"lora_alpha": 16, "fan_in_fan_out": True}, 4.0),
        ({"lora_alpha": -4}, -1.0),
    ],
)
def test_scale_is_alpha_by_rank_or_by_its_root(tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    spec = accept(tmp_path, [Q0, V0, Q1, V1], **config)

    assert [module.scale for module in spec.modules] == [scale] * 4


def test_patterns_set_rank_and_alpha_of_single_modules(tmp_path: Path) -> None:
    spec = accept(
        tmp_path,
        [Q0, V0, Q1, V1],
        rank={Q0: 2, V0: 4, Q1: 2, V1: 8},
        rank_pattern={"q_proj": 2, "^model.layers.1.self_attn.v_proj": 8},
        alpha_pattern={r".*layers\.[1-9]\..*": 3.5},
        use_rslora=True,
    )

    assert modules_of(spec) == {
        Q0: (2, 8 / math.sqrt(2)),
        V0: (4, 4.0),
        Q1: (2, 3.5 / math.sqrt(2)),
        V1: (8, 3.5 / math.sqrt(8)),
    }
    assert spec.rank == 8


def test_the_first_pattern_in_the_file_wins(tmp_path: Path) -> None:
    spec = accept(
        tmp_path, [Q0, Q1], target_modules=["q_proj"], alpha_pattern={"q_proj": 4, "0.self_attn.q_proj": 400}
    )

    assert modules_of(spec) == {Q0: (4, 1.0), Q1: (4, 1.0)}


@pytest.mark.parametrize(
    ("config", "modules"),
    [
        ({"target_modules": [Q0, V1]}, [Q0, V1]),
        ({"target_modules": ["self_attn.q_proj", "lm_head"]}, [Q0, Q1]),
        ({"target_modules": r".*\.(q|v)_proj"}, [Q0, V0, Q1, V1]),
        ({"target_modules": r"model\.layers\.0\.self_attn\.[qv]_proj"}, [Q0, V0]),
        ({"target_modules": "all-linear"}, list(SITES)),
        (
            {"target_modules": "All-Linear", "exclude_modules": "mlp.*|.*mlp.*"},
            [m for m in SITES if "mlp" not in m],
        ),
        ({"exclude_modules": ["v_proj"]}, [Q0, Q1]),
        ({"exclude_modules": [Q0, "1.self_attn.v_proj"]}, [V0, Q1]),
        ({"layers_to_transform": [1]}, [Q1, V1]),
        ({"layers_to_transform": 0}, [Q0, V0]),
        ({"layers_to_transform": []}, [Q0, V0, Q1, V1]),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, [Q0, V0]),
        ({"layers_to_transform": [0], "layers_pattern": ["h", "lay.rs"]}, [Q0, V0]),
        ({"layers_to_transform": [1], "target_modules": [Q0, "v_proj"]}, [Q0, V1]),
    ],
)
def test_the_config_selects_the_modules(tmp_path: Path, config: dict[str, Any], modules: list[str]) -> None:
    spec = accept(tmp_path, modules, **config)

    assert [module.module for module in spec.modules] == [site for site in SITES if site in modules]


def test_all_linear_spares_embedding_and_head(tmp_path: Path) -> None:
    sites = llama_sites(vocabulary=99)

    spec = inspect(
        write_folder(tmp_path, peft_config(target_modules="all-linear"), random_tensors(SITES)), sites
    )

    assert {module.module for module in spec.modules} == set(SITES)


def test_opt_layers_are_counted_below_the_decoder(tmp_path: Path) -> None:
    sites = {f"model.decoder.layers.{layer}.fc1": LoraSite(16, 64) for layer in range(3)}
    tensors = random_tensors({name: sites[name] for name in list(sites)[1:]})
    config = peft_config(target_modules=["fc1"], layers_to_transform=[1, 2])

    spec = inspect(write_folder(tmp_path, config, tensors), sites)

    assert [module.module for module in spec.modules] == list(sites)[1:]


@pytest.mark.parametrize(
    "config",
    [{"init_lora_weights": value} for value in (True, False, None, "gaussian", "orthogonal", "eva", "mica")]
    + [
        {"eva_config": {"rho": 1.0}, "loftq_config": {}, "lora_dropout": 0.1, "runtime_config": {}},
        {"use_dora": False, "modules_to_save": [], "layer_replication": None, "megatron_config": {}},
        {"trainable_token_indices": [], "ensure_weight_tying": True, "modules_to_tie": None},
        {"unsloth_fixed": True, "auto_mapping": {"base_model_class": "LlamaForCausalLM"}},
        {"a_field_of_the_future": False, "another": None, "a third": []},
        {"bias": None, "rank_pattern": None, "alpha_pattern": None, "exclude_modules": None},
        {"base_model_name_or_path": None},
    ],
)
def test_fields_without_effect_are_accepted(tmp_path: Path, config: dict[str, Any]) -> None:
    assert accept(tmp_path, [Q0, V0, Q1, V1], **config).rank == 4


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace(".weight", ".default.weight"),
    ],
)
def test_other_spellings_of_a_key_are_the_same_adapter(tmp_path: Path, rename: Any) -> None:
    modules = {module: SITES[module] for module in (Q0, V0, Q1, V1)}
    tensors = random_tensors(modules)
    renamed: Tensors = {rename(key): tensor for key, tensor in tensors.items()}

    plain = inspect(write_folder(tmp_path / "plain", peft_config(), tensors))
    other = inspect(write_folder(tmp_path / "other", peft_config(), renamed))

    assert other.digest == plain.digest
    assert {other.modules[0].a.key, other.modules[0].b.key} <= set(renamed)


def write_shards(folder: Path, tensors: Tensors, num_shards: int) -> Path:
    """Split the adapter between modules, in key order."""
    keys = list(tensors)
    size = -(-len(keys) // num_shards // 2) * 2
    weight_map = {}
    write_folder(folder, peft_config(), None)
    for start in range(0, len(keys), size):
        name = f"adapter_model-{start:05d}.safetensors"
        part = {key: tensors[key] for key in keys[start : start + size]}
        (folder / name).write_bytes(safetensors_bytes(part))
        weight_map.update(dict.fromkeys(part, name))
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_sharding_folder_order_and_padding_do_not_change_the_digest(tmp_path: Path) -> None:
    tensors = random_tensors({module: SITES[module] for module in (Q0, V0, Q1, V1)})
    backwards = dict(reversed(tensors.items()))

    one = inspect(write_folder(tmp_path / "one", peft_config(), tensors))
    two = inspect(write_folder(tmp_path / "two", peft_config(inference_mode=False), backwards))
    shards = inspect(write_shards(tmp_path / "shards", tensors, num_shards=2))

    assert one.digest == two.digest == shards.digest
    assert len({module.a.file for module in shards.modules}) == 2


def test_equal_effect_has_one_digest_however_the_config_says_it(tmp_path: Path) -> None:
    plain = accept(tmp_path / "plain", [Q0, V0, Q1, V1])
    regex = accept(tmp_path / "regex", [Q0, V0, Q1, V1], target_modules=r".*[qv]_proj")
    pattern = accept(
        tmp_path / "pattern", [Q0, V0, Q1, V1], r=16, rank_pattern={".*_proj": 4}, lora_alpha=8.0
    )

    assert plain.digest == regex.digest == pattern.digest


def test_any_change_of_content_changes_the_digest(tmp_path: Path) -> None:
    def digest(name: str, **changes: Any) -> str:
        return inspect(write_adapter(tmp_path / name, SITES, **changes)).digest

    changed = tmp_path / "byte"
    write_adapter(changed, SITES)
    data = bytearray((changed / WEIGHTS_FILE).read_bytes())
    data[-1] ^= 1
    (changed / WEIGHTS_FILE).write_bytes(data)
    digests = [
        digest("plain"),
        digest("alpha", alpha=9),
        digest("rslora", use_rslora=True),
        digest("alpha of one module", alpha_pattern={Q0: 9}),
        digest("seed", seed=1),
        digest("rank", rank=8),
        digest("dtype", dtype="F16"),
        digest("fewer modules", target_modules=["q_proj"]),
        inspect(changed).digest,
    ]

    assert len(set(digests)) == len(digests)


def test_bytes_moved_between_modules_change_the_digest(tmp_path: Path) -> None:
    tensors = random_tensors({Q0: SITES[Q0], Q1: SITES[Q1]})
    keys = list(tensors)
    swapped = {
        keys[0]: tensors[keys[2]],
        keys[1]: tensors[keys[3]],
        keys[2]: tensors[keys[0]],
        keys[3]: tensors[keys[1]],
    }
    config = peft_config(target_modules=["q_proj"])

    first = inspect(write_folder(tmp_path / "first", config, tensors))
    second = inspect(write_folder(tmp_path / "second", config, swapped))

    assert first.digest != second.digest


def test_tensors_larger_than_a_chunk_are_hashed_whole(tmp_path: Path) -> None:
    sites = {"model.layers.0.mlp.down_proj": LoraSite(100_003, 16)}
    folder = write_adapter(tmp_path, sites, target_modules=["down_proj"])
    before = inspect(folder, sites).digest
    data = bytearray((folder / WEIGHTS_FILE).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(data)

    assert inspect(folder, sites).digest != before


def test_a_link_to_the_folder_is_followed_once(tmp_path: Path) -> None:
    write_adapter(tmp_path / "v1", SITES)
    (tmp_path / "current").symlink_to("v1")

    assert inspect(tmp_path / "current").path == os.path.realpath(tmp_path / "v1")


def test_a_snapshot_of_the_hub_cache_is_read_through_its_links(tmp_path: Path) -> None:
    blobs = write_adapter(tmp_path / "models--org--name" / "blobs", SITES)
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for name in ("adapter_config.json", WEIGHTS_FILE):
        (snapshot / name).symlink_to(f"../../blobs/{name}")

    spec = inspect(snapshot)

    assert spec.path == os.path.realpath(snapshot)
    assert spec.digest == inspect(blobs).digest
