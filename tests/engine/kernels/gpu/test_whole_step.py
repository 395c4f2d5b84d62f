"""Whole steps on the GPU's path against plain torch: launched, and as the graphs replay them.

On a machine without a GPU the kernels run under Triton's interpreter and a recorded step is run again;
everything else is the code that a GPU runs. The checkpoint is small because the interpreter is slow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from loramux.engine.errors import InvalidConfig
from loramux.engine.gpu_step import GpuSteps
from loramux.engine.kernels.attention import KVCache
from loramux.engine.kernels.gpu import attention_tiles
from tests.adapter_files import write_adapter
from tests.parity.driving import Answer, Served
from tests.parity.zoo import Checkpoint, make_checkpoint
from tests.tiny_models import random_prompt

NUM_ADAPTERS = 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LIMITS = {"num_kv_blocks": 64, "max_model_len": 96, "max_num_seqs": 8, "max_num_batched_tokens": 64}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what padding holds


@pytest.fixture(autouse=True)
def _small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs programs one by one: a device for few of them."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(attention_tiles, "NUM_SMS", 2)


@pytest.fixture(autouse=True)
def _nothing_starts_as_zero() -> Iterator[None]:
    """Fresh memory holds NaN: what padding computes from it must reach nobody."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint("llama", tmp_path_factory.mktemp("whole-step"))


@pytest.fixture(scope="module")
def serve(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Served]:
    folder = tmp_path_factory.mktemp("adapters")

    def serve(**config: Any) -> Served:
        served = Served(checkpoint, enable_lora=True, num_lanes=64, **{**LIMITS, **config})
        sites = served.engine.info.lora_sites
        for index in range(NUM_ADAPTERS):
            path = folder / f"a{index}"
            if not path.exists():
                rank = (4, 7, 8)[index % 3]
                write_adapter(path, sites, rank=rank, alpha=24 * rank, target_modules=TARGETS, seed=index)
            served.load(f"a{index}", path)
        return served

    return serve


def answers(served: Served, num_adapters: int) -> list[Answer]:
    """Prompts of several lengths that join each other in decode; base rows in every batch."""
    names = [None, *(f"a{i}" for i in range(num_adapters))]
    requests = [
        served.request(random_prompt(3 + 2 * i, seed=i), names[i % len(names)], max_tokens=3)
        for i in range(min(LIMITS["max_num_seqs"], num_adapters + 3))
    ]
    said = served.run(requests)
    served.engine.close()
    return said


@pytest.mark.parametrize(("num_adapters", "sizes"), [(0, [4]), (1, [2, 4]), (NUM_ADAPTERS, [8, 64])])
def test_replayed_and_overlapped_steps_say_what_plain_torch_says(
    serve: Callable[..., Served], num_adapters: int, sizes: list[int]
) -> None:
    expected = answers(serve(kernels="torch"), num_adapters)
    steps = {"cudagraph_capture_sizes": sizes, "async_scheduling": True}
    said = answers(serve(kernels="triton", **steps), num_adapters)

    assert [a.tokens for a in said] == [a.tokens for a in expected]


def test_launched_steps_say_what_plain_torch_says(serve: Callable[..., Served]) -> None:
    expected = answers(serve(kernels="torch"), 2)
    said = answers(serve(kernels="triton", enforce_eager=True), 2)

    assert [a.tokens for a in said] == [a.tokens for a in expected]


def test_the_largest_step_of_padding_writes_no_keys(serve: Callable[..., Served]) -> None:
    served = serve(kernels="triton", enforce_eager=True)
    steps = served.engine.runner._steps
    assert isinstance(steps, GpuSteps)
    caches = [KVCache(torch.zeros_like(cache.k), torch.zeros_like(cache.v)) for cache in steps._caches]
    steps.largest(caches)
    served.engine.close()

    assert not any(side.any() for cache in caches for side in (cache.k, cache.v))


def test_steps_that_the_kernels_cannot_address_are_refused(serve: Callable[..., Served]) -> None:
    with pytest.raises(InvalidConfig, match=r"--max-num-batched-tokens must be at most \d+ "):
        serve(kernels="triton", max_num_batched_tokens=1 << 26)


def test_adapters_differ_from_the_base_and_from_each_other(serve: Callable[..., Served]) -> None:
    served = serve(kernels="torch")
    prompt = random_prompt(9)
    said = served.run([served.request(prompt, name, max_tokens=6) for name in [None, *served.digests]])
    served.engine.close()

    assert len({tuple(answer.tokens) for answer in said}) == NUM_ADAPTERS + 1
