"""The products of bfloat16 and int8 weights against torch's, on processors that have the instructions."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from loramux.engine.kernels.cpu import product
from loramux.engine.kernels.cpu.product import PackedLinear, renew_scratch, scratch, supports
from loramux.engine.kernels.cpu.product_strips import CHUNK_PAIRS, FEW_ROWS, PANEL_ROWS

pytestmark = pytest.mark.skipif(not product.is_available(), reason="needs AVX512-BF16 without AMX")

# out_features: whole strips, one strip and a bit, less than one, an odd number of strips for each thread
# in_features: one turn of the loop, one more, several chunks with a short last one
SHAPES = [(96, 64), (17, 4), (5, 68), (50, 8), (208, 1000), (33, 2 * CHUNK_PAIRS + 12), (16, 6 * CHUNK_PAIRS)]
ROWS = [*range(1, 71), PANEL_ROWS - 1, PANEL_ROWS, PANEL_ROWS + 1, 3 * PANEL_ROWS + 7]


FORMS = ["bfloat16", "int8"]


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape).to(torch.bfloat16)


@dataclass
class Weight:
    """A random weight in one of the forms."""

    stored: Tensor
    scale: Tensor | None

    def pack(self, bias: Tensor | None = None) -> PackedLinear:
        return PackedLinear(self.stored, bias, self.scale)

    def exact(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = x.double() @ self.stored.double().T
        y *= 1.0 if self.scale is None else self.scale.double()
        return y if bias is None else y + bias.double()


def random_weight(form: str, out_features: int, in_features: int) -> Weight:
    if form == "bfloat16":
        return Weight(numbers(out_features, in_features), None)
    stored = torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8)
    return Weight(skip_unless_supported(stored), torch.rand(out_features) / 64)


def skip_unless_supported(weight: Tensor) -> Tensor:
    if not supports(weight):
        pytest.skip("needs AVX512-VBMI")
    return weight


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_product_is_rounded_once(form: str, out_features: int, in_features: int, has_bias: bool) -> None:
    weight = random_weight(form, out_features, in_features)
    bias = numbers(out_features) if has_bias else None
    linear = weight.pack(bias)
    x = numbers(max(ROWS), in_features)
    expected = weight.exact(x, bias)
    size = expected.abs() + in_features**0.5
    for rows in ROWS:
        y = linear(x[:rows])

        assert y.shape == (rows, out_features)
        assert y.dtype == torch.bfloat16
        assert ((y.double() - expected[:rows]).abs() / size[:rows]).max() < 2**-8


@pytest.mark.parametrize("form", FORMS)
def test_each_number_has_its_own_place(form: str) -> None:
    weight = random_weight(form, 37, 64)
    linear = weight.pack()
    for row in range(0, 64, 16):  # few rows; and, below, more of them
        x = torch.eye(64, dtype=torch.bfloat16)[row : row + 16]
        assert torch.equal(linear(x), weight.exact(x, None).to(torch.bfloat16))
    x = torch.eye(64, dtype=torch.bfloat16)
    assert torch.equal(linear(x), weight.exact(x, None).to(torch.bfloat16))


def test_every_byte_is_widened_without_rounding() -> None:
    stored = torch.arange(-127, 128, dtype=torch.int8).expand(16, 255)
    stored = torch.nn.functional.pad(stored, (0, 1))
    linear = PackedLinear(skip_unless_supported(stored), None, torch.ones(16))
    assert torch.equal(linear(torch.eye(256, dtype=torch.bfloat16)), stored.T.to(torch.bfloat16))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("in_features", [576, 2 * CHUNK_PAIRS + 12])
def test_rows_do_not_depend_on_their_company(form: str, in_features: int) -> None:
    linear = random_weight(form, 100, in_features).pack()
    x = numbers(300, in_features)
    alone = torch.cat([linear(row[None]) for row in x])
    for rows in (2, FEW_ROWS, FEW_ROWS + 1, 63, PANEL_ROWS + 1, 300):
        assert torch.equal(linear(x[:rows]), alone[:rows])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_gives_the_same(form: str, threads: int) -> None:
    weight, x = random_weight(form, 1000, 192), numbers(40, 192)
    before = torch.get_num_threads()
    expected = weight.pack()(x)
    try:
        torch.set_num_threads(threads)
        linear = weight.pack()
        assert torch.equal(linear(x), expected)
        assert torch.equal(linear(x[:3]), expected[:3])
    finally:
        torch.set_num_threads(before)


def test_rows_that_do_not_lie_side_by_side() -> None:
    weight, x = numbers(48, 64), numbers(64, 20).T
    assert torch.equal(PackedLinear(weight, None)(x), PackedLinear(weight, None)(x.contiguous()))


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_written_beside_the_result(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = random_weight(form, 19, 64).pack()
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
        (torch.zeros(8, 66, dtype=torch.int8), False),
    ],
)
def test_which_weights_it_takes(weight: Tensor, expected: bool) -> None:
    assert supports(weight) is expected


def test_engines_share_no_memory_while_they_multiply() -> None:
    before = scratch(2)
    assert scratch(2) is before

    renew_scratch()

    assert scratch(2).data_ptr() != before.data_ptr()
