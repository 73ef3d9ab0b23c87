# SPDX-License-Identifier: Apache-2.0
"""The findings of a load, before it: a model on the meta device loads tensors made of headers.

vLLM's own loaders say what they take and what fills each parameter, as when weights are loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from vllm.compressed_linear.checkpoint import completeness, experts
from vllm.compressed_linear.checkpoint.completeness import Finding, Severity
from vllm.compressed_linear.checkpoint.file_header import TensorHeader
from vllm.compressed_linear.checkpoint.load_record import LoadRecord
from vllm.compressed_linear.checkpoint.shard import CheckpointError
from vllm.compressed_linear.formats.resolution import ConfigError
from vllm.compressed_linear.integration import compat
from vllm.compressed_linear.integration.compat_loading import Loading
from vllm.compressed_linear.integration.completeness import (
    LOADERS_RAISE,
    findings_of,
    not_loadable,
    targets,
)
from vllm.compressed_linear.integration.config import CompressedLinearConfig
from vllm.compressed_linear.integration.given_weights import under_other_names
from vllm.compressed_linear.integration.unasked import ask_for_all

_NEEDS_VALUES = re.compile(r"\bmeta\b|PretendGroup|fake tensor", re.IGNORECASE)
"""In errors of a loader that asks for what the meta device and one process do not have."""


def findings_from_headers(
    model: torch.nn.Module,
    vllm_config: Any,
    config: CompressedLinearConfig,
    headers: Mapping[str, TensorHeader],
) -> list[Finding]:
    """What loading would report, and why it would fail, from headers alone.

    ``model``: built on the meta device, with nothing loaded, and not used for loading afterwards;
    ``config``: its quantization config, which built it; ``headers``: with the names of the files,
    not vLLM's. Call it in the contexts in which the model was built (``built_on_meta`` of the
    command ``explain``: current config, parallel groups, meta as the default device, the model's
    dtype), and not for a model of which a layer was refused.

    Each ``Finding`` has a severity, a message for people and all names it is about. Missing
    parameters are errors (warnings, if the settings of ``config`` allow them); tensors that nothing
    takes and entries that match nothing are warnings. If the model's loader needs values, one note
    says that nothing is known. Of the experts of a layer that each have their own tensors one is
    loaded, and the others are compared with it. Does not raise.
    """
    try:
        moved = ask_for_all(model, config)
    except (CheckpointError, ConfigError) as error:
        return [Finding(Severity.ERROR, str(error))]
    superseded = config.superseded()
    thinned = _experts_are_rows_of_parameters(model)
    names = experts.one_of_each(headers) if thinned else list(headers)
    names = [name for name in names if name not in superseded.plain]
    record = LoadRecord(targets(model))
    loading = Loading(model, vllm_config.model_config, vllm_config, lambda: None)
    given = under_other_names(_on_meta(names, headers), moved)
    found = superseded.findings()
    try:
        with record:
            model.load_weights(record.weights(given))  # type: ignore[operator]
    except LOADERS_RAISE as error:
        return [*found, _refusal(loading, record, error)]
    found += findings_of(loading, record, config, one_expert=thinned)
    if thinned:
        found += _unlike_experts(headers, _number_of_experts(model))
    return found


def _on_meta(
    names: list[str], headers: Mapping[str, TensorHeader]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in names:
        header = headers[name]
        dtype = getattr(torch, header.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"{header.file}: {name} has an unknown dtype {header.dtype!r}")
        yield name, torch.empty(header.shape, dtype=dtype, device="meta")


def _refusal(loading: Loading, record: LoadRecord, error: Exception) -> Finding:
    if isinstance(error, CheckpointError | ConfigError):
        return Finding(Severity.ERROR, str(error), (record.current,))
    if isinstance(error, NotImplementedError) or _NEEDS_VALUES.search(str(error)):
        return Finding(
            Severity.NOTE,
            f"whether the checkpoint is complete is not known: the loader of vLLM's "
            f"{type(loading.model).__name__} needs values of tensors ({record.current}), and only "
            "headers were read",
        )
    return Finding(Severity.ERROR, str(not_loadable(loading, record, error)), (record.current,))


def _experts_are_rows_of_parameters(model: torch.nn.Module) -> bool:
    modules = dict(model.named_modules())
    return any(map(compat.holds_experts, modules.values())) and not any(
        re.search(r"\.experts\.\d+$", name) for name in modules
    )


def _number_of_experts(model: torch.nn.Module) -> int:
    """Number of experts of a layer, the same for all of them; 0 if it differs or is not told."""
    found = {
        int(getattr(module, "global_num_experts", 0) or 0)
        for module in model.modules()
        if compat.holds_experts(module)
    }
    return found.pop() if len(found) == 1 else 0


def _unlike_experts(headers: Mapping[str, TensorHeader], number: int) -> list[Finding]:
    missing: list[str] = []
    unlike: list[str] = []
    for layer in experts.experts_of(headers):
        missing += layer.missing
        unlike += layer.unlike
        missing += [f"{layer.prefix}{n}.*" for n in sorted(set(range(number)) - {*layer.numbers})]
    return [
        *completeness.missing_of_experts(missing),
        *completeness.unlike_experts(unlike),
    ]
