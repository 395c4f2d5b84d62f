"""The same rules as PEFT's: fields, chosen modules, ranks and scales, compared with PEFT itself."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from loramux.engine.errors import AdapterIncompatible
from loramux.engine.types import LoraSite
from loramux.resolvers.inspect import inspect_adapter
from loramux.resolvers.module_patterns import by_pattern
from loramux.resolvers.peft_config import HANDLED, HARMLESS, UNSUPPORTED, parse_config
from loramux.resolvers.selection import select
from tests.adapter_files import llama_sites, peft_config

SITES = llama_sites(num_layers=12, vocabulary=64)

# PEFT asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_every_field_of_the_installed_peft_is_in_exactly_one_table() -> None:
    tables = [*HANDLED, *HARMLESS, *UNSUPPORTED]

    assert sorted(tables) == sorted({field.name for field in dataclasses.fields(peft.LoraConfig)})


def test_a_default_config_of_peft_is_plain_lora() -> None:
    config = peft.LoraConfig(target_modules=["q_proj"]).to_dict()
    config.update(peft_type="LORA", target_modules=["q_proj"])

    assert parse_config(config).r == 8


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load_base(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def sites_of(model: Any) -> dict[str, LoraSite]:
    vocabulary, features = model.get_input_embeddings().weight.shape
    is_tied = model.config.tie_word_embeddings
    layers = {
        name: LoraSite(module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    embedding = LoraSite(vocabulary, features, "embedding")
    head = LoraSite(features, vocabulary, "head", is_tied)
    return {"model.embed_tokens": embedding, **layers, "lm_head": head}


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 16},
        {"target_modules": ["q_proj"], "lora_alpha": 7, "r": 3, "use_rslora": True},
        {"target_modules": "all-linear", "r": 2},
        {"target_modules": "all-linear", "exclude_modules": ["o_proj", "model.layers.1.mlp.up_proj"]},
        {"target_modules": r".*layers\.1\.(self_attn|mlp)\.(q|up)_proj"},
        {"target_modules": ["v_proj", "o_proj"], "layers_to_transform": [1]},
        {"target_modules": ["v_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {
            "target_modules": ["q_proj", "k_proj", "v_proj"],
            "rank_pattern": {
                "q_proj": 5,
                "layers.1.self_attn.k_proj": 6,
                "^model.layers.0.self_attn.v_proj": 7,
            },
            "alpha_pattern": {"k_proj": 3, r".*\.1\..*v_proj": 2.5, "model.layers.0.self_attn.k_proj": 99},
            "use_rslora": True,
        },
        {"target_modules": ["gate_proj"], "fan_in_fan_out": True},
        {"target_modules": ["gate_proj"], "init_lora_weights": "orthogonal", "r": 6},
        {"target_modules": ["gate_proj"], "init_lora_weights": "mica"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_ranks_and_scales_are_those_of_peft(
    config: dict[str, Any], base_folder: Path, tmp_path: Path
) -> None:
    base = load_base(base_folder)
    sites = sites_of(base)
    peft.get_peft_model(base, peft.LoraConfig(**config)).save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(load_base(base_folder), tmp_path)

    spec = inspect_adapter(tmp_path, sites, max_lora_rank=64)

    expected = {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for name, layer in reloaded.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    assert {module.module: (module.rank, module.scale) for module in spec.modules} == expected


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["norm"]}, "modules_to_save names 'norm'"),
        ({"modules_to_save": ["lm_head", "input_layernorm"]}, "modules_to_save names 'input_layernorm'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
        ({"use_dora": True, "layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused_as_peft_saves_it(
    config: dict[str, Any], says: str, base_folder: Path, tmp_path: Path
) -> None:
    base = load_base(base_folder)
    sites = sites_of(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, peft.LoraConfig(**{"target_modules": ["q_proj"], **config}))
        model.save_pretrained(tmp_path)

    with pytest.raises(AdapterIncompatible, match=says):
        inspect_adapter(tmp_path, sites, max_lora_rank=64)


TABLE_CONFIGS: list[dict[str, Any]] = [
    {"use_dora": True, "target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_rslora": True},
    {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
    {"target_modules": r".*\.(q_proj|embed_tokens)", "ensure_weight_tying": True},
    {"target_modules": r".*(q_proj|embed_tokens)", "ensure_weight_tying": True},
    {"target_modules": r".*(q_proj|lm_head)", "ensure_weight_tying": True},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj", "embed_tokens"]},
    {"trainable_token_indices": [3, 1]},
    {"trainable_token_indices": [3, 1], "ensure_weight_tying": True},
    {"trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [3, 1]}},
    {"trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [1, 3]}},
    {"trainable_token_indices": {"lm_head": [3]}},
    {"trainable_token_indices": [5], "target_modules": ["q_proj", "lm_head"]},
]


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("config", TABLE_CONFIGS, ids=str)
def test_what_peft_saves_of_tables_is_accounted_for_to_the_last_tensor(
    config: dict[str, Any], is_tied: bool, base_folder: Path, tmp_path: Path
) -> None:
    shape = transformers.AutoConfig.from_pretrained(base_folder, tie_word_embeddings=is_tied)
    base = transformers.AutoModelForCausalLM.from_config(shape)
    sites = sites_of(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, peft.LoraConfig(**{"target_modules": ["q_proj"], **config}))
        model.save_pretrained(tmp_path)

    spec = inspect_adapter(tmp_path, sites, max_lora_rank=64)

    stored = set(load_file(tmp_path / "adapter_model.safetensors"))
    used = {module.a.key for module in spec.modules} | {module.b.key for module in spec.modules}
    used |= {module.magnitude.key for module in spec.modules if module.magnitude}
    used |= {table.tensor.key for table in spec.tables}
    assert used == stored


NAMES = st.sampled_from(
    [
        "q_proj",
        "proj",
        "self_attn.q_proj",
        "mlp.up_proj",
        "1.self_attn.k_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.10.mlp.down_proj",
        "lm_head",
        "embed_tokens",
        "",
    ]
)


@settings(max_examples=200, deadline=None)
@given(
    target=st.lists(NAMES, min_size=1, max_size=4),
    exclude=st.none() | st.lists(NAMES, max_size=2),
    layers=st.none() | st.integers(0, 12) | st.lists(st.integers(0, 12), max_size=3),
    pattern=st.none() | st.sampled_from(["layers", "lay.rs", "h", "model"]) | st.just(["h", "layers"]),
    saved=st.none() | st.lists(st.sampled_from(["lm_head", "embed_tokens", "model.embed_tokens"])),
)
def test_modules_are_chosen_as_peft_chooses_them(
    target: Any, exclude: Any, layers: Any, pattern: Any, saved: Any
) -> None:
    fields: dict[str, Any] = {
        "target_modules": target,
        "exclude_modules": exclude,
        "layers_to_transform": layers,
        "layers_pattern": pattern if layers not in (None, []) else None,
        "modules_to_save": saved,
    }
    theirs = peft.LoraConfig(**fields)

    ours = set(select(parse_config(peft_config(**fields)), SITES).lora)

    results = {name: check_target_module_exists(theirs, name) for name in SITES}
    assert ours == {
        name for name, result in results.items() if result and not isinstance(result, _ExcludedModule)
    }


PATTERN_KEYS = NAMES.filter(bool) | st.sampled_from(
    ["^model.layers.2.mlp.up_proj", "^q_proj", "_proj", "layers.1"]
)


@settings(max_examples=200, deadline=None)
@given(pattern=st.dictionaries(PATTERN_KEYS, st.integers(1, 9), max_size=4))
def test_patterns_match_as_peft_matches_them(pattern: dict[str, int]) -> None:
    modules = list(SITES)

    ours = by_pattern("rank_pattern", pattern, 42, modules)

    assert ours == [pattern.get(get_pattern_key(list(pattern), name), 42) for name in modules]


@pytest.mark.parametrize(
    "key",
    [
        r".*\.[02]\..*",
        "(q|k)_proj",
        "q_proj|up_proj",
        "q_proj)|(up_proj",
        r"mlp\.\w+",
        "[qk]_proj",
        r"layers\.\d\..*",
    ],
)
def test_regular_expressions_match_as_peft_matches_them(key: str) -> None:
    modules = list(SITES)
    pattern = {key: 1, "q_proj": 2}

    ours = by_pattern("rank_pattern", pattern, 42, modules)

    assert ours == [pattern.get(get_pattern_key(list(pattern), name), 42) for name in modules]
