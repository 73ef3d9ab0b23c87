# SPDX-License-Identifier: Apache-2.0
"""Read every layer of a checkpoint with the package: header, format, parameter, facts, rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from tests.support.fuzzing.decode import Stored
from tests.support.shards import in_file_order
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.headers import Headers
from vllm.compressed_linear.checkpoint.parameter import collect_shards, create_parameters
from vllm.compressed_linear.checkpoint.parts import refine
from vllm.compressed_linear.checkpoint.shard import ShardSource
from vllm.compressed_linear.commands.explain.checkpoint import Checkpoint
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.registry import format_of, parse_in
from vllm.compressed_linear.formats.resolution import (
    Delegated,
    LayerKind,
    Resolution,
    Unquantized,
)

CONTEXT = LayerContext("bfloat16", "bfloat16")


@dataclass
class Found:
    """``weights``: float32 [N, K] of each layer. ``left``: layers that are vLLM's, and why.
    ``unfilled``: layers that no tensor of the files fills, which is an error of the completeness
    check after loading."""

    weights: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    unfilled: list[str] = field(default_factory=list)


def read(directory: Path, layers: Mapping[str, Stored]) -> Found:
    """Read ``layers``, whose names and shapes a model's class would state."""
    found = Found()
    checkpoint = Checkpoint.open(str(directory))
    if format_of(checkpoint.quantization) is None:
        found.left = dict.fromkeys(layers, "the whole checkpoint")
        return found
    read_by = parse_in(directory, checkpoint.quantization)
    file = FileView(checkpoint.headers, read_by.marker_tensors)
    resolved: dict[str, Resolution] = {}
    for layer in layers:
        kind = LayerKind.HEAD if layer == "lm_head" else LayerKind.LINEAR
        resolved[layer] = read_by.resolve(layer, kind, file)
        file.check_against_file(layer, layer, resolved[layer])
    read_by.unmatched_entries(file, {})
    for layer, resolution in resolved.items():
        tensors = _tensors(layer, checkpoint.headers)
        if isinstance(resolution, Delegated):
            found.left[layer] = resolution.reason
        elif not isinstance(resolution, Unquantized):
            found.weights[layer] = _weight(layer, resolution, layers[layer], tensors)
        elif "weight" in tensors and tensors["weight"].shape == (layers[layer].n, layers[layer].k):
            found.weights[layer] = tensors["weight"].float().numpy()
        else:
            found.unfilled.append(layer)
    return found


def _tensors(layer: str, headers: Headers) -> dict[str, torch.Tensor]:
    tensors = {}
    for last in headers.modules.get(layer, ()):
        name = f"{layer}.{last}"
        with safe_open(headers[name].file, framework="pt") as stream:
            tensors[last] = stream.get_tensor(name)
    return tensors


_KNOWN: dict[Any, npt.NDArray[Any]] = {}


def _weight(
    layer: str, scheme: Any, stored: Stored, tensors: Mapping[str, torch.Tensor]
) -> npt.NDArray[Any]:
    """float32 [N, K] as a backend gets it. Computed once for the same bytes: most mutants change
    one layer of many."""
    key = (
        *(layer, scheme, stored.n, stored.k),
        *sorted(
            (
                last,
                str(t.dtype),
                tuple(t.shape),
                t.contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
            )
            for last, t in tensors.items()
        ),
    )
    if key not in _KNOWN:
        if len(_KNOWN) > 2000:
            _KNOWN.clear()
        source = ShardSource(layer, scheme, stored.n, stored.k, 0, stored.n, 0, stored.k)
        parameters = create_parameters([source], layer)
        for name, parameter in parameters.items():
            if name in tensors:
                parameter.weight_loader(parameter, tensors[name])
        (part,) = refine(collect_shards(parameters, [source]), CONTEXT)
        _KNOWN[key] = in_file_order(part).numpy()
    return _KNOWN[key]


def equal(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> bool:
    """Up to the rounding of a stored minimum, which is divided by its scale and multiplied."""
    if found.shape != expected.shape:
        return False
    allowed = 2.0**-20 * float(np.abs(expected).max(initial=0.0))
    return bool((np.abs(found - expected) <= allowed).all())
