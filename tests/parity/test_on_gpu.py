"""A GPU's answers: as the reference's, with graphs as without, and while adapters come and go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from loramux.engine.cuda_graph import DECODE_SIZES, MIXED_SIZES
from tests.adapter_files import write_adapter
from tests.parity.driving import Answer, Served
from tests.parity.reference import Reference
from tests.parity.zoo import Zoo
from tests.tiny_models import FAMILIES, random_prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
ADAPTERS = ["r4", "r8", "r16", "r33"]
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}  # of log-probabilities; another adapter's differ by several
MAX_SEQS = 128
NUM_ADAPTERS = 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def on_gpu(zoo: Zoo, name: str, adapters: list[str], **config: Any) -> Served:
    return Served(zoo[name], adapters, device=DEVICE, num_kv_blocks=2048, **config)


def assert_close(
    answer: Answer, reference: Reference, prompt: list[int], adapter: str | None, atol: float
) -> None:
    """Every token is the reference's best one, or as good as that, after the tokens before it."""
    assert answer.tokens
    expected = torch.log_softmax(reference.follow(prompt, answer.tokens, adapter), dim=-1)
    for token, said, row in zip(answer.tokens, answer.logprobs, expected, strict=True):
        assert abs(said.logprobs[0] - float(row[token])) <= atol
        assert float(row.max() - row[token]) <= atol


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_matches_the_reference(zoo: Zoo, family: str, dtype: str) -> None:
    served = on_gpu(zoo, family, ADAPTERS, dtype=dtype)
    rows = [
        (random_prompt(length, seed=length), adapter)
        for length, adapter in zip((40, 7, 23, 64, 33), [None, *ADAPTERS], strict=True)
    ]

    answers = served.run([served.request(p, a, logprobs=1, max_tokens=32) for p, a in rows])
    served.engine.close()

    for (prompt, adapter), answer in zip(rows, answers, strict=True):
        assert_close(answer, zoo[family].reference, prompt, adapter, TOLERANCE[dtype])


@pytest.fixture(scope="module", params=[0, 1, NUM_ADAPTERS])
def both(
    zoo: Zoo, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[tuple[Served, Served]]:
    """An engine with graphs and one without, with as many adapters loaded."""
    folder = tmp_path_factory.mktemp("adapters")
    pair = []
    for eager in (False, True):
        config = {"enforce_eager": eager, "max_num_seqs": MAX_SEQS, "enable_lora": True, "num_lanes": 128}
        served = on_gpu(zoo, "llama", [], **config)
        for index in range(request.param):
            path = folder / f"a{index}"
            if not eager:
                sites, rank = served.engine.info.lora_sites, (4, 8, 12, 16)[index % 4]
                write_adapter(path, sites, rank=rank, alpha=24 * rank, target_modules=TARGETS, seed=index)
            served.load(path.name, path)
        pair.append(served)
    yield pair[0], pair[1]
    for served in pair:
        served.engine.close()


@pytest.mark.parametrize("num_seqs", [size for size in DECODE_SIZES if size <= MAX_SEQS])
def test_every_decode_graph_equals_launched_kernels(both: tuple[Served, Served], num_seqs: int) -> None:
    prompts = [random_prompt(3 + i % 40, seed=i) for i in range(num_seqs)]
    assert_same(*(run(served, prompts, max_tokens=8) for served in both))


@pytest.mark.parametrize("num_tokens", MIXED_SIZES)
def test_every_prompt_graph_equals_launched_kernels(both: tuple[Served, Served], num_tokens: int) -> None:
    lengths = [num_tokens // 4, num_tokens // 8, num_tokens // 3, 2]
    prompts = [random_prompt(min(length, 400), seed=length) for length in lengths]
    assert_same(*(run(served, prompts, max_tokens=4) for served in both))


def run(served: Served, prompts: list[list[int]], *, max_tokens: int) -> list[Answer]:
    names = [None, *served.digests]
    return served.run(
        [
            served.request(prompt, names[i % len(names)], max_tokens=max_tokens, logprobs=0, salt="x")
            for i, prompt in enumerate(prompts)
        ]
    )


def assert_same(replayed: list[Answer], launched: list[Answer]) -> None:
    for one, other in zip(replayed, launched, strict=True):
        assert one.tokens == other.tokens
        for a, b in zip(one.logprobs, other.logprobs, strict=True):
            assert abs(a.logprobs[0] - b.logprobs[0]) <= TOLERANCE["float32"]


def test_adapters_that_come_and_go_change_nothing_for_those_that_run(zoo: Zoo) -> None:
    calm, busy = (churned(zoo, churns=churns) for churns in (False, True))

    assert [answer.tokens for answer in busy] == [answer.tokens for answer in calm]


def churned(zoo: Zoo, *, churns: bool) -> list[Answer]:
    served = on_gpu(zoo, "llama", ["r8", "r16"], num_lanes=64)
    others = [served.spec(zoo["llama"].adapters[name]) for name in ("r4", "r33")]
    requests = [
        served.request(random_prompt(9 + i, seed=i), name, max_tokens=80)
        for i, name in enumerate([None, "r8", "r16", "r8"])
    ]
    answers = {request.request_id: Answer() for request in requests}
    for request in requests:
        served.engine.add_request(request)
    turn = 0
    while served.engine.has_work():
        served.step(answers)
        if churns:
            spec = others[turn % len(others)]
            served.engine.load_adapter(spec)
            served.engine.unload_adapter(spec.digest)
            turn += 1
    served.engine.close()
    return list(answers.values())
