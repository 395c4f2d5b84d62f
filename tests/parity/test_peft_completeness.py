"""What adapters change beyond plain LoRA gives what PEFT gives: DoRA, embeddings, heads, rows.

Each feature alone, and all of them in one batch with base and plain rows, under chunked prefill, with
the prefix cache, while lanes are too few for them.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramux.engine.errors import AdapterIncompatible
from tests.parity.driving import Answer, Served, assert_greedy, assert_prompt_logprobs
from tests.parity.reference import Greedy, Reference
from tests.parity.zoo import Checkpoint, Zoo
from tests.tiny_models import make_adapter, random_prompt

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
OPT_ALL = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
Recipe = tuple[str, dict[str, Any]]

DORA: dict[str, Recipe] = {
    "dora": ("llama", {"r": 8, "targets": [*ATTENTION, "down_proj"], "use_dora": True}),
    "dora-all-linear": ("qwen3", {"r": 4, "targets": "all-linear", "use_dora": True}),
    "dora-part-of-a-site": ("llama", {"r": 8, "targets": ["k_proj", "up_proj"], "use_dora": True}),
    "dora-rslora-rank-pattern": (
        "llama",
        {
            "r": 8,
            "targets": [*ATTENTION, "up_proj"],
            "use_dora": True,
            "rslora": True,
            "alpha": 9,
            "rank_pattern": {"k_proj": 3, "layers.1.self_attn.q_proj": 20},
            "alpha_pattern": {"v_proj": 5},
        },
    ),
    "dora-over-biases": ("llama-biases", {"r": 8, "targets": "all-linear", "use_dora": True}),
    "dora-opt": ("opt", {"r": 8, "targets": OPT_ALL, "use_dora": True}),
    "dora-embedding": ("llama", {"r": 8, "targets": ["v_proj", "embed_tokens"], "use_dora": True}),
    "dora-head": ("llama", {"r": 8, "targets": ["v_proj", "lm_head"], "use_dora": True}),
    "dora-tied": (
        "qwen3",
        {"r": 8, "targets": ["v_proj", "embed_tokens"], "use_dora": True, "ensure_weight_tying": True},
    ),
}
TABLES: dict[str, Recipe] = {
    "embedding": ("llama", {"r": 8, "targets": ["q_proj", "embed_tokens"]}),
    "embedding-only": ("llama", {"r": 3, "targets": ["embed_tokens"], "rslora": True}),
    "embedding-before-projection": ("opt-350m-like", {"r": 8, "targets": ["q_proj", "embed_tokens"]}),
    "embedding-tied-base": ("qwen2", {"r": 8, "targets": ["q_proj", "embed_tokens"]}),
    "head": ("llama", {"r": 8, "targets": ["q_proj", "lm_head"], "rank_pattern": {"lm_head": 17}}),
    "head-only": ("opt-350m-like", {"r": 8, "targets": ["lm_head"]}),
    "head-tied-base": ("qwen2", {"r": 8, "targets": ["q_proj", "lm_head"]}),
    "both": ("opt", {"r": 8, "targets": ["q_proj", "embed_tokens", "lm_head"]}),
    "both-tied": ("qwen3", {"r": 8, "targets": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "regex": ("llama", {"r": 8, "seed": 2, "targets": r".*\.(v_proj|embed_tokens)"}),
    "save-embedding": ("llama", {"r": 8, "targets": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "save-head": ("llama", {"r": 8, "targets": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "save-both": ("opt", {"r": 8, "targets": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "save-embedding-tied-base": (
        "qwen2",
        {"r": 8, "targets": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "save-head-tied-base": ("qwen2", {"r": 8, "targets": "all-linear", "modules_to_save": ["lm_head"]}),
    "save-tied": (
        "qwen3",
        {"r": 8, "targets": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "save-embedding-before-projection": (
        "opt-350m-like",
        {"r": 8, "targets": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "dora-and-saved-head": (
        "llama",
        {"r": 8, "targets": ["q_proj"], "use_dora": True, "modules_to_save": ["lm_head"]},
    ),
    "rows": ("llama", {"r": 8, "targets": ["q_proj"], "trainable_token_indices": [130, 5, 64, 17]}),
    "rows-tied-base": ("qwen3", {"r": 8, "targets": ["q_proj"], "trainable_token_indices": [*range(3, 60)]}),
    "rows-tied-in-name-only": (
        "llama-tied-in-name-only",
        {"r": 8, "targets": ["q_proj"], "trainable_token_indices": [*range(3, 60)]},
    ),
    "dora-head-tied-in-name-only": (
        "llama-tied-in-name-only",
        {"r": 8, "targets": ["q_proj", "lm_head"], "use_dora": True},
    ),
    "rows-of-the-head": (
        "llama",
        {"r": 8, "targets": ["q_proj"], "trainable_token_indices": {"lm_head": list(range(40, 3, -2))}},
    ),
    "rows-that-differ": (
        "qwen2",
        {
            "r": 8,
            "targets": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": list(range(3, 50)), "lm_head": [7, 6, 99]},
        },
    ),
    "rows-and-head": (
        "qwen2",
        {"r": 8, "targets": ["q_proj", "lm_head"], "trainable_token_indices": [5, 9, 30]},
    ),
}  # fmt: skip
FEATURES = {**DORA, **TABLES}


def make(checkpoint: Checkpoint, folder: Path, recipe: dict[str, Any]) -> Path:
    """Write the adapter; PEFT warns about tied heads and about saving embeddings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_adapter(checkpoint.folder, folder, **recipe)


def expect(checkpoint: Checkpoint, folder: Path, prompt: list[int], steps: int = 64) -> Greedy:
    """What PEFT says with this adapter alone on a fresh base model."""
    return Reference(checkpoint.folder, {folder.name: folder}).greedy(prompt, folder.name, steps)


@pytest.mark.parametrize("feature", FEATURES)
def test_feature_matches_peft(zoo: Zoo, tmp_path: Path, feature: str) -> None:
    family, recipe = FEATURES[feature]
    checkpoint = zoo[family]
    folder = make(checkpoint, tmp_path / "adapter", recipe)
    prompt = random_prompt(30, seed=3)
    expected = expect(checkpoint, folder, prompt)
    served = Served(checkpoint, enable_lora=True, max_num_batched_tokens=16)
    served.load("x", folder)

    answer = served.ask(prompt, "x", logprobs=served.vocab_size)

    assert expected.tokens != checkpoint.reference.greedy(prompt).tokens
    assert_greedy(answer, expected)


MIXED: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "plain": {"r": 8, "targets": ATTENTION},
        "dora": {"r": 8, "targets": "all-linear", "use_dora": True},
        "embedding": {"r": 4, "targets": ["q_proj", "embed_tokens"]},
        "head": {"r": 4, "targets": ["v_proj", "lm_head"], "use_dora": True},
        "saved": {"r": 8, "targets": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        "rows": {"r": 8, "targets": ["q_proj"], "trainable_token_indices": list(range(3, 70))},
    },
    "qwen3": {
        "plain": {"r": 8, "targets": ATTENTION},
        "dora": {"r": 8, "targets": ["q_proj", "down_proj"], "use_dora": True, "rslora": True},
        "tied": {"r": 4, "targets": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        "saved": {"r": 8, "targets": ["q_proj"], "modules_to_save": ["lm_head"]},
        "rows": {"r": 8, "targets": ["q_proj", "lm_head"], "trainable_token_indices": [5, 9, 30, 64]},
    },
}


class Mixed:
    """All kinds of adapters on one base model, and what PEFT says with each of them alone."""

    def __init__(self, family: str, checkpoint: Checkpoint, root: Path) -> None:
        self.checkpoint = checkpoint
        self.folders = {
            name: make(checkpoint, root / name, {**recipe, "seed": seed})
            for seed, (name, recipe) in enumerate(MIXED[family].items())
        }
        self.names: list[str | None] = [None, *self.folders]
        shared = random_prompt(32, seed=11)  # two full blocks that only rows of one adapter may share
        self.prompts = {name: shared + random_prompt(3 + i, seed=i) for i, name in enumerate(self.names)}
        self.expected = {
            name: checkpoint.reference.greedy(self.prompts[None])
            if name is None
            else expect(checkpoint, self.folders[name], self.prompts[name])
            for name in self.names
        }

    def serve(self, **config: Any) -> Served:
        served = Served(self.checkpoint, enable_lora=True, max_num_batched_tokens=24, **config)
        for name, folder in self.folders.items():
            served.load(name, folder)
        return served

    def check(self, served: Served, copies: int = 2) -> list[int]:
        """Ask all at once, each `copies` times; returns how many tokens each found in the cache."""
        asked = [name for _ in range(copies) for name in self.names]
        answers = served.run(
            [served.request(self.prompts[name], name, logprobs=served.vocab_size) for name in asked]
        )
        for name, answer in zip(asked, answers, strict=True):
            assert_greedy(answer, self.expected[name])
        return [answer.num_cached_tokens for answer in answers]


@pytest.fixture(scope="module", params=MIXED)
def mixed(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Mixed:
    return Mixed(request.param, zoo[request.param], tmp_path_factory.mktemp(f"mixed-{request.param}"))


def test_all_kinds_in_one_batch_answer_as_alone(mixed: Mixed) -> None:
    served = mixed.serve()

    mixed.check(served)
    cached = mixed.check(served)

    assert all(count >= 32 for count in cached), "the second time every prompt is in the cache"


def test_all_kinds_survive_the_loss_of_their_lanes(mixed: Mixed) -> None:
    served = mixed.serve(num_lanes=16, max_lora_rank=16)  # two adapters at a time

    mixed.check(served)
    mixed.check(served)

    on_device = set(served.engine.stats().device_adapters)
    assert len(on_device) <= 2
    assert set(served.engine.runner.tables) <= on_device


def test_a_return_from_disk_reads_the_same_tables(mixed: Mixed) -> None:
    served = mixed.serve(num_lanes=16, max_lora_rank=16, max_cpu_loras=1)

    mixed.check(served, copies=1)

    assert served.engine.stats().host_evictions > 0


def test_streams_do_not_notice_tables_that_come_and_go(mixed: Mixed) -> None:
    served = mixed.serve(num_lanes=24, max_lora_rank=16)
    kept: list[str | None] = [None, "dora"]
    passing = [name for name in mixed.folders if name not in kept]
    requests = [served.request(mixed.prompts[name], name, logprobs=served.vocab_size) for name in kept]
    answers = {request.request_id: Answer() for request in requests}
    for request in requests:
        served.engine.add_request(request)

    for turn in range(200):
        if not served.engine.has_work():
            break
        passer = passing[turn % len(passing)]
        if served.engine.adapters.is_loaded(served.digests[passer]):
            served.engine.unload_adapter(served.digests[passer])
        else:
            served.engine.begin_load(served.spec(mixed.folders[passer]), lambda error: None)
        served.step(answers)

    for name, answer in zip(kept, answers.values(), strict=True):
        assert_greedy(answer, mixed.expected[name])


def test_unloading_frees_every_table(mixed: Mixed) -> None:
    served = mixed.serve()
    before = served.engine.stats()
    assert before.table_bytes > 0

    for digest in served.digests.values():
        served.engine.unload_adapter(digest)

    after = served.engine.stats()
    assert (after.table_bytes, after.host_bytes, after.lanes_used) == (0, 0, 0)


def test_adapters_without_tables_allocate_none(zoo: Zoo) -> None:
    served = Served(zoo["llama"], ["r4", "r8"])

    served.ask(random_prompt(10), "r8", max_tokens=4)

    assert served.engine.stats().table_bytes == 0
    assert served.engine.runner.tables == {}


def test_shards_and_files_of_trainers_do_not_change_the_answer(zoo: Zoo, tmp_path: Path) -> None:
    checkpoint = zoo["llama"]
    recipe = {"r": 8, "targets": ["q_proj", "embed_tokens"], "use_dora": True, "modules_to_save": ["lm_head"]}
    whole = make(checkpoint, tmp_path / "whole", recipe)
    shards = split_by_key(whole, tmp_path / "shards", num_shards=5)
    prompt = random_prompt(30, seed=3)
    served = Served(checkpoint, enable_lora=True)
    served.load("shards", shards)
    served.load("whole", whole)

    assert_greedy(served.ask(prompt, "shards", logprobs=20), expect(checkpoint, whole, prompt))
    assert served.digests["shards"] == served.digests["whole"]


def split_by_key(folder: Path, out: Path, *, num_shards: int) -> Path:
    """The same adapter with its tensors dealt out to shards, so that A and B of a module part."""
    tensors = load_file(folder / "adapter_model.safetensors")
    out.mkdir()
    (out / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    weight_map = {key: f"shard-{index % num_shards}.safetensors" for index, key in enumerate(tensors)}
    for name in set(weight_map.values()):
        save_file({key: tensors[key] for key in tensors if weight_map[key] == name}, out / name)
    index = {"metadata": {}, "weight_map": weight_map}
    (out / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    return out


def test_a_table_that_only_looks_like_a_copy_of_the_base_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    checkpoint = zoo["llama"]
    folder = make(checkpoint, tmp_path / "adapter", {"r": 8, "targets": ["q_proj", "embed_tokens"]})
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.base_layer.weight"][7, 3] += 0.01
    save_file(tensors, folder / "adapter_model.safetensors")
    served = Served(checkpoint, enable_lora=True)

    with pytest.raises(AdapterIncompatible, match=r"is not the base model's model\.embed_tokens"):
        served.load("x", folder)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_copy_in_the_dtype_of_training_is_still_a_copy(zoo: Zoo, tmp_path: Path, dtype: str) -> None:
    checkpoint = zoo["llama"]
    recipe = {"r": 8, "targets": ["q_proj", "embed_tokens"], "dtype": dtype}
    served = Served(checkpoint, enable_lora=True)

    served.load("x", make(checkpoint, tmp_path / "adapter", recipe))

    assert served.ask(random_prompt(5), "x", max_tokens=2).finish_reason == "length"


def test_dora_needs_the_checkpoint_that_the_engine_started_from(zoo: Zoo, tmp_path: Path) -> None:
    model = Path(shutil.copytree(zoo["llama"].folder, tmp_path / "model"))
    checkpoint = zoo["llama"]._replace(folder=model)
    served = Served(checkpoint, enable_lora=True)
    plain = make(checkpoint, tmp_path / "plain", {"r": 8, "targets": ["q_proj"]})
    dora = make(checkpoint, tmp_path / "dora", {"r": 8, "targets": ["q_proj"], "use_dora": True})
    os.utime(model / "model.safetensors", ns=(0, 0))

    served.load("plain", plain)
    with pytest.raises(AdapterIncompatible, match="the base model's files changed"):
        served.load("dora", dora)


def test_dora_in_bfloat16_stays_close_to_peft(zoo: Zoo, tmp_path: Path) -> None:
    checkpoint = zoo["llama"]
    recipe = {
        "r": 8,
        "targets": [*ATTENTION, "lm_head"],
        "use_dora": True,
        "modules_to_save": ["embed_tokens"],
    }
    folder = make(checkpoint, tmp_path / "adapter", recipe)
    prompt = random_prompt(30, seed=3)
    served = Served(checkpoint, enable_lora=True, dtype="bfloat16")
    served.load("x", folder)

    said = served.ask(prompt, "x", max_tokens=1, logprobs=served.vocab_size).logprobs[0]

    exact = expect(checkpoint, folder, prompt, steps=1).logprobs[0]
    base = checkpoint.reference.greedy(prompt).logprobs[0]
    values = torch.tensor(said.logprobs[1:])
    ids = torch.tensor(said.token_ids[1:])
    assert (values - exact[ids]).abs().mean() < 0.1 * (base[ids] - exact[ids]).abs().mean()


@pytest.mark.parametrize("feature", ["dora-head", "save-both", "rows-tied-base", "both-tied"])
def test_prompt_logprobs_come_from_the_adapters_own_tables(zoo: Zoo, tmp_path: Path, feature: str) -> None:
    family, recipe = FEATURES[feature]
    checkpoint = zoo[family]
    folder = make(checkpoint, tmp_path / "adapter", recipe)
    prompt = random_prompt(30, seed=3)
    rows = Reference(checkpoint.folder, {"adapter": folder}).logprobs(prompt, "adapter")
    served = Served(checkpoint, enable_lora=True, max_num_batched_tokens=16)
    served.load("x", folder)
    requests = [
        served.request(prompt, name, max_tokens=1, prompt_logprobs=5, salt=str(name)) for name in ("x", None)
    ]

    own, base = served.run(requests)

    assert_prompt_logprobs(own, prompt, rows)
    assert_prompt_logprobs(base, prompt, checkpoint.reference.logprobs(prompt))
