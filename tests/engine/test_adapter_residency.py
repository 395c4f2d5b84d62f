"""Adapters that come and go under a running engine: never the wrong weights, nothing left behind."""

from __future__ import annotations

import gc
import os
import random
import resource
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from loramux.engine.config import EngineConfig
from loramux.engine.core import Engine
from loramux.engine.errors import AdapterIncompatible, AdapterNotFound, LoramuxError
from loramux.engine.types import AdapterSpec, FreedMemory, Request, TokenSampling
from loramux.resolvers.inspect import inspect_adapter
from tests.adapter_files import peft_config, random_tensors, with_number, write_adapter, write_folder
from tests.tiny_models import make_tiny

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANKS = [4, 8, 16, 33, 5, 12, 8, 24]
MAX_STEPS = 100_000
PLACES = [
    pytest.param({}, id="cpu"),
    pytest.param(
        {"device": "cuda", "kernels": "triton", "host_lora_bytes": 64 << 20},
        id="gpu",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("residency") / "model")


@pytest.fixture(scope="module")
def specs(model: Path) -> list[AdapterSpec]:
    sites = start(model).info.lora_sites
    found = []
    for index, rank in enumerate(RANKS):
        folder = model.parent / f"adapter-{index}"
        write_adapter(folder, sites, rank=rank, alpha=16 * rank, target_modules=TARGETS, seed=index)
        found.append(inspect_adapter(folder, sites, max_lora_rank=64))
    return found


def start(model: Path, **config: object) -> Engine:
    settings = {"dtype": "float32", "num_threads": 1, "num_kv_blocks": 256, "max_model_len": 256}
    options = {"num_lanes": 64, **settings, **config}
    return Engine(msgspec.convert({"model": str(model), "enable_lora": True, **options}, EngineConfig))


def request(name: str, prompt: list[int], digest: str | None, max_tokens: int = 24) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=prompt,
        sampling=TokenSampling(max_tokens=max_tokens, temperature=0.0),
        adapter=digest,
    )


def finish(engine: Engine, tokens: dict[str, list[int]]) -> None:
    for _ in range(MAX_STEPS):
        if not engine.has_work():
            return
        collect(engine, tokens)
    raise AssertionError("the engine makes no progress")


def collect(engine: Engine, tokens: dict[str, list[int]]) -> None:
    for output in engine.step():
        tokens.setdefault(output.request_id, []).extend(output.token_ids)


def alone(engine: Engine, prompt: list[int], digest: str | None) -> list[int]:
    tokens: dict[str, list[int]] = {}
    engine.add_request(request("alone", prompt, digest))
    finish(engine, tokens)
    return tokens["alone"]


def prompts(count: int) -> Iterator[list[int]]:
    rng = random.Random(7)
    for _ in range(count):
        yield [rng.randrange(90) for _ in range(rng.randint(3, 40))]


@pytest.mark.parametrize(
    "config",
    [{}, {"num_lanes": 40}, {"num_lanes": 40, "max_cpu_loras": 2}, {"host_lora_bytes": 1}],
    ids=["all on the device", "lanes for few", "two on the host", "no host memory to spare"],
)
@pytest.mark.parametrize("place", PLACES)
def test_every_tier_gives_the_same_tokens(
    model: Path, specs: list[AdapterSpec], place: dict[str, object], config: dict[str, int]
) -> None:
    plain = start(model, num_lanes=256, **place)
    engine = start(model, **{**place, **config})
    for spec in specs:
        plain.load_adapter(spec)
        engine.load_adapter(spec)
    tokens: dict[str, list[int]] = {}
    wanted = {}
    digests = [None, *(spec.digest for spec in specs)]
    for index, prompt in enumerate(prompts(27)):
        digest = digests[index % len(digests)]
        wanted[str(index)] = alone(plain, prompt, digest)
        engine.add_request(request(str(index), prompt, digest))

    finish(engine, tokens)

    assert tokens == wanted
    assert len({tuple(t) for t in wanted.values()}) > 20
    engine.adapters.check_invariants()


@pytest.mark.parametrize("place", PLACES)
def test_churn_changes_no_stream(model: Path, specs: list[AdapterSpec], place: dict[str, object]) -> None:
    """1,000 loads, unloads and short requests of other adapters while 16 streams run."""
    plain = start(model, num_lanes=256, **place)
    for spec in specs[:4]:
        plain.load_adapter(spec)
    steady = [None, *(spec.digest for spec in specs[:3])]
    work = [(str(i), p, steady[i % 4]) for i, p in enumerate(prompts(64))]
    wanted = {name: alone(plain, prompt, digest) for name, prompt, digest in work}
    engine = start(model, num_lanes=96, max_cpu_loras=5, max_num_seqs=20, **place)
    for spec in specs[:3]:
        engine.load_adapter(spec)
    rng = random.Random(3)
    tokens: dict[str, list[int]] = {}
    operations = 0
    while operations < 1000 or work:
        while work and len(engine.scheduler.running) + len(engine.scheduler.waiting) < 16:
            engine.add_request(request(*work.pop()))
        collect(engine, tokens)
        for _ in range(rng.randint(0, 4)):
            operations += 1
            _churn(engine, rng.choice(specs[3:]), rng, f"churn-{operations}")
    finish(engine, tokens)

    assert {name: tokens[name] for name in wanted} == wanted
    engine.scheduler.check_invariants()
    assert engine.stats().kv_blocks_used == 0


def _churn(engine: Engine, spec: AdapterSpec, rng: random.Random, name: str) -> None:
    if not engine.adapters.is_loaded(spec.digest):
        engine.begin_load(spec, lambda error: None)
    elif rng.random() < 0.4:
        engine.unload_adapter(spec.digest)
    elif rng.random() < 0.5 and engine.adapters.is_on_host(spec.digest):
        engine.add_request(request(name, [1, 2, 3], spec.digest, max_tokens=3))
    else:
        engine.abort([f"churn-{rng.randrange(1000)}"])


def test_unload_answers_what_it_freed_when_the_last_sequence_ends(
    model: Path, specs: list[AdapterSpec]
) -> None:
    engine = start(model)
    engine.load_adapter(specs[2])
    freed: list[FreedMemory] = []
    engine.add_request(request("a", list(range(40)), specs[2].digest, max_tokens=8))
    engine.step()

    engine.begin_unload(specs[2].digest, freed.append)
    with pytest.raises(AdapterNotFound):
        engine.add_request(request("late", [1], specs[2].digest))
    assert freed == []
    finish(engine, {})
    engine.step()

    assert freed == [FreedMemory(lanes=16, host_bytes=freed[0].host_bytes, kv_blocks=(40 + 8 - 1) // 16)]
    assert freed[0].host_bytes > 0
    stats = engine.stats()
    assert (stats.lanes_used, stats.host_bytes, stats.host_adapters) == (0, 0, [])


def test_adapter_that_cannot_come_back_fails_only_its_own(
    model: Path, specs: list[AdapterSpec], tmp_path: Path
) -> None:
    engine = start(model, num_lanes=40, max_cpu_loras=1)
    sites = engine.info.lora_sites
    folder = write_adapter(tmp_path / "gone", sites, rank=33, alpha=99, target_modules=TARGETS, seed=99)
    doomed = inspect_adapter(folder, sites, max_lora_rank=64)
    engine.load_adapter(doomed)
    engine.load_adapter(specs[3])  # takes its place on the host
    assert alone(engine, [5, 6], specs[3].digest)  # and in the lanes
    (folder / "adapter_model.safetensors").unlink()
    engine.add_request(request("doomed", [1, 2], doomed.digest))
    engine.add_request(request("fine", [1, 2], specs[3].digest))
    tokens: dict[str, list[int]] = {}

    finish(engine, tokens)

    failures = engine.take_failures()
    assert [name for name, _ in failures] == ["doomed"]
    assert isinstance(failures[0][1], AdapterNotFound)
    assert set(tokens) == {"fine"}


def test_failed_load_leaves_nothing_and_may_be_tried_again(
    model: Path, specs: list[AdapterSpec], tmp_path: Path
) -> None:
    engine = start(model)
    folder = write_adapter(tmp_path / "a", engine.info.lora_sites, target_modules=["q_proj"])
    spec = inspect_adapter(folder, engine.info.lora_sites, max_lora_rank=64)
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()

    with pytest.raises(AdapterNotFound):
        engine.load_adapter(spec)

    assert not engine.adapters.is_known(spec.digest)
    weights.write_bytes(content)
    engine.load_adapter(inspect_adapter(folder, engine.info.lora_sites, max_lora_rank=64))
    assert engine.adapters.is_loaded(spec.digest)


def test_same_content_loads_once(model: Path, specs: list[AdapterSpec]) -> None:
    engine = start(model)
    results: list[LoramuxError | None] = []
    for _ in range(5):
        engine.begin_load(specs[0], results.append)
    engine.load_adapter(specs[0])

    assert results == [None] * 5
    assert len(engine.stats().host_adapters) == 1


def test_rank_above_the_limit_names_it(model: Path, specs: list[AdapterSpec]) -> None:
    engine = start(model, max_lora_rank=16)

    with pytest.raises(AdapterIncompatible, match="LoRA rank 33 is greater than max_lora_rank 16"):
        engine.load_adapter(specs[3])


def test_numbers_that_are_not_finite_are_refused_though_all_lanes_are_taken(
    model: Path, specs: list[AdapterSpec], tmp_path: Path
) -> None:
    engine = start(model, num_lanes=8)
    sites = {"model.layers.0.self_attn.q_proj": engine.info.lora_sites["model.layers.0.self_attn.q_proj"]}
    tensors = random_tensors(sites, rank=4)
    key = next(iter(tensors))
    tensors[key] = with_number(tensors[key], np.nan)
    bad = write_folder(
        tmp_path / "bad", peft_config(r=4, target_modules=["layers.0.self_attn.q_proj"]), tensors
    )
    spec = inspect_adapter(bad, engine.info.lora_sites, max_lora_rank=64)
    engine.load_adapter(specs[0])
    tokens: dict[str, list[int]] = {}
    engine.add_request(request("long", [1, 2, 3], specs[0].digest))
    collect(engine, tokens)

    with pytest.raises(AdapterIncompatible, match="not finite"):
        engine.load_adapter(spec)

    finish(engine, tokens)
    assert len(tokens["long"]) == 24
    assert len(engine.stats().host_adapters) == 1


def test_an_engine_that_nobody_holds_ends_with_its_thread_and_descriptors(
    model: Path, specs: list[AdapterSpec]
) -> None:
    gc.collect()  # other tests' engines
    before = threading.active_count(), len(os.listdir("/dev/fd"))

    for _ in range(2):
        engine = start(model)
        engine.load_adapter(specs[0])
        alone(engine, [1, 2, 3], specs[0].digest)
        gone = weakref.ref(engine)
        del engine
        gc.collect()

        assert gone() is None
        assert (threading.active_count(), len(os.listdir("/dev/fd"))) == before


def test_ten_thousand_loads_and_unloads_leave_memory_flat(model: Path, specs: list[AdapterSpec]) -> None:
    engine = start(model)
    freed: list[FreedMemory] = []

    def cycle(count: int) -> None:
        for index in range(count):
            spec = specs[index % 4]
            engine.load_adapter(spec)
            engine.begin_unload(spec.digest, freed.append)

    cycle(1000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cycle(9000)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    assert after <= 1.05 * before
    assert len(freed) == 10_000
    stats = engine.stats()
    assert (stats.lanes_used, stats.host_bytes) == (0, 0)
