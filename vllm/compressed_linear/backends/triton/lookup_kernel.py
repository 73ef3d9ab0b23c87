# SPDX-License-Identifier: Apache-2.0
"""The kernel that looks up rows of an embedding table. Importing this needs Triton."""

# Arguments have the types of Triton's language, not of Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from vllm.compressed_linear.backends.triton.kernel import small_float, store_rounded, wide_scales


@triton.jit
def _field(packed, row, place, stride, k_filled, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """int32 [rows, places]: what the plane of WIDTH bits has of the codes, at their place."""
    FIELDS: tl.constexpr = 32 // WIDTH
    # The wider planes come first, and hold the lower bits.
    BELOW: tl.constexpr = BITS & ~(2 * WIDTH - 1)
    word = (k_filled * BELOW // 32 + place // FIELDS).to(tl.int64)
    words = tl.load(packed + word[None, :] * stride + row[:, None])
    return ((words >> (place % FIELDS * WIDTH)[None, :]) & ((1 << WIDTH) - 1)) << BELOW


@triton.jit
def lookup_kernel(
    ids,
    packed,
    scale,
    zero,
    row_scale,
    order,
    table,
    out,
    m,
    n,
    columns,
    k,
    k_filled,
    channels,
    segment,
    filled,
    group_size,
    BITS: tl.constexpr,
    CODED: tl.constexpr,
    OFFSET: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    ZERO_SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Grid (ROWS of ids, blocks of BLOCK channels). ids [m]; packed int32 [words, columns], scale
    and zero [G, columns], row_scale [n], order int32 [k] and table fp32 [2^BITS] as
    ``linear_kernel`` has them; out [m, channels], of zeros before where there is an order, which
    names no channel twice.

    An id out of range gives a row of NaN, since a kernel cannot raise errors.
    """
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wanted = at < m
    row = tl.load(ids + at, mask=wanted, other=0).to(tl.int64)
    known = (row >= 0) & (row < n)
    row = tl.where(known, row, 0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = channel < k
    channel = tl.where(within, channel, 0)
    place = channel // segment * filled + channel % segment

    codes = tl.zeros((ROWS, BLOCK), tl.int32)
    if BITS & 8:
        codes |= _field(packed, row, place, columns, k_filled, 8, BITS)
    if BITS & 4:
        codes |= _field(packed, row, place, columns, k_filled, 4, BITS)
    if BITS & 2:
        codes |= _field(packed, row, place, columns, k_filled, 2, BITS)
    if BITS & 1:
        codes |= _field(packed, row, place, columns, k_filled, 1, BITS)
    if CODED == "integer":
        values = (codes - OFFSET).to(tl.float32)
    elif CODED == "float":
        values = small_float(codes, EXPONENT, MANTISSA)
    else:
        values = tl.load(table + codes)

    groups = (channel // group_size).to(tl.int64)[None, :] * columns + row[:, None]
    if zero is not None:
        values -= tl.load(zero + groups).to(tl.float32) + ZERO_SHIFT
    if scale is not None:
        values *= wide_scales(scale, groups, SCALE_KIND)
    if row_scale is not None:
        values *= tl.load(row_scale + row)[:, None]
    values = tl.where(known[:, None], values, float("nan"))

    if order is None:
        target = channel
    else:
        target = tl.load(order + channel)
        within = within & (target >= 0)
    places = out + at.to(tl.int64)[:, None] * channels + target[None, :]
    store_rounded(places, values, wanted[:, None] & within[None, :], INTERPRETED)
