"""Adapters as training programs leave them: the adapter lies in the folder itself, among much else.

Nothing but the config and the weights is opened, whatever else lies there, and checkpoints below the
folder are not searched.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loramux.engine.errors import AdapterIncompatible, AdapterNotFound
from loramux.engine.types import AdapterSpec
from loramux.resolvers.inspect import inspect_adapter
from tests.adapter_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Tensors,
    encode_values,
    llama_sites,
    peft_config,
    random_tensors,
    write_folder,
)

VOCABULARY = 32
SITES = llama_sites(vocabulary=VOCABULARY)
LINEAR = [name for name, site in SITES.items() if site.kind == "linear"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# As current versions write them: every field of LoraConfig, most of them off.
PEFT_0_18: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_dropout": 0.0,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_version": "0.18.0",
    "qalora_group_size": 16,
    "rank_pattern": {},
    "revision": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}
NAMES = "|".join(TARGETS)
UNSLOTH_REGEX = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    rf"(?:{NAMES}).*?)|(?:\bmodel\.layers\.[\d]{{1,}}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    rf"\.(?:(?:{NAMES})))"
)

TOKENIZER = ["added_tokens.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json"]
TOKENIZER += ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"]
TRAINING = ["optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin"]
DEEPSPEED = ["latest", "zero_to_fp32.py", "global_step100/mp_rank_00_model_states.pt"]

# Program -> what its config adds to PEFT's, and which files it leaves beside the adapter.
PROGRAMS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "Unsloth": (
        {
            "auto_mapping": {
                "base_model_class": "LlamaForCausalLM",
                "parent_library": "transformers.models.llama.modeling_llama",
                "unsloth_fixed": True,
            },
            "base_model_name_or_path": "unsloth/llama-3.2-1b-instruct-unsloth-bnb-4bit",
            "target_modules": UNSLOTH_REGEX,
            "task_type": None,
        },
        ["README.md", *TOKENIZER],
    ),
    "Unsloth, note in the config": (
        {"unsloth_fixed": True, "target_modules": TARGETS, "loftq_config": {}, "revision": "unsloth"},
        ["README.md", *TOKENIZER, *TRAINING],
    ),
    "LLaMA-Factory": (
        {"target_modules": TARGETS, "lora_dropout": 0.05, "modules_to_save": None},
        [
            "README.md",
            "all_results.json",
            "train_results.json",
            "trainer_log.jsonl",
            "training_loss.png",
            "checkpoint-500/adapter_config.json",
            "checkpoint-500/adapter_model.safetensors",
            *TOKENIZER,
            *TRAINING,
        ],
    ),
    "LLaMA-Factory, additional_target": (
        {"target_modules": TARGETS, "modules_to_save": ["embed_tokens", "lm_head"]},
        ["README.md", "llamaboard_config.yaml", "training_args.yaml", *TOKENIZER],
    ),
    "Axolotl": (
        {
            "target_modules": ["up_proj", "q_proj", "k_proj", "gate_proj", "down_proj", "v_proj", "o_proj"],
            "fan_in_fan_out": None,
            "lora_dropout": 0.05,
        },
        ["README.md", "config.json", "debug.log", "checkpoint-90/adapter_config.json", *TOKENIZER],
    ),
    "Axolotl, lora_modules_to_save": (
        {"target_modules": TARGETS, "fan_in_fan_out": None, "modules_to_save": ["embed_tokens", "lm_head"]},
        ["config.json", *TOKENIZER, *TRAINING, *DEEPSPEED],
    ),
    "a trainer's checkpoint": ({"target_modules": TARGETS}, [*TOKENIZER, *TRAINING, *DEEPSPEED]),
}

_opened: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], str):
        _opened.append(arguments[0])


sys.addaudithook(_note)


@contextlib.contextmanager
def opened_files() -> Iterator[list[str]]:
    """Every path that this process opens."""
    global _opened  # a hook cannot be removed, only be told to stop
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


def write(folder: Path, program: str) -> Path:
    """An adapter for every linear layer as `program` leaves it; the other files hold no sense."""
    changes, others = PROGRAMS[program]
    config = peft_config(**{**PEFT_0_18, **changes})
    tensors = random_tensors({name: SITES[name] for name in LINEAR})
    for name in config["modules_to_save"] or []:
        module = next(site for site in SITES if site.endswith(name))
        tensors.update(table(module))
    write_folder(folder, config, tensors)
    for other in others:
        path = folder / other
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\x80\x04not what it seems")
    return folder


def table(module: str, rows: int = VOCABULARY) -> Tensors:
    """A replaced embedding or head."""
    values = np.full(rows * 16, 0.5, dtype=np.float32)
    return {f"base_model.model.{module}.weight": ("BF16", (rows, 16), encode_values(values, "BF16"))}


def inspect(folder: Path) -> AdapterSpec:
    return inspect_adapter(folder, SITES, max_lora_rank=64)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_folder_of_a_training_program_is_served_as_it_is(program: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "out", program)

    with opened_files() as opened:
        spec = inspect(folder)

    assert {module.module for module in spec.modules} == set(LINEAR)
    saved = PROGRAMS[program][0].get("modules_to_save") or []
    assert {(table.module.rpartition(".")[2], table.kind) for table in spec.tables} == {
        (name, "full") for name in saved
    }
    inside = {os.path.relpath(path, folder) for path in opened if path.startswith(str(tmp_path))}
    assert inside == {CONFIG_FILE, WEIGHTS_FILE}


def test_checkpoints_below_the_folder_are_not_searched(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-500", "a trainer's checkpoint")
    (tmp_path / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": "checkpoint-500"}))

    with pytest.raises(AdapterNotFound, match=CONFIG_FILE):
        inspect(tmp_path)
    assert len(inspect(tmp_path / "checkpoint-500").modules) == len(LINEAR)


def test_added_tokens_of_the_base_are_not_taken_for_a_grown_vocabulary(tmp_path: Path) -> None:
    folder = write(tmp_path, "Unsloth")
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": VOCABULARY + 5}))

    assert inspect(folder).tables == []


def test_a_vocabulary_that_training_made_larger_is_refused_with_both_sizes(tmp_path: Path) -> None:
    folder = write(tmp_path, "LLaMA-Factory, additional_target")
    tensors = random_tensors({name: SITES[name] for name in LINEAR})
    grown = {**tensors, **table("model.embed_tokens", VOCABULARY + 8), **table("lm_head", VOCABULARY + 8)}
    config = json.loads((folder / CONFIG_FILE).read_text())
    write_folder(folder, config, grown)

    with pytest.raises(AdapterIncompatible, match="vocabulary of 40 tokens, the base model has 32"):
        inspect(folder)
