# SPDX-License-Identifier: Apache-2.0
"""Rotations of compressed-tensors' ``transform_config``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.described import Described
from tests.support.format_configs import INT4, Q, as_a_part, groups
from tests.support.messages import saying
from vllm.compressed_linear.checkpoint.file_header import TensorHeader
from vllm.compressed_linear.checkpoint.headers import Headers
from vllm.compressed_linear.formats.resolution import (
    ConfigError,
    Delegated,
    Resolution,
    Unquantized,
)
from vllm.compressed_linear.spec.activation import hadamard
from vllm.compressed_linear.spec.descriptor import TransformSpec
from vllm.compressed_linear.spec.scheme import CheckpointScheme

PLAIN = "model.layers.1.mlp.down_proj"


def rotated(
    kind: str = "hadamard",
    location: str = "input",
    targets: Any = ("re:.*q_proj$", "re:.*down_proj$"),
    apply: list[dict[str, Any]] | None = None,
    **scheme: Any,
) -> dict[str, Any]:
    entry = {"targets": list(targets), "location": location, "inverse": False, "ignore": []}
    group = {"type": kind, "apply": [entry] if apply is None else apply, **scheme}
    return groups(
        (["Linear"], INT4), ignore=[PLAIN], transform_config={"config_groups": {"R4": group}}
    )


def headers(k: int = 256) -> Headers:
    return Headers(
        {
            f"{Q}.weight_packed": TensorHeader("int32", (64, k // 8), 0, "a"),
            f"{Q}.weight_scale": TensorHeader("bfloat16", (64, k // 128), 0, "a"),
            f"{Q}.weight_shape": TensorHeader("int64", (2,), 0, "a"),
            f"{PLAIN}.weight": TensorHeader("bfloat16", (64, k), 0, "a"),
        }
    )


def resolved(config: dict[str, Any], module: str = Q, k: int = 256) -> Resolution:
    return Described.of(config, headers(k)).resolve(module)


@pytest.mark.parametrize("size", [1, 2, 16, 128])
def test_the_librarys_matrix_is_ours(size: int) -> None:
    from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix

    matrix = deterministic_hadamard_matrix(size, torch.float64) / size**0.5
    x = torch.randn(3, 2 * size, generator=torch.Generator().manual_seed(size))
    blocks = x.double().reshape(-1, size) @ matrix.t()
    torch.testing.assert_close(hadamard(x, size).double(), blocks.reshape(3, -1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("location", ["weight_input", "weight_output", "q_attn", "k_cache"])
def test_what_is_in_the_weights_or_cancels_needs_nothing(location: str) -> None:
    for kind in ("hadamard", "random-hadamard", "random-matrix"):
        assert resolved(rotated(kind, location)) == resolved(groups((["Linear"], INT4)))


@pytest.mark.parametrize(("size", "block"), [({"head_dim": 64}, 64), ({}, 256)])
@pytest.mark.parametrize("module", [Q, PLAIN])
def test_inputs_are_rotated_also_of_weights_that_are_not_quantized(
    module: str, size: dict[str, int], block: int
) -> None:
    found = resolved(rotated(**size), module)
    assert isinstance(found, CheckpointScheme)
    assert found.transform == TransformSpec("hadamard", "input", block)
    part = as_a_part(module)
    renamed = Described.of(rotated(targets=[module], **size), headers()).renamed(as_a_part)
    found = renamed.resolve(part)
    assert isinstance(found, CheckpointScheme)
    assert found.transform is not None


def test_only_targets_that_are_not_ignored() -> None:
    entry = {"targets": ["Linear"], "location": "input", "ignore": ["re:.*q_proj"]}
    config = rotated(apply=[entry], head_dim=32)
    found = resolved(config)
    assert isinstance(found, CheckpointScheme)
    assert found.transform is None
    assert isinstance(resolved(config, PLAIN), CheckpointScheme)
    assert isinstance(resolved(rotated(targets=["re:.*q_proj"]), PLAIN), Unquantized)


@pytest.mark.parametrize("kind", ["random-hadamard", "random-matrix"])
@pytest.mark.parametrize("location", ["input", "output"])
def test_stored_matrices_are_left_to_vllm(kind: str, location: str) -> None:
    found = resolved(rotated(kind, location))
    assert isinstance(found, Delegated)
    assert kind in found.reason
    assert "R4" in found.reason


@pytest.mark.parametrize(
    ("config", "k", "complaint"),
    [
        (rotated(location="output"), 256, ("R4.apply[0]", "outputs", Q, "after the product")),
        (rotated(randomize=True), 256, ("R4.apply[0]", "randomized")),
        (rotated(), 384, (384, "power of two")),
        (rotated(head_dim=96), 384, (96, "power of two")),
        (rotated(location="sideways"), 256, ("R4.apply[0].location", "'sideways'", "weight_input")),
    ],
)
def test_other_rotations_are_refused_by_name(
    config: dict[str, Any], k: int, complaint: tuple[object, ...]
) -> None:
    with pytest.raises(ConfigError, match=saying(*complaint)):
        resolved(config, k=k)
