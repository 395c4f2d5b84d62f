"""KV blocks that come next are made resident while the engine is idle."""

from __future__ import annotations

from pathlib import Path

from loramux.engine.model_runner import PAGED_AT_ONCE, PAGED_STEPS
from tests.engine.test_adapter_residency import alone, start
from tests.tiny_models import make_tiny

PROMPT = [7, *range(1, 60)]


def test_what_is_cached_is_not_touched(tmp_path: Path) -> None:
    engine = start(make_tiny("llama", tmp_path / "model"), enable_lora=False)
    first = alone(engine, PROMPT, None)

    pieces = 0
    while engine.page_ahead():
        pieces += 1
    again = alone(engine, PROMPT, None)
    hits = engine.stats().prefix_cache_hits
    engine.close()

    assert pieces > 0
    assert hits == 48  # the prompt's whole blocks but the last
    assert again == first


def test_it_keeps_a_distance_and_ends_with_the_pool(tmp_path: Path) -> None:
    options = {"enable_lora": False, "enable_prefix_caching": False, "max_num_batched_tokens": 128}
    engine = start(make_tiny("llama", tmp_path / "model"), num_kv_blocks=32, max_model_len=512, **options)
    ahead = PAGED_STEPS * 128 // 16

    idle = [engine.page_ahead() for _ in range(ahead // PAGED_AT_ONCE + 1)]
    alone(engine, PROMPT * 5, None)  # 300 tokens and 24 of output: blocks 0 to 20
    used = [engine.page_ahead() for _ in range(3)]
    engine.close()

    assert idle == [True] * (ahead // PAGED_AT_ONCE) + [False]
    assert used == [True, True, False]  # blocks 21 to 31
