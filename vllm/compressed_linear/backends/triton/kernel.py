# SPDX-License-Identifier: Apache-2.0
"""The kernels. Importing this needs Triton; TRITON_INTERPRET=1 must be set before, or never.

One program makes a tile of the output, [BLOCK_M, BLOCK_N], from a run of blocks of BLOCK_K input
channels. Every block is within one group of channels, unless scales are multiplied before the sum.
"""

# Triton evaluates branches at compile time only if they are not merged; arguments have the types of
# Triton's language, not of Python's.
# ruff: noqa: SIM102, SIM108
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _plane(
    packed,
    columns,
    stride,
    start,
    k_filled,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """int32 [BLOCK_N, BLOCK_K]: what the plane of WIDTH bits has of the codes, at their place."""
    FIELDS: tl.constexpr = 32 // WIDTH
    # The wider planes come first, and hold the lower bits.
    BELOW: tl.constexpr = BITS & ~(2 * WIDTH - 1)
    first = packed + (k_filled * BELOW // 32 + start // FIELDS).to(tl.int64) * stride
    rows = tl.arange(0, BLOCK_K // FIELDS)
    words = tl.load(first + rows[None, :] * stride + columns[:, None])
    # Halves of each word side by side, then halves of these, so that the fields of a word stay with
    # the thread that has read it.
    fields = tl.interleave(words, words >> 16)
    if WIDTH <= 8:
        fields = tl.interleave(fields, fields >> 8)
    if WIDTH <= 4:
        fields = tl.interleave(fields, fields >> 4)
    if WIDTH <= 2:
        fields = tl.interleave(fields, fields >> 2)
    if WIDTH == 1:
        fields = tl.interleave(fields, fields >> 1)
    return (fields & ((1 << WIDTH) - 1)) << BELOW


@triton.jit
def _codes(
    packed,
    columns,
    stride,
    start,
    k_filled,
    BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """int32 [BLOCK_N, BLOCK_K]: codes from input channel ``start`` on."""
    codes = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    if BITS & 8:
        codes |= _plane(packed, columns, stride, start, k_filled, 8, BITS, BLOCK_K)
    if BITS & 4:
        codes |= _plane(packed, columns, stride, start, k_filled, 4, BITS, BLOCK_K)
    if BITS & 2:
        codes |= _plane(packed, columns, stride, start, k_filled, 2, BITS, BLOCK_K)
    if BITS & 1:
        codes |= _plane(packed, columns, stride, start, k_filled, 1, BITS, BLOCK_K)
    return codes


@triton.jit
def small_float(codes, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """fp32 of floats whose sign is their highest bit (OCP formats of 4 to 8 bits)."""
    magnitude = codes & ((1 << (EXPONENT + MANTISSA)) - 1)
    sign = (codes >> (EXPONENT + MANTISSA)) << 31
    bits = magnitude << (23 - MANTISSA)
    # The exponent of fp32 counts from 127; what is subnormal here is so there, and the product is
    # exact for both.
    UP: tl.constexpr = 2.0 ** (128 - (1 << (EXPONENT - 1)))
    value = (bits | sign).to(tl.float32, bitcast=True) * UP
    if EXPONENT == 5 and MANTISSA == 2:
        special = (bits | sign | 0x7F800000).to(tl.float32, bitcast=True)
        value = tl.where(magnitude >= 0x7C, special, value)
    elif EXPONENT == 4 and MANTISSA == 3:
        value = tl.where(magnitude == 0x7F, float("nan"), value)
    return value


@triton.jit
def wide_scales(scale, places, SCALE_KIND: tl.constexpr):
    """fp32 scales of any stored dtype."""
    stored = tl.load(scale + places)
    if SCALE_KIND == "e4m3":
        wide = small_float(stored.to(tl.int32), 4, 3)
    elif SCALE_KIND == "e8m0":
        code = stored.to(tl.int32)
        # 2^-127 is subnormal; the last code is NaN.
        bits = tl.where(code == 0, 0x00400000, tl.where(code == 255, 0x7FC00000, code << 23))
        wide = bits.to(tl.float32, bitcast=True)
    else:
        wide = stored.to(tl.float32)
    return wide


@triton.jit
def _decoded(
    codes,
    offset,
    table,
    CODED: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """fp32 of codes; of integers less ``offset``, which others have not."""
    if CODED == "integer":
        # 2^23 + code is an fp32 number with the code in its lowest bits.
        values = (codes | 0x4B000000).to(tl.float32, bitcast=True) - (offset + 8388608.0)
    elif CODED == "float":
        values = small_float(codes, EXPONENT, MANTISSA)
    else:
        flat = tl.gather(table, tl.reshape(codes, (BLOCK_N * BLOCK_K,)), 0)
        values = tl.reshape(flat, (BLOCK_N, BLOCK_K))
    return values


@triton.jit
def _leading(values, OPERAND: tl.constexpr):
    """fp32 values cut off to as many bits as OPERAND holds."""
    if OPERAND == "bf16":
        kept = values.to(tl.int32, bitcast=True) & -0x10000
    else:
        kept = values.to(tl.int32, bitcast=True) & -0x2000
    return kept.to(tl.float32, bitcast=True)


@triton.jit
def _operand(values, OPERAND: tl.constexpr, INTERPRETED: tl.constexpr):
    """``values``, which are exact in it, as what is multiplied."""
    if OPERAND == "bf16":
        if INTERPRETED:
            # The interpreter multiplies the bits of bf16 as integers.
            held = _leading(values.to(tl.float32), OPERAND)
        else:
            held = values.to(tl.bfloat16)
    elif OPERAND == "fp16":
        held = values.to(tl.float16)
    else:
        held = values.to(tl.float32)
    return held


@triton.jit
def _dot(x, w, total, OPERAND: tl.constexpr):
    if OPERAND == "tf32":
        total = tl.dot(x, w, total, input_precision="tf32")
    elif OPERAND == "fp32":
        total = tl.dot(x, w, total, input_precision="ieee")
    else:
        total = tl.dot(x, w, total)
    return total


@triton.jit
def _products(
    x,
    w,
    total,
    OPERAND: tl.constexpr,
    X_PARTS: tl.constexpr,
    W_PARTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``total`` + x · wᵀ, exact products added in fp32. At most one of the two has parts.

    w is [BLOCK_N, BLOCK_K] because a thread holds neighbouring input channels, and so writes them
    to shared memory at once."""
    if X_PARTS > 1:
        held = tl.trans(_operand(w, OPERAND, INTERPRETED))
        rest = x.to(tl.float32)
        for part in tl.static_range(X_PARTS):
            if part + 1 < X_PARTS:
                kept = _leading(rest, OPERAND)
            else:
                kept = rest
            total = _dot(_operand(kept, OPERAND, INTERPRETED), held, total, OPERAND)
            rest = rest - kept
    else:
        held = _operand(x, OPERAND, INTERPRETED)
        for part in tl.static_range(W_PARTS):
            if part + 1 < W_PARTS:
                kept = _leading(w, OPERAND)
            else:
                kept = w
            taken = tl.trans(_operand(kept, OPERAND, INTERPRETED))
            total = _dot(held, taken, total, OPERAND)
            w = w - kept
    return total


@triton.jit
def store_rounded(places, values, inside, INTERPRETED: tl.constexpr):
    """fp32 values, rounded to the dtype of ``places``."""
    if INTERPRETED and places.dtype.element_ty == tl.bfloat16:
        # The interpreter cuts off what bf16 does not hold, so there this rounds, ties to even.
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(places, bits.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(places, values.to(places.dtype.element_ty), mask=inside)


@triton.jit
def linear_kernel(
    x,
    packed,
    scale,
    zero,
    row_scale,
    bias,
    order,
    table,
    out,
    m,
    n,
    columns,
    x_stride,
    k_filled,
    segment,
    blocks_of_program,
    BITS: tl.constexpr,
    CODED: tl.constexpr,
    OFFSET: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    SCALING: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    ZERO: tl.constexpr,
    ZERO_SHIFT: tl.constexpr,
    OPERAND: tl.constexpr,
    X_PARTS: tl.constexpr,
    W_PARTS: tl.constexpr,
    GAPS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Grid (tiles of M and N, M first; splits of K). x [m, K], its channels side by side and its
    rows ``x_stride`` apart; packed int32 [words, columns]; scale and zero [G, columns]; row_scale
    and bias [n]; order int32 [K] or None; table fp32 [2^BITS] or None.

    out: [m, n] of its dtype, or with SPLIT fp32 [splits, m, n], to which ``sum_kernel`` does the
    rest. ``segment`` channels are contiguous; GAPS follow if they do not fill their blocks. With
    SCALING "block" a segment is a group and fills so many BLOCKS; with "element" GROUP channels
    share a scale.
    """
    tiles_m = tl.cdiv(m, BLOCK_M)
    tile = tl.program_id(0)
    part = tl.program_id(1)
    row = (tile % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tile // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.arange(0, BLOCK_K)
    x_rows = row.to(tl.int64)[:, None] * x_stride
    here = row < m

    if table is None:
        values = table
    else:
        values = tl.load(table + tl.arange(0, 1 << BITS))
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = part * blocks_of_program
    last = tl.minimum(first + blocks_of_program, k_filled // BLOCK_K)
    for block in range(first, last):
        start = block * BLOCK_K
        if SCALING == "block":
            group = block // BLOCKS
            inner = (block % BLOCKS) * BLOCK_K
        else:
            group = 0
            inner = start
        channel = group * segment + inner
        wanted = here[:, None]
        if GAPS:
            wanted = wanted & (inner + step < segment)[None, :]
        if order is None:
            taken = tl.load(x + channel + (x_rows + step[None, :]), mask=wanted, other=0.0)
        else:
            gathered = tl.load(order + channel + step, mask=inner + step < segment, other=-1)
            wanted = here[:, None] & (gathered >= 0)[None, :]
            taken = tl.load(x + (x_rows + gathered[None, :]), mask=wanted, other=0.0)

        codes = _codes(packed, column, columns, start, k_filled, BITS, BLOCK_K, BLOCK_N)
        if SCALING == "element":
            EACH: tl.constexpr = BLOCK_K // GROUP
            groups = start // GROUP + tl.arange(0, EACH)
            # Groups that only fill up have no scale; their x are zeros.
            places = tl.minimum(groups, segment // GROUP - 1)[None, :] * columns + column[:, None]
            w = tl.reshape(
                _decoded(codes, OFFSET, values, CODED, EXPONENT, MANTISSA, BLOCK_K, BLOCK_N),
                (BLOCK_N, EACH, GROUP),
            )
            if ZERO == "before":
                w = w - tl.load(zero + places).to(tl.float32)[:, :, None]
            w = w * wide_scales(scale, places, SCALE_KIND)[:, :, None]
            w = tl.reshape(w, (BLOCK_N, BLOCK_K))
        else:
            places = group * columns + column
            if ZERO == "before":
                point = tl.load(zero + places).to(tl.float32)[:, None]
                w = _decoded(codes, point, values, CODED, EXPONENT, MANTISSA, BLOCK_K, BLOCK_N)
            else:
                w = _decoded(codes, OFFSET, values, CODED, EXPONENT, MANTISSA, BLOCK_K, BLOCK_N)

        if SCALING == "block":
            sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            sums = _products(taken, w, sums, OPERAND, X_PARTS, W_PARTS, INTERPRETED)
            if ZERO == "after":
                point = tl.load(zero + places).to(tl.float32) + ZERO_SHIFT
                sums -= tl.sum(taken.to(tl.float32), 1)[:, None] * point[None, :]
            total += sums * wide_scales(scale, places, SCALE_KIND)[None, :]
        else:
            total = _products(taken, w, total, OPERAND, X_PARTS, W_PARTS, INTERPRETED)

    inside = here[:, None] & (column < n)[None, :]
    at = row.to(tl.int64)[:, None] * n + column[None, :]
    if SPLIT:
        tl.store(out + part.to(tl.int64) * m * n + at, total, mask=inside)
    else:
        if SCALING == "row":
            if scale is not None:
                total *= wide_scales(scale, column, SCALE_KIND)[None, :]
        if row_scale is not None:
            total *= tl.load(row_scale + column, mask=column < n, other=0.0)[None, :]
        if bias is not None:
            total += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
        store_rounded(out + at, total, inside, INTERPRETED)


@triton.jit
def sum_kernel(
    parts,
    scale,
    row_scale,
    bias,
    out,
    size,
    n,
    splits,
    SCALING: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """parts fp32 [splits, size] → out [size] with size = m · n: added in the order of the splits,
    then what ``linear_kernel`` does after the sum."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    source = parts + at
    for _ in range(splits):
        total += tl.load(source, mask=inside, other=0.0)
        source += size
    column = at % n
    if SCALING == "row":
        if scale is not None:
            total *= wide_scales(scale, column, SCALE_KIND)
    if row_scale is not None:
        total *= tl.load(row_scale + column)
    if bias is not None:
        total += tl.load(bias + column).to(tl.float32)
    store_rounded(out + at, total, inside, INTERPRETED)
