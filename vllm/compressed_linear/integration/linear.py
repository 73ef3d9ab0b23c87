# SPDX-License-Identifier: Apache-2.0
"""Quantization methods for vLLM's linear layers and output heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self
from weakref import ref

import torch
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
)

from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.parameter import (
    CheckpointParameter,
    collect_shards,
    create_parameters,
    shard_indices,
)
from vllm.compressed_linear.checkpoint.shard import LoadedShard, ShardSource, dense_shard
from vllm.compressed_linear.formats.resolution import ConfigError, LayerKind
from vllm.compressed_linear.integration import compat
from vllm.compressed_linear.integration.preparation import HeldWeight, ModelPreparation, Prepared
from vllm.compressed_linear.integration.sharding import (
    Member,
    assign,
    check_repeated_rows,
    shard_geometry,
)
from vllm.compressed_linear.integration.stand_in import StandIn
from vllm.compressed_linear.integration.whole_model import OurMethod
from vllm.compressed_linear.prepare.layer import OtherPlanError
from vllm.compressed_linear.spec.elements import dtype_name
from vllm.compressed_linear.spec.scheme import CheckpointScheme, dense_scheme

logger = compat.logger(__name__)

DEVICE_ANCHOR = "weight_packed"
"""Attribute from which vLLM's LoRA code takes a layer's device; kept as an empty tensor."""


def layer_context(layer: Any, params_dtype: torch.dtype) -> LayerContext:
    """Dtypes of a vLLM layer."""
    bias = getattr(layer, "bias", None)
    return LayerContext(
        input_dtype=dtype_name(params_dtype),
        output_dtype=dtype_name(params_dtype),
        bias_dtype=None if bias is None else dtype_name(bias.dtype),
    )


@dataclass(frozen=True)
class InputNumbers:
    """Static scale (fp32 [1]), static zero point and prescale (fp32 [K]) of x of one member."""

    scale: torch.Tensor | None
    zero: torch.Tensor | None
    prescale: torch.Tensor | None

    @classmethod
    def of(cls, shard: LoadedShard) -> Self:
        """Copies, since the checkpoint's tensors are freed."""
        found = (shard.input_scale(), shard.input_zero(), shard.prescale())
        return cls(*(None if tensor is None else tensor.clone() for tensor in found))


class CompressedLinearMethod(OurMethod, LinearMethodBase):
    """Linear layer or output head of which at least one shard is quantized.

    ``members``: the logical weights that the layer fuses. With one scheme, all partitions share it.
    """

    def __init__(
        self,
        prefix: str,
        kind: LayerKind,
        members: Sequence[Member],
        model: ModelPreparation,
    ) -> None:
        self.prefix = prefix
        self.kind = kind
        self.members = list(members)
        self.model = model
        self.sources: list[ShardSource] = []
        self.prepared: Prepared | None = None
        self.input_numbers: list[InputNumbers] = []

    @property
    def only_scheme(self) -> CheckpointScheme | None:
        """The scheme of a layer with a single member; None for fused ones."""
        return self.sources[0].scheme if len(self.sources) == 1 else None

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register a ``CheckpointParameter`` for every tensor of every shard."""
        geometry = shard_geometry(
            layer, input_size_per_partition, output_partition_sizes, input_size
        )
        if self.kind is LayerKind.LINEAR:
            check_repeated_rows(self.prefix, self.members, geometry, int(layer.tp_size))
        members = assign(self.prefix, self.members, geometry)
        self.params_dtype = params_dtype
        self.dummy = compat.loads_dummy_weights()
        self.sources = [
            part.source(
                member.name,
                member.resolution
                if isinstance(member.resolution, CheckpointScheme)
                else dense_scheme(params_dtype),
            )
            for part, member in zip(geometry, members, strict=True)
        ]
        if input_size_per_partition != input_size:
            self._check_sums_over_ranks(input_size_per_partition)
        self.dtypes = [member.dtypes for member in members]
        parameters = create_parameters(self.sources, self.prefix)
        for name, parameter in parameters.items():
            layer.register_parameter(name, parameter)
        self.tensor_names = list(parameters)

    def _check_sums_over_ranks(self, k: int) -> None:
        """Raise ``ConfigError`` if this rank, with ``k`` of the channels, cannot compute its part:
        outputs are quantized that are sums over all ranks, or a rotation needs more channels."""
        for source in self.sources:
            if (transform := source.scheme.transform) is not None and k % transform.block:
                raise ConfigError(
                    f"{self.prefix}: a {transform.kind} transform of {transform.block} channels "
                    f"needs whole blocks, but each rank has {k} channels; load the checkpoint with "
                    "--tensor-parallel-size 1"
                )
            if (output := source.scheme.output_activation) is not None:
                raise ConfigError(
                    f"{self.prefix}: y as {output} is quantized after the sum over all ranks, "
                    "which vLLM makes outside of the layer; load the checkpoint with "
                    "--tensor-parallel-size 1"
                )

    def waiting(self, layer: Any) -> list[torch.Tensor]:
        tensors = [getattr(layer, name, None) for name in self.tensor_names]
        return [tensor for tensor in tensors if isinstance(tensor, CheckpointParameter)]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Describe, select, prepare, check; then free the checkpoint's tensors."""
        parameters = {name: getattr(layer, name) for name in self.tensor_names}
        if not all(isinstance(p, CheckpointParameter) for p in parameters.values()):
            return  # already prepared, and nothing was loaded since
        first = self.prepared is None
        shards = collect_shards(
            parameters, self.sources, dummy=self.dtypes if self.dummy and first else None
        )
        device = shards[0].device
        self.input_numbers = [InputNumbers.of(shard) for shard in shards]
        try:
            prepared = self.model.prepare(
                layer,
                self.plan_name,
                self.plan_kind,
                shards,
                self.context(layer),
                self.prepared,
                dummy=self.dummy,
                note=self.plan_note,
            )
        except OtherPlanError as error:
            if not self.dummy:
                raise
            raise OtherPlanError(
                f"{error} with --load-format auto, since dummy weights do not tell how the real "
                "ones are ordered"
            ) from None
        for name in self.tensor_names:
            delattr(layer, name)
        self.prepared = prepared
        held = self.held_by(layer)
        anchor = StandIn(self.prefix, (0,), torch.uint8, device, held)
        layer.register_parameter(DEVICE_ANCHOR, anchor)
        if self.kind is not LayerKind.LINEAR:
            shape = (0, layer.embedding_dim)
            weight = StandIn(self.prefix, shape, self.params_dtype, device, held)
            layer.register_parameter("weight", weight)

    def held_by(self, layer: Any) -> Callable[[], HeldWeight | None]:
        """What ``layer`` holds whenever it is asked."""
        return partial(_held, self, ref(layer))

    @property
    def plan_name(self) -> str:
        """Name of the layer in the plan; ``plan_kind`` and ``plan_note`` likewise."""
        return self.prefix

    @property
    def plan_kind(self) -> LayerKind:
        return self.kind

    @property
    def plan_note(self) -> str:
        return ""

    def context(self, layer: Any) -> LayerContext:
        """What the layer is apart from its weights."""
        return layer_context(layer, self.params_dtype)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] → [..., N]."""
        assert self.prepared is not None, f"{self.prefix}: weights were never processed"
        return self.prepared.apply(layer, x, bias)

    def tie_weights(self, layer: Any, embed_tokens: torch.nn.Module) -> Any:
        """Refuse to tie: the checkpoint has a separate head, even if its config says it is tied."""
        logger.info(
            "%s: tied to the embedding table in the model's config, but the checkpoint holds it "
            "quantized, so it is not tied",
            self.prefix,
        )
        return layer


def _held(
    method: CompressedLinearMethod | DenseMethod, layer: ref[torch.nn.Module]
) -> HeldWeight | None:
    return None if method.prepared is None else HeldWeight(method.prepared, layer)


def is_plain_matrix(layer: Any) -> bool:
    """Whether ``layer.weight`` is an ordinary 2-D weight of a supported dtype that no other vLLM
    method will transform."""
    weight = layer.weight
    return bool(
        weight.ndim == 2
        and weight.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and not getattr(layer, "_cpu_skip_gemm_dispatch", False)
    )


class DenseMethod(OurMethod):
    """Mixin of our methods for unquantized weights, whose base classes are vLLM's.

    ``could_take``: whether our kernels can run a layer; all others are left to vLLM.
    """

    kind: LayerKind

    def __init__(self, prefix: str, model: ModelPreparation) -> None:
        super().__init__()
        self.prefix = prefix
        self.model = model
        self.prepared: Prepared | None = None

    @property
    def plan_name(self) -> str:
        """Name of the layer in the plan."""
        return self.prefix

    def plan_note(self, *, lookup: bool) -> str:
        """Note in the plan; ``lookup``: whether its rows are looked up in the prepared copy."""
        return ""

    def could_take(self, layer: Any) -> bool:
        return is_plain_matrix(layer)

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)  # type: ignore[misc]
        self.dummy = compat.loads_dummy_weights()

    def waiting(self, layer: Any) -> list[torch.Tensor]:
        empty = self.prepared is not None and layer.weight.numel() == 0
        if empty or layer.weight.is_meta or not self.could_take(layer):
            return []
        return [layer.weight]

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.prepared is not None and layer.weight.numel() == 0:
            return
        if layer.weight.is_meta or not self.could_take(layer):
            super().process_weights_after_loading(layer)  # type: ignore[misc]
            return
        self.prepared = self.prepare(layer)
        self.drop_weight(layer)

    def absent(self, layer: Any, arrived: Sequence[tuple[str, Any]]) -> str:
        shards = [shard for name, shard in arrived if name == "weight"]
        parts = len(getattr(layer, "output_partition_sizes", ()))
        if None in shards or (shards and parts <= 1):
            return ""
        for index in range(max(parts, 1)):
            if not any(index in shard_indices(shard) for shard in shards):
                return f"weight of part {index + 1} of {parts}" if parts > 1 else "weight"
        return ""

    def context(self, layer: Any) -> LayerContext:
        """What the layer is apart from its weights."""
        return layer_context(layer, layer.weight.dtype)

    def prepare(self, layer: Any) -> Prepared:
        """The natural weight, prepared."""
        name = self.plan_name
        shards = [dense_shard(name, layer.weight.data)]
        context = self.context(layer)
        if self.prepared is None:
            context = self.model.settle_lookup(name, shards, context)
        else:
            context = replace(context, lookup=self.prepared.looks_up)
        return self.model.prepare(
            layer,
            name,
            self.kind,
            shards,
            context,
            self.prepared,
            dummy=self.dummy,
            note=self.plan_note(lookup=context.lookup),
        )

    def drop_weight(self, layer: Any) -> None:
        """Free the natural weight, now that there is a prepared one."""
        layer.weight = self.stand_in(layer)

    def stand_in(self, layer: Any) -> StandIn:
        """What takes the place of the natural weight of ``layer``."""
        natural, held = layer.weight, partial(_held, self, ref(layer))
        shape = (0, *natural.shape[1:])
        return StandIn(self.prefix, shape, natural.dtype, natural.device, held)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self.prepared is None:
            return super().apply(layer, x, bias)  # type: ignore[misc]
        return self.prepared.apply(layer, x, bias)


class CompressedUnquantizedLinearMethod(DenseMethod, UnquantizedLinearMethod):
    """Linear layer that the checkpoint leaves unquantized, on our dense kernel.

    A subclass of vLLM's method because routers, MLA and online quantization ask for that type.
    vLLM's special cases (convolutions, ``_cpu_skip_gemm_dispatch``) are left to vLLM.
    """

    kind = LayerKind.LINEAR
