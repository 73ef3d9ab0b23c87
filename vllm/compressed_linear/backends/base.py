# SPDX-License-Identifier: Apache-2.0
"""Protocol of a backend: capabilities, estimated time, preparation, execution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm.compressed_linear.backends.contract import STANDARD, Contract
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor


@dataclass(frozen=True)
class Verdict:
    """The answer of ``can_implement``: true, or false with every reason why not."""

    reasons: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.reasons

    def __str__(self) -> str:
        return "; ".join(self.reasons) or "can implement"


@dataclass(frozen=True)
class Capabilities:
    """Capabilities of a backend, one declaration per axis of the descriptor.

    Anything undeclared is declined, so features that are added to descriptors later are declined
    by every older backend.
    """

    devices: frozenset[str]
    integer_bits: frozenset[int] = frozenset()
    other_elements: frozenset[str] = frozenset()
    codebooks: bool = False
    input_dtypes: frozenset[str] = frozenset({"bfloat16", "float16", "float32"})
    scale_dtypes: frozenset[str] = frozenset({"bfloat16", "float16", "float32"})
    granularities: frozenset[str] = frozenset({"tensor", "channel", "group", "block"})
    """A backend that reads scales row by row and declares "group" can declare "block", too."""
    zero_kinds: frozenset[str] = frozenset()
    channel_order: bool = False
    padded_order: bool = False
    row_scale: bool = False
    activations: frozenset[str] = frozenset()
    """Kinds of quantized activations: values of ``ActivationSpec.kind``."""
    prescale: bool = False
    transforms: bool = False
    outputs: bool = False
    lookup: bool = False
    required_ops: tuple[str, ...] = ()
    cpu_features: frozenset[str] = frozenset()
    min_capability: int | None = None
    max_capability: int | None = None

    def reasons(self, d: CompressedLinearDescriptor, platform: Platform) -> Iterable[str]:
        """Every declared limit that ``d`` on ``platform`` exceeds, with both values."""
        yield from self.platform_reasons(platform)
        yield from self._weight_reasons(d)
        if d.input_dtype not in self.input_dtypes:
            yield f"input dtype {d.input_dtype} (supported: {_names(self.input_dtypes)})"
        if d.channel_order is not None and not self.channel_order:
            yield "reordered input channels (activation order) are not supported"
        elif d.channel_order is not None and d.channel_order.padded and not self.padded_order:
            yield "input channels padded to equal groups are not supported"
        if d.activation is not None and d.activation.kind not in self.activations:
            supported = _names(self.activations)
            yield f"activations as {d.activation.kind} (supported: {supported})"
        for present, able, what in (
            (d.prescale, self.prescale, "a per-channel scale of the activations"),
            (d.transform, self.transforms, "Hadamard or rotation transforms"),
            (d.weight.row_scale, self.row_scale, "second-level scales"),
            (
                d.output_activation,
                self.outputs,
                "quantization of outputs, which layers do after any product,",
            ),
        ):
            if present is not None and not able:
                yield f"{what} ({present}) not supported"
        if d.lookup and not self.lookup:
            yield "lookup of rows (an embedding table) is not supported"
        if d.lookup and (d.transform or d.prescale):
            yield "lookup of rows of a weight whose x is transformed or scaled first"

    def platform_reasons(self, platform: Platform) -> Iterable[str]:
        """Declared reasons why no descriptor can run on ``platform``."""
        if platform.device not in self.devices:
            yield f"device {platform.device} (supported: {_names(self.devices)})"
            return
        if platform.device == "cuda":
            yield from self._capability_reasons(platform)
        for op in self.required_ops:
            if op not in platform.ops:
                yield platform.why_missing(op)
        if platform.device == "cpu" and not self.cpu_features <= platform.features:
            lacking = _names(self.cpu_features - platform.features)
            yield f"CPU without {lacking} (this is {platform.name})"

    def _weight_reasons(self, d: CompressedLinearDescriptor) -> Iterable[str]:
        element, scale, zero = d.weight.element, d.weight.scale, d.weight.zero
        if element.kind == "integer":
            if element.bits not in self.integer_bits:
                supported = _names(self.integer_bits)
                yield f"{element.bits}-bit integer weights (supported bits: {supported})"
        elif element.kind == "codebook" and self.codebooks:
            pass
        elif element.name not in self.other_elements:
            yield f"{element.name} weights (supported: {_names(self._element_names())})"
        if scale is not None:
            if scale.dtype not in self.scale_dtypes:
                yield f"scale dtype {scale.dtype} (supported: {_names(self.scale_dtypes)})"
            if scale.granularity not in self.granularities:
                yield f"scales per {scale.granularity} (supported: {_names(self.granularities)})"
        if zero is not None and zero.kind not in self.zero_kinds:
            yield f"{zero.kind} zero points (supported: {_names(self.zero_kinds)})"

    def _element_names(self) -> set[str]:
        names = {f"uint{b}" for b in self.integer_bits} | set(self.other_elements)
        return names | ({"codebooks"} if self.codebooks else set())

    def _capability_reasons(self, platform: Platform) -> Iterable[str]:
        have = platform.capability or 0
        if self.min_capability is not None and have < self.min_capability:
            yield f"compute capability {have} is too old (needs {self.min_capability})"
        if self.max_capability is not None and have > self.max_capability:
            yield f"compute capability {have} is too new (at most {self.max_capability})"


def _names(values: Iterable[object]) -> str:
    return ", ".join(str(v) for v in sorted(values, key=lambda v: (str(type(v)), v))) or "none"


class QuantLinearMethod(ABC):
    """One kernel family. An instance serves one layer and its only state is the descriptor.

    Subclasses set ``name`` and ``capabilities``, and implement ``prep_weights_for_execution``,
    ``apply`` and ``seconds``; limits that involve several axes go into ``further_reasons``.
    """

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    batch_invariant: ClassVar[bool] = False
    """Whether the bits of a row's result are independent of the other rows of the batch, for every
    descriptor and on every platform."""

    def __init__(self, descriptor: CompressedLinearDescriptor) -> None:
        self.descriptor = descriptor

    @classmethod
    def contract(cls, descriptor: CompressedLinearDescriptor) -> Contract:
        """The error that a result for ``descriptor`` may have; kit and self-check hold it to it."""
        return STANDARD

    @classmethod
    def can_implement(cls, descriptor: CompressedLinearDescriptor, platform: Platform) -> Verdict:
        """Whether this backend computes ``descriptor`` on ``platform``; if not, every reason."""
        reasons = list(cls.capabilities.reasons(descriptor, platform))
        if platform.device in cls.capabilities.devices:
            reasons += cls.further_reasons(descriptor, platform)
        return Verdict(tuple(dict.fromkeys(reasons)))

    @classmethod
    def further_reasons(
        cls, descriptor: CompressedLinearDescriptor, platform: Platform
    ) -> Iterable[str]:
        """Rules across several axes, and shapes."""
        return ()

    @classmethod
    @abstractmethod
    def seconds(cls, descriptor: CompressedLinearDescriptor, platform: Platform, m: int) -> float:
        """Declared estimate of the seconds that one call with ``m`` tokens takes on ``platform``,
        with all of its threads; deterministic. ``cost.roofline`` helps. The least expected time
        over the device's ``cost.mix`` is chosen first.
        """

    @classmethod
    def variant(cls, descriptor: CompressedLinearDescriptor, platform: Platform) -> str:
        """Which code path would run, for the plan (e.g. an instruction set); may be empty."""
        return ""

    @classmethod
    def prepared_variant(cls, descriptor: CompressedLinearDescriptor, platform: Platform) -> str:
        """The part of ``variant`` on which prepared tensors and compiled graphs depend: of the keys
        of both caches. All of it, unless the code path is picked by each call."""
        return cls.variant(descriptor, platform)

    @classmethod
    def rows_are_independent(
        cls, descriptor: CompressedLinearDescriptor, platform: Platform
    ) -> bool:
        """Whether ``batch_invariant`` holds for ``descriptor`` on ``platform``, as the process is
        set up."""
        return cls.batch_invariant

    @classmethod
    def hardware_tested(cls, platform: Platform, variant: str = "") -> bool:
        """Whether code path ``variant`` has run on hardware such as ``platform``; where it is
        empty, whether any has. ``explain`` and ``backends`` mark what has not."""
        return True

    @classmethod
    def prepared_bytes(cls, descriptor: CompressedLinearDescriptor) -> int | None:
        """Bytes of all tensors that ``prep_weights_for_execution`` would return, for ``explain``;
        None when that is not known beforehand."""
        return None

    @classmethod
    def layout_version(
        cls, descriptor: CompressedLinearDescriptor, platform: Platform
    ) -> str | None:
        """Name and version of the prepared layout, for the prepared-weights cache.

        It must change whenever another release of the backend's code (or of a library that it
        repacks with) returns other tensors, or reads them in another way. None: never cached.
        """
        return None

    @abstractmethod
    def prep_weights_for_execution(self, weights: CompressedWeights) -> dict[str, torch.Tensor]:
        """Repack once. Returns plain named tensors, which are the only state."""

    @abstractmethod
    def apply(
        self,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [..., K] of the input dtype, any strides → [..., N] of the output dtype."""

    def embedding(self, tensors: Mapping[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [...], each from 0 to N − 1 → those rows of ŵ, [..., in_features] in the order
        of x's channels, in fp32 and rounded once to the output dtype.

        Only backends whose ``capabilities.lookup`` is true implement it.
        """
        raise NotImplementedError(
            f"backend {self.name} does not look up rows ({self.descriptor}); its capabilities say "
            f"lookup={self.capabilities.lookup}"
        )
