"""The bfloat16 product against torch's, on processors that have the instruction for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loramux.engine.kernels.cpu import product
from loramux.engine.kernels.cpu.product import CHUNK_PAIRS, FEW_ROWS, PANEL_ROWS, PackedLinear, supports

pytestmark = pytest.mark.skipif(not product.is_available(), reason="needs AVX512-BF16 without AMX")

# out_features: whole strips, one strip and a bit, less than one, an odd number of strips for each thread
# in_features: one turn of the loop, one more, several chunks with a short last one
SHAPES = [(96, 64), (17, 4), (5, 68), (50, 8), (208, 1000), (33, 2 * CHUNK_PAIRS + 12), (16, 6 * CHUNK_PAIRS)]
ROWS = [*range(1, 71), PANEL_ROWS - 1, PANEL_ROWS, PANEL_ROWS + 1, 3 * PANEL_ROWS + 7]


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape).to(torch.bfloat16)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_product_is_rounded_once(out_features: int, in_features: int, has_bias: bool) -> None:
    weight = numbers(out_features, in_features)
    bias = numbers(out_features) if has_bias else None
    linear = PackedLinear(weight, bias)
    x = numbers(max(ROWS), in_features)
    expected = exact(x, weight, bias)
    size = expected.abs() + in_features**0.5
    for rows in ROWS:
        y = linear(x[:rows])

        assert y.shape == (rows, out_features)
        assert y.dtype == torch.bfloat16
        assert ((y.double() - expected[:rows]).abs() / size[:rows]).max() < 2**-8


@pytest.mark.parametrize("in_features", [576, 2 * CHUNK_PAIRS + 12])
def test_rows_do_not_depend_on_their_company(in_features: int) -> None:
    linear = PackedLinear(numbers(100, in_features), None)
    x = numbers(300, in_features)
    alone = torch.cat([linear(row[None]) for row in x])
    for rows in (2, FEW_ROWS, FEW_ROWS + 1, 63, PANEL_ROWS + 1, 300):
        assert torch.equal(linear(x[:rows]), alone[:rows])


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_gives_the_same(threads: int) -> None:
    weight, x = numbers(1000, 192), numbers(40, 192)
    before = torch.get_num_threads()
    expected = PackedLinear(weight, None)(x)
    try:
        torch.set_num_threads(threads)
        linear = PackedLinear(weight, None)
        assert torch.equal(linear(x), expected)
        assert torch.equal(linear(x[:3]), expected[:3])
    finally:
        torch.set_num_threads(before)


def test_rows_that_do_not_lie_side_by_side() -> None:
    weight, x = numbers(48, 64), numbers(64, 20).T
    assert torch.equal(PackedLinear(weight, None)(x), PackedLinear(weight, None)(x.contiguous()))


def test_nothing_is_written_beside_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = numbers(19, 64)
    linear = PackedLinear(weight, None)
    for rows in (3, 20):
        memory = torch.full((rows + 2, 19), 7.0, dtype=torch.bfloat16)
        monkeypatch.setattr(torch, "empty", lambda *_, memory=memory, **__: memory[1:-1])
        linear(numbers(rows, 64))
        monkeypatch.undo()
        assert (memory[[0, -1]] == 7.0).all()
        assert (memory[1:-1] != 7.0).any()


def test_no_rows() -> None:
    assert PackedLinear(numbers(32, 64), None)(numbers(0, 64)).shape == (0, 32)


def test_infinities_stay_in_their_row() -> None:
    x = numbers(20, 64)
    x[7, 3] = float("inf")
    y = PackedLinear(numbers(32, 64), None)(x)
    assert y[[i for i in range(20) if i != 7]].isfinite().all()
    assert not y[7].isfinite().any()


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (torch.zeros(8, 64, dtype=torch.bfloat16), True),
        (torch.zeros(8, 64), False),
        (torch.zeros(8, 66, dtype=torch.bfloat16), False),
    ],
)
def test_which_weights_it_takes(weight: Tensor, expected: bool) -> None:
    assert supports(weight) is expected
