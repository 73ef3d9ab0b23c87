# SPDX-License-Identifier: Apache-2.0
"""CPU kernels that multiply integer weights with 8-bit integer activations.

``cpu_int8`` runs layers whose activations the checkpoint quantizes to int8. ``cpu_int8_fast`` runs
layers with plain activations the same way: it rounds x to int8 in groups of 32 channels, which the
checkpoint does not ask for. That is another numerical contract, so it must be requested by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from vllm.compressed_linear.backends.base import Capabilities, QuantLinearMethod
from vllm.compressed_linear.backends.contract import Contract
from vllm.compressed_linear.backends.cpu import paths
from vllm.compressed_linear.backends.cpu.costs import CallClass
from vllm.compressed_linear.backends.cpu.packing import new_packed, pack_codes, pack_scales
from vllm.compressed_linear.backends.cpu.product import make_problem, multiply
from vllm.compressed_linear.backends.shared.side_tensors import (
    scale_bytes,
    scale_dtype,
    small_bytes,
    small_tensors,
    zero_dtype,
)
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.machine import arena, native
from vllm.compressed_linear.machine.cost import overlapped
from vllm.compressed_linear.machine.platform import NATIVE_LIBRARY, Platform
from vllm.compressed_linear.spec.descriptor import ActivationSpec, CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import INT8, torch_dtype

_CALL_SECONDS = 5e-6

QUAD = 4
"""Input channels that a byte dot product takes at once; groups begin at a multiple of it."""


class CpuInt8Backend(QuantLinearMethod):
    """Integer kernels on the packed layout of ``csrc/layouts/quads.h``.

    Prepared tensors (T = ceil(N / 16) tiles): ``packed`` uint8 [T, bytes]; ``scale`` and ``zero``
    [T, G, 16]; ``row_scale`` float32 [N]; ``prescale`` float32 [K]; ``perm`` int32 [K];
    ``input_scale`` float32 [1] and ``input_zero`` int32 [1] of static activations; ``code_sums``
    int32 [T, segments, 16] for asymmetric ones; ``problem`` int64, the constants of a call. Only
    ``packed``, ``scale`` and ``problem`` are always there.
    """

    name = "cpu_int8"
    batch_invariant = True
    capabilities = Capabilities(
        devices=frozenset({"cpu"}),
        integer_bits=frozenset(range(1, 9)),
        zero_kinds=frozenset({"integer", "float"}),
        channel_order=True,
        padded_order=True,
        row_scale=True,
        prescale=True,
        activations=frozenset(
            ActivationSpec(INT8, dynamic, granularity, symmetric, group).kind
            for dynamic, granularity, group in (
                (True, "token", -1),
                (True, "group", 32),
                (False, "tensor", -1),
            )
            for symmetric in (True, False)
        ),
        required_ops=(NATIVE_LIBRARY,),
    )

    def __init__(self, descriptor: CompressedLinearDescriptor) -> None:
        super().__init__(descriptor)
        paths.install_here()
        # Made here because the compiler may hold numbers symbolic, and a string must not be.
        self.element = f"uint{descriptor.weight.element.bits}"
        self.output_dtype = torch_dtype(descriptor.output_dtype)

    @classmethod
    def _activation(cls, descriptor: CompressedLinearDescriptor) -> ActivationSpec | None:
        """Quantization of x."""
        return descriptor.activation

    @classmethod
    def further_reasons(
        cls, descriptor: CompressedLinearDescriptor, platform: Platform
    ) -> Iterable[str]:
        if descriptor.k == 0:
            yield "no input channels (K = 0)"
        activation = cls._activation(descriptor)
        if activation is None:
            yield "activations that are not quantized (supported: int8)"
        elif activation.granularity == "group" and activation.group_size < descriptor.k:
            size, group = activation.group_size, descriptor.group_size
            if size % QUAD:
                yield f"activations in groups of {size} (supported: multiples of {QUAD})"
            if descriptor.groups > 1 and group % QUAD and size % group:
                yield (
                    f"activations in groups of {size} with weights in groups of {group} "
                    f"(supported: multiples of these, or weights in groups of a multiple of {QUAD})"
                )

    @classmethod
    def variant(cls, descriptor: CompressedLinearDescriptor, platform: Platform) -> str:
        return paths.in_words(paths.paths_of(cls.call_class(descriptor), platform))

    @classmethod
    def prepared_variant(cls, descriptor: CompressedLinearDescriptor, platform: Platform) -> str:
        # All instruction sets read one layout, and a call picks one.
        return ""

    @classmethod
    def call_class(cls, d: CompressedLinearDescriptor) -> CallClass:
        """The calls whose paths those of ``d`` take."""
        activation = cls._activation(d)
        assert activation is not None
        # A group of all channels is a token's.
        grouped = 0 < _channels(activation) < d.k
        weights = "narrow" if d.weight.element.bits < 8 else "bytes"
        return CallClass("integers", weights, "group" if grouped else "token")

    @classmethod
    def seconds(cls, descriptor: CompressedLinearDescriptor, platform: Platform, m: int) -> float:
        d, call = descriptor, cls.call_class(descriptor)
        isa = paths.path_at(paths.paths_of(call, platform), m)
        return overlapped(
            platform,
            read_bytes=d.n * d.k * d.weight.element.bits / 8 + scale_bytes(d, d.n),
            cycles=paths.cost_of(isa, call).cycles(call, platform.rates, m, d.n * d.k),
            call_seconds=_CALL_SECONDS,
        )

    @classmethod
    def hardware_tested(cls, platform: Platform, variant: str = "") -> bool:
        # The kernels for Arm have run in qemu only.
        return platform.device == "cpu" and "neon" not in platform.features

    @classmethod
    def prepared_bytes(cls, descriptor: CompressedLinearDescriptor) -> int | None:
        d = descriptor
        activation = cls._activation(d)
        assert activation is not None
        if native.available() is not None or not activation.symmetric:
            return None  # only the kernels know the number of sums of codes
        tiles, tile_bytes = torch.ops.compressed_linear.packed_shape(
            "quads", d.n, d.k, d.group_size, f"uint{d.weight.element.bits}"
        )
        total = tiles * (tile_bytes + scale_bytes(d, native.TILE)) + native.PROBLEM_BYTES
        return total + small_bytes(d, activation)

    @classmethod
    def layout_version(
        cls, descriptor: CompressedLinearDescriptor, platform: Platform
    ) -> str | None:
        return native.layout_id("quads")

    def prep_weights_for_execution(self, weights: CompressedWeights) -> dict[str, torch.Tensor]:
        native.load()
        d = self.descriptor
        activation = self._activation(d)
        assert activation is not None
        packed = new_packed(d, self.element, "quads")
        pack_codes(packed, weights, d, self.element, "quads")
        tensors = {
            name: arena.empty((len(packed), d.groups, native.TILE), dtype)
            for name, dtype in (("scale", scale_dtype(d)), ("zero", zero_dtype(d)))
            if dtype is not None
        }
        pack_scales(tensors, weights, d)
        tensors["packed"] = packed
        tensors |= small_tensors(weights, activation)
        if not activation.symmetric:
            tensors["code_sums"] = torch.ops.compressed_linear.code_sums(
                packed, d.n, d.k, d.group_size, self.element, _channels(activation)
            )
        tensors["problem"] = make_problem("quads", d, self.element, activation, tensors)
        return tensors

    def apply(
        self,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return multiply(tensors, x, bias, self.descriptor.n, self.output_dtype)


def _channels(activation: ActivationSpec) -> int:
    """Channels that share a scale of x; 0 means the whole token."""
    return activation.group_size if activation.granularity == "group" else 0


_OWN_ACTIVATION = ActivationSpec(INT8, True, "group", group_size=32)


class CpuInt8FastBackend(CpuInt8Backend):
    """The same kernels for layers whose activations are not quantized.

    x is rounded to int8 in groups of 32 channels, as llama.cpp does for its quantized weights, so
    each x̂ is off by up to max|x| / 254 of its group.
    """

    name = "cpu_int8_fast"
    capabilities = Capabilities(
        devices=CpuInt8Backend.capabilities.devices,
        integer_bits=CpuInt8Backend.capabilities.integer_bits,
        zero_kinds=CpuInt8Backend.capabilities.zero_kinds,
        channel_order=True,
        padded_order=True,
        row_scale=True,
        prescale=True,
        required_ops=(NATIVE_LIBRARY,),
    )

    @classmethod
    def contract(cls, descriptor: CompressedLinearDescriptor) -> Contract:
        return Contract(activation=_OWN_ACTIVATION)

    @classmethod
    def _activation(cls, descriptor: CompressedLinearDescriptor) -> ActivationSpec | None:
        return _OWN_ACTIVATION
