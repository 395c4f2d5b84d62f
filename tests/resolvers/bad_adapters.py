"""A table of wrong adapters: how each is made, and what the error about it must say."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from loramux.engine.errors import AdapterError, AdapterIncompatible, AdapterNotFound
from loramux.engine.types import LoraSite
from tests.adapter_files import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    Tensors,
    llama_sites,
    peft_config,
    random_tensors,
    safetensors_bytes,
    with_header,
    write_folder,
)

VOCABULARY = 32
SITES = llama_sites(vocabulary=VOCABULARY)
MODULES = {name: site for name, site in SITES.items() if name.endswith(("q_proj", "v_proj"))}
Q0 = "model.layers.0.self_attn.q_proj"
KEY_A = f"base_model.model.{Q0}.lora_A.weight"
KEY_B = f"base_model.model.{Q0}.lora_B.weight"
GOOD = random_tensors(MODULES)
Make = Callable[[Path], Any]


class Bad(NamedTuple):
    """A way to spoil an adapter, and what the error must say."""

    name: str
    make: Make
    says: tuple[str, ...]
    error: type[AdapterError] = AdapterIncompatible
    sites: Mapping[str, LoraSite] = SITES


def config(name: str, *says: str, **overrides: Any) -> Bad:
    """A folder whose config has these fields, beside good tensors."""
    return Bad(name, lambda folder: write_folder(folder, peft_config(**overrides), GOOD), says)


def unsupported(field: str, value: Any) -> Bad:
    return config(f"unsupported {field}", field, "not supported", **{field: value})


def without(field: str) -> Bad:
    fields = {key: value for key, value in peft_config().items() if key != field}
    return Bad(f"no {field}", lambda folder: write_folder(folder, fields, GOOD), (field, "is missing"))


def raw_config(name: str, data: bytes, *says: str) -> Bad:
    return Bad(name, lambda folder: write_folder(folder, data, GOOD), (CONFIG_FILE, *says))


def tensors(name: str, changes: dict[str, Any], *says: str, **overrides: Any) -> Bad:
    """Good tensors with some replaced, added or (None) removed."""
    changed: Tensors = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    return Bad(name, lambda folder: write_folder(folder, peft_config(**overrides), changed), says)


def weights(name: str, data: bytes, *says: str) -> Bad:
    """A weights file of these bytes."""
    return Bad(name, lambda folder: write_folder(folder, peft_config(), data), (WEIGHTS_FILE, *says))


def entry(**changes: Any) -> dict[str, Any]:
    """The header of a file whose one tensor is 4 x 16 F32, spoilt."""
    return {KEY_A: {"dtype": "F32", "shape": [4, 16], "data_offsets": [0, 256], **changes}}


def zeros(*shape: int) -> tuple[str, tuple[int, ...], bytes]:
    count = 1
    for size in shape:
        count *= size
    return "F32", shape, bytes(4 * count)


def only_config_json(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")


def fifo_config(folder: Path) -> None:
    write_folder(folder, None, GOOD)
    os.mkfifo(folder / CONFIG_FILE)


def linked_weights(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes(safetensors_bytes(GOOD))
    write_folder(folder, peft_config(), None)
    (folder / WEIGHTS_FILE).symlink_to(outside)


def pickle_only(folder: Path) -> None:
    write_folder(folder, peft_config(), None)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")


def index(weight_map: object, shard: Tensors | None = None) -> Make:
    """A sharded adapter whose one shard, part.safetensors, holds `shard`."""

    def make(folder: Path) -> None:
        write_folder(folder, peft_config(), None)
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
        (folder / "part.safetensors").write_bytes(safetensors_bytes(GOOD if shard is None else shard))
        (folder / "outside.safetensors").symlink_to("../outside.safetensors")
        (folder.parent / "outside.safetensors").write_bytes(safetensors_bytes(GOOD))

    return make


FOLDERS = [
    Bad("no folder", os.rmdir, ("No adapter found for", "no such folder"), AdapterNotFound),
    Bad("empty folder", lambda folder: None, ("No adapter found for", CONFIG_FILE), AdapterNotFound),
    Bad("full model", only_config_json, ("No adapter found for", "full model"), AdapterNotFound),
    Bad("config is a folder", lambda folder: (folder / CONFIG_FILE).mkdir(), (CONFIG_FILE, "regular file")),
    Bad("config is a named pipe", fifo_config, (CONFIG_FILE, "not a regular file")),
    Bad("no weights", lambda folder: write_folder(folder, peft_config(), None), (WEIGHTS_FILE, "no ")),
    Bad("weights outside", linked_weights, (WEIGHTS_FILE, "leaves the adapter's folder")),
    Bad("pickle only", pickle_only, ("adapter_model.bin", "only safetensors is read", "save_pretrained")),
    Bad("shard path", index({KEY_A: "../outside.safetensors"}), (INDEX_FILE, "plain name")),
    Bad("shard absolute", index({KEY_A: "/etc/passwd"}), (INDEX_FILE, "'/etc/passwd'")),
    Bad("shard other kind", index({KEY_A: "adapter_model.bin"}), (INDEX_FILE, "adapter_model.bin")),
    Bad("shard linked out", index({KEY_A: "outside.safetensors"}), ("outside.safetensors", "leaves")),
    Bad("shard missing", index({KEY_A: "gone.safetensors"}), (INDEX_FILE, "gone.safetensors", "missing")),
    Bad("shard not listed", index({KEY_A: "part.safetensors"}), (INDEX_FILE, "does not list 7 tensors")),
    Bad(
        "shard lacks a tensor",
        index(dict.fromkeys(GOOD, "part.safetensors"), {KEY_A: GOOD[KEY_A]}),
        (INDEX_FILE, "lists 7 tensors that its files lack"),
    ),
    Bad("no weight_map", index(None), (INDEX_FILE, "weight_map")),
]

CONFIGS = [
    raw_config("not JSON", b"{", "not valid JSON"),
    raw_config("not UTF-8", b'{"r": "\xff"}', "not valid JSON"),
    raw_config("a list", b"[]", "must hold a JSON object"),
    raw_config("a key twice", b'{"r": 8, "r": 4}', "'r' stands twice"),
    raw_config("NaN", b'{"lora_alpha": NaN}', "NaN"),
    raw_config("very deep", b'{"a":' * 100_000, "nested too deeply"),
    raw_config("very long number", b'{"r": ' + b"9" * 5000 + b"}", "not valid JSON"),
    raw_config("too large", b" " * ((1 << 20) + 1), "1048577 bytes", "limit of 1048576"),
    without("r"),
    without("lora_alpha"),
    without("target_modules"),
    without("peft_type"),
    config("another method", "peft_type", "'IA3'", peft_type="IA3"),
    config("r is zero", "r must be an integer of at least 1, got 0", r=0),
    config("r is true", "r must be", "True", r=True),
    config("r is a float", "r must be", "4.0", r=4.0),
    config("r is text", "r must be", "'4'", r="4"),
    config("alpha is text", "lora_alpha must be a number", lora_alpha="16"),
    config("alpha is true", "lora_alpha must be a number", lora_alpha=True),
    raw_config(
        "alpha is huge",
        json.dumps(peft_config()).replace('"lora_alpha": 8', '"lora_alpha": 1e999').encode(),
        "finite",
    ),
    config("alpha is a huge integer", "lora_alpha must be a finite number", lora_alpha=10**400),
    config("rslora is text", "use_rslora must be true or false", use_rslora="yes"),
    config("fan_in_fan_out is text", "fan_in_fan_out must be true or false", fan_in_fan_out="no"),
    config("targets are a number", "target_modules must be", target_modules=3),
    config("targets are mixed", "target_modules must be", target_modules=["q_proj", 1]),
    config("no targets", "target_modules is empty", target_modules=[]),
    config(
        "target is no regex", "target_modules cannot be used", "regular expression", target_modules="(q_proj"
    ),
    config("exclude is no regex", "exclude_modules cannot be used", exclude_modules="*"),
    config("exclude is a number", "exclude_modules must be", exclude_modules=1),
    config("layers are text", "layers_to_transform must be", layers_to_transform="0"),
    config("layers are true", "layers_to_transform must be", layers_to_transform=[True]),
    config(
        "layers with a regex", "layers_to_transform cannot", layers_to_transform=[0], target_modules=".*_proj"
    ),
    config("pattern without layers", "layers_pattern needs layers_to_transform", layers_pattern="layers"),
    config("pattern is a number", "layers_pattern must be", layers_pattern=1, layers_to_transform=[0]),
    config("layer pattern is no regex", "layers_pattern cannot", layers_pattern="(", layers_to_transform=[0]),
    config("rank pattern is a list", "rank_pattern must be an object", rank_pattern=[]),
    config("rank pattern of text", "rank_pattern['q_proj'] must be an integer", rank_pattern={"q_proj": "4"}),
    config("rank pattern of zero", "rank_pattern['q_proj'] must be an integer", rank_pattern={"q_proj": 0}),
    config("rank pattern is no regex", "rank_pattern cannot be used", rank_pattern={"q_proj)": 4}),
    config(
        "alpha pattern of null", "alpha_pattern['v_proj'] must be a number", alpha_pattern={"v_proj": None}
    ),
    config(
        "too many patterns",
        "alpha_pattern has 5000 entries",
        "4096",
        alpha_pattern={str(i): 1 for i in range(5000)},
    ),
    config("base is a number", "base_model_name_or_path must be a string", base_model_name_or_path=1),
    config("base is half a character", "base_model_name_or_path", base_model_name_or_path="\ud800"),
    config("biases", "bias is 'all'", bias="all"),
    config("LoRA biases", "bias is 'lora_only'", bias="lora_only"),
    *(
        config(
            f"initialised by {kind}", "init_lora_weights", repr(kind), "base weights", init_lora_weights=kind
        )
        for kind in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "a new one")
    ),
    config("DoRA of text", "use_dora must be true or false", use_dora="yes"),
    config("tying of text", "ensure_weight_tying must be true or false", ensure_weight_tying="yes"),
    unsupported("lora_bias", True),
    *(
        config(
            f"replaces {name}",
            f"modules_to_save names {name!r}, which is not supported",
            "only model.embed_tokens and lm_head",
            modules_to_save=["lm_head", name],
        )
        for name in ("norm", "score", "q_proj", "tokens", "model", ".*", "model.layers.0.mlp.up_proj", "")
    ),
    config("modules to save are text", "modules_to_save must be a list", modules_to_save="lm_head"),
    config("modules to save are numbers", "modules_to_save must be a list", modules_to_save=[1]),
    config("token indices are a number", "trainable_token_indices must be", trainable_token_indices=1),
    config("token indices are text", "trainable_token_indices must be", trainable_token_indices=["1"]),
    config("token indices are true", "trainable_token_indices must be", trainable_token_indices=[True]),
    config("a token twice", "names a token of 'embed_tokens' twice", trainable_token_indices=[3, 1, 3]),
    config(
        "a table twice",
        "trainable_token_indices names model.embed_tokens twice",
        trainable_token_indices={"embed_tokens": [1], "model.embed_tokens": [2]},
    ),
    config(
        "a new token",
        "names token 32, but the base model has a vocabulary of 32 tokens",
        "add tokens",
        trainable_token_indices=[31, 32],
    ),
    config("a negative token", "names token -1", "32", trainable_token_indices=[-1]),
    config(
        "rows of a layer",
        "trainable_token_indices names 'v_proj', which is not supported",
        trainable_token_indices={"v_proj": [1]},
    ),
    unsupported("target_parameters", ["mlp.experts.gate_up_proj"]),
    unsupported("layer_replication", [[0, 2], [1, 2]]),
    unsupported("alora_invocation_tokens", [1, 2]),
    unsupported("megatron_config", {"a": 1}),
    unsupported("use_qalora", True),
    *(
        unsupported(field, {})
        for field in ("monteclora_config", "use_bdlora", "arrow_config", "kasa_config", "velora_config")
    ),
    config("unknown field", "use_next_idea", "{'a': 1}", "unknown field", use_next_idea={"a": 1}),
    config("rank over the limit", "LoRA rank 65 is greater than max_lora_rank 64", "--max-lora-rank", r=65),
    config(
        "rank of one module over it",
        "LoRA rank 99 is greater than max_lora_rank 64",
        rank_pattern={"0.self_attn.v_proj": 99},
    ),
    config("rank beyond floats", "is greater than max_lora_rank 64", r=10**400),
]

P = "base_model.model."
NO_MODEL = dict.fromkeys((f"{P}layers.0.mlp.up_proj.lora_{side}.weight" for side in "AB"), zeros(4, 16))
COVERAGE = [
    tensors("no model in the path", NO_MODEL, "2 of 10 tensors fit no module", "base_model.model.layers.0"),
    tensors("names the base's modules", NO_MODEL, "the base model has model.layers.{0..1}.self_attn.q_proj"),
    tensors("a layer too many", {KEY_A.replace(".0.", ".2."): zeros(4, 16)}, "1 of 9", "model.layers.2.self"),
    tensors("a bias", {KEY_B.replace("weight", "bias"): zeros(16)}, "lora_B.bias", "lora_bias"),
    tensors("another name", {KEY_A.replace("weight", "other.weight"): zeros(4, 16)}, "other.weight"),
    tensors("a weight twice", {KEY_A.removeprefix(P): zeros(4, 16)}, "same weight", KEY_A),
    tensors("no B", {KEY_B: None}, "missing", f"{Q0}.lora_B"),
    tensors("no A", {KEY_A: None}, "missing", f"{Q0}.lora_A"),
    tensors("a module missing", {KEY_A: None, KEY_B: None}, "matched 3 of 4 modules", Q0),
    tensors("more selected", {}, "matched 4 of 14 modules", "up_proj", target_modules="all-linear"),
    tensors("regex selects more", {}, "matched 4 of 8 modules", target_modules=r".*self_attn\..*"),
    tensors("not a target", {}, "target_modules ['q_proj']", "2 of 4", "v_proj", target_modules=["q_proj"]),
    tensors("excluded", {}, "does not select 2 of 4", "v_proj", exclude_modules=["v_proj"]),
    tensors("other layers", {}, "does not select 2 of 4", "layers.0", layers_to_transform=[1]),
    tensors("targets no module", {}, "does not select 4 of 4", target_modules=["c_attn"]),
    tensors("no tensors", dict.fromkeys(GOOD), "holds no LoRA tensors"),
    tensors("A of another base", {KEY_A: zeros(4, 32)}, KEY_A, "[4, 32]", "[4, 16]"),
    tensors("B of another base", {KEY_B: zeros(32, 4)}, KEY_B, "[32, 4]", "[16, 4]"),
    tensors("A turned round", {KEY_A: zeros(16, 4)}, KEY_A, "[16, 4]"),
    tensors("another rank", {}, "[4, 16]", "[8, 16]", "rank 8 by adapter_config.json", r=8),
    tensors("rank of A and B differ", {KEY_B: zeros(16, 8)}, KEY_B, "[16, 8]"),
    tensors("a flat tensor", {KEY_A: zeros(64)}, "[64]", "gather"),
    tensors("an empty tensor", {KEY_A: zeros(0)}, "[0]", "gather"),
]  # fmt: skip

FILES = [
    weights("empty file", b"", "truncated", "0 bytes"),
    weights("four bytes", b"\1\0\0\0", "truncated"),
    weights("header cut", safetensors_bytes(GOOD)[:50], "truncated"),
    weights("body cut", safetensors_bytes(GOOD)[:-1], "truncated"),
    weights("bytes left over", safetensors_bytes(GOOD) + b"\0", "1 bytes follow"),
    weights("huge header", (1 << 60).to_bytes(8, "little") + b"{}", "1152921504606846976 bytes", "limit"),
    weights("pickle", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P", "corrupt"),
    weights("header is text", with_header(b"hello"), "not valid JSON"),
    weights("header is deep", with_header(b'{"a":' * 100_000), "nested too deeply"),
    weights("header is a list", with_header([]), "JSON object"),
    weights("a tensor twice", with_header(b'{"a": {}, "a": {}}'), "'a' stands twice"),
    weights("metadata of numbers", with_header({"__metadata__": {"a": 1}}), "__metadata__"),
    weights("a tensor is a number", with_header({"a": 1}), "'a'"),
    weights("no dtype", with_header({"a": {"shape": [1], "data_offsets": [0, 4]}}), "'a'", "dtype"),
    weights("F64", with_header(entry(dtype="F64"), bytes(512)), "'F64'", "only F32, F16 and BF16"),
    weights("F8", with_header(entry(dtype="F8_E4M3"), bytes(256)), "'F8_E4M3'"),
    weights("dtype is a list", with_header(entry(dtype=[])), "dtype"),
    weights("negative shape", with_header(entry(shape=[-4, -16]), bytes(256)), "shape", "[-4, -16]"),
    weights("shape of true", with_header(entry(shape=[True, 64]), bytes(256)), "shape"),
    weights("shape is huge", with_header(entry(shape=[10**30, 1]), bytes(256)), "shape"),
    weights("too many axes", with_header(entry(shape=[1] * 9), bytes(256)), "shape"),
    weights("offsets do not fit", with_header(entry(shape=[4, 15]), bytes(256)), "needs 240 bytes"),
    weights("offsets turned round", with_header(entry(data_offsets=[256, 0]), bytes(256)), "data_offsets"),
    weights("offsets of three", with_header(entry(data_offsets=[0, 1, 2]), bytes(256)), "data_offsets"),
    weights("offsets beyond the end", with_header(entry(), bytes(100)), "truncated"),
    weights("a gap", with_header(entry(data_offsets=[8, 264]), bytes(264)), "gap"),
    weights("an overlap", with_header({**entry(), "b": entry()[KEY_A]}, bytes(256)), "overlaps"),
]  # fmt: skip

ALL = [*FOLDERS, *CONFIGS, *COVERAGE, *FILES]
