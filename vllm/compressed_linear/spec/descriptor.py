# SPDX-License-Identifier: Apache-2.0
"""CompressedLinearDescriptor: the computation of one linear layer, as a value.

It means exactly

    y[m,n] = sum_k x̂[m,k] · ŵ[n,k] + bias[n]
    ŵ[n,k] = s2[n] · (s[n,g] · decode(q[n,k]) − z'[n,g])        g = k // group_size
    x̂      = quantize(T(x)[:, order] · prescale)                (identity where absent)
    y      = quantize(y in the output dtype)                    (identity where absent)

with z' = s·z for a zero point z, or a stored minimum.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vllm.compressed_linear.spec.elements import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    E8M0,
    INT8,
    ElementType,
    uint,
)


def _element(data: dict[str, Any]) -> ElementType:
    return ElementType(**{**data, "codebook": tuple(data["codebook"])})


@dataclass(frozen=True)
class ScaleSpec:
    """Scales of the weight. ``granularity``: "tensor", "channel", "group" (along K) or "block"
    (``block_rows`` × ``group_size``). ``group_size`` counts input channels; −1 is all of K.
    ``dtype`` may also be "float8_e4m3fn" (NVFP4) and "e8m0" (MX: powers of two).

    Backends receive scales repeated for each row, as [N, G]. With "block" those of rows
    ``block_rows``·i to ``block_rows``·(i + 1) − 1 are equal, counted from the descriptor's first
    row; the last block may be short. If a tensor-parallel slice cuts a block, or another member
    of a fused layer begins in the middle of one, the granularity is "group"."""

    dtype: str
    granularity: str
    group_size: int = -1
    block_rows: int = 1

    def __post_init__(self) -> None:
        if self.granularity not in ("tensor", "channel", "group", "block"):
            raise ValueError(f"scale granularity {self.granularity!r}")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group size {self.group_size} (expected −1 or a positive number)")
        if self.block_rows < 1 or (self.block_rows > 1 and self.granularity != "block"):
            raise ValueError(
                f"blocks of {self.block_rows} rows with scales per {self.granularity} (expected a "
                "positive number, and 1 unless scales are per block)"
            )


@dataclass(frozen=True)
class ZeroSpec:
    """Zero points, one for each scale. ``kind``: "integer" (a code), "float" (in units of codes)
    or "minimum" (already multiplied by the scale; ``negated`` ones are stored as addends).
    Backends receive a minimum as the equivalent float zero point."""

    kind: str
    dtype: str
    negated: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("integer", "float", "minimum"):
            raise ValueError(f"zero point kind {self.kind!r}")


@dataclass(frozen=True)
class WeightSpec:
    """Element type, scales, zero points, and ``row_scale``: dtype of the second-level scale per
    output row, or None."""

    element: ElementType
    scale: ScaleSpec | None = None
    zero: ZeroSpec | None = None
    row_scale: str | None = None

    def group_size(self, k: int) -> int:
        """Input channels that share a scale, for K = ``k``."""
        if self.scale is None or self.scale.granularity in ("tensor", "channel"):
            return k
        return k if self.scale.group_size == -1 else self.scale.group_size

    def groups(self, k: int) -> int:
        """G for K = ``k``; the last group may be short."""
        return -(-k // self.group_size(k)) if k else 0


@dataclass(frozen=True)
class ChannelOrder:
    """The kernel multiplies over gathered channels x[:, order] (activation order is only that).

    ``length``: channels after the gather. ``padded``: the order holds −1, a channel of zeros,
    because groups were padded to equal size.
    """

    length: int
    padded: bool = False


@dataclass(frozen=True)
class ActivationSpec:
    """Quantization of x before the product; ``activation.py`` has the exact definition.

    ``element``: an integer whose middle code is 0 (``INT8``), or a float of 4 to 8 bits.
    ``dynamic``: the scale is computed from x; otherwise the checkpoint has one for the tensor.
    ``granularity``: values that share a scale, "tensor" (all of x), "token", or "group"
    (``group_size`` consecutive channels of a token). ``symmetric``: without a zero point.
    ``scale_dtype``: "float32"; "e8m0", powers of two for groups (MX); or "float8_e4m3fn", groups
    under a static scale of the tensor (NVFP4). ``maximum``: the |q| on which the largest |x| falls
    (with e8m0: between it and its double); frameworks differ in it. ``limit``: larger |x| count as
    this, in the scale too; 0 for no limit.
    """

    element: ElementType
    dynamic: bool
    granularity: str
    symmetric: bool = True
    group_size: int = -1
    scale_dtype: str = "float32"
    maximum: float = 127.0
    limit: float = 0.0

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ValueError(f"activation {self.element}: {problem}")

    def _problems(self) -> Iterator[str]:
        element, grouped = self.element, self.granularity == "group"
        centred = element.kind == "integer" and element.bias == 1 << (element.bits - 1)
        if not centred and (element.kind != "float" or element == E8M0):
            yield "expected an integer whose middle code is 0, or a float of 4 to 8 bits"
        if self.granularity not in ("tensor", "token", "group"):
            yield f"granularity {self.granularity!r} (expected tensor, token or group)"
        if self.group_size < 1 if grouped else self.group_size != -1:
            yield f"group size {self.group_size} per {self.granularity}"
        if not self.dynamic and self.granularity != "tensor":
            yield f"static scales per {self.granularity} (expected one for the tensor)"
        if not self.symmetric and element.kind != "integer":
            yield "zero points are for integers"
        if self.scale_dtype not in ("float32", "e8m0", "float8_e4m3fn"):
            yield f"scale dtype {self.scale_dtype} (expected float32, e8m0 or float8_e4m3fn)"
        if self.scale_dtype != "float32" and not (grouped and self.symmetric):
            yield f"{self.scale_dtype} scales (expected for symmetric groups only)"
        if not 0 < self.maximum < float("inf"):
            yield f"maximum {self.maximum} (expected a positive number)"
        if not 0 <= self.limit < float("inf") or (self.limit and not self.dynamic):
            yield f"limit {self.limit} (expected a positive number, for dynamic scales, or 0)"

    @property
    def kind(self) -> str:
        """The entry of ``Capabilities.activations``: all fields except sizes, ``maximum`` and
        ``limit``."""
        integer = self.element.kind == "integer"
        name = f"int{self.element.bits}" if integer else self.element.name
        scales = {"e8m0": " with e8m0 scales", "float8_e4m3fn": " with e4m3 scales"}
        return (
            f"{name} {'dynamic' if self.dynamic else 'static'} per {self.granularity}"
            + scales.get(self.scale_dtype, "")
            + ("" if self.symmetric else ", asymmetric")
        )

    @property
    def mixes_rows(self) -> bool:
        """Whether a token's x̂ depends on the other tokens of the batch."""
        return self.dynamic and self.granularity == "tensor"

    @property
    def needs_scale(self) -> bool:
        """Whether an ``input_scale`` comes with the weights."""
        return not self.dynamic or self.scale_dtype == "float8_e4m3fn"

    @property
    def needs_zero(self) -> bool:
        """Whether an ``input_zero`` comes with the weights."""
        return not self.dynamic and not self.symmetric

    @property
    def text(self) -> str:
        """Serialize to JSON, for ops, whose arguments are tensors and plain values."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ActivationSpec:
        """The inverse of ``dataclasses.asdict``, also after JSON (``text``)."""
        return cls(**{**data, "element": _element(data["element"])})

    def __str__(self) -> str:
        group = f" of {self.group_size}" if self.granularity == "group" else ""
        limit = f", limit {self.limit:g}" if self.limit else ""
        kind = self.kind.replace("per group", f"per group{group}")
        return f"{kind}, maximum {self.maximum:g}{limit}"


def activation_kinds() -> frozenset[str]:
    """All values of ``ActivationSpec.kind``, for integers of 4 and 8 bits and the small floats."""
    kinds = set()
    axes = itertools.product(
        (uint(4, 8), INT8, E4M3, E5M2, E3M2, E2M3, E2M1),
        (True, False),
        (("tensor", -1), ("token", -1), ("group", 32)),
        (True, False),
        ("float32", "e8m0", "float8_e4m3fn"),
    )
    for element, dynamic, (granularity, size), symmetric, scale in axes:
        with contextlib.suppress(ValueError):
            kinds.add(ActivationSpec(element, dynamic, granularity, symmetric, size, scale).kind)
    return frozenset(kinds)


@dataclass(frozen=True)
class TransformSpec:
    """A transform of x in blocks of ``block`` channels, before reordering. ``kind``: "hadamard"
    (``activation.hadamard``); ``side``: "input"."""

    kind: str
    side: str
    block: int

    def __post_init__(self) -> None:
        if self.kind != "hadamard" or self.side != "input":
            raise ValueError(f"transform {self.kind} of the {self.side} (known: hadamard, input)")
        if self.block < 1 or self.block & (self.block - 1):
            raise ValueError(f"Hadamard block {self.block} (expected a power of two)")


@dataclass(frozen=True)
class CompressedLinearDescriptor:
    """The computation of one linear layer. All shapes are those of one rank.

    It has neither the rank nor the shards of a fused layer: equal work has equal descriptors,
    which are the keys of measurements and of prepared weights.

    ``lookup``: rows of ŵ are also looked up by index, because the weight is an embedding table,
    alone or tied to an output head. ``output_activation``: static quantization of y with its bias.
    """

    in_features: int
    out_features: int
    weight: WeightSpec
    input_dtype: str
    output_dtype: str
    bias_dtype: str | None = None
    channel_order: ChannelOrder | None = None
    activation: ActivationSpec | None = None
    prescale: str | None = None
    transform: TransformSpec | None = None
    lookup: bool = False
    output_activation: ActivationSpec | None = None

    def __post_init__(self) -> None:
        if self.output_activation is not None and self.output_activation.dynamic:
            raise ValueError(f"y as {self.output_activation} (expected a static scale)")
        if self.in_features < 0 or self.out_features < 0:
            raise ValueError(f"negative shape N={self.out_features} K={self.in_features}")
        if self.transform is not None and self.in_features % self.transform.block:
            raise ValueError(
                f"K={self.in_features} is not a multiple of the {self.transform.kind} block "
                f"{self.transform.block}"
            )
        if self.weight.scale is not None and self.k and self.k % self.group_size:
            raise ValueError(f"K={self.k} is not a multiple of the group size {self.group_size}")

    @property
    def product(self) -> CompressedLinearDescriptor:
        """The same without quantization of y and the limit of x, which the layer sees to after and
        before the product."""
        activation = self.activation
        if activation is not None and activation.limit:
            activation = dataclasses.replace(activation, limit=0.0)
        return dataclasses.replace(self, activation=activation, output_activation=None)

    @property
    def n(self) -> int:
        """Output channels."""
        return self.out_features

    @property
    def k(self) -> int:
        """Input channels of the kernel: after the gather, if there is one."""
        return self.channel_order.length if self.channel_order else self.in_features

    @property
    def group_size(self) -> int:
        """Channels that share a scale; always divides ``k``."""
        return self.weight.group_size(self.k)

    @property
    def groups(self) -> int:
        """G."""
        return self.weight.groups(self.k)

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable dictionary; ``from_json`` gives back an equal descriptor."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CompressedLinearDescriptor:
        """The inverse of ``to_json``."""
        data = dict(data)
        weight = dict(data.pop("weight"))

        def maybe(kind: type, value: dict[str, Any] | None) -> Any:
            return None if value is None else kind(**value)

        activation, output = data.pop("activation"), data.pop("output_activation", None)
        return cls(
            weight=WeightSpec(
                _element(weight["element"]),
                maybe(ScaleSpec, weight["scale"]),
                maybe(ZeroSpec, weight["zero"]),
                weight["row_scale"],
            ),
            channel_order=maybe(ChannelOrder, data.pop("channel_order")),
            activation=None if activation is None else ActivationSpec.from_json(activation),
            output_activation=None if output is None else ActivationSpec.from_json(output),
            transform=maybe(TransformSpec, data.pop("transform")),
            **data,
        )

    def __str__(self) -> str:
        w = self.weight
        parts = [f"{self.n}x{self.k}", w.element.name]
        if w.scale is not None:
            if w.scale.granularity == "group":
                parts.append(f"g{self.group_size}")
            elif w.scale.granularity == "block":
                parts.append(f"block {w.scale.block_rows}x{w.scale.group_size}")
            else:
                parts.append(f"per {w.scale.granularity}")
            parts.append(f"{w.scale.dtype} scale")
        if w.zero is not None:
            parts.append(f"{w.zero.kind} zero")
        if w.row_scale is not None:
            parts.append(f"{w.row_scale} row scale")
        if self.channel_order is not None:
            parts.append("reordered K" + (" (padded)" if self.channel_order.padded else ""))
        if self.prescale is not None:
            parts.append(f"x times {self.prescale} per channel")
        if (a := self.activation) is not None:
            parts.append(f"x as {a}")
        if self.transform is not None:
            parts.append(f"{self.transform.kind} {self.transform.side}")
        if (a := self.output_activation) is not None:
            parts.append(f"y as {a}")
        if self.lookup:
            parts.append("looked up")
        parts.append(f"{self.input_dtype} → {self.output_dtype}")
        return ", ".join(parts)
