# SPDX-License-Identifier: Apache-2.0
"""Triton kernel for every weight that is stored as codes, for layers that Marlin declines.

Integers of 1 to 8 bits with any zero points, codebooks, floats of 4 to 8 bits, scales of every
dtype and any group size, reordered channels. Activations that are quantized, scaled or transformed
are made by ``activation.prepare_input`` and multiplied in fp32 precision.

It was tested in Triton's interpreter and compiled for every architecture, and has never run on a
GPU. Modules of this folder: ``spec`` (how a weight is multiplied), ``packing`` (layout of words),
``launch`` and ``measured`` (sizes of tiles), ``kernel``, and ``lookup`` (rows of tables).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping

import torch

from vllm.compressed_linear.backends.base import Capabilities, QuantLinearMethod
from vllm.compressed_linear.backends.shared.call_counter import CallCounter
from vllm.compressed_linear.backends.shared.side_tensors import small_bytes, small_tensors
from vllm.compressed_linear.backends.triton import launch, runtime
from vllm.compressed_linear.backends.triton.lookup import triton_embedding
from vllm.compressed_linear.backends.triton.packing import (
    columns,
    pack_weights,
    packed_rows,
    scale_dtype,
    zero_dtype,
)
from vllm.compressed_linear.backends.triton.runtime import (
    check_device,
    check_packed,
    interpreted,
    missing,
)
from vllm.compressed_linear.backends.triton.spec import KernelSpec
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.machine.cost import roofline
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec import elements
from vllm.compressed_linear.spec.activation import gather_channels, prepare_input
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor, activation_kinds
from vllm.compressed_linear.spec.elements import torch_dtype

CALLS = CallCounter()
_OP = "compressed_linear::triton_linear"

_EFFICIENCY = 0.4
"""Share of what ``mma.sync`` does at best. A guess: weights take the way through shared memory.
Tiles of 64 tokens use the faster instructions of 9.0 and 10.0; until that is measured it is not
counted, or a kernel that never ran would go before vLLM's."""
_READ_SHARE = 0.7
"""Share of the memory's rate; a guess, too."""
_CALL_SECONDS = 4e-6
"""Two kernels instead of one where input channels are split."""
_PREPARED_BYTES = 24.0
"""Read and written for each activation while x is prepared in several passes of fp32."""
GATHER_ABOVE = 32
"""Tokens above which channels are gathered once, and not by every program."""


@torch.library.custom_op("compressed_linear::triton_linear", mutates_args=())
def triton_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    perm: torch.Tensor | None,
    prescale: torch.Tensor | None,
    table: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    input_zero: torch.Tensor | None,
    n: int,
    scale_kind: str,
    spec: str,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    """x [M, K], any strides → [M, n]. ``spec``: a ``KernelSpec`` as JSON, and what the other
    tensors are, see ``TritonBackend``. ``scale_kind``: "e4m3" or "e8m0" for scales in bytes, else
    "plain"."""
    CALLS.add()
    constants = KernelSpec.parse(spec)
    _check(x, packed, perm, n, constants)
    out = x.new_empty(x.shape[0], n, dtype=output_dtype)
    if not out.numel():
        return out
    if constants.activation or constants.hadamard or prescale is not None:
        x = prepare_input(
            x,
            constants.quantized_as,
            hadamard_block=constants.hadamard,
            order=perm,
            prescale=prescale,
            input_scale=input_scale,
            input_zero=input_zero,
        )
        perm = None
    elif perm is not None and x.shape[0] > GATHER_ABOVE:
        x = gather_channels(x, perm)
        perm = None
    if x.stride(1) != 1:
        x = x.contiguous()
    on_device = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    with on_device:
        _launch(x, packed, scale, zero, row_scale, bias, perm, table, out, scale_kind, constants)
    return out


@triton_linear.register_fake
def _(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    perm: torch.Tensor | None,
    prescale: torch.Tensor | None,
    table: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    input_zero: torch.Tensor | None,
    n: int,
    scale_kind: str,
    spec: str,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], n, dtype=output_dtype)


def _check(
    x: torch.Tensor, packed: torch.Tensor, perm: torch.Tensor | None, n: int, spec: KernelSpec
) -> None:
    """``ValueError`` for what would be read out of bounds, ``RuntimeError`` off a GPU."""
    check_device(_OP, "x", x)
    check_packed(_OP, packed, x.device, n, spec)
    if x.dim() != 2 or x.shape[1] != spec.channels:
        raise ValueError(f"{_OP}: x has shape {list(x.shape)}, expected [M, {spec.channels}]")
    if perm is not None and perm.shape != (spec.k,):
        raise ValueError(f"{_OP}: perm has shape {list(perm.shape)}, expected [{spec.k}]")


def _launch(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    perm: torch.Tensor | None,
    table: torch.Tensor | None,
    out: torch.Tensor,
    scale_kind: str,
    spec: KernelSpec,
) -> None:
    # A local import: Triton may be absent, and decides at import whether it interprets.
    from vllm.compressed_linear.backends.triton import kernel

    m, n = out.shape
    same = os.environ.get("VLLM_BATCH_INVARIANT") == "1"
    counted = launch.INVARIANT_M if same else m
    cut = launch.cut(spec, n, counted, *runtime.gpu(x.device))
    tiles, split = cut.tiles, cut.splits > 1
    target = x.new_empty(cut.splits, m, n, dtype=torch.float32) if split else out
    grid = (-(-m // tiles.block_m) * -(-n // tiles.block_n), cut.splits)
    kernel.linear_kernel[grid](
        x,
        packed,
        scale,
        zero,
        None if split else row_scale,
        None if split else bias,
        perm,
        table,
        target,
        m,
        n,
        packed.shape[1],
        x.stride(0),
        spec.k_filled,
        spec.segment,
        cut.blocks,
        **launch.constants(spec, cut, scale_kind),
        INTERPRETED=interpreted(),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if split:
        block = 256
        kernel.sum_kernel[(-(-m * n // block),)](
            target,
            scale,
            row_scale,
            bias,
            out,
            m * n,
            n,
            cut.splits,
            SCALING=spec.scaling,
            SCALE_KIND=scale_kind,
            BLOCK=block,
            INTERPRETED=interpreted(),
        )


class TritonBackend(QuantLinearMethod):
    """Prepared tensors: ``packed`` int32 [words, columns], see ``packing.py`` (columns: N filled
    up); ``scale`` and ``zero`` [G, columns], in the checkpoint's dtype, floats of 8 bits as uint8,
    integer zero points as bfloat16; ``table`` float32 [2^bits] of a codebook; ``perm`` int32 [K],
    ``row_scale`` float32 [N], ``prescale`` float32 [K], ``input_scale`` float32 [1] and
    ``input_zero`` int32 [1]. Only ``packed`` is always there.
    """

    name = "triton"
    capabilities = Capabilities(
        devices=frozenset({"cuda"}),
        integer_bits=frozenset(range(1, 9)),
        other_elements=frozenset(element.name for element in elements.SMALL_FLOATS),
        codebooks=True,
        scale_dtypes=frozenset({"bfloat16", "float16", "float32", "float8_e4m3fn", "e8m0"}),
        zero_kinds=frozenset({"integer", "float"}),
        channel_order=True,
        padded_order=True,
        row_scale=True,
        activations=activation_kinds(),
        prescale=True,
        transforms=True,
        lookup=True,
        min_capability=80,
    )

    def __init__(self, descriptor: CompressedLinearDescriptor) -> None:
        super().__init__(descriptor)
        self.output_dtype = torch_dtype(descriptor.output_dtype)
        self.scale_kind = scale_kind(descriptor)
        # Made here because the compiler may hold numbers symbolic, and a string must not be.
        self.spec = KernelSpec.of(descriptor).text if descriptor.k else ""

    @classmethod
    def further_reasons(
        cls, descriptor: CompressedLinearDescriptor, platform: Platform
    ) -> Iterable[str]:
        if (reason := missing()) is not None:
            yield reason
        if descriptor.k == 0:
            yield "no input channels (K = 0)"

    @classmethod
    def variant(cls, descriptor: CompressedLinearDescriptor, platform: Platform) -> str:
        spec = KernelSpec.of(descriptor)
        parts = max(spec.x_parts, spec.w_parts)
        return spec.operand if parts == 1 else f"{spec.operand} in {parts} parts"

    @classmethod
    def seconds(cls, descriptor: CompressedLinearDescriptor, platform: Platform, m: int) -> float:
        d, spec = descriptor, KernelSpec.of(descriptor)
        read = 4.0 * packed_rows(spec) * d.n + _scale_bytes(d, d.n)
        if d.activation is not None or d.prescale is not None or d.transform is not None:
            read += _PREPARED_BYTES * m * d.k
        # tf32 has half of the rate of bf16.
        times = spec.x_parts * spec.w_parts * (2 if spec.operand == "tf32" else 1)
        # A tile of tokens is multiplied whole.
        block = launch.tiles_of(spec, m, platform.capability or 80).block_m
        return roofline(
            platform,
            read_bytes=read / _READ_SHARE,
            operations=2.0 * -(-m // block) * block * d.n * spec.k_filled * times,
            arithmetic="fp32" if spec.operand == "fp32" else "mma",
            efficiency=_EFFICIENCY,
            call_seconds=_CALL_SECONDS,
        )

    @classmethod
    def hardware_tested(cls, platform: Platform, variant: str = "") -> bool:
        return False

    @classmethod
    def prepared_bytes(cls, descriptor: CompressedLinearDescriptor) -> int | None:
        d, spec, wide = descriptor, KernelSpec.of(descriptor), columns(descriptor.n)
        table = 4 << spec.bits if spec.coded == "table" else 0
        packed = 4 * packed_rows(spec) * wide
        return packed + _scale_bytes(d, wide) + table + small_bytes(d, d.activation)

    @classmethod
    def layout_version(
        cls, descriptor: CompressedLinearDescriptor, platform: Platform
    ) -> str | None:
        return f"triton-1 {KernelSpec.of(descriptor).text}"

    def prep_weights_for_execution(self, weights: CompressedWeights) -> dict[str, torch.Tensor]:
        d, spec = self.descriptor, KernelSpec.parse(self.spec)
        tensors = pack_weights(weights, d, spec) | small_tensors(weights, d.activation)
        if spec.coded == "table":
            tensors["table"] = d.weight.element.table().to(weights.device)
        return tensors

    def apply(
        self,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        out = torch.ops.compressed_linear.triton_linear(
            x.reshape(-1, x.shape[-1]),
            tensors["packed"],
            tensors.get("scale"),
            tensors.get("zero"),
            tensors.get("row_scale"),
            bias,
            tensors.get("perm"),
            tensors.get("prescale"),
            tensors.get("table"),
            tensors.get("input_scale"),
            tensors.get("input_zero"),
            self.descriptor.n,
            self.scale_kind,
            self.spec,
            self.output_dtype,
        )
        return out.reshape(*x.shape[:-1], self.descriptor.n)

    def embedding(self, tensors: Mapping[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        rows = triton_embedding(
            ids.reshape(-1),
            tensors["packed"],
            tensors.get("scale"),
            tensors.get("zero"),
            tensors.get("row_scale"),
            tensors.get("perm"),
            tensors.get("table"),
            self.descriptor.n,
            self.scale_kind,
            self.spec,
            self.output_dtype,
        )
        return rows.reshape(*ids.shape, self.descriptor.in_features)


def scale_kind(d: CompressedLinearDescriptor) -> str:
    """How scales in bytes are read: "e4m3", "e8m0", or "plain" for others."""
    dtype = "" if d.weight.scale is None else d.weight.scale.dtype
    return {"float8_e4m3fn": "e4m3", "e8m0": "e8m0"}.get(dtype, "plain")


def _scale_bytes(d: CompressedLinearDescriptor, channels: int) -> int:
    """Bytes of the scales and zero points of that many output channels."""
    dtypes = (scale_dtype(d), zero_dtype(d))
    return channels * d.groups * sum(dtype.itemsize for dtype in dtypes if dtype is not None)
