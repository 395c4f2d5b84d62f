"""Thirty-two sequences over eight adapters say token for token what each says alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramux.engine.types import Request
from tests.parity.driving import Served
from tests.parity.zoo import Zoo
from tests.tiny_models import make_adapter, random_prompt

RANKS = (4, 8, 8, 12, 16, 32, 33, 64)
TARGETS = (["q_proj", "v_proj"], "all-linear", ["down_proj", "o_proj"])


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_32_sequences_over_8_adapters_answer_as_alone(zoo: Zoo, tmp_path: Path, temperature: float) -> None:
    served = Served(zoo["llama"], enable_lora=True, max_num_batched_tokens=256)
    for index, rank in enumerate(RANKS):
        folder = make_adapter(
            served.checkpoint.folder, tmp_path / f"a{index}", r=rank, targets=TARGETS[index % 3], seed=index
        )
        served.load(f"a{index}", folder)
    prompts = [random_prompt(6 + index, seed=index // 8) for index in range(32)]  # with shared beginnings

    def requests() -> list[Request]:
        return [
            served.request(prompt, f"a{index % 8}", temperature=temperature, seed=index)
            for index, prompt in enumerate(prompts)
        ]

    alone = [served.run([request])[0].tokens for request in requests()]
    together = [answer.tokens for answer in served.run(requests())]

    assert together == alone
    assert len({tuple(tokens) for tokens in alone}) == 32
