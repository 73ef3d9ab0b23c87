# SPDX-License-Identifier: Apache-2.0
"""Every damage of every tensor of a weight, read without vLLM: right, or one clear error."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.float_models import Store
from tests.support.shards import MODULE, described_by, load, source_of, stored_by
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.parts import refine
from vllm.compressed_linear.spec.scheme import CheckpointScheme

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def change_tensor(
    directory: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor] | None
) -> None:
    """Change tensor ``name`` of model.safetensors in ``directory``; without ``change`` drop it."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    held = tensors.pop(name)
    if change is not None:
        tensors[name] = change(held).contiguous()
    save_file(tensors, file)


def damages(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor | None]]:
    """(what is done, the tensor after it, None for dropped)."""
    yield "dropped", None
    for axis, length in enumerate(tensor.shape):
        if length > 1:
            yield f"cut along {axis}", tensor.narrow(axis, 0, length - 1)
            yield f"half of {axis}", tensor.narrow(axis, 0, length // 2)
        yield f"twice along {axis}", torch.cat([tensor, tensor], axis)
    if tensor.ndim == 2 and tensor.shape[0] != tensor.shape[1] and 1 not in tensor.shape:
        yield "transposed", tensor.t()
    if tensor.ndim == 2 and 1 not in tensor.shape:
        yield "flat", tensor.flatten()
    yield "empty", tensor.new_empty(0, *tensor.shape[1:])
    wide = tensor.to(torch.float32)
    for dtype in (torch.int32, torch.int64, torch.bool, torch.complex64):
        if dtype != tensor.dtype:
            yield f"as {dtype}", wide.to(dtype)
    if tensor.dtype in FLOATS:
        for value in (float("nan"), float("inf"), -float("inf"), 0.0, 3e38):
            changed = tensor.clone()
            changed.reshape(-1)[0] = value
            yield f"with {value}", changed
        yield "zeros", torch.zeros_like(tensor)
    elif "scale" in name and tensor.element_size() == 1:
        yield "with NaN", torch.full_like(tensor.view(torch.uint8), 255).view(tensor.dtype)
        if tensor.dtype == torch.float8_e4m3fn:
            yield "zeros", torch.zeros_like(tensor)


def untold_damages(
    config: dict[str, Any], store: Store, n: int, k: int, harmless: Collection[str] = ()
) -> list[str]:
    """Damages of a weight [n, k] that are neither told nor without effect, as "tensor what: …".
    ``harmless``: "tensor what" that are other files, which are as good."""
    stored, tensors = stored_by(store, n, k)
    found = []
    for last, tensor in stored.tensors.items():
        for what, changed in damages(last, tensor):
            if f"{last} {what}" in harmless:
                continue
            file = {key: t for key, t in tensors.items() if key != f"{MODULE}.{last}"}
            if changed is not None:
                file[f"{MODULE}.{last}"] = changed.contiguous()
            if complaint := _untold(config, file, n, k, last, stored.meaning):
                found.append(f"{last} {what}: {complaint}")
    return found


def _untold(
    config: dict[str, Any],
    file: dict[str, torch.Tensor],
    n: int,
    k: int,
    last: str,
    meaning: Any,
) -> str:
    described = described_by(config, file)
    try:
        scheme = described.resolve(MODULE)
        described.file.check_against_file("a.layer", MODULE, scheme)
        if not isinstance(scheme, CheckpointScheme):
            return f"{scheme}"
        restated = dict(described.format.restated(file.items()))
        shard = load(source_of(MODULE, scheme, n, k), restated)
        (part,) = refine([shard], LayerContext("float32", "float32"))
    except ValueError as error:
        text = str(error)
        # A tensor that is not there may have had another of its names.
        missing = f"{MODULE}.{last}" not in file and f"tensor {MODULE}." in text
        return "" if (missing or f"{MODULE}.{last}" in text) and "\n" not in text else text
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError) as error:
        return repr(error)
    error = abs(part.weights.dequantize(0, n).double().numpy() - meaning)
    return "" if (error <= 1e-6 * abs(meaning)).all() else "another weight"
