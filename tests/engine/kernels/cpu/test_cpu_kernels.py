"""The compiled CPU kernels against the plain-torch references beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from loramux.engine.kernels.attention import reference_attention
from loramux.engine.kernels.cpu.attention import attend_range, scratch_size, tile_of
from loramux.engine.kernels.cpu.best import best_tokens
from loramux.engine.kernels.cpu.dtypes import TAGS
from loramux.engine.kernels.cpu.intrinsics import BLOCK, units
from loramux.engine.kernels.cpu.rows import rms_norm, rotate_and_store, silu_mul
from loramux.engine.layers.rotary import rotate

DTYPES = [torch.float32, torch.bfloat16]


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def cache_form(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """[num_blocks, kv_heads, 16, head_dim] → as the compiled kernels keep them."""
    blocks, heads, size, dim = k.shape
    word = 4 // k.itemsize
    keys = k.transpose(2, 3).reshape(blocks, heads, dim // word, word, size).transpose(3, 4)
    values = v.reshape(blocks, heads, size // word, word, dim).transpose(3, 4)
    return keys.contiguous(), values.contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 5, 40])
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim"), [(3, 3, 64), (2, 1, 32), (1, 8, 128), (2, 7, 16), (1, 30, 64)]
)
@pytest.mark.parametrize("is_prompt", [False, True])
def test_attention_of_tiles_equals_the_reference(
    dtype: torch.dtype, window: int, kv_heads: int, group: int, head_dim: int, is_prompt: bool
) -> None:
    tile = tile_of(group, head_dim // 16, is_prompt=is_prompt)
    counts = np.array([max(1, tile.tokens - i) if is_prompt else 1 for i in range(6)])
    first_ends = np.array([1, 15, 16, 17, 33, 200])
    lengths = first_ends + counts - 1
    tables = [-(-int(length) // BLOCK) for length in lengths]
    num_blocks = sum(tables)
    k = torch.randn(num_blocks, kv_heads, BLOCK, head_dim).to(dtype)
    v = torch.randn_like(k)
    qkv = torch.randn(int(counts.sum()), kv_heads * group + 3, head_dim).to(dtype)  # q within wider rows
    q = qkv[:, : kv_heads * group]
    out, out_2 = (torch.empty(q.shape, dtype=dtype) for _ in range(2))
    ids = torch.randperm(num_blocks).numpy()
    indptr = np.concatenate(([0], np.cumsum(tables)))
    order = np.array([3, 1, 5, 0, 4, 2])  # of the tiles' tokens in the batch
    tokens = np.empty_like(order)
    tokens[order] = np.cumsum(counts[order]) - counts[order]
    scratch = np.zeros((2, scratch_size(tile, head_dim, max(tables))), dtype=np.float32)
    k_cache, v_cache = cache_form(k, v)
    tiles = np.stack((indptr[:-1], first_ends, tokens, counts), axis=1)
    items = len(lengths) * kv_heads

    def arguments(target: Tensor) -> tuple[object, ...]:
        return (
            *(TAGS[dtype], units(head_dim // 16)),
            *(tile.rows, tile.score_rows, tile.score_blocks, tile.value_rows, group),
            *(q.data_ptr(), q.stride(0) * q.itemsize),
            *(x.data_ptr() for x in (k_cache, v_cache, target)),
            *(ids, tiles, window, np.float32(head_dim**-0.5), kv_heads),
        )

    attend_range(*arguments(out), scratch[0], 0, items)
    for i, (begin, end) in enumerate(((0, items // 2), (items // 2, items))):
        attend_range(*arguments(out_2), scratch[i], begin, end)

    assert torch.equal(out, out_2)
    for i, (end, count) in enumerate(zip(first_ends, counts, strict=True)):
        blocks = ids[indptr[i] : indptr[i + 1]]
        keys, values = (
            torch.cat([x[b].transpose(0, 1) for b in blocks])[: lengths[i]].float() for x in (k, v)
        )
        own = slice(int(tokens[i]), int(tokens[i] + count))
        expected = reference_attention(
            q[own].float(), keys, values, start=int(end) - 1, window=window or None
        )
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(out[own].float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_delta", [True, False])
def test_norm_rounds_as_the_plain_layer_does(dtype: torch.dtype, with_delta: bool) -> None:
    x, delta, weight = (torch.randn(n, 48).to(dtype) for n in (5, 5, 1))
    expected_x = x + delta if with_delta else x.clone()
    expected = plain_norm(expected_x, weight[0], 1e-5)
    out = torch.empty_like(x)

    rms_norm(
        TAGS[dtype],
        x.data_ptr(),
        delta.data_ptr() if with_delta else 0,
        weight.data_ptr(),
        out.data_ptr(),
        *(48, 1e-5, 0, 5),
    )

    assert torch.equal(x, expected_x)
    torch.testing.assert_close(out, expected, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
    assert dtype == torch.float32 or (out == expected).float().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("with_angles", [True, False])
def test_rotated_keys_and_values_land_in_their_slots(
    dtype: torch.dtype, with_norm: bool, with_angles: bool
) -> None:
    heads, kv_heads, head_dim = 4, 2, 32
    qkv = torch.randn(3, heads + 2 * kv_heads, head_dim).to(dtype)
    angles = torch.randn(3, head_dim)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    weights = torch.randn(2, head_dim).to(dtype)
    slots = np.array([5 * BLOCK + 3, 0, 2 * BLOCK + 15])
    k_cache, v_cache = cache_form(*torch.zeros(2, 6, kv_heads, BLOCK, head_dim, dtype=dtype))
    q, k, v = (part.clone() for part in torch.split(qkv, [heads, kv_heads, kv_heads], dim=1))
    if with_norm:
        q, k = plain_norm(q, weights[0], 1e-6), plain_norm(k, weights[1], 1e-6)
    if with_angles:
        q, k = (rotate(x, cos[:, None], sin[:, None]) for x in (q, k))

    rotate_and_store(
        TAGS[dtype],
        qkv.data_ptr(),
        *((cos.data_ptr(), sin.data_ptr()) if with_angles else (0, 0)),
        *((weights[0].data_ptr(), weights[1].data_ptr()) if with_norm else (0, 0)),
        1e-6,
        *(k_cache.data_ptr(), v_cache.data_ptr(), slots, heads, kv_heads, units(head_dim // 16), 0, 3),
    )

    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(qkv[:, :heads], q, rtol=tolerance, atol=tolerance)
    expected_k, expected_v = torch.zeros(2, 6, kv_heads, BLOCK, head_dim, dtype=dtype)
    for token, slot in enumerate(slots.tolist()):
        block, offset = divmod(slot, BLOCK)
        expected_k[block, :, offset], expected_v[block, :, offset] = k[token], v[token]
    expected_k, expected_v = cache_form(expected_k, expected_v)
    torch.testing.assert_close(k_cache, expected_k, rtol=tolerance, atol=tolerance)
    assert torch.equal(v_cache, expected_v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_equals_torch(dtype: torch.dtype) -> None:
    gate_up = torch.cat((torch.randn(4, 96) * 6, torch.tensor([[-200.0, 200.0, 0.0, -88.0] * 24])))
    gate_up = gate_up.to(dtype).contiguous()
    gate, up = gate_up.chunk(2, dim=-1)
    out = torch.empty(5, 48, dtype=dtype)

    silu_mul(TAGS[dtype], gate_up.data_ptr(), out.data_ptr(), 48, 0, 5)

    expected = functional.silu(gate) * up
    torch.testing.assert_close(out, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


def best_of(x: Tensor) -> list[int]:
    out = np.full(len(x), -1, dtype=np.int64)
    best_tokens(TAGS[x.dtype], x.data_ptr(), x.shape[1], out)
    return out.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 48, 1024, 1040, 5008])
def test_the_best_token_is_the_first_of_the_largest(dtype: torch.dtype, width: int) -> None:
    x = torch.randn(64, width).mul(3).round().to(dtype)  # many are equal
    x[:32] -= 1000
    x[torch.arange(32), torch.randint(width, (32,))] = -5.0  # one is the best, anywhere
    x[62] = -0.0
    x[62, 5:] = 0.0  # equal to the others
    x[63] = -torch.inf

    assert best_of(x) == x.float().numpy().argmax(axis=1).tolist()
    assert best_of(x)[62:] == [0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_never_the_best_token(dtype: torch.dtype) -> None:
    x = torch.full((3, 2048), torch.nan, dtype=dtype)
    x[1, 1500], x[1, 1700] = -3.0, -2.0
    x[2, 7] = torch.inf

    assert best_of(x) == [0, 1700, 7]
