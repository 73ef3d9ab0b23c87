# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with quantized activations, computed by ``reference``, against the logits that the
quantizers' own models give with their activations quantized."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from tests.support.checkpoints import checkpoint, checkpoint_reference, checkpoint_tensors
from vllm.compressed_linear.backends.reference import ReferenceBackend
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.parts import Part, refine
from vllm.compressed_linear.checkpoint.shard import ShardSource
from vllm.compressed_linear.prepare.self_check import self_check
from vllm.compressed_linear.spec.descriptor import ActivationSpec, ScaleSpec, WeightSpec
from vllm.compressed_linear.spec.elements import E2M1, E3M2, E4M3, INT8, ElementType
from vllm.compressed_linear.spec.packing import Packing
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StoredTensor
from vllm.compressed_linear.testing.data import load_shard
from vllm.compressed_linear.testing.suite import INT8_TOKEN, NVFP4_INPUT, mx

FP32 = LayerContext("float32", "float32")
INT8_CODES = StoredTensor(
    "weight", Role.CODES, "int8", ("N", "K"), Packing(8, "K", "int8", signed=True)
)
FP8_CODES = StoredTensor("weight", Role.CODES, "float8_e4m3fn", ("N", "K"))
INPUT_SCALE = StoredTensor("input_scale", Role.INPUT_SCALE, "float32", (1,))


def packed(name: str, bits: int) -> StoredTensor:
    return StoredTensor(name, Role.CODES, "uint8", ("N", "K"), Packing(bits, "K", "uint8"))


def scale(dtype: str, *axes: str | int) -> StoredTensor:
    return StoredTensor("weight_scale", Role.SCALE, dtype, axes)


def scheme(
    element: ElementType,
    scales: ScaleSpec,
    activation: ActivationSpec,
    *tensors: StoredTensor,
    row_scale: str | None = None,
) -> CheckpointScheme:
    return CheckpointScheme(WeightSpec(element, scales, row_scale=row_scale), tensors, activation)


def global_scale(name: str, role: Role) -> StoredTensor:
    return StoredTensor(name, role, "float32", (1,), reciprocal=True)


CHANNEL = ScaleSpec("bfloat16", "channel")
NVFP4_SCALES = ScaleSpec("float8_e4m3fn", "group", 16)
MX_SCALES = ScaleSpec("e8m0", "group", 32)
FP8_TOKEN = ActivationSpec(E4M3, True, "token", maximum=448.0)
STATIC = ActivationSpec(INT8, False, "tensor", symmetric=False)

SCHEMES = {
    "llmcompressor-w8a8-int8-dyn-asym": scheme(
        INT8,
        CHANNEL,
        replace(INT8_TOKEN, symmetric=False),
        INT8_CODES,
        scale("bfloat16", "N", 1),
    ),
    "llmcompressor-w8a8-int8-static-asym": scheme(
        INT8,
        CHANNEL,
        STATIC,
        INT8_CODES,
        scale("bfloat16", "N", 1),
        INPUT_SCALE,
        StoredTensor("input_zero_point", Role.INPUT_ZERO, "int32", (1,)),
    ),
    "llmcompressor-fp8-dynamic": scheme(
        E4M3, CHANNEL, FP8_TOKEN, FP8_CODES, scale("bfloat16", "N", 1)
    ),
    "llmcompressor-fp8-static": scheme(
        E4M3,
        ScaleSpec("bfloat16", "tensor"),
        replace(FP8_TOKEN, dynamic=False, granularity="tensor"),
        FP8_CODES,
        scale("bfloat16", 1),
        INPUT_SCALE,
    ),
    "llmcompressor-fp8-block": scheme(
        E4M3,
        ScaleSpec("bfloat16", "block", 128, 128),
        replace(FP8_TOKEN, granularity="group", group_size=128),
        FP8_CODES,
        scale("bfloat16", "B", "G"),
    ),
    "llmcompressor-nvfp4": scheme(
        E2M1,
        NVFP4_SCALES,
        NVFP4_INPUT,
        packed("weight_packed", 4),
        scale("float8_e4m3fn", "N", "G"),
        global_scale("weight_global_scale", Role.ROW_SCALE),
        global_scale("input_global_scale", Role.INPUT_SCALE),
        row_scale="float32",
    ),
    "modelopt-nvfp4": scheme(
        E2M1,
        NVFP4_SCALES,
        NVFP4_INPUT,
        packed("weight", 4),
        scale("float8_e4m3fn", "N", "G"),
        StoredTensor("weight_scale_2", Role.ROW_SCALE, "float32", ()),
        replace(INPUT_SCALE, axes=()),
        row_scale="float32",
    ),
    "llmcompressor-mxfp4": scheme(
        E2M1, MX_SCALES, mx(E2M1, 3.5), packed("weight_packed", 4), scale("e8m0", "N", "G")
    ),
    "llmcompressor-mxfp8": scheme(
        E4M3, MX_SCALES, mx(E4M3, 224.0), FP8_CODES, scale("e8m0", "N", "G")
    ),
    "quark-mxfp6_e3m2": scheme(
        E3M2, MX_SCALES, mx(E3M2, 15.0), packed("weight", 6), scale("e8m0", "N", "G")
    ),
}

FP8_CHECKPOINTS = (
    "llmcompressor-fp8-dynamic",
    "llmcompressor-fp8-static",
    "llmcompressor-fp8-block",
)


@dataclass
class Layer:
    """A linear layer of the model on ``reference``, checked as it is at load."""

    method: ReferenceBackend
    tensors: dict[str, torch.Tensor]

    def __call__(self, module: Any, arguments: tuple[torch.Tensor, ...], out: Any) -> torch.Tensor:
        return self.method.apply(self.tensors, arguments[0])


@dataclass
class TorchLayer:
    """The same layer by plain torch: x to e4m3 as compressed-tensors does it, ``F.linear``."""

    weight: torch.Tensor
    activation: ActivationSpec
    input_scale: torch.Tensor | None

    def __call__(self, module: Any, arguments: tuple[torch.Tensor, ...], out: Any) -> torch.Tensor:
        (x,) = arguments
        grouped = self.activation.granularity == "group"
        groups = x.unflatten(-1, (-1, self.activation.group_size if grouped else x.shape[-1]))
        scale = self.input_scale
        if scale is None:
            scale = groups.abs().amax(-1, keepdim=True) / self.activation.maximum
        codes = (groups / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        return torch.nn.functional.linear((codes.float() * scale).flatten(-2), self.weight)


def part_of(
    name: str, shape: tuple[int, int], scheme: CheckpointScheme, tensors: dict[str, torch.Tensor]
) -> Part:
    own = {
        stored.name: tensors[f"{name}.{stored.name}"].reshape(
            stored.shape(source_of(name, shape, scheme).extents)
        )
        for stored in scheme.tensors
    }
    (part,) = refine([load_shard(source_of(name, shape, scheme), own)], FP32)
    return part


def layer(name: str, part: Part) -> Layer:
    method = ReferenceBackend(part.descriptor)
    prepared = method.prep_weights_for_execution(part.weights)
    self_check(name, method, prepared, part.weights)
    return Layer(method, prepared)


def torch_layer(name: str, part: Part) -> TorchLayer:
    activation, weights = part.descriptor.activation, part.weights
    assert activation is not None
    return TorchLayer(weights.dequantize(0, weights.n), activation, weights.input_scale)


def source_of(name: str, shape: tuple[int, int], scheme: CheckpointScheme) -> ShardSource:
    n, k = shape
    return ShardSource(name, scheme, n, k, 0, n, 0, k)


@contextmanager
def model(
    name: str,
    scheme: CheckpointScheme,
    layer: Callable[[str, Part], Layer | TorchLayer] = layer,
) -> Iterator[Any]:
    """The checkpoint's model in fp32, its quantized layers run by what ``layer`` makes of them."""
    from transformers import AutoConfig, LlamaForCausalLM

    config = json.loads((checkpoint(name) / "config.json").read_text())
    config.pop("quantization_config", None)
    tensors = checkpoint_tensors(name)
    built = LlamaForCausalLM(
        AutoConfig.for_model(config.pop("model_type"), **config, attn_implementation="eager")
    )
    built = built.float().eval()
    for key, value in built.state_dict().items():
        module = built.get_submodule(key.rpartition(".")[0])
        if isinstance(module, torch.nn.Linear) and ".layers." in key:
            linear = key.rpartition(".")[0]
            part = part_of(linear, tuple(value.shape), scheme, tensors)
            module.register_forward_hook(layer(linear, part))
        else:
            value.copy_(tensors[key])
    with torch.no_grad():
        yield built


def quantizers_logits(name: str, reference: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the quantizer's model gives with its activations quantized, on this machine.

    A few x of the fp8 checkpoints lie so near the middle of two codes that the order in which torch
    adds up products decides, which is another on other processors. Where plain torch does not come
    to the logits that were stored, its own are what must be met.
    """
    stored = reference["logits_actquant"]
    if name not in FP8_CHECKPOINTS:
        return stored
    with model(name, SCHEMES[name], torch_layer) as built:
        here = built(reference["input_ids"]).logits
    return stored if float((here - stored).abs().max()) < 1e-4 else here


@pytest.mark.parametrize("name", SCHEMES)
def test_logits_are_those_of_the_quantizer(name: str) -> None:
    reference = checkpoint_reference(name)
    expected, plain = quantizers_logits(name, reference), reference["logits"]
    with model(name, SCHEMES[name]) as built:
        logits = built(reference["input_ids"]).logits
    assert float((logits - expected).abs().max()) < 1e-4
    # Leaving the activations as they are is far outside.
    assert float((plain - expected).abs().max()) > 0.3


def test_symmetric_int8_hangs_on_the_last_bit_of_its_scales() -> None:
    """The largest |x| of a token lies between codes 127 and 128 by compressed-tensors' scale.

    Which of them it gets, another order of additions decides, and one that differs changes all the
    tokens behind it: so the tokens that differ least are compared.
    """
    name = "llmcompressor-w8a8-int8-dyn"
    reference = checkpoint_reference(name)
    apart = {}
    for maximum in (127.5, 127.0):
        tensors = INT8_CODES, scale("bfloat16", "N", 1)
        own = scheme(INT8, CHANNEL, replace(INT8_TOKEN, maximum=maximum), *tensors)
        with model(name, own) as built:
            logits = built(reference["input_ids"]).logits
        tokens = (logits - reference["logits_actquant"]).abs().amax(-1)
        apart[maximum] = float(tokens.min())
    assert apart[127.5] < 1e-4 < 0.05 < apart[127.0]
