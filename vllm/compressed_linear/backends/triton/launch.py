# SPDX-License-Identifier: Apache-2.0
"""Launch configuration of a call: a table, without a search at serving time.

The table was made without a GPU: what bounds its entries are registers and shared memory, which
``tests/backends/triton`` asserts of every architecture. What ``benchmarks.triton_tiles``
measured on a GPU goes before it (``measured.py``).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from vllm.compressed_linear.backends.triton import measured as triton_measured
from vllm.compressed_linear.backends.triton.measured import EVERY_M, TileClass, Tiles
from vllm.compressed_linear.backends.triton.spec import COLUMN_MULTIPLE, KernelSpec
from vllm.compressed_linear.machine.gpus import gpu_facts

INVARIANT_M = 64
"""Batch size by which every call is cut under VLLM_BATCH_INVARIANT=1."""

_PROGRAMS_OF_PROCESSOR = 2
_CHANNELS_OF_SPLIT = 128
_MOST_SPLITS = 16


@dataclass(frozen=True)
class Cut:
    """``tiles``; ``blocks``: steps of each program; ``splits``: programs that share the input
    channels of a tile."""

    tiles: Tiles
    blocks: int
    splits: int


M_CLASSES = (16, 32, 64, EVERY_M)
"""Largest M of each column of the table."""
_LARGE = 160 << 10
"""Bytes of shared memory of a multiprocessor from which a GPU takes the "large" rows: A100, H100
and B200 have 164 and 228 KiB, GeForce and L40S 100."""

_PARTS = (
    Tiles(16, 128, 32, 4, 4),
    Tiles(32, 128, 32, 4, 4),
    Tiles(64, 64, 32, 4, 4),
    Tiles(64, 64, 32, 4, 4),
)
_32_BIT = (
    Tiles(16, 64, 32, 4, 2),
    Tiles(32, 64, 32, 4, 2),
    Tiles(32, 64, 32, 4, 2),
    Tiles(32, 64, 32, 4, 2),
)
_TABLE: dict[tuple[str, str, str], tuple[Tiles, Tiles, Tiles, Tiles]] = {
    ("16-bit", "1-4", "large"): (
        Tiles(16, 128, 128, 4, 4),
        Tiles(32, 128, 64, 4, 4),
        Tiles(64, 128, 64, 4, 4),
        Tiles(128, 128, 64, 8, 4),
    ),
    ("16-bit", "1-4", "small"): (
        Tiles(16, 128, 64, 4, 4),
        Tiles(32, 128, 64, 4, 3),
        Tiles(64, 128, 64, 4, 3),
        Tiles(128, 128, 64, 8, 3),
    ),
    ("16-bit", "5-8", "large"): (
        Tiles(16, 128, 128, 4, 3),
        Tiles(32, 128, 64, 4, 4),
        Tiles(64, 128, 64, 4, 4),
        Tiles(128, 128, 64, 8, 4),
    ),
    ("16-bit", "5-8", "small"): (
        Tiles(16, 128, 64, 4, 3),
        Tiles(32, 128, 64, 4, 3),
        Tiles(64, 128, 64, 4, 3),
        Tiles(128, 128, 64, 8, 3),
    ),
    ("parts", "1-4", "large"): _PARTS,
    ("parts", "1-4", "small"): _PARTS,
    ("parts", "5-8", "large"): _PARTS,
    ("parts", "5-8", "small"): _PARTS,
    ("32-bit", "1-4", "large"): _32_BIT,
    ("32-bit", "1-4", "small"): _32_BIT,
    ("32-bit", "5-8", "large"): _32_BIT,
    ("32-bit", "5-8", "small"): _32_BIT,
}
"""(what is multiplied, bits of a code, shared memory) → tiles for each of ``M_CLASSES``. What is
multiplied: bf16 or fp16 once; parts of bf16; or tf32 and fp32, which take twice the space. Reasons:

* Up to 16 tokens of 16 bits the memory is the limit. Two programs on each multiprocessor must have
  so many weights on the way that it never waits: the memory's rate times 0.8 µs (taken on the safe
  side), which is 43 kB on a B200, 20 on an H100, 5 to 15 on the others. Codes of 1 to 4 bits are
  half as many bytes a step as those of 5 to 8, so they are loaded one step further ahead.
* Steps of 128 input channels take 10 % fewer instructions for each weight than steps of 64 (counted
  for sm_80), but decoded weights and loads take twice the shared memory, so that two programs fit
  large ones only.
* From 64 tokens on tiles of 64 × 128 or more use the instructions of whole warp groups (sm_90) and
  tensor memory (sm_100). Larger ones would spill: group sums are kept next to the total.
* With parts and 32 bits it is registers that are short, and instructions that take the time, on
  every GPU. Of what does not spill these take the fewest instructions for each weight.
"""


def class_of(spec: KernelSpec, m: int, capability: int) -> TileClass:
    """Key of the table of tiles."""
    parts = spec.x_parts > 1 or spec.w_parts > 1
    operand = "32-bit" if spec.operand in ("tf32", "fp32") else "parts" if parts else "16-bit"
    up_to = next(most for most in M_CLASSES if m <= most)
    return TileClass(capability, operand, "1-4" if spec.bits <= 4 else "5-8", up_to)


def declared(found: TileClass) -> Tiles:
    """The table's entry."""
    large = gpu_facts(found.capability).shared_bytes >= _LARGE
    row = _TABLE[found.operand, found.codes, "large" if large else "small"]
    return row[M_CLASSES.index(found.up_to)]


def tiles_of(spec: KernelSpec, m: int, capability: int) -> Tiles:
    """What was measured for ``m`` tokens on a GPU of that compute capability, else the table's
    entry; with steps that fit the weight."""
    found = class_of(spec, m, capability)
    tiles = triton_measured.table().get(found) or declared(found)
    fits = spec.filled & -spec.filled
    return dataclasses.replace(tiles, block_k=min(tiles.block_k, fits))


def cut(spec: KernelSpec, n: int, m: int, processors: int, capability: int) -> Cut:
    """For ``m`` tokens × ``n`` output channels on a GPU of that compute capability and so many
    multiprocessors.

    Input channels are split where there are too few tiles to fill it. How depends on nothing else,
    so the same call always adds up in the same order.
    """
    tiles = tiles_of(spec, m, capability)
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
        **spec.decoding,
        "GROUP": spec.group_size if spec.scaling == "element" else 0,
        "BLOCKS": spec.filled // cut.tiles.block_k if spec.scaling == "block" else 0,
        "SCALING": spec.scaling,
        "SCALE_KIND": scale_kind,
        "ZERO": spec.zero,
        "OPERAND": spec.operand,
        "X_PARTS": spec.x_parts,
        "W_PARTS": spec.w_parts,
        "GAPS": spec.filled != spec.segment,
        "SPLIT": cut.splits > 1,
        "BLOCK_M": cut.tiles.block_m,
        "BLOCK_N": cut.tiles.block_n,
        "BLOCK_K": cut.tiles.block_k,
    }
