"""DoRA, embeddings, heads and replaced rows: what the spec says, and what gives the same digest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loramux.engine.types import AdapterSpec, LoraSite, TableTensor
from loramux.resolvers.inspect import inspect_adapter
from tests.adapter_files import (
    INDEX_FILE,
    Tensors,
    llama_sites,
    peft_config,
    random_tensors,
    safetensors_bytes,
    tensor_ref,
    write_folder,
)

VOCABULARY = 32
SITES = llama_sites(vocabulary=VOCABULARY)
TIED = llama_sites(vocabulary=VOCABULARY, is_tied=True)
Q0, Q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
EMBED, HEAD = "model.embed_tokens", "lm_head"
P = "base_model.model."


def tensor(*shape: int, fill: int = 0) -> tuple[str, tuple[int, ...], bytes]:
    count = 2
    for size in shape:
        count *= size
    return "BF16", shape, bytes([fill]) * count


def write(folder: Path, *modules: str, extra: Mapping[str, Any] | None = None, **config: Any) -> Path:
    """LoRA on q_proj and `modules`, beside other tensors."""
    tensors: Tensors = random_tensors({name: SITES[name] for name in (Q0, Q1, *modules)})
    targets = ["q_proj", *(name.rpartition(".")[2] for name in modules)]
    return write_folder(folder, peft_config(target_modules=targets, **config), {**tensors, **(extra or {})})


def inspect(folder: Path, sites: Mapping[str, LoraSite] = SITES) -> AdapterSpec:
    return inspect_adapter(folder, sites, max_lora_rank=64)


def magnitudes(fill: int = 1, end: str = "") -> Tensors:
    return {f"{P}{name}.lora_magnitude_vector{end}": tensor(16, fill=fill) for name in (Q0, Q1)}


def rows(*tables: str, count: int = 2, fill: int = 1) -> Tensors:
    end = "token_adapter.trainable_tokens_delta"
    return {f"{P}{table}.{end}": tensor(count, 16, fill=fill) for table in tables}


def test_dora_names_the_magnitude_of_every_module(tmp_path: Path) -> None:
    folder = write(tmp_path, extra=magnitudes(), use_dora=True)

    spec = inspect(folder)

    assert [module.magnitude for module in spec.modules] == [
        tensor_ref(folder, f"{P}{name}.lora_magnitude_vector") for name in (Q0, Q1)
    ]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=AdapterSpec) == spec


@pytest.mark.parametrize("end", [".weight", ".default", ".default.weight"])
def test_older_spellings_of_a_magnitude_are_the_same_adapter(tmp_path: Path, end: str) -> None:
    new = inspect(write(tmp_path / "new", extra=magnitudes(), use_dora=True))
    old = inspect(write(tmp_path / "old", extra=magnitudes(end=end), use_dora=True))

    assert old.digest == new.digest


def test_replaced_tables_are_listed_under_both_spellings(tmp_path: Path) -> None:
    spellings = {f"{P}{HEAD}.weight", f"{P}{HEAD}.modules_to_save.weight"}
    spellings.add(f"{P}{HEAD}.modules_to_save.default.weight")
    specs = [
        inspect(write(tmp_path / str(i), extra={key: tensor(32, 16)}, modules_to_save=["lm_head"]))
        for i, key in enumerate(sorted(spellings))
    ]

    assert {spec.tables[0].tensor.key for spec in specs} == spellings
    assert {(spec.tables[0].module, spec.tables[0].kind) for spec in specs} == {(HEAD, "full")}
    assert len({spec.digest for spec in specs}) == 1


def test_copies_of_the_base_are_for_the_engine_to_check_and_change_nothing(tmp_path: Path) -> None:
    plain = inspect(write(tmp_path / "plain", EMBED))
    copy = {f"{P}{EMBED}.base_layer.weight": tensor(32, 16), f"{P}{HEAD}.weight": tensor(32, 16)}
    copied = inspect(write(tmp_path / "copied", EMBED, extra=copy))

    assert {(table.module, table.kind) for table in copied.tables} == {(EMBED, "copy"), (HEAD, "copy")}
    assert copied.digest == plain.digest
    assert copied.nbytes == plain.nbytes + 2 * 32 * 16 * 2


@pytest.mark.parametrize("name", ["embed_tokens", "model.embed_tokens"])
def test_rows_go_to_a_tied_head_too(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, extra=rows(EMBED), trainable_token_indices={name: [7, 3]})
    key = f"{P}{EMBED}.token_adapter.trainable_tokens_delta"
    on_embedding = TableTensor(EMBED, "rows", tensor_ref(folder, key), [7, 3])

    assert inspect(folder).tables == [on_embedding]
    assert inspect(folder, TIED).tables == [on_embedding, msgspec.structs.replace(on_embedding, module=HEAD)]


def test_rows_of_a_tied_head_alone_stay_there(tmp_path: Path) -> None:
    spec = inspect(write(tmp_path, extra=rows(HEAD), trainable_token_indices={"lm_head": [3, 7]}), TIED)

    assert [(table.module, table.token_ids) for table in spec.tables] == [(HEAD, [3, 7])]


def test_an_adapter_of_tables_alone_has_a_rank_for_its_lanes(tmp_path: Path) -> None:
    tensors = random_tensors({EMBED: SITES[EMBED]}, rank=5)
    spec = inspect(write_folder(tmp_path, peft_config(target_modules=["embed_tokens"], r=5), tensors))

    assert spec.rank == 5


def test_any_change_beyond_the_layers_changes_the_digest(tmp_path: Path) -> None:
    full = {f"{P}{HEAD}.weight": tensor(32, 16)}
    other = {f"{P}{HEAD}.weight": tensor(32, 16, fill=1)}
    variants: list[dict[str, Any]] = [
        {},
        {"extra": magnitudes(), "use_dora": True},
        {"extra": magnitudes(fill=2), "use_dora": True},
        {"extra": full, "modules_to_save": ["lm_head"]},
        {"extra": other, "modules_to_save": ["lm_head"]},
        {"extra": {f"{P}{EMBED}.weight": tensor(32, 16)}, "modules_to_save": ["embed_tokens"]},
        {"extra": rows(EMBED), "trainable_token_indices": [1, 2]},
        {"extra": rows(EMBED), "trainable_token_indices": [1, 3]},
        {"extra": rows(EMBED), "trainable_token_indices": [2, 1]},
        {"extra": rows(EMBED, fill=2), "trainable_token_indices": [1, 2]},
        {"extra": rows(HEAD), "trainable_token_indices": {"lm_head": [1, 2]}},
        {
            "extra": rows(EMBED, HEAD),
            "trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [1, 2]},
        },
    ]
    digests = [inspect(write(tmp_path / str(i), **variant)).digest for i, variant in enumerate(variants)]

    assert len(set(digests)) == len(digests)


def test_a_and_b_may_lie_in_different_shards(tmp_path: Path) -> None:
    tensors = random_tensors({name: SITES[name] for name in (Q0, Q1)})
    config = peft_config(target_modules=["q_proj"])
    one = inspect(write_folder(tmp_path / "one", config, tensors))
    folder = write_folder(tmp_path / "many", config, None)
    weight_map = {key: f"side-{'AB'[key.endswith('B.weight')]}.safetensors" for key in tensors}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    for name in set(weight_map.values()):
        part = {key: tensors[key] for key in tensors if weight_map[key] == name}
        (folder / name).write_bytes(safetensors_bytes(part))

    many = inspect(folder)

    assert many.digest == one.digest
    assert [(module.a.file, module.b.file) for module in many.modules] == [
        ("side-A.safetensors", "side-B.safetensors")
    ] * 2
    assert {file.name for file in many.files} == {"side-A.safetensors", "side-B.safetensors"}
