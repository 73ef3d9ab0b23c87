# SPDX-License-Identifier: Apache-2.0
"""What each format reads out of every checkpoint, against the maker's own library."""

from __future__ import annotations

import json

import pytest
import torch

from conftest import (
    assert_matches_reference,
    checkpoint,
    checkpoint_reference,
    checkpoint_tensors,
    checkpoints,
)
from vllm.compressed_linear.config import CompressedLinearConfig
from vllm.compressed_linear.descriptor import CheckpointScheme
from vllm.compressed_linear.parameter import collect_shards, create_parameters
from vllm.compressed_linear.refine import LayerContext, refine
from vllm.compressed_linear.resolution import Delegated, LayerKind, Unquantized
from vllm.compressed_linear.weights import LoadedShard, ShardSource

CHECKPOINTS = [
    name
    for name in checkpoints("gptqmodel-gptq", "autoawq-", "autoround-native-", "llmcompressor-")
    if not any(other in name for other in ("fp8", "fp4", "w8a8", "w4a8"))
]
CONTEXT = LayerContext("bfloat16", "bfloat16")


def read_config(name: str) -> CompressedLinearConfig:
    """The format's config of a checkpoint, headers and all, as vLLM makes it."""
    path = checkpoint(name)
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    found = CompressedLinearConfig.from_config(config)
    found.maybe_update_config(str(path))
    return found


def linears(name: str) -> list[str]:
    """Names of the linear layers whose dequantised weights are known."""
    return sorted(
        key.removesuffix(".corner") for key in checkpoint_reference(name) if key.endswith(".corner")
    )


def kind_of(linear: str) -> LayerKind:
    return LayerKind.HEAD if linear == "lm_head" else LayerKind.LINEAR


def source_of(
    linear: str, scheme: CheckpointScheme, n: int, k: int, part: dict[str, int] | None = None
) -> ShardSource:
    whole = {"n_start": 0, "n": n, "k_start": 0, "k": k}
    return ShardSource(linear, scheme, n, k, **{**whole, **(part or {})})


def load(source: ShardSource, tensors: dict[str, torch.Tensor]) -> LoadedShard:
    """One shard through the parameters that vLLM would load into."""
    parameters = create_parameters([source], source.name)
    for name, parameter in parameters.items():
        tensor = tensors.get(f"{source.name}.{name}")
        if tensor is not None:
            parameter.weight_loader(parameter, tensor)
    return collect_shards(parameters, [source])[0]


def standard(shard: LoadedShard) -> torch.Tensor:
    """fp32 [N, K] from what a backend gets: refined rows in standard layout, channels put back."""
    (part,) = refine([shard], CONTEXT)
    rows = part.weights.rows(0, part.weights.n)
    assert rows.scale is not None
    size = part.descriptor.group_size
    values = part.descriptor.weight.element.decode(rows.codes)
    if rows.zero is not None:
        values = values - rows.zero.to(torch.float32).repeat_interleave(size, 1)
    values = values * rows.scale.to(torch.float32).repeat_interleave(size, 1)
    order = part.weights.permutation
    if order is None:
        return values
    out = torch.zeros(part.weights.n, part.descriptor.in_features)
    kept = order >= 0
    out[:, order[kept].to(torch.int64)] = values[:, kept]
    return out


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_weights_equal_the_makers(name: str) -> None:
    config, tensors = read_config(name), checkpoint_tensors(name)
    reference = checkpoint_reference(name)
    ours = 0
    for linear in linears(name):
        scheme = config.resolve(linear, kind_of(linear))
        n, k = len(reference[f"{linear}.rowsum"]), len(reference[f"{linear}.colsum"])
        if isinstance(scheme, Delegated):
            assert "mixed" in name
            continue
        if isinstance(scheme, Unquantized):
            assert_matches_reference(tensors[f"{linear}.weight"].float(), reference, linear)
            continue
        ours += 1
        shard = load(source_of(linear, scheme, n, k), tensors)
        weight = shard.dequantize(0, n)
        assert_matches_reference(weight, reference, linear)
        again = standard(shard)
        # A zero point that is stored multiplied by its scale is divided once more on this way.
        exact = scheme.weight.zero is None or scheme.weight.zero.kind != "minimum"
        allowed = 0.0 if exact else 2.0**-20 * float(weight.abs().max())
        torch.testing.assert_close(again, weight, rtol=0, atol=allowed)
        if ".1." not in linear:
            for axis in ("n", "k"):
                halves = in_two(linear, scheme, n, k, axis, tensors)
                torch.testing.assert_close(halves, weight, rtol=0, atol=0)
    assert ours >= 5


def in_two(
    linear: str,
    scheme: CheckpointScheme,
    n: int,
    k: int,
    axis: str,
    tensors: dict[str, torch.Tensor],
) -> torch.Tensor:
    """fp32 [N, K] from the shards of two ranks, which divide the output or the input channels."""
    length = n if axis == "n" else k
    parts = []
    for start, stop in ((0, length // 2), (length // 2, length)):
        part = {f"{axis}_start": start, axis: stop - start}
        shard = load(source_of(linear, scheme, n, k, part), tensors)
        parts.append(shard.dequantize(0, shard.source.n))
        standard(shard)  # refines without complaint
    return torch.cat(parts, 0 if axis == "n" else 1)
