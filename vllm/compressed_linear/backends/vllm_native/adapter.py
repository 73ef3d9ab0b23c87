# SPDX-License-Identifier: Apache-2.0
"""Adapter from a descriptor to one of vLLM's kernel classes.

Each class gets a layer in the state in which vLLM's own linear method hands it to repacking, and
later one in the state after repacking, built from plain tensors. A ``KernelAdapter`` has all that
differs between classes; ``table.py`` lists them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from vllm.compressed_linear.backends.vllm_native.classes import process, scaled_mm, tables
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.machine.cost import roofline
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import torch_dtype
from vllm.compressed_linear.spec.packing import Packing, pack


@dataclass(frozen=True, kw_only=True)
class KernelAdapter(ABC):
    """One of vLLM's kernel classes.

    ``kernel``: the name of the class, which is also the variant in plans. ``tag``: the names of the
    prepared tensors begin with it, so that they say who reads them. ``family``: which of vLLM's
    tables lists the class. ``ops``: operators of vLLM that it calls while repacking or running.
    ``arithmetic`` and ``efficiency``: for ``cost.roofline``, the latter a guess of each. With "mma"
    it has an estimate of its own for each compute capability.
    ``min_capability`` and ``max_capability``: the oldest and the newest that the class's operator
    runs on, where the class itself does not ask. ``scale_dtypes`` and ``row_scale``: scales of
    groups and of rows. ``adds_bias``: the class adds it before it rounds.
    """

    kernel: str
    tag: str
    ops: tuple[str, ...] = ()
    devices: frozenset[str] = frozenset({"cuda"})
    arithmetic: str = "bf16"
    efficiency: float = 0.7
    min_capability: int | None = None
    max_capability: int | None = None

    family = ""
    scale_dtypes = frozenset({"bfloat16", "float16", "float32"})
    row_scale = False
    adds_bias = False

    @abstractmethod
    def reasons(self, d: CompressedLinearDescriptor) -> Iterable[str]:
        """Reasons why the class does not compute ``d``, which it may accept silently."""

    @abstractmethod
    def config(self, d: CompressedLinearDescriptor) -> object:
        """vLLM's configuration of the class for ``d``."""

    @abstractmethod
    def build(self, kernel: Any, d: CompressedLinearDescriptor) -> Any:
        """An object of vLLM's class ``kernel`` in the state that repacking leaves it in."""

    @abstractmethod
    def layer(self, d: CompressedLinearDescriptor, weights: CompressedWeights) -> torch.nn.Module:
        """The layer as vLLM's own linear method has it before ``process_weights_after_loading``."""

    def attributes(self, d: CompressedLinearDescriptor) -> dict[str, Any]:
        """What the class reads of a layer besides tensors, on both layers."""
        return {}

    def instance(self, d: CompressedLinearDescriptor, device: str) -> Any:
        """An object of vLLM's class that repacks and runs ``d``; None where there is no class."""
        with process.configured():
            kernel = self.build(tables.kernel_class(self.family, device, self.kernel), d)
        scaled_mm.quantize_without_compiler(kernel)
        return kernel

    def prepare(
        self, kernel: Any, d: CompressedLinearDescriptor, weights: CompressedWeights
    ) -> dict[str, torch.Tensor]:
        """The tensors that ``run`` needs, by the class's own names."""
        layer = self.layer(d, weights)
        for name, value in self.attributes(d).items():
            setattr(layer, name, value)
        self.repack(kernel, layer, d)
        return self.prepared(layer)

    def repack(self, kernel: Any, layer: torch.nn.Module, d: CompressedLinearDescriptor) -> None:
        """Run vLLM's repacking of ``layer``, in place."""
        kernel.process_weights_after_loading(layer)

    def prepared(self, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The tensors that ``apply`` needs of a repacked ``layer``, by the class's own names."""
        return {name: parameter.data for name, parameter in layer.named_parameters()}

    def run(
        self, kernel: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x [M, K], contiguous → [M, N] by vLLM's class; ``bias`` is None unless it adds it."""
        out: torch.Tensor = kernel.apply_weights(layer, x, bias)
        return out

    def seconds(self, d: CompressedLinearDescriptor, platform: Platform, m: int) -> float:
        """See ``QuantLinearMethod.seconds``."""
        width = torch_dtype(d.input_dtype).itemsize
        return roofline(
            platform,
            read_bytes=self.prepared_bytes(d) + width * m * (d.k + d.n),
            operations=2.0 * m * d.n * d.k,
            arithmetic=self.arithmetic,
            efficiency=self.efficiency,
        )

    def hardware_tested(self, platform: Platform) -> bool:
        """See ``QuantLinearMethod.hardware_tested``."""
        return False

    @abstractmethod
    def prepared_bytes(self, d: CompressedLinearDescriptor) -> int:
        """Bytes of what preparation returns, channel order and padding to whole tiles apart."""

    def weight_rounding(self, d: CompressedLinearDescriptor) -> float:
        """See ``Contract.weight_rounding``; without that of an added bias."""
        return rounded_weights(d)

    def result_dtype(self, d: CompressedLinearDescriptor) -> torch.dtype:
        """Of what ``run`` returns."""
        return torch_dtype(d.input_dtype)

    def ratio(
        self, d: CompressedLinearDescriptor, weights: CompressedWeights
    ) -> torch.Tensor | None:
        """fp32 [N] by which the result of ``run`` is multiplied, or None: what remains of scales of
        rows where the class knows one for the layer."""
        return None if weights.row_scale is None else row_ratio(weights.row_scale)


def row_ratio(scale: torch.Tensor) -> torch.Tensor | None:
    """What remains of each row's ``scale`` [N] when all are given the largest; None if nothing
    does."""
    largest = scale.abs().max()
    return None if bool((scale == largest).all()) else scale / largest


def rounded_weights(d: CompressedLinearDescriptor) -> float:
    """The rounding of weights that are dequantized to the dtype of x, and of scales cast to it."""
    unit = torch.finfo(torch_dtype(d.input_dtype)).eps / 2
    scale = d.weight.scale
    exact = ("e8m0", d.input_dtype)
    cast = scale is not None and scale.dtype not in exact
    return (1 + unit) ** 2 - 1 if cast else unit


def common_reasons(d: CompressedLinearDescriptor) -> Iterable[str]:
    """Rules of all classes."""
    if not d.n or not d.k:
        yield f"an empty weight ({d.n}x{d.k})"
    if d.output_dtype != d.input_dtype:
        yield f"output dtype {d.output_dtype} (supported: that of the input, {d.input_dtype})"
    if d.bias_dtype is not None and d.bias_dtype != d.input_dtype:
        yield f"bias dtype {d.bias_dtype} (supported: that of the input, {d.input_dtype})"


def packed_codes(d: CompressedLinearDescriptor, weights: CompressedWeights) -> torch.Tensor:
    """Codes as containers of int32 [N, K·bits/32], the first code in the lowest bits."""
    bits = d.weight.element.bits
    packing = Packing(bits, "K")
    out = torch.empty(d.n, packing.words(d.k), dtype=torch.int32, device=weights.device)
    for start, stop in weights.chunks():
        out[start:stop] = pack(weights.rows(start, stop).codes, packing)
    return out


def byte_codes(d: CompressedLinearDescriptor, weights: CompressedWeights) -> torch.Tensor:
    """Codes uint8 [N, K]."""
    out = torch.empty(d.n, d.k, dtype=torch.uint8, device=weights.device)
    for start, stop in weights.chunks():
        out[start:stop] = weights.rows(start, stop).codes
    return out


def row_scale(weights: CompressedWeights) -> torch.Tensor:
    """Second-level scales, fp32 [N]; ``ValueError`` where there are none."""
    if weights.row_scale is None:
        raise ValueError("vllm_native: second-level scales were declared and are not there")
    return weights.row_scale


def scales(d: CompressedLinearDescriptor, weights: CompressedWeights) -> torch.Tensor:
    """[N, G] in the dtype of the standard layout: that of the checkpoint."""
    return torch.cat([_present(weights.rows(a, b).scale, d) for a, b in weights.chunks()])


def zero_points(weights: CompressedWeights) -> torch.Tensor | None:
    """Zero points [N, G] in units of codes, or None."""
    found = [weights.rows(start, stop).zero for start, stop in weights.chunks()]
    present = [zero for zero in found if zero is not None]
    return torch.cat(present) if present else None


def _present(scale: torch.Tensor | None, d: CompressedLinearDescriptor) -> torch.Tensor:
    if scale is None:
        raise ValueError(f"vllm_native: weights without scales, descriptor {d}")
    return scale


def cast_scales(
    d: CompressedLinearDescriptor, scale: torch.Tensor, largest: float, where: str = ""
) -> torch.Tensor:
    """``scale`` [N, G] in the dtype of x, which must hold ``largest`` times each of them.
    ``where``: which output channels they are of, for the message.

    ``ValueError`` where it would not: vLLM would compute infinities without a word.
    """
    out = scale.to(torch_dtype(d.input_dtype))
    extreme = float(scale.abs().max()) if scale.numel() else 0.0
    if extreme * largest > torch.finfo(out.dtype).max:
        raise ValueError(
            f"vllm_native: a scale of {extreme:g}{where}, whose weights vLLM's kernel could not "
            f"hold in {d.input_dtype}"
        )
    return out


def add_parameter(layer: torch.nn.Module, name: str, data: torch.Tensor) -> None:
    """Register ``data`` on ``layer`` as a parameter without gradient."""
    layer.register_parameter(name, torch.nn.Parameter(data, requires_grad=False))
