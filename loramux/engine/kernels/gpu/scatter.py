"""An adapter's bytes on the device → lanes, in one launch.

    lanes[target + l, c] = cast(source[l * lane_stride + c * column_stride] * scale)     l < rank
                         = 0                                                             rank <= l < count

for each row of the table (an A or a B of one module): folds alpha / rank, transposes B, converts the
files' dtype. A number that is not finite is never written: the lane gets 0, and the row's flag is
set, because other adapters' rows may be computing beside these lanes.

`reference_lanes` says the same for one row of the table.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from loramux.engine.adapters.packed import Column

NUM_COLUMNS: Final = len(Column)
TILE_LANES: Final = 16
TILE_FEATURES: Final = 256
NUM_WARPS: Final = 4

_CUTS: tl.constexpr = tl.constexpr(bool(knobs.runtime.interpret))  # the interpreter rounds bfloat16 towards 0
_SOURCE: tl.constexpr = tl.constexpr(int(Column.SOURCE))
_LANE_STRIDE: tl.constexpr = tl.constexpr(int(Column.LANE_STRIDE))
_COLUMN_STRIDE: tl.constexpr = tl.constexpr(int(Column.COLUMN_STRIDE))
_KIND: tl.constexpr = tl.constexpr(int(Column.KIND))
_RANK: tl.constexpr = tl.constexpr(int(Column.RANK))
_COLUMNS: tl.constexpr = tl.constexpr(int(Column.COLUMNS))
_TARGET: tl.constexpr = tl.constexpr(int(Column.TARGET))
_TARGET_STRIDE: tl.constexpr = tl.constexpr(int(Column.TARGET_STRIDE))
_SCALE: tl.constexpr = tl.constexpr(int(Column.SCALE))


@triton.jit
def _to_nearest(values: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """The nearest numbers of bfloat16, if that is the dtype, in float32."""
    if dtype != tl.bfloat16:
        return values
    bits = values.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _load(begin: tl.tensor, offsets: tl.tensor, mask: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Elements of a dtype, in float32; 0 where the mask is false."""
    return tl.load(begin.to(tl.pointer_type(dtype)) + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["first_row", "count"])
def scatter_kernel(
    table: tl.tensor,  # [rows, WIDTH] int64
    source: tl.tensor,  # bytes
    flags: tl.tensor,  # [rows] int32
    like: tl.tensor,  # in the lanes' dtype
    first_row: tl.tensor,  # of the table
    count: tl.tensor,  # lanes to write
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    FEATURES: tl.constexpr,
) -> None:
    """LANES lanes and FEATURES features of one row of the table; grid (rows, feature tiles, lane tiles)."""
    dtype: tl.constexpr = like.dtype.element_ty
    index = first_row + tl.program_id(0)
    row = table + index.to(tl.int64) * WIDTH
    num_features = tl.load(row + _COLUMNS)
    first = tl.program_id(1) * FEATURES
    if first < num_features:
        lanes = (tl.program_id(2) * LANES + tl.arange(0, LANES))[:, None]
        features = (first + tl.arange(0, FEATURES))[None, :]
        inside = features < num_features
        wanted = (lanes < tl.load(row + _RANK)) & inside
        offsets = lanes * tl.load(row + _LANE_STRIDE) + features * tl.load(row + _COLUMN_STRIDE)
        begin = source + tl.load(row + _SOURCE)
        kind = tl.load(row + _KIND)
        values = tl.zeros([LANES, FEATURES], dtype=tl.float32)
        if kind == 0:
            values = _load(begin, offsets, wanted, tl.bfloat16)
        elif kind == 1:
            values = _load(begin, offsets, wanted, tl.float16)
        else:
            values = _load(begin, offsets, wanted, tl.float32)
        scale = tl.load(row + _SCALE).to(tl.int32).to(tl.float32, bitcast=True)
        out = (_to_nearest(values * scale, dtype) if _CUTS else values * scale).to(dtype)
        is_finite = tl.abs(out.to(tl.float32)) < float("inf")
        if tl.min(is_finite.to(tl.int32)) == 0:
            tl.store(flags + index, 1)
        target = tl.load(row + _TARGET).to(tl.pointer_type(dtype))
        at_target = target + lanes * tl.load(row + _TARGET_STRIDE) + features
        tl.store(at_target, tl.where(is_finite, out, tl.zeros_like(out)), mask=(lanes < count) & inside)


def scatter(
    table: Tensor, source: Tensor, flags: Tensor, like: Tensor, *, rows: slice, count: int, max_features: int
) -> None:
    """Write lanes.

    Args:
        table: [rows, columns of Column] int64, with TARGET at the first lane to write
        source: bytes, what SOURCE counts from
        flags: [rows] int32: set to 1 where a number was not finite
        like: any tensor of the lanes' dtype
        rows: of the table that are to be written
        count: lanes to write; those above a row's rank become zero
        max_features: of any row
    """
    grid = (rows.stop - rows.start, triton.cdiv(max_features, TILE_FEATURES), triton.cdiv(count, TILE_LANES))
    scatter_kernel[grid](
        table,
        source,
        flags,
        like,
        rows.start,
        count,
        WIDTH=NUM_COLUMNS,
        LANES=TILE_LANES,
        FEATURES=TILE_FEATURES,
        num_warps=NUM_WARPS,
    )


def reference_lanes(row: Tensor, source: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """What one row of the table writes, [count, features].

    Args:
        row: [columns of Column] int64, on the CPU
        source: bytes
    """
    values = {column: int(row[column]) for column in Column}
    kind = (torch.bfloat16, torch.float16, torch.float32)[values[Column.KIND]]
    rank, features = values[Column.RANK], values[Column.COLUMNS]
    out = torch.zeros((count, features), dtype=dtype)
    if rank:
        stored = source[values[Column.SOURCE] :]
        stored = stored[: len(stored) // kind.itemsize * kind.itemsize].view(kind)
        strides = (values[Column.LANE_STRIDE], values[Column.COLUMN_STRIDE])
        scale = row[Column.SCALE].to(torch.int32).view(torch.float32)
        out[:rank] = (stored.as_strided((rank, features), strides).float() * scale).to(dtype)
    return torch.where(out.isfinite(), out, 0)
