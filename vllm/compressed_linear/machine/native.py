# SPDX-License-Identifier: Apache-2.0
"""The compiled library: loading it, shapes for the compiler, and its call counters.

Ops are reached as ``torch.ops.compressed_linear.<name>`` after ``load()``:

* ``packed_tile_bytes(k, group_size, element) -> int``: bytes of 16 packed output channels
* ``pack_rows(packed!, rows, row_start, n, group_size, element)``: writes codes uint8 [rows, k] (or
  floats of the element's dtype) as output channels from ``row_start``, a multiple of 16, on; the
  chunk must end at a multiple of 16 or at n
* ``repack_codes(packed!, stored, order, k_at, n_at, widths, flip, n_first, rows, blank,
  blank_code, row_start, n, group_size, element)``: the same from codes (not floats) as a
  checkpoint has them, see below
* ``place(packed!)``: asks for huge pages for a new tensor [tiles, ...], and lets the threads that
  ``linear`` reads it with be the first to write to it; its content is undefined
* ``unpack_rows(packed, n, k, group_size, element) -> Tensor`` [n, k]: the inverse, all rows
* ``linear(x, packed, scale, zero, bias, perm, table, n, k, group_size, element, element_bias,
  out_dtype, row_scale=None, prescale=None, activation=None, activation_group=-1,
  activation_maximum=0.0, input_scale=None, input_zero=None) -> Tensor`` [m, n], see below
* ``embedding(ids, packed, scale, zero, perm, table, n, k, group_size, element, element_bias,
  channels, out_dtype, row_scale=None) -> Tensor`` [m, channels], see below
* ``marlin_pack_rows``, ``marlin_repack_codes``, ``marlin_unpack_rows``, ``marlin_scales``,
  ``marlin_zeros``: Marlin's layout for GPUs, see below
* ``isa()``, ``supported_isas()``, ``select_isa(name)`` (for tests), ``layout_id()``
* ``op_calls(name)``, ``op_call_lines()``, ``reset_op_calls()``

``linear`` computes y = row_scale · (x̂ ŵᵀ) + bias with x̂ = quantise(x[:, perm] · prescale) (a −1
in ``perm`` is a zero) and ŵ[n,k] = scale[n,g] · (code − element_bias − zero[n,g]), or scale ·
(table[code] − zero), g = k // group_size. x: [m, K] bfloat16, float16 or float32, any strides.
packed: uint8 [tiles, bytes per tile], one tile for each 16 output channels. scale and zero:
[tiles, groups, 16], any of the three float dtypes; scale also float8_e4m3fn, or uint8 exponents of
two (e8m0). bias: [n]. row_scale: float32 [n]. perm: int32 [k]. table: [2^bits], bfloat16 or
float32. prescale: float32 [k]. activation: an ``ActivationSpec.kind``, with its group size (−1
without groups) and ``maximum``; input_scale: float32 [1] and input_zero: int32 [1] where it is
static. ``element`` is ``uint1`` … ``uint8``, ``e4m3``, ``e5m2``, ``bf16``, ``fp16`` or ``fp32``.
Sums are fp32; the AVX-512 path takes denormals of activations and partial products as zero. A
row's result does not depend on the other rows nor on the number of threads.

``repack_codes`` reads ``stored``, integers of two axes in which codes are streams of bits, lowest
first: ``n_major`` [N, containers along K], ``k_words`` [containers along K, N] (up to 32 bits each)
or ``k_major`` [K, containers along N]. A code is fields of ``widths`` bits, lowest first, with
``flip`` xored in. k_at: int32 [fields, k], the bit at which channel k's field begins, or in
``k_major`` [k], its row; negative for a channel of code 0. n_at (``k_major`` only): int32 [fields,
rows], the bit of each output channel. The first output channel is ``n_first`` along N; ``rows`` of
them are stored and ``blank`` more are all ``blank_code``. They become output channels from
``row_start`` on.

``embedding`` gives rows of the same row_scale · ŵ, of which ``ids`` int64 [m] holds the numbers, in
fp32 and rounded once. Column c is the weight of channel c of x: with ``perm`` the sum over the k
with perm[k] = c. ``channels`` is the width of x, k without ``perm``.

For 8-bit integer activations there is a layout of its own (``layout_id_int8()``), and engines of
their own (``isa_int8()``, ``supported_isas_int8()``, ``select_isa_int8(name)``):

* ``packed_tile_bytes_int8``, ``pack_rows_int8``, ``repack_codes_int8``, ``unpack_rows_int8``: as
  above, for ``uint1`` … ``uint8``
* ``code_sums_int8(packed, n, k, group_size, element, activation_group) -> Tensor`` int32
  [tiles, segments, 16]: sums of codes over what is added up as integers
* ``linear_int8(x, packed, scale, zero, row_scale, bias, perm, prescale, input_scale, input_zero,
  code_sums, n, k, group_size, element, element_bias, symmetric, activation_group, maximum,
  out_dtype) -> Tensor`` [m, n]

``linear_int8`` computes y = x̂ ŵᵀ + bias with x̂ as ``spec/activation.py`` says of an 8-bit integer:
dynamic, in groups of ``activation_group`` channels of x[:, perm] · prescale (0: the token), with
``maximum`` if ``symmetric``; or static, with ``input_scale`` float32 [1] and, unless ``symmetric``,
``input_zero`` int32 [1]. ``code_sums`` are needed unless ``symmetric``. The other tensors are those
of ``linear``. Products are added up as integers, exactly, and scaled in fp32 once for each run of
channels with one scale of x and of ŵ; every instruction set gives the same bits.

Marlin's layout (``csrc/layouts/marlin.h``) is for N a multiple of 64 and K of 16, and for elements
``uint4``, ``uint8``, ``e4m3`` and ``e5m2``. On the CPU there are all of these ops; on CUDA devices,
if ``cuda_available()``, those but ``marlin_unpack_rows``, with ``k_at`` and ``n_at`` on the CPU and
one field to a code:

* ``marlin_pack_rows(packed!, rows, row_start, n, element)``: codes uint8 [rows, k] into ``packed``
  int32 [k / 16, n · bits / 2]
* ``marlin_repack_codes(packed!, stored, order, k_at, n_at, widths, flip, n_first, rows, blank,
  blank_code, row_start, n, element)``: the same from a checkpoint's layout, as ``repack_codes``
* ``marlin_unpack_rows(packed, n, k, element) -> Tensor`` uint8 [n, k]: the inverse
* ``marlin_scales(scale, columns) -> Tensor`` [G, n]: scales [n, G] of up to 32 bits, any strides,
  in Marlin's order of output channels: ``grouped``; ``channel`` where G = 1, and for a bias [n, 1];
  ``byte`` for groups with scales of one byte
* ``marlin_zeros(zero, bits) -> Tensor`` int32 [G, n · bits / 32]: zero points uint8 [n, G]
* ``marlin_gemm(x, weight, scale, zero, codebook, order, row_scale, bias, workspace, n, k,
  group_size, element, element_bias, out_dtype) -> Tensor`` [m, n]: on CUDA devices only

``marlin_gemm`` computes y = row_scale · (x[:, order] ŵᵀ) + bias with ŵ[n,k] = scale[n,g] · (code −
element_bias − zero[n,g]), or scale · value for the elements ``e4m3``, ``e2m1`` and ``codebook4``.
x: [M, K] float16 or bfloat16, any strides. weight, scale and zero lie as Marlin's layout has them,
scale in ``channel`` columns if G = 1, in ``byte`` columns if it is of one byte, else in ``grouped``
ones; zero needs an element_bias of 0. group_size: k, 16, 32 or a multiple of 64. codebook: float32
[16], rounded to the dtype of x. order: int32 [k], −1 for a channel of zeros. row_scale: float32
[n]. bias: [n]. workspace: int32 [1024], zero before and after each call; calls that run at the same
time need one each. Groups are added up in fp32 and then scaled. The same call gives the same bits,
but how K is cut depends on M and on the GPU, so a row's bits do depend on the other rows.
"""

from __future__ import annotations

import threading
from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[1] / "lib" / "libcompressed_linear.so"
CUDA_LIBRARY = LIBRARY.with_name("libcompressed_linear_cuda.so")
"""CUDA kernels of some of the ops; built where torch has CUDA and nvcc is there."""
TILE = 16
"""Output channels that are packed together."""
MARLIN_WORKSPACE = 1024
"""Counters that ``marlin_gemm`` needs."""

_lock = threading.Lock()
_reason: str | None = "not loaded yet"
_cuda_reason: str | None = "not loaded yet"


def load() -> None:
    """Loads the library and registers the shape functions; does nothing the second time.

    Raises ``RuntimeError`` when it was not built or does not fit the installed torch.
    """
    global _reason, _cuda_reason
    if _reason is None:
        return
    with _lock:
        if _reason is None:
            return
        if not LIBRARY.is_file():
            _reason = f"native library not built ({LIBRARY.name} is not in {LIBRARY.parent})"
            raise RuntimeError(_reason)
        try:
            torch.ops.load_library(str(LIBRARY))
        except OSError as error:
            _reason = f"native library cannot be loaded with torch {torch.__version__}: {error}"
            raise RuntimeError(_reason) from error
        _register_fakes()
        _cuda_reason = _load_cuda()
        _reason = None


def _load_cuda() -> str | None:
    """Loads the CUDA kernels; None, or why there are none. Touches no GPU."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if not CUDA_LIBRARY.is_file():
        return f"CUDA kernels not built ({CUDA_LIBRARY.name} is not in {CUDA_LIBRARY.parent})"
    try:
        torch.ops.load_library(str(CUDA_LIBRARY))
    except OSError as error:
        return f"CUDA kernels cannot be loaded with torch {torch.__version__}: {error}"
    return None


def available() -> str | None:
    """None if the ops can be called, else why not. Loads the library if need be."""
    try:
        load()
    except RuntimeError as error:
        return str(error)
    return None


def cuda_available() -> str | None:
    """None if there are CUDA kernels of the ops that may have them, else why not. Whether there is
    a GPU to run them on is another question. Loads the libraries if need be."""
    reason = available()
    return _cuda_reason if reason is None else reason


def isa() -> str:
    """Instruction set in use: avx512bf16, avx512, avx2 or generic."""
    load()
    return str(torch.ops.compressed_linear.isa())


def supported_isas() -> list[str]:
    """Instruction sets this processor can run, best first."""
    load()
    return str(torch.ops.compressed_linear.supported_isas()).split()


def layout_id() -> str:
    """Name of the packed layout; part of the key of anything that stores packed weights."""
    load()
    return str(torch.ops.compressed_linear.layout_id())


def isa_int8() -> str:
    """Instruction set in use for integer activations: avx512vnni, amx, avxvnni, avx512bw, avx2,
    i8mm, dotprod, neon or generic."""
    load()
    return str(torch.ops.compressed_linear.isa_int8())


def supported_isas_int8() -> list[str]:
    """Instruction sets for integer activations that this processor can run, best first."""
    load()
    return str(torch.ops.compressed_linear.supported_isas_int8()).split()


def layout_id_int8() -> str:
    """The same for the layout of integer activations."""
    load()
    return str(torch.ops.compressed_linear.layout_id_int8())


def call_counts() -> dict[str, int]:
    """Calls since the start or the last reset, for example ``{"linear/avx512bf16/uint4": 12}``."""
    load()
    lines = str(torch.ops.compressed_linear.op_call_lines()).splitlines()
    return {name: int(count) for name, count in (line.split() for line in lines)}


def reset_call_counts() -> None:
    """Sets every counter to zero."""
    load()
    torch.ops.compressed_linear.reset_op_calls()


_ROW_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _fake_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    perm: torch.Tensor | None,
    table: torch.Tensor | None,
    n: int,
    k: int,
    group_size: int,
    element: str,
    element_bias: int,
    out_dtype: torch.dtype,
    row_scale: torch.Tensor | None = None,
    prescale: torch.Tensor | None = None,
    activation: str | None = None,
    activation_group: int = -1,
    activation_maximum: float = 0.0,
    input_scale: torch.Tensor | None = None,
    input_zero: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], n), dtype=out_dtype)


def _fake_embedding(
    ids: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    perm: torch.Tensor | None,
    table: torch.Tensor | None,
    n: int,
    k: int,
    group_size: int,
    element: str,
    element_bias: int,
    channels: int,
    out_dtype: torch.dtype,
    row_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    return packed.new_empty((ids.shape[0], channels), dtype=out_dtype)


def _fake_unpack_rows(
    packed: torch.Tensor, n: int, k: int, group_size: int, element: str
) -> torch.Tensor:
    return packed.new_empty((n, k), dtype=_ROW_DTYPES.get(element, torch.uint8))


def _fake_linear_int8(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    perm: torch.Tensor | None,
    prescale: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    input_zero: torch.Tensor | None,
    code_sums: torch.Tensor | None,
    n: int,
    k: int,
    group_size: int,
    element: str,
    element_bias: int,
    symmetric: bool,
    activation_group: int,
    maximum: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], n), dtype=out_dtype)


def _fake_marlin_unpack_rows(packed: torch.Tensor, n: int, k: int, element: str) -> torch.Tensor:
    return packed.new_empty((n, k), dtype=torch.uint8)


def _fake_marlin_scales(scale: torch.Tensor, columns: str) -> torch.Tensor:
    return scale.new_empty((scale.shape[1], scale.shape[0]))


def _fake_marlin_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    codebook: torch.Tensor | None,
    order: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    workspace: torch.Tensor,
    n: int,
    k: int,
    group_size: int,
    element: str,
    element_bias: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], n), dtype=out_dtype)


def _fake_marlin_zeros(zero: torch.Tensor, bits: int) -> torch.Tensor:
    return zero.new_empty((zero.shape[1], zero.shape[0] * bits // 32), dtype=torch.int32)


def _register_fakes() -> None:
    torch.library.register_fake("compressed_linear::marlin_unpack_rows", _fake_marlin_unpack_rows)
    torch.library.register_fake("compressed_linear::marlin_scales", _fake_marlin_scales)
    torch.library.register_fake("compressed_linear::marlin_zeros", _fake_marlin_zeros)
    torch.library.register_fake("compressed_linear::marlin_gemm", _fake_marlin_gemm)
    torch.library.register_fake("compressed_linear::linear_int8", _fake_linear_int8)
    torch.library.register_fake("compressed_linear::unpack_rows_int8", _fake_unpack_rows)
    torch.library.register_fake("compressed_linear::linear", _fake_linear)
    torch.library.register_fake("compressed_linear::embedding", _fake_embedding)
    torch.library.register_fake("compressed_linear::unpack_rows", _fake_unpack_rows)
