"""Every supported way to write a LoRA adapter gives what PEFT gives with the same folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parity.driving import Served, assert_greedy
from tests.parity.reference import Reference
from tests.parity.zoo import Checkpoint, Zoo
from tests.tiny_models import edit_adapter_config, make_adapter, random_prompt

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "rank-1": ("llama", {"r": 1, "targets": ["down_proj"]}),
    "rank-64": ("llama", {"r": 64, "targets": ["v_proj", "up_proj"]}),
    "all-linear": ("llama", {"r": 8, "targets": "all-linear"}),
    "regex": ("llama", {"r": 8, "targets": r".*\.layers\.1\.(self_attn\.q_proj|mlp\.down_proj)"}),
    "one-layer": ("llama", {"r": 8, "targets": ATTENTION, "layers_to_transform": [1]}),
    "float-alpha": ("llama", {"r": 8, "targets": ATTENTION, "alpha": 3.7}),
    "rslora": ("llama", {"r": 24, "targets": ATTENTION, "rslora": True, "alpha": 9}),
    "rank-pattern": (
        "llama",
        {
            "r": 8,
            "targets": [*ATTENTION, "gate_proj", "down_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 3, r".*\.mlp\.down_proj": 20},
        },
    ),
    "alpha-pattern": (
        "llama",
        {"r": 8, "targets": ATTENTION, "alpha_pattern": {"layers.1.self_attn.v_proj": 40, "o_proj": 1}},
    ),
    "patterns-with-rslora": (
        "llama",
        {
            "r": 8,
            "targets": ATTENTION,
            "rslora": True,
            "rank_pattern": {"k_proj": 12},
            "alpha_pattern": {"k_proj": 5, "v_proj": 2.5},
        },
    ),
    "bf16-tensors": ("llama", {"r": 8, "targets": ATTENTION, "dtype": "bfloat16"}),
    "fp16-tensors": ("llama", {"r": 8, "targets": ATTENTION, "dtype": "float16"}),
    "opt-all-linear": ("opt", {"r": 8, "targets": "all-linear"}),
    "opt-output-only": ("opt", {"r": 5, "targets": ["out_proj", "fc2"]}),
    "opt-one-layer": ("opt", {"r": 8, "targets": ["fc1", "k_proj"], "layers_to_transform": [0]}),
    "qwen3-qk-under-norm": ("qwen3", {"r": 8, "targets": ["q_proj", "k_proj"], "strength": 1.5}),
    "qwen2-over-biases": ("qwen2", {"r": 8, "targets": ["q_proj", "k_proj", "v_proj"]}),
}


def _check(checkpoint: Checkpoint, folder: Path) -> None:
    prompt = random_prompt(30, seed=3)
    reference = Reference(checkpoint.folder, {folder.name: folder})
    expected = reference.greedy(prompt, folder.name)
    served = Served(checkpoint, enable_lora=True)
    served.load("x", folder)

    answer = served.ask(prompt, "x", logprobs=served.vocab_size)

    assert expected.tokens != checkpoint.reference.greedy(prompt).tokens
    assert_greedy(answer, expected)


@pytest.mark.parametrize("form", FORMS)
def test_form_matches_peft(zoo: Zoo, tmp_path: Path, form: str) -> None:
    family, recipe = FORMS[form]
    checkpoint = zoo[family]

    _check(checkpoint, make_adapter(checkpoint.folder, tmp_path / "adapter", **recipe))


def test_fan_in_fan_out_is_ignored_on_linear_layers_as_in_peft(zoo: Zoo, tmp_path: Path) -> None:
    checkpoint = zoo["llama"]
    folder = make_adapter(checkpoint.folder, tmp_path / "adapter", r=8, targets=ATTENTION)

    _check(checkpoint, edit_adapter_config(folder, fan_in_fan_out=True))


def test_two_adapters_of_equal_shape_do_not_mix(zoo: Zoo, tmp_path: Path) -> None:
    checkpoint = zoo["llama"]
    folders = {
        name: make_adapter(checkpoint.folder, tmp_path / name, r=8, targets=ATTENTION, seed=seed)
        for seed, name in enumerate(("one", "two"))
    }
    reference = Reference(checkpoint.folder, folders)
    served = Served(checkpoint, enable_lora=True)
    prompt = random_prompt(30, seed=3)
    for name, folder in folders.items():
        served.load(name, folder)

    answers = served.run([served.request(prompt, name) for name in folders])

    assert answers[0].tokens != answers[1].tokens
    for name, answer in zip(folders, answers, strict=True):
        assert_greedy(answer, reference.greedy(prompt, name))
