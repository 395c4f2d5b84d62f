"""Two processes that share each layer answer as one does, and as transformers and PEFT do."""

from __future__ import annotations

import os
import shutil
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramux.engine.errors import AdapterIncompatible, EngineDead, InvalidConfig
from loramux.engine.parallel.leader import LeadingRunner
from tests.parity.driving import Answer, Served, assert_greedy, assert_prompt_logprobs
from tests.parity.reference import Reference
from tests.parity.zoo import Checkpoint, Zoo
from tests.tiny_models import make_adapter, random_prompt

ADAPTERS = ["r4", "r8", "r16", "r33"]
MIXED: list[str | None] = [None, *ADAPTERS]
CHECKPOINTS = [
    "llama-mqa",  # one KV head on both ranks, a vocabulary that is odd
    "mistral-sliding",
    "qwen2",  # biases, tied
    "qwen3-compiled",  # norms of heads, tied; by the compiled kernels
    "opt-350m-like",  # biases, post-norm, a narrow embedding
]
Row = tuple[list[int], str | None]


def two_ranks(checkpoint: Checkpoint, adapters: list[str], **config: Any) -> Served:
    return Served(checkpoint, adapters, tensor_parallel_size=2, **config)


def crew_of(served: Served) -> list[int]:
    """Process ids of the other ranks."""
    assert isinstance(served.engine.runner, LeadingRunner)
    return served.engine.runner.other_pids


def mixed_rows(count: int) -> list[Row]:
    return [(random_prompt(10 + (17 * i) % 50, seed=200 + i), MIXED[i % len(MIXED)]) for i in range(count)]


def assert_rows(checkpoint: Checkpoint, rows: list[Row], answers: list[Answer], steps: int) -> None:
    for (prompt, adapter), answer in zip(rows, answers, strict=True):
        assert_greedy(answer, checkpoint.reference.greedy(prompt, adapter, steps))


@pytest.fixture(scope="module")
def llama(zoo: Zoo) -> Iterator[Served]:
    """Two ranks of the plain model, with too few blocks for everybody and prompts in chunks."""
    served = two_ranks(zoo["llama"], ADAPTERS, num_kv_blocks=24, max_model_len=200, max_num_batched_tokens=24)
    yield served
    served.engine.close()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_kind_of_model_answers_the_same(zoo: Zoo, name: str) -> None:
    checkpoint = zoo[name]
    served = two_ranks(checkpoint, ADAPTERS, max_num_batched_tokens=40)
    (pid,) = crew_of(served)
    rows = mixed_rows(6)

    try:
        for _ in range(2):  # the second time with cached prefixes
            answers = served.run([served.request(p, a, max_tokens=8, logprobs=5) for p, a in rows])
            assert_rows(checkpoint, rows, answers, 8)
    finally:
        served.engine.close()

    assert max(answer.num_cached_tokens for answer in answers) > 0
    with pytest.raises(ProcessLookupError):  # the other rank ended with the engine
        os.kill(pid, 0)


def test_preemption_and_chunks_change_nothing(llama: Served) -> None:
    rows = mixed_rows(10)
    before = llama.engine.stats().num_preemptions

    answers = llama.run([llama.request(p, a, max_tokens=32, logprobs=5) for p, a in rows])

    assert llama.engine.stats().num_preemptions > before
    assert_rows(llama.checkpoint, rows, answers, 32)


def test_prompt_logprobs_are_the_references(llama: Served) -> None:
    prompt = random_prompt(40, seed=11)

    for adapter in (None, "r8"):
        answer = llama.ask(prompt, adapter, max_tokens=2, prompt_logprobs=llama.vocab_size)
        assert_prompt_logprobs(answer, prompt, llama.checkpoint.reference.logprobs(prompt, adapter))


def test_sampled_tokens_are_those_of_one_rank(zoo: Zoo, llama: Served) -> None:
    alone = Served(zoo["llama"], ADAPTERS)
    prompt = random_prompt(20, seed=12)
    sampling = {"max_tokens": 24, "temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 7}

    said = [served.ask(prompt, "r33", **sampling).tokens for served in (alone, llama)]

    assert said[0] == said[1]


def test_adapters_come_and_go_while_others_are_answered(llama: Served, tmp_path: Path) -> None:
    """Lanes change hands under decoding sequences, and nobody gets another one's weights."""
    checkpoint = llama.checkpoint
    rows = mixed_rows(4)
    newcomers = {
        f"new{i}": make_adapter(
            checkpoint.folder, tmp_path / f"new{i}", r=8, targets=["q_proj", "down_proj"], seed=50 + i
        )
        for i in range(3)
    }
    reference = Reference(checkpoint.folder, newcomers)
    answers = {}
    for prompt, adapter in rows:
        request = llama.request(prompt, adapter, logprobs=5)
        answers[request.request_id] = Answer()
        llama.engine.add_request(request)
    for name, folder in newcomers.items():
        for _ in range(6):
            llama.step(answers)
        llama.load(name, folder)
        prompt = random_prompt(12, seed=13)
        request = llama.request(prompt, name, max_tokens=8, logprobs=5)
        llama.engine.add_request(request)
        answers[request.request_id] = answer = Answer()
        while answer.finish_reason is None:
            llama.step(answers)
        assert_greedy(answer, reference.greedy(prompt, name, 8))
        llama.engine.unload_adapter(llama.digests.pop(name))

    llama.drain(answers)

    assert_rows(checkpoint, rows, list(answers.values())[:4], 64)


def test_an_adapter_that_one_rank_refuses_is_refused_by_all(llama: Served, tmp_path: Path) -> None:
    """Only the second rank reads the input features that are not finite."""
    folder = shutil.copytree(llama.checkpoint.adapters["r16"], tmp_path / "broken")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if "down_proj" in key and "lora_A" in key)
    tensors[name][0, -1] = float("inf")
    save_file(tensors, path)

    with pytest.raises(AdapterIncompatible, match="not finite"):
        llama.load("broken", folder)

    assert "broken" not in llama.digests
    assert_rows(llama.checkpoint, [row := mixed_rows(4)[3]], [llama.ask(*row, max_tokens=8, logprobs=5)], 8)


BEYOND_LANES: dict[str, dict[str, Any]] = {
    "dora": {"r": 8, "targets": "all-linear", "use_dora": True},
    "embedding": {"r": 8, "targets": ["q_proj", "embed_tokens"]},
    "head": {"r": 8, "targets": ["o_proj", "lm_head"], "use_dora": True},
    "saved-head": {"r": 8, "targets": ["q_proj"], "modules_to_save": ["lm_head"]},
    "rows": {"r": 8, "targets": ["q_proj"], "trainable_token_indices": [130, 5, 64, 17]},
}


def test_what_lies_beside_the_lanes_counts_once(zoo: Zoo, tmp_path: Path) -> None:
    """DoRA on summed layers with biases; tables, which each rank or only the first holds whole."""
    checkpoint = zoo["llama-biases"]
    with warnings.catch_warnings():  # PEFT tells what it saves
        warnings.simplefilter("ignore")
        folders = {
            name: make_adapter(checkpoint.folder, tmp_path / name, **recipe)
            for name, recipe in BEYOND_LANES.items()
        }
    served = two_ranks(checkpoint, [], enable_lora=True)
    prompt = random_prompt(30, seed=3)
    try:
        for name, folder in folders.items():
            served.load(name, folder)
        answers = served.run(
            [served.request(prompt, name, max_tokens=16, logprobs=5) for name in (None, *folders)]
        )
    finally:
        served.engine.close()

    assert_greedy(answers[0], checkpoint.reference.greedy(prompt, steps=16))
    for (name, folder), answer in zip(folders.items(), answers[1:], strict=True):
        assert_greedy(answer, Reference(checkpoint.folder, {name: folder}).greedy(prompt, name, 16))


def test_a_rank_that_is_killed_ends_the_engine_and_the_other_processes(zoo: Zoo) -> None:
    served = two_ranks(zoo["llama"], ["r8"])
    served.engine.add_request(served.request(random_prompt(10), "r8"))
    served.engine.step()
    (pid,) = crew_of(served)

    os.kill(pid, signal.SIGKILL)

    with pytest.raises(EngineDead, match=rf"rank 1 .* \(process {pid}\) ended: signal SIGKILL"):
        served.engine.step()
    served.engine.close()


def test_a_model_that_cannot_be_divided_starts_nothing(zoo: Zoo) -> None:
    with pytest.raises(InvalidConfig, match=r"--tensor-parallel-size 3: the model's 4 attention heads"):
        Served(zoo["llama"], tensor_parallel_size=3)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ["llama", "qwen2", "opt-350m-like"])
def test_two_gpus_answer_the_same(zoo: Zoo, name: str) -> None:
    checkpoint = zoo[name]
    served = two_ranks(checkpoint, ADAPTERS, device="cuda", max_num_batched_tokens=40)
    rows = mixed_rows(6)
    try:
        answers = served.run([served.request(p, a, max_tokens=16, logprobs=5) for p, a in rows])
    finally:
        served.engine.close()

    assert_rows(checkpoint, rows, answers, 16)
