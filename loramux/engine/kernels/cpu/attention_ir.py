"""Inner loops of the attention kernel: scores, softmax and weighted values of a tile of rows.

Queries, keys, values and probabilities are read as 32-bit words: one float32, or two bfloat16, whose
products the CPU adds in one operation. A cache block therefore lies in words, too:
keys [head_dim / per_word, 16, per_word], values [16 / per_word, head_dim, per_word].
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from loramux.engine.kernels.cpu.intrinsics import BLOCK
from loramux.engine.kernels.cpu.vector_ir import LANES, Builder, Value, Vectors

_I64 = ir.IntType(64)
_WORD = 4  # bytes
_VECTOR = LANES * _WORD


def _per_word(dtype: Any) -> int:
    return int(32 // dtype.bitwidth)


@intrinsic
def score_rows(
    typing: Any,
    dtype: Any,
    rows: Any,
    blocks: Any,
    vectors: Any,
    q: Any,
    k: Any,
    stride: Any,
    table: Any,
    scores: Any,
    score_bytes: Any,
) -> tuple[Any, Any]:
    """scores[r, b * 16 + t] = sum over d of q[r, d] * K[table[b], d, t], without the scale.

    Args:
        rows, blocks: how many at once, as `units`; every sum stays in a register
        vectors: head_dim / 16, as `units`
        q: address of [rows, head_dim]
        k: address of the first block's keys of this head; stride: bytes from one block to the next
        table: address of the block ids, int64
        scores: address of float32 rows, written; score_bytes: from one row to the next
    """
    words = vectors.count * LANES // _per_word(dtype)
    q_bytes = words * _WORD

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        v = Vectors(builder)
        q_, k_, stride_, table_, scores_, score_bytes_ = args[4:]
        bases = [
            builder.add(k_, builder.mul(_entry(builder, table_, v.i64(b)), stride_))
            for b in range(blocks.count)
        ]
        totals = [[v.accumulator() for _ in bases] for _ in range(rows.count)]

        def body(word: Value) -> None:
            offset = builder.mul(word, v.i64(_VECTOR))
            keys = [v.load_words(builder.add(base, offset), dtype) for base in bases]
            at = builder.add(q_, builder.mul(word, v.i64(_WORD)))
            for r, row in enumerate(totals):
                query = v.splat_word(builder.add(at, v.i64(r * q_bytes)), dtype)
                for total, key in zip(row, keys, strict=True):
                    builder.store(v.dot(builder.load(total), query, key, dtype), total)

        _count(builder, v.i64(words), body)
        for r, row in enumerate(totals):
            target = builder.add(scores_, builder.mul(score_bytes_, v.i64(r)))
            for b, total in enumerate(row):
                v.store(target, v.i64(b * BLOCK), builder.load(total), types.float32)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(dtype, rows, blocks, vectors, i64, i64, i64, i64, i64, i64), codegen


@intrinsic
def softmax_row(typing: Any, dtype: Any, count: Any, scores: Any, probs: Any, scale: Any) -> tuple[Any, Any]:
    """probs[i] = exp(scale * (scores[i] - the largest)) for i < count; returns 1 / their sum.

    Args:
        dtype: of probs; the sum is that of the values before they are rounded
        count: a multiple of 16
        scores: address of float32, consumed; probs: address
        scale: float32, positive
    """

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        v = Vectors(builder)
        _, count_, scores_, probs_, scale_ = args
        best = [v.accumulator() for _ in range(4)]
        total = [v.accumulator() for _ in range(4)]
        for one in best:
            builder.store(v.load(scores_, v.i64(0), types.float32), one)

        def find(i: Value, chain: int) -> None:
            one = best[chain]
            builder.store(v.larger(builder.load(one), v.load(scores_, i, types.float32)), one)

        v.unrolled(count_, find)
        for one in best[1:]:
            builder.store(v.larger(builder.load(best[0]), builder.load(one)), best[0])
        largest, factor = v.splat(v.max(builder.load(best[0]))), v.splat(scale_)
        is_half = dtype == types.uint16
        if is_half:
            factor = builder.fmul(factor, v.const(1.44269504))  # 2 to the x instead of e

        def raise_(i: Value, chain: int) -> None:
            distance = builder.fsub(v.load(scores_, i, types.float32), largest)
            distance = builder.fmul(distance, factor)
            value = v.rough_exp2(distance) if is_half else v.exp(distance)
            v.store(probs_, i, value, dtype)
            builder.store(builder.fadd(builder.load(total[chain]), value), total[chain])

        v.unrolled(count_, raise_)
        for one in total[1:]:
            builder.store(builder.fadd(builder.load(total[0]), builder.load(one)), total[0])
        return builder.fdiv(ir.Constant(ir.FloatType(), 1.0), v.sum(builder.load(total[0])))

    return types.float32(dtype, types.int64, types.int64, types.int64, types.float32), codegen


@intrinsic
def sum_values(
    typing: Any,
    dtype: Any,
    rows: Any,
    vectors: Any,
    probs: Any,
    prob_bytes: Any,
    v_: Any,
    stride: Any,
    table: Any,
    num_blocks: Any,
    out: Any,
) -> tuple[Any, Any]:
    """out[r, d] = sum over all blocks b and tokens t of probs[r, b * 16 + t] * V[table[b], t, d].

    Args:
        rows, vectors: as in `score_rows`
        probs: address of rows of dtype; prob_bytes: from one row to the next
        v_: address of the first block's values of this head; stride: bytes from one block to the next
        table: address of num_blocks block ids, int64
        out: address of [rows, head_dim] float32, written
    """
    head_dim, words = vectors.count * LANES, BLOCK // _per_word(dtype)

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        v = Vectors(builder)
        probs_, prob_bytes_, values_, stride_, table_, num_blocks_, out_ = args[3:]
        totals = [[v.accumulator() for _ in range(vectors.count)] for _ in range(rows.count)]
        starts = [builder.add(probs_, builder.mul(prob_bytes_, v.i64(r))) for r in range(rows.count)]

        def body(block: Value) -> None:
            base = builder.add(values_, builder.mul(_entry(builder, table_, block), stride_))
            first = builder.mul(block, v.i64(words * _WORD))
            for word in range(words):
                line = [
                    v.load_words(builder.add(base, v.i64((word * head_dim + d) * _WORD)), dtype)
                    for d in range(0, head_dim, LANES)
                ]
                for start, row in zip(starts, totals, strict=True):
                    at = builder.add(builder.add(start, first), v.i64(word * _WORD))
                    prob = v.splat_word(at, dtype)
                    for total, value in zip(row, line, strict=True):
                        builder.store(v.dot(builder.load(total), prob, value, dtype), total)

        _count(builder, num_blocks_, body)
        for r, row in enumerate(totals):
            for i, total in enumerate(row):
                v.store(out_, v.i64(r * head_dim + i * LANES), builder.load(total), types.float32)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(dtype, rows, vectors, i64, i64, i64, i64, i64, i64, i64), codegen


@intrinsic
def store_key(typing: Any, dtype: Any, vectors: Any, k: Any, target: Any) -> tuple[Any, Any]:
    """Write one token's key into its column of a block.

    Args:
        vectors: head_dim / 16, as `units`
        k: address of [head_dim]
        target: address of the token's first word in the block
    """
    words = vectors.count * LANES // _per_word(dtype)
    word = ir.IntType(32).as_pointer()

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        source, column = (builder.inttoptr(address, word) for address in args[2:])
        for i in range(words):
            value = builder.load(builder.gep(source, [ir.Constant(_I64, i)]))
            builder.store(value, builder.gep(column, [ir.Constant(_I64, i * LANES)]))
        return context.get_dummy_value()

    return types.void(dtype, vectors, types.int64, types.int64), codegen


@intrinsic
def store_value(
    typing: Any, dtype: Any, vectors: Any, value: Any, target: Any, is_second: Any
) -> tuple[Any, Any]:
    """Write one token's value into its row of a block; of bfloat16 only its half of each word.

    Args:
        vectors: head_dim / 16, as `units`
        value: address of [head_dim]
        target: address of the first word that holds the token
        is_second: whether its half is the upper one; other threads may write the lower one meanwhile
    """

    def codegen(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        v = Vectors(builder)
        _, _, value_, target_, is_second_ = args
        offsets = [v.i64(i * LANES) for i in range(vectors.count)]
        if dtype != types.uint16:
            for offset in offsets:
                v.store(target_, offset, v.load(value_, offset, dtype), dtype)
            return context.get_dummy_value()
        with builder.if_else(builder.icmp_signed("!=", is_second_, v.i64(0))) as branches:
            for half, branch in zip((1, 0), branches, strict=True):
                with branch:
                    for offset in offsets:
                        v.store_half(target_, value_, offset, half)
        return context.get_dummy_value()

    return types.void(dtype, vectors, types.int64, types.int64, types.int64), codegen


def _entry(builder: Builder, table: Value, index: Value) -> Value:
    return builder.load(builder.gep(builder.inttoptr(table, _I64.as_pointer()), [index]))


def _count(builder: Builder, count: Value, body: Any) -> None:
    with cgutils.for_range(builder, count) as loop:
        body(loop.index)
