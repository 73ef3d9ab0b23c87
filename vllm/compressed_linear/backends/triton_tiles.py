# SPDX-License-Identifier: Apache-2.0
"""How the work of one call is cut into programs: a table, not a search at serving time.

The table was made without a GPU. Its entries keep registers and shared memory of every architecture
within what ``tests/test_triton_compile.py`` asserts; which of several is fastest was not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.compressed_linear.backends.triton_spec import COLUMN_MULTIPLE, KernelSpec

INVARIANT_M = 64
"""Batch size by which every call is cut under VLLM_BATCH_INVARIANT=1."""

_PROGRAMS_OF_PROCESSOR = 2
_CHANNELS_OF_SPLIT = 128
_MOST_SPLITS = 16


@dataclass(frozen=True)
class Tiles:
    """A program's part: ``block_m`` tokens × ``block_n`` output channels, in steps of ``block_k``
    input channels, by ``warps`` warps, with ``stages`` steps loaded ahead."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Cut:
    """``tiles``; ``blocks``: steps of each program; ``splits``: programs that share the input
    channels of a tile."""

    tiles: Tiles
    blocks: int
    splits: int


_HALF: tuple[tuple[int, Tiles], ...] = (
    (16, Tiles(16, 128, 64, 4, 4)),
    (32, Tiles(32, 128, 64, 4, 3)),
    (64, Tiles(64, 128, 64, 4, 3)),
    (1 << 62, Tiles(128, 128, 64, 8, 3)),
)
"""(largest M, tiles) where bf16 or fp16 is multiplied once."""

_PARTS: tuple[tuple[int, Tiles], ...] = (
    (16, Tiles(16, 128, 64, 4, 3)),
    (32, Tiles(32, 128, 64, 4, 3)),
    (1 << 62, Tiles(64, 128, 32, 4, 3)),
)
"""Where there are parts of bf16."""

_WIDE: tuple[tuple[int, Tiles], ...] = (
    (16, Tiles(16, 64, 32, 4, 2)),
    (1 << 62, Tiles(32, 64, 32, 4, 2)),
)
"""Where tf32, or fp32 without tensor cores, is multiplied: operands of twice the size."""


def tiles_of(spec: KernelSpec, m: int) -> Tiles:
    """The table's entry for ``m`` tokens, with steps that fit the weight."""
    table = _HALF if spec.x_parts == spec.w_parts == 1 else _PARTS
    table = _WIDE if spec.operand in ("tf32", "fp32") else table
    found = next(tiles for most, tiles in table if m <= most)
    fits = spec.filled & -spec.filled
    return Tiles(found.block_m, found.block_n, min(found.block_k, fits), found.warps, found.stages)


def cut(spec: KernelSpec, n: int, m: int, processors: int) -> Cut:
    """For ``m`` tokens × ``n`` output channels on a GPU of so many multiprocessors.

    Input channels are split where there are too few tiles to fill it. How depends on nothing else,
    so the same call always adds up in the same order.
    """
    tiles = tiles_of(spec, m)
    assert COLUMN_MULTIPLE % tiles.block_n == 0
    total = spec.k_filled // tiles.block_k
    programs = -(-m // tiles.block_m) * -(-n // tiles.block_n)
    wanted = _PROGRAMS_OF_PROCESSOR * processors // programs
    most = spec.k_filled // _CHANNELS_OF_SPLIT
    splits = max(min(wanted, most, _MOST_SPLITS), 1)
    blocks = -(-total // splits)
    return Cut(tiles, blocks, -(-total // blocks))


def constants(spec: KernelSpec, cut: Cut, scale_kind: str) -> dict[str, int | str | bool]:
    """What ``triton_kernel.linear_kernel`` is compiled for."""
    return {
        "BITS": spec.bits,
        "CODED": spec.coded,
        "OFFSET": spec.offset,
        "EXPONENT": spec.exponent,
        "MANTISSA": spec.mantissa,
        "GROUP": spec.group_size if spec.scaling == "element" else 0,
        "BLOCKS": spec.filled // cut.tiles.block_k if spec.scaling == "block" else 0,
        "SCALING": spec.scaling,
        "SCALE_KIND": scale_kind,
        "ZERO": spec.zero,
        "ZERO_SHIFT": spec.zero_shift,
        "OPERAND": spec.operand,
        "X_PARTS": spec.x_parts,
        "W_PARTS": spec.w_parts,
        "GAPS": spec.filled != spec.segment,
        "SPLIT": cut.splits > 1,
        "BLOCK_M": cut.tiles.block_m,
        "BLOCK_N": cut.tiles.block_n,
        "BLOCK_K": cut.tiles.block_k,
    }
