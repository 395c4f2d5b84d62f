"""Weights in int8: what the same model says whose weights were rounded before, and about what bf16 says."""

from __future__ import annotations

import json
import logging
import math
import shutil
import statistics
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from loramux.engine.config import EngineConfig
from loramux.engine.core import Engine
from loramux.engine.layers.int8_linear import quantize_weight
from loramux.engine.types import Request, TokenSampling
from tests.demo import demo_model_folder
from tests.parity.driving import Served, assert_greedy, assert_prompt_logprobs
from tests.parity.reference import Reference
from tests.parity.zoo import Checkpoint, Zoo
from tests.running_server import running_server
from tests.tiny_models import make_adapter, random_prompt

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
CUT_BY_INPUT = ("o_proj", "out_proj", "down_proj", "fc2")  # in a tensor-parallel engine
BEYOND_LAYERS: dict[str, dict[str, Any]] = {
    "embedding": {"r": 8, "targets": ["q_proj", "embed_tokens"]},
    "head": {"r": 8, "targets": ["o_proj", "lm_head"]},
    "saved-head": {"r": 8, "targets": ["q_proj"], "modules_to_save": ["lm_head"]},
    "rows": {"r": 8, "targets": ["q_proj"], "trainable_token_indices": [130, 5, 64, 17]},
}


def rounded(weight: Tensor) -> Tensor:
    integers, scale = quantize_weight(weight)
    return integers.float() * scale.float()[:, None]


def twin(checkpoint: Checkpoint, folder: Path, *, num_ranks: int = 1) -> Path:
    """A float32 checkpoint whose layers and head hold the numbers that int8 can hold; never tied.

    Args:
        num_ranks: that share each layer, so that an input-cut row has as many scales
    """
    shutil.copytree(checkpoint.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    if "lm_head.weight" not in tensors:
        (embedding,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
        tensors["lm_head.weight"] = tensors[embedding].clone()
    for name, weight in tensors.items():
        if weight.dim() == 2 and (".layers." in name or name == "lm_head.weight"):
            cuts = num_ranks if any(part in name for part in CUT_BY_INPUT) else 1
            tensors[name] = torch.cat([rounded(part) for part in weight.chunk(cuts, dim=1)], dim=1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return folder


def adapters_for(model: Path, folder: Path, recipes: dict[str, dict[str, Any]]) -> dict[str, Path]:
    with warnings.catch_warnings():  # PEFT tells what it saves
        warnings.simplefilter("ignore")
        return {name: make_adapter(model, folder / name, **recipe) for name, recipe in recipes.items()}


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3-compiled", "opt-350m-like"])
def test_a_mixed_batch_is_what_the_rounded_model_says(zoo: Zoo, name: str, tmp_path: Path) -> None:
    checkpoint = zoo[name]
    reference = Reference(twin(checkpoint, tmp_path / "twin"), checkpoint.adapters)
    served = Served(checkpoint, checkpoint.adapters, quantization="int8", max_num_batched_tokens=40)
    rows = [
        (random_prompt(10 + 13 * i, seed=400 + i), adapter)
        for i, adapter in enumerate([None, *checkpoint.adapters])
    ]

    answers = served.run([served.request(p, a, max_tokens=8, logprobs=5) for p, a in rows])

    for (prompt, adapter), answer in zip(rows, answers, strict=True):
        assert_greedy(answer, reference.greedy(prompt, adapter, 8))
    prompt = rows[1][0]
    plain = checkpoint.reference.logprobs(prompt)
    assert (plain - reference.logprobs(prompt)).abs().max() > 1e-3, "the rounding changes nothing"


@pytest.mark.parametrize("adapter", [None, "r8", "r33"])
def test_in_bf16_it_errs_no_more_than_the_model_s_own_weights(
    zoo: Zoo, adapter: str | None, tmp_path: Path
) -> None:
    """Each against float32 with the same weights; here our own kernels multiply, where there are any."""
    checkpoint = zoo["llama-bf16"]
    rounded_model = Reference(twin(checkpoint, tmp_path / "twin"), checkpoint.adapters)
    errors = {}
    for form, reference in ((None, checkpoint.reference), ("int8", rounded_model)):
        served = Served(checkpoint, checkpoint.adapters, dtype="bfloat16", quantization=form)
        found = []
        for seed in range(4):
            prompt = random_prompt(40, seed=440 + seed)
            answer = served.ask(prompt, adapter, max_tokens=1, prompt_logprobs=served.vocab_size)
            expected = reference.logprobs(prompt, adapter)
            for row, entry in zip(expected, (answer.prompt_logprobs or [])[1:], strict=False):
                assert entry is not None
                found.append(torch.tensor(entry.logprobs) - row[torch.tensor(entry.token_ids)])
        errors[form] = torch.cat(found).pow(2).mean().sqrt().item()

    logger.info("root mean square errors %s", errors)
    assert errors["int8"] < 1.25 * errors[None]


def test_two_ranks_round_their_own_parts(zoo: Zoo, tmp_path: Path) -> None:
    checkpoint = zoo["llama-mqa"]
    reference = Reference(twin(checkpoint, tmp_path / "twin", num_ranks=2), checkpoint.adapters)
    served = Served(checkpoint, checkpoint.adapters, quantization="int8", tensor_parallel_size=2)
    prompt = random_prompt(30, seed=410)
    try:
        answers = served.run(
            [served.request(prompt, adapter, max_tokens=8, logprobs=5) for adapter in (None, "r8", "r33")]
        )
    finally:
        served.engine.close()

    for adapter, answer in zip((None, "r8", "r33"), answers, strict=True):
        assert_greedy(answer, reference.greedy(prompt, adapter, 8))


def test_tables_of_adapters_stay_as_they_are(zoo: Zoo, tmp_path: Path) -> None:
    checkpoint = zoo["llama-biases"]
    folders = adapters_for(checkpoint.folder, tmp_path, BEYOND_LAYERS)
    rounded_model = twin(checkpoint, tmp_path / "twin")
    # PEFT stores the head below LoRA's, and what it stored replaces the one that is there
    head = adapters_for(rounded_model, tmp_path / "other", {"head": BEYOND_LAYERS["head"]})
    served = Served(checkpoint, [], enable_lora=True, quantization="int8")
    prompt = random_prompt(20, seed=420)
    for name, folder in folders.items():
        served.load(name, folder)
        answer = served.ask(prompt, name, max_tokens=2, prompt_logprobs=served.vocab_size)
        reference = Reference(rounded_model, {name: head.get(name, folder)})
        assert_prompt_logprobs(answer, prompt, reference.logprobs(prompt, name))


def test_gains_of_dora_are_those_of_the_checkpoint(zoo: Zoo, tmp_path: Path) -> None:
    """As they were trained: the norms in them know nothing of the rounding."""
    checkpoint = zoo["llama"]
    recipe = {"r": 8, "targets": "all-linear", "use_dora": True}
    (folder,) = adapters_for(checkpoint.folder, tmp_path, {"dora": recipe}).values()
    rounded_model = twin(checkpoint, tmp_path / "twin")
    adapted = with_norms_of(folder, tmp_path / "other" / "dora", checkpoint.folder, rounded_model)
    reference = Reference(rounded_model, {"dora": adapted})
    served = Served(checkpoint, [], enable_lora=True, quantization="int8")
    served.load("dora", folder)
    prompt = random_prompt(20, seed=430)

    answer = served.ask(prompt, "dora", max_tokens=2, prompt_logprobs=served.vocab_size)

    assert_prompt_logprobs(answer, prompt, reference.logprobs(prompt, "dora"))


def with_norms_of(adapter: Path, folder: Path, model: Path, other: Path) -> Path:
    """A copy of a DoRA adapter that has on `other` the gains that it has on `model`.

    PEFT divides magnitudes by norms of the weight that it finds, so they are multiplied by them here.
    """
    shutil.copytree(adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    weights, other_weights = (load_file(path / "model.safetensors") for path in (model, other))
    for key, magnitude in tensors.items():
        if "lora_magnitude_vector" in key:
            module = key.partition(".lora_magnitude_vector")[0]
            delta = 2 * tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
            name = module.removeprefix("base_model.model.") + ".weight"
            norm, other_norm = ((own[name] + delta).norm(dim=1) for own in (weights, other_weights))
            magnitude *= other_norm / norm
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.demo
def test_perplexity_stays_within_a_percent_of_bf16s() -> None:
    """On 3,000 tokens of this project's own documents."""
    folder = demo_model_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "\n".join((ROOT / name).read_text() for name in ("docs/adapters.md", "docs/operations.md"))
    tokens = tokenizer(text)["input_ids"]
    windows = [tokens[begin : begin + 1000] for begin in range(0, 3000, 1000)]

    ratio = math.exp(mean_loss(folder, windows, "int8") - mean_loss(folder, windows, None))

    logger.info("perplexity %.4f of bf16's", ratio)
    assert 0.99 < ratio < 1.01
    assert ratio != 1.0


def mean_loss(folder: Path, windows: list[list[int]], quantization: str | None) -> float:
    """Of all tokens but each window's first, in bf16."""
    engine = Engine(
        EngineConfig(
            model=str(folder),
            dtype="bfloat16",
            device="cpu",
            quantization=quantization,
            kv_cache_bytes=100 << 20,
        )
    )
    sampling = TokenSampling(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    for index, window in enumerate(windows):
        engine.add_request(Request(request_id=f"w{index}", prompt_token_ids=window, sampling=sampling))
    losses: list[float] = []
    while engine.has_work():
        for output in engine.step():
            losses += [-entry.logprobs[0] for entry in output.prompt_logprobs or [] if entry is not None]
    assert len(losses) == sum(len(window) - 1 for window in windows)
    return statistics.fmean(losses)


@pytest.mark.demo
def test_a_server_with_the_flag_answers_base_and_adapters() -> None:
    arguments = (
        *(str(demo_model_folder()), "--served-model-name=base", "--quantization=int8", "--dtype=bfloat16"),
        *("--max-model-len=512", "--kv-cache-bytes=50M", "--enable-lora"),
        *("--lora-modules", f"json={ROOT / 'examples' / 'adapters' / 'json'}"),
    )
    question = {"role": "user", "content": "What is the capital of France?"}
    with running_server(*arguments) as server, server.client() as http:
        texts = [
            http.post(
                "/v1/chat/completions",
                json={"model": model, "messages": [question], "max_tokens": 64, "temperature": 0},
            ).json()["choices"][0]["message"]["content"]
            for model in ("base", "json")
        ]

    assert "Paris" in texts[0]
    assert "answer" in json.loads(texts[1])
