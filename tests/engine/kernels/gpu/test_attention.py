"""The paged kernel against the reference: tiny under the interpreter, the same at full size on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from loramux.engine.kernels.attention import (
    FP8_MAX,
    Attention,
    AttentionShape,
    BatchLayout,
    KVCache,
    TorchAttention,
    reference_attention,
    to_cache,
)
from loramux.engine.kernels.gpu.attention import GpuAttention
from loramux.engine.step_buffers import StepBuffers, StepLimits
from tests.engine.kernels.gpu.attention_steps import BLOCK, Work, make_layout, make_shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP8 = torch.float8_e4m3fn
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def make_limits(step: BatchLayout, block_size: int = BLOCK) -> StepLimits:
    most = max(len(ids) for ids in step.blocks)
    return StepLimits(
        max_tokens=len(step.positions) + 5,
        max_seqs=len(step.blocks) + 2,
        max_blocks=most,
        block_size=block_size,
        num_lanes=0,
        vocab_size=0,
    )


@dataclass
class World:
    """A step with random queries, and a cache that holds its sequences' keys, and NaN everywhere else."""

    shape: AttentionShape
    step: BatchLayout
    attention: GpuAttention
    cache: KVCache
    q: torch.Tensor
    kv: list[tuple[torch.Tensor, torch.Tensor]]  # of each sequence, as the cache rounds them
    soft_cap: float | None

    def attend(self) -> torch.Tensor:
        window = self.shape.windows[0]
        return self.attention.attend(self.q, self.cache, self.attention.plan(self.step), window=window)

    def expected(self) -> torch.Tensor:
        rows = []
        for i, (k, v) in enumerate(self.kv):
            own = slice(*self.step.offsets[i : i + 2])
            start, window = int(self.step.ends[i] - self.step.counts[i]), self.shape.windows[0]
            queries = self.q[own].float()
            rows.append(
                reference_attention(queries, k, v, start=start, window=window, soft_cap=self.soft_cap)
            )
        return torch.cat(rows).flatten(1)


def make_world(shape: AttentionShape, work: Work, soft_cap: float | None = None) -> World:
    torch.manual_seed(len(work))
    step = make_layout(work, shape.block_size)
    attention = GpuAttention(shape, make_limits(step, shape.block_size), soft_cap=soft_cap)
    cache = attention.empty_cache(max(int(ids.max()) for ids in step.blocks) + 1)
    kv = []
    for own in (cache.k, cache.v):
        own.copy_(torch.full(own.shape, torch.nan).to(own.dtype))
    for end, blocks in zip(step.ends, step.blocks, strict=True):
        rows = [torch.randn(int(end), shape.num_kv_heads, shape.head_dim, device=DEVICE) for _ in "kv"]
        positions = np.arange(end)
        where = (blocks[positions // shape.block_size], slice(None), positions % shape.block_size)
        cache.k[where], cache.v[where] = (x.to(shape.dtype).to(shape.cache_dtype) for x in rows)
        kv.append((cache.k[where].float(), cache.v[where].float()))
    q = torch.randn(len(step.positions), shape.num_heads, shape.head_dim, device=DEVICE).to(shape.dtype)
    return World(shape, step, attention, cache, q, kv, soft_cap)


def assert_right(world: World) -> None:
    out = world.attend().float()

    tolerance = TOLERANCE[world.shape.dtype]
    torch.testing.assert_close(out, world.expected(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "work",
    [
        [(0, 1)],
        [(15, 1), (16, 1), (63, 1), (64, 1)],  # borders of blocks and of tiles
        [(0, 33)],
        [(129, 1), (700, 1)],  # two parts and six
        [(5, 1), (40, 30), (0, 3), (64, 2)],  # decode, chunks of prompts with and without context
        [(1100, 5)],  # a short chunk of a long prompt: split, too
    ],
)
def test_any_mix_of_rows(work: Work) -> None:
    assert_right(make_world(make_shape(6, 2, device=DEVICE), work))


@pytest.mark.parametrize("heads", [(4, 4), (9, 3), (8, 2), (8, 1), (7, 1)])
def test_query_heads_that_share_a_kv_head(heads: tuple[int, int]) -> None:
    assert_right(make_world(make_shape(*heads, device=DEVICE), [(70, 1), (20, 40)]))


@pytest.mark.parametrize("head_dim", [80, 96, 128, 256])
def test_sizes_of_a_head(head_dim: int) -> None:
    assert_right(make_world(make_shape(2, 1, head_dim, device=DEVICE), [(70, 1), (20, 40)]))


@pytest.mark.parametrize("window", [1, 16, 50, 300])
def test_a_sliding_window(window: int) -> None:
    assert_right(make_world(make_shape(4, 2, window=window, device=DEVICE), [(400, 1), (9, 1), (80, 70)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_precisions_and_large_blocks(dtype: torch.dtype) -> None:
    shape = make_shape(4, 2, dtype=dtype, block_size=32, device=DEVICE)

    assert_right(make_world(shape, [(300, 1), (40, 30)]))


def test_soft_cap() -> None:
    shape = make_shape(4, 2, dtype=torch.float32, device=DEVICE)
    world = make_world(shape, [(300, 1), (40, 30)], soft_cap=0.5)

    assert_right(world)
    world.soft_cap = None
    assert (world.attend() - world.expected()).abs().max() > 1e-3, "the cap must matter here"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_of_8_bit_values(dtype: torch.dtype) -> None:
    shape = make_shape(6, 2, dtype=dtype, kv_dtype=FP8, device=DEVICE)

    assert_right(make_world(shape, [(300, 1), (40, 30)]))


def test_equal_steps_give_equal_bits() -> None:
    world = make_world(make_shape(6, 2, device=DEVICE), [(700, 1), (1100, 5)])

    first, second = world.attend(), world.attend()

    assert torch.equal(first, second)


def test_a_padded_step_gives_the_same_bits_and_leaves_padding_alone() -> None:
    world = make_world(make_shape(6, 2, device=DEVICE), [(700, 1), (3, 1), (0, 20)])
    expected, num_tokens = world.attend(), len(world.q)
    planner = world.attention.planner
    buffers = StepBuffers(planner.fields, world.shape.device)
    buffers.upload(planner.fill(buffers.host, world.step))
    plan = planner.view(buffers.device, num_tokens + 5, 5)
    padded = torch.cat([world.q, world.q.new_full((5, *world.q.shape[1:]), torch.nan)])

    out = world.attention.attend(padded, world.cache, plan, window=None)

    assert torch.equal(out[:num_tokens], expected)


@pytest.mark.parametrize("kv_dtype", [None, FP8])
def test_keys_and_values_go_where_plain_torch_puts_them(kv_dtype: torch.dtype | None) -> None:
    shape = make_shape(2, 1, 32, dtype=torch.float32, kv_dtype=kv_dtype, device=DEVICE)
    step = make_layout([(20, 1), (15, 2)])
    both: list[Attention] = [GpuAttention(shape, make_limits(step)), TorchAttention(shape)]
    caches = [attention.empty_cache(8) for attention in both]
    qkv = torch.randn(3, 4 * shape.head_dim, device=DEVICE) * 300
    # Exact in 8 bits, or more than they hold: the interpreter does not round to them rightly.
    qkv = torch.where(qkv.abs() > FP8_MAX, qkv, to_cache(qkv, FP8).float())

    rows = [
        attention.store(qkv.clone(), None, None, cache, attention.plan(step))
        for attention, cache in zip(both, caches, strict=True)
    ]

    torch.testing.assert_close(rows[0], rows[1])
    assert caches[0].v.dtype == (kv_dtype or torch.float32)
    torch.testing.assert_close(caches[0].k.float(), caches[1].k.float())
    torch.testing.assert_close(caches[0].v.float(), caches[1].v.float())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
@pytest.mark.parametrize("model", [(32, 8, 128), (28, 4, 128), (9, 3, 64), (16, 8, 256)])
@pytest.mark.parametrize("kv_dtype", [None, FP8])
@pytest.mark.parametrize(
    "work",
    [
        [(4000, 1)],
        [(1023, 1)] * 32,
        [(30000, 1)] + [(100, 1)] * 40,
        [(0, 2048)],
        [(900, 1)] * 16 + [(3000, 500), (0, 77)],
        [(8000, 50)],
    ],
)
def test_full_size(model: tuple[int, int, int], kv_dtype: torch.dtype | None, work: Work) -> None:
    world = make_world(make_shape(*model, kv_dtype=kv_dtype, device=DEVICE), work)
    plain = TorchAttention(world.shape)

    outs = [world.attend() for _ in range(3)]

    for own in (world.cache.k, world.cache.v):  # plain torch reads whole blocks
        own.copy_(torch.where(own.float().isnan(), 0.0, own.float()).to(own.dtype))
    expected = plain.attend(world.q, world.cache, plain.plan(world.step), window=None)
    torch.testing.assert_close(outs[0].float(), expected.float(), rtol=2e-2, atol=2e-2)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
