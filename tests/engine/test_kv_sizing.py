"""How many KV blocks fit, and what is said where too few do."""

from __future__ import annotations

from typing import Any

import pytest

from loramux.engine.errors import InvalidConfig
from loramux.engine.kv_sizing import GIB, KvDemand, KvPlan, MemoryBudget, budget_of_gpu, plan_kv_cache

BLOCK = 2 << 20  # Llama-3.1-8B in bfloat16: 2 * 32 layers * 8 heads * 128 * 16 tokens * 2 bytes


def demand(**changes: Any) -> KvDemand:
    fields = {
        "block_bytes": BLOCK,
        "block_size": 16,
        "max_num_seqs": 128,
        "max_model_len": 131072,
        "may_shorten": False,
    }
    return KvDemand(**(fields | changes))


def h200(**changes: Any) -> MemoryBudget:
    fields: dict[str, Any] = {
        "outside": GIB,
        "allocated": 20 * GIB,
        "parts": [("adapter lanes", 5 * GIB), ("nothing", 0)],
        "reserves": [("the largest step", 2 * GIB), ("CUDA graphs", GIB)],
    }
    return budget_of_gpu(140 * GIB, 0.9, **(fields | changes))


def test_a_gpu_gives_what_everything_else_leaves() -> None:
    budget = h200()

    assert budget.left == (126 - 20 - 2 - 1 - 1) * GIB
    assert str(budget) == (
        "140.00 GiB * 0.9 (--gpu-memory-utilization) - 15.00 GiB weights - 5.00 GiB adapter lanes "
        "- 2.00 GiB the largest step - 1.00 GiB CUDA graphs - 1.00 GiB outside the engine = 102.00 GiB"
    )
    assert plan_kv_cache(budget, demand()) == KvPlan(102 * GIB // BLOCK, 131072)


def test_half_the_bytes_a_block_are_twice_the_blocks() -> None:
    plan = plan_kv_cache(h200(), demand(block_bytes=BLOCK // 2))

    assert plan.num_blocks == 102 * GIB // (BLOCK // 2)


def test_no_more_blocks_than_can_be_used() -> None:
    plan = plan_kv_cache(h200(), demand(max_num_seqs=3, max_model_len=160))

    assert plan.num_blocks == (3 + 1) * 10


def test_too_little_memory_is_refused_with_the_calculation() -> None:
    with pytest.raises(InvalidConfig) as caught:
        plan_kv_cache(h200(allocated=114 * GIB), demand())

    assert caught.value.param == "--max-model-len"
    assert caught.value.message == (
        "one sequence of --max-model-len 131072 tokens needs 8192 KV blocks of 2097152 bytes, 16.00 GiB, but "
        "4096 fit: 140.00 GiB * 0.9 (--gpu-memory-utilization) - 109.00 GiB weights - 5.00 GiB adapter lanes "
        "- 2.00 GiB the largest step - 1.00 GiB CUDA graphs - 1.00 GiB outside the engine = 8.00 GiB; "
        "lower --max-model-len, --max-loras or --max-num-batched-tokens, or raise --gpu-memory-utilization"
    )


def test_a_length_that_nobody_asked_for_is_shortened() -> None:
    plan = plan_kv_cache(h200(allocated=114 * GIB), demand(may_shorten=True))

    assert plan == KvPlan(4096, 4096 * 16)


@pytest.mark.parametrize("may_shorten", [False, True])
def test_less_than_one_block_is_refused(may_shorten: bool) -> None:
    with pytest.raises(InvalidConfig, match=r"but 0 fit: .* = -2\.00 GiB"):
        plan_kv_cache(h200(allocated=124 * GIB), demand(may_shorten=may_shorten))


def test_blocks_may_be_counted_out_but_not_beyond_a_gpu_s_memory() -> None:
    assert plan_kv_cache(h200(), demand(num_blocks=9000)) == KvPlan(9000, 131072)

    with pytest.raises(InvalidConfig, match=r"--num-gpu-blocks-override 60000 needs 117\.19 GiB, but 52224"):
        plan_kv_cache(h200(), demand(num_blocks=60000))


def test_on_a_cpu_the_flag_is_the_limit() -> None:
    budget = MemoryBudget(limit=GIB, origin="--kv-cache-bytes")

    assert plan_kv_cache(budget, demand(max_model_len=8192)) == KvPlan(512, 8192)
    assert plan_kv_cache(budget, demand(num_blocks=10000)) == KvPlan(10000, 131072)
    with pytest.raises(InvalidConfig, match=r"but 512 fit: .*; lower --max-model-len or raise --kv-"):
        plan_kv_cache(budget, demand())
    with pytest.raises(InvalidConfig, match="or raise --num-gpu-blocks-override"):
        plan_kv_cache(budget, demand(num_blocks=100))
