"""The committed example adapters: small, safe to open, different from each other, free of traces."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest

ADAPTERS = Path(__file__).resolve().parent.parent / "examples" / "adapters"
NAMES = ("json", "pirate", "sql")
MAX_BYTES = 2_000_000
# A path of the machine that trained it: absolute, in somebody's home, or relative to a checkout.
LOCAL_PATH = re.compile(r"(?<![\w.:/])(/|~/|\.\.?/)[\w.-]+")


def config(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((ADAPTERS / name / "adapter_config.json").read_text(encoding="utf-8"))
    return value


def header(name: str) -> dict[str, Any]:
    """The JSON header of the adapter's safetensors file: tensor name -> dtype, shape, offsets."""
    with (ADAPTERS / name / "adapter_model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        value: dict[str, Any] = json.loads(file.read(length))
    return value


@pytest.mark.parametrize("name", NAMES)
def test_folder_holds_a_config_and_safetensors_and_nothing_else(name: str) -> None:
    files = {path.name for path in (ADAPTERS / name).iterdir()}

    assert files == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("name", NAMES)
def test_adapter_is_small(name: str) -> None:
    size = sum(path.stat().st_size for path in (ADAPTERS / name).iterdir())

    assert size <= MAX_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_base_model_is_named_by_its_public_name(name: str) -> None:
    assert config(name)["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("name", NAMES)
def test_config_names_no_path_of_the_machine_that_trained_it(name: str) -> None:
    text = (ADAPTERS / name / "adapter_config.json").read_text(encoding="utf-8")

    assert LOCAL_PATH.search(text) is None


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_half_of_a_lora_pair_in_bf16(name: str) -> None:
    tensors = {key: value for key, value in header(name).items() if key != "__metadata__"}
    stems = {key.replace(".lora_B.", ".lora_A.") for key in tensors}

    assert all(re.search(r"\.(lora_A|lora_B)\.weight$", key) for key in tensors)
    assert len(tensors) == 2 * len(stems)
    assert {value["dtype"] for value in tensors.values()} == {"BF16"}


@pytest.mark.parametrize("name", NAMES)
def test_ranks_of_the_tensors_are_those_of_the_config(name: str) -> None:
    settings = config(name)
    pairs = {key: value["shape"][0] for key, value in header(name).items() if key.endswith(".lora_A.weight")}

    for key, rank in pairs.items():
        module = key.removesuffix(".lora_A.weight").rsplit(".", 1)[-1]
        assert rank == settings["rank_pattern"].get(module, settings["r"])


def test_ranks_and_targets_differ() -> None:
    ranks = {config(name)["r"] for name in NAMES}
    targets = {frozenset(config(name)["target_modules"]) for name in NAMES}

    assert len(ranks) == len(targets) == len(NAMES)


def test_exactly_one_uses_rslora() -> None:
    assert [name for name in NAMES if config(name)["use_rslora"]] == ["pirate"]


@pytest.mark.parametrize("name", NAMES)
def test_no_held_out_question_is_in_the_training_data(name: str) -> None:
    held_out = json.loads((ADAPTERS / "data" / "held_out.json").read_text(encoding="utf-8"))[name]
    lines = (ADAPTERS / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()

    assert not set(held_out) & {json.loads(line)["question"] for line in lines}


def test_every_json_answer_of_the_training_data_is_json() -> None:
    lines = (ADAPTERS / "data" / "json.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(json.loads(line)["answer"]) for line in lines]

    assert all(set(answer) == {"answer", "confidence"} for answer in answers)
