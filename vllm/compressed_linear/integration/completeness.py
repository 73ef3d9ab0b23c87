# SPDX-License-Identifier: Apache-2.0
"""Completeness of a checkpoint for a model of vLLM: checked as it loads, and from headers alone.

vLLM's own check of loaded weights is off for quantized models and knows no parts of fused
parameters. Here the model's own loaders are observed (``checkpoint/load_record.py``), so layers
that are left to vLLM, norms, biases and experts are covered like our own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from vllm.compressed_linear.checkpoint import completeness, experts
from vllm.compressed_linear.checkpoint.completeness import (
    Finding,
    IncompleteCheckpointError,
    Severity,
    Unfilled,
)
from vllm.compressed_linear.checkpoint.load_record import Fill, LoadRecord
from vllm.compressed_linear.checkpoint.parameter import CheckpointParameter, never_arrived
from vllm.compressed_linear.checkpoint.shard import CheckpointError
from vllm.compressed_linear.formats.resolution import ConfigError
from vllm.compressed_linear.integration import compat, compat_loading
from vllm.compressed_linear.integration.compat_loading import LeftOut, Loading
from vllm.compressed_linear.integration.config import CompressedLinearConfig
from vllm.compressed_linear.integration.given_weights import GivenWeights
from vllm.compressed_linear.integration.unasked import ask_for_all
from vllm.compressed_linear.integration.zeros_of_experts import ZerosOfExperts
from vllm.compressed_linear.spec.elements import dtype_name

logger = compat.logger(__name__)


def load_and_check(loading: Loading) -> None:
    """Load a model; raise ``IncompleteCheckpointError`` if parameters have no values then.

    Models without a config of ours for their own files are left alone (a drafter is built with its
    target's too), and so are loaders that give the model no tensors (dummy weights).
    """
    model = loading.model
    configs = [
        config
        for config in compat_loading.quantization_configs(model, loading.vllm_config)
        if isinstance(config, CompressedLinearConfig) and config.describes_model_being_built()
    ]
    if not configs:
        loading.load_weights()
        return
    configs[0].name_table()
    moved = ask_for_all(model, configs[0])
    experts_zeros = ZerosOfExperts(configs[0].format, configs[0].file)
    given = GivenWeights(configs[0].superseded, configs[0].format.restated, experts_zeros, moved)
    _report(given.superseded.findings())
    record = LoadRecord(targets(model))
    own = given.install(model)
    installed = model.load_weights

    def load_weights(weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
        with record:
            return own(record.weights(given.of(weights)), *args, **kwargs)

    model.load_weights = load_weights
    try:
        loading.load_weights()
    except LOADERS_RAISE as error:
        if isinstance(error, CheckpointError | ConfigError | torch.OutOfMemoryError):
            raise
        raise not_loadable(loading, record, error) from error
    finally:
        model.load_weights = installed
    if record.held:
        _report(findings_of(loading, record, configs[0]))


LOADERS_RAISE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Errors by which loaders of vLLM's models refuse tensors."""

LONGEST_ERROR = 300
"""Limit of characters for an error of vLLM: some list every parameter of the model."""


def not_loadable(loading: Loading, record: LoadRecord, error: Exception) -> CheckpointError:
    """The error of a model's loader, with the tensor that it was given last."""
    why = f"{type(error).__name__}: {' '.join(str(error).split())[:LONGEST_ERROR]}"
    where = f"vLLM's {type(loading.model).__name__} cannot load {loading.model_config.model}"
    if record.current not in record.held:
        return CheckpointError(f"{where}: {why}")
    dtype, shape = record.held[record.current]
    return CheckpointError(
        f"{where}: at tensor {record.current} ({dtype_name(dtype)} {list(shape)}): {why}"
    )


def _report(findings: Iterable[Finding]) -> None:
    errors = []
    for finding in findings:
        if finding.severity is Severity.ERROR:
            errors.append(finding.message)
        elif finding.severity is Severity.WARNING:
            logger.warning("%s", finding.message)
    if errors:
        raise IncompleteCheckpointError(" ".join(errors))


def findings_of(
    loading: Loading,
    record: LoadRecord,
    config: CompressedLinearConfig,
    *,
    one_expert: bool = False,
) -> list[Finding]:
    """What ``record`` says about the load that it observed. ``one_expert``: of the experts of a
    layer that each have their own tensors, only the first was loaded."""
    model = type(loading.model).__name__
    left_out = LeftOut(loading.model, config, loading.vllm_config)
    unfilled = list(_unfilled(loading, record, config, one_expert))
    unused = [
        name
        for name, (_, shape) in record.held.items()
        if name not in record.taken
        and name not in record.zero_biases
        and name not in left_out
        # Some tools write an empty tensor where they have none.
        and 0 not in shape
    ]
    unfilled = [replace(u, unused=_of_same_module(u, unused)) for u in unfilled]
    biases = [name for name in unused if name in record.unread_biases]
    absent = [
        error
        for parameter in loading.model.parameters()
        if isinstance(parameter, CheckpointParameter)
        for error in never_arrived(parameter)
    ]
    return [
        *completeness.never_arrived(absent),
        *completeness.missing(
            unfilled,
            model,
            str(loading.model_config.model),
            allowed=config.settings.allow_missing,
        ),
        *completeness.unused([name for name in unused if name not in biases], model),
        *completeness.perhaps_biased(biases, model),
        *completeness.unmatched(config.unmatched_entries()),
    ]


def _of_same_module(unfilled: Unfilled, unused: Iterable[str]) -> tuple[str, ...]:
    modules = {name.rpartition(".")[0] for name in (unfilled.name, *unfilled.expected)}
    return tuple(name for name in unused if name.rpartition(".")[0] in modules)


def targets(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    for tensor in (*model.parameters(), *model.buffers()):
        if not torch.nn.parameter.is_lazy(tensor):
            yield tensor


def _like_loaded_ones(fills: Mapping[str, Fill | None]) -> dict[str, Fill | None]:
    """Those of ``fills``, of buffers, that may not be empty: buffers of that name in like modules
    take values, and only then is it known that the checkpoint has them."""
    loaded = {completeness.pattern(n) for n, fill in fills.items() if fill and fill.names}
    return {n: fill for n, fill in fills.items() if completeness.pattern(n) in loaded}


def _unfilled(
    loading: Loading, record: LoadRecord, config: CompressedLinearConfig, one_expert: bool
) -> Iterator[Unfilled]:
    model = loading.model
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    tensors = parameters | buffers
    modules = dict(model.named_modules())
    fills = {
        name: record.fill(tensor)
        for name, tensor in tensors.items()
        if not torch.nn.parameter.is_lazy(tensor) and tensor.numel()
    }
    statistics = dict(compat_loading.batch_statistics(model))
    alike = _like_loaded_ones({n: fill for n, fill in fills.items() if n in buffers})
    fills = {
        name: fill
        for name, fill in fills.items()
        if name in parameters or name in statistics or name in alike
    }
    names = {name: fill.names for name, fill in fills.items() if fill is not None}
    for name, fill in fills.items():
        tensor = tensors[name]
        path, _, last = name.rpartition(".")
        module = modules[path]
        count = tensor.shape[0] if compat.holds_experts(module) else 0
        if fill and one_expert and count and any(map(experts.is_of_one, fill.names)):
            fill = fill.of_first(fill.nbytes // count)
        if (
            fill is not None
            and not isinstance(tensor, CheckpointParameter)
            and fill.missing > compat_loading.padding(tensor) * tensor.element_size()
            and not compat_loading.fills_itself(module, last)
            and not (compat_loading.is_head_without_use(model, module) and not fill.names)
            and not compat_loading.comes_from_target(model, name, module, loading)
        ):
            others = {other: found for other, found in names.items() if other != name}
            yield Unfilled(
                name,
                dtype_name(tensor.dtype),
                tuple(tensor.shape),
                completeness.expected_names(
                    name, fill.names, others, config.packed_modules_mapping, count
                ),
                fill.names,
                _part(fill, tensor),
            )


def _part(fill: Fill, tensor: torch.Tensor) -> str:
    """What of ``tensor`` is missing, in words; empty for all of it."""
    if fill.missing == fill.nbytes:
        return ""
    start, stop = fill.gaps[0]
    row = fill.nbytes // tensor.shape[0]
    if tensor.is_contiguous() and start % row == 0 and stop % row == 0:
        first, last = start // row, stop // row - 1
        rows = f"row {first}" if first == last else f"rows {first} to {last}"
        return rows if len(fill.gaps) == 1 else f"{rows} and others"
    return f"{fill.missing // tensor.element_size()} of {tensor.numel()} elements"
