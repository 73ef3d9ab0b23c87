# SPDX-License-Identifier: Apache-2.0
"""CompressedLinearDescriptor: what is to be computed, as a value.

It means exactly

    y[m,n] = sum_k x̂[m,k] · ŵ[n,k] + bias[n]
    ŵ[n,k] = s2[n] · (s[n,g] · decode(q[n,k]) − z'[n,g])        g = k // group_size
    x̂      = quantise(T(x)[:, order] · prescale)                (identity where absent)

with z' = s·z for a zero point z, or a stored minimum.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from vllm.compressed_linear.layout import StoredTensor
from vllm.compressed_linear.numerics import ElementType


@dataclass(frozen=True)
class ScaleSpec:
    """Scales of the weight. ``granularity``: "tensor", "channel", "group" (along K) or "block"
    (``block_rows`` × ``group_size``). ``group_size`` counts input channels; −1 is all of K."""

    dtype: str
    granularity: str
    group_size: int = -1
    block_rows: int = 1

    def __post_init__(self) -> None:
        if self.granularity not in ("tensor", "channel", "group", "block"):
            raise ValueError(f"scale granularity {self.granularity!r}")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group size {self.group_size} (expected −1 or a positive number)")


@dataclass(frozen=True)
class ZeroSpec:
    """Zero points, one for each scale. ``kind``: "integer" (a code), "float" (in units of codes)
    or "minimum" (already multiplied by the scale; ``negated`` ones are stored as addends). What
    backends see of a minimum is the float zero point it amounts to."""

    kind: str
    dtype: str
    negated: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("integer", "float", "minimum"):
            raise ValueError(f"zero point kind {self.kind!r}")


@dataclass(frozen=True)
class WeightSpec:
    """Element type, scales, zero points, and ``row_scale``: dtype of a second-level scale per
    output row (None: there is none)."""

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
    because groups were filled up to equal size.
    """

    length: int
    padded: bool = False


@dataclass(frozen=True)
class ActivationSpec:
    """Quantisation of x. ``granularity``: "tensor", "token" or "group"."""

    element: ElementType
    dynamic: bool
    granularity: str
    symmetric: bool = True
    group_size: int = -1


@dataclass(frozen=True)
class TransformSpec:
    """A Hadamard or rotation transform of blocks of ``block`` channels, before reordering."""

    kind: str
    side: str
    block: int


@dataclass(frozen=True)
class CompressedLinearDescriptor:
    """One linear layer on one rank, as a backend sees it. All shapes are this rank's."""

    in_features: int
    out_features: int
    weight: WeightSpec
    input_dtype: str
    output_dtype: str
    bias_dtype: str | None = None
    shards: tuple[int, ...] = ()
    tp_rank: int = 0
    tp_size: int = 1
    channel_order: ChannelOrder | None = None
    activation: ActivationSpec | None = None
    prescale: str | None = None
    transform: TransformSpec | None = None

    def __post_init__(self) -> None:
        if self.in_features < 0 or self.out_features < 0:
            raise ValueError(f"negative shape N={self.out_features} K={self.in_features}")
        if not self.shards:
            object.__setattr__(self, "shards", (self.out_features,))
        if sum(self.shards) != self.out_features:
            raise ValueError(f"shards {self.shards} do not add up to N={self.out_features}")
        if self.weight.scale is not None and self.k and self.k % self.group_size:
            raise ValueError(f"K={self.k} is no multiple of the group size {self.group_size}")

    @property
    def n(self) -> int:
        """Output channels."""
        return self.out_features

    @property
    def k(self) -> int:
        """Channels the kernel multiplies over: after the gather, if there is one."""
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

        def element(value: dict[str, Any]) -> ElementType:
            return ElementType(**{**value, "codebook": tuple(value["codebook"])})

        def maybe(kind: type, value: dict[str, Any] | None) -> Any:
            return None if value is None else kind(**value)

        activation = data.pop("activation")
        if activation is not None:
            activation = ActivationSpec(**{**activation, "element": element(activation["element"])})
        return cls(
            weight=WeightSpec(
                element(weight["element"]),
                maybe(ScaleSpec, weight["scale"]),
                maybe(ZeroSpec, weight["zero"]),
                weight["row_scale"],
            ),
            channel_order=maybe(ChannelOrder, data.pop("channel_order")),
            activation=activation,
            transform=maybe(TransformSpec, data.pop("transform")),
            shards=tuple(data.pop("shards")),
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
        if self.channel_order is not None:
            parts.append("reordered K" + (" (padded)" if self.channel_order.padded else ""))
        if self.activation is not None:
            a = self.activation
            parts.append(
                f"x as {a.element} {'dynamic' if a.dynamic else 'static'} per {a.granularity}"
            )
        if self.transform is not None:
            parts.append(f"{self.transform.kind} {self.transform.side}")
        parts.append(f"{self.input_dtype} → {self.output_dtype}")
        return ", ".join(parts)


@dataclass(frozen=True)
class CheckpointScheme:
    """What a format says of one weight: its meaning and how the checkpoint holds it."""

    weight: WeightSpec
    tensors: tuple[StoredTensor, ...]

    def __str__(self) -> str:
        zero = ", zero points" if self.weight.zero else ""
        scale = self.weight.scale
        group = "" if scale is None else f", group {scale.group_size}"
        return f"{self.weight.element}{group}{zero}"
