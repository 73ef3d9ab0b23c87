# SPDX-License-Identifier: Apache-2.0
"""Explain the choice of backends for a checkpoint without loading it.

The input is ``config.json`` and safetensors headers; the choice itself is made by the same code as
at load. Facts that depend on values are listed as alternatives (``possibilities.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from vllm.compressed_linear.backends import measurements
from vllm.compressed_linear.backends.registry import NoBackendError
from vllm.compressed_linear.checkpoint.headers import Headers
from vllm.compressed_linear.commands.explain.checkpoint import Checkpoint, ExplainError
from vllm.compressed_linear.commands.explain.explanation import (
    Explanation,
    LayerPlan,
    PartPlan,
    Possibility,
)
from vllm.compressed_linear.commands.explain.layers import (
    ModelLayer,
    ModelLayers,
    ModelUnavailableError,
    model_layers,
)
from vllm.compressed_linear.commands.explain.possibilities import (
    possibilities,
    read_possibility,
)
from vllm.compressed_linear.commands.explain.tensors import ReadTensor, assumed, load_shards, locate
from vllm.compressed_linear.formats.base import Hints
from vllm.compressed_linear.formats.registry import format_of, formats, parse_in
from vllm.compressed_linear.integration.preparation import detect_platform
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.prepare.layer import choose, settle_lookup
from vllm.compressed_linear.prepare.plan import rejections
from vllm.compressed_linear.settings import ENABLE, Settings, enabled


def explain(
    model: str,
    *,
    platform: Platform,
    tp_size: int = 1,
    dtype: str = "auto",
    read_weights: bool = False,
    settings: Settings | None = None,
) -> Explanation:
    """Explain a local checkpoint.

    Raises ``ExplainError``, ``ConfigError`` for a contradictory quantization config,
    ``CheckpointError`` for tensors that contradict it, ``TensorParallelError``. Layers that no
    backend can or may run do not raise; they are in ``Explanation.errors``.
    """
    with _one_thread():
        return _explain(model, platform, tp_size, dtype, read_weights, settings)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread: for many small tensor operations, synchronization costs more than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _explain(
    model: str,
    platform: Platform,
    tp_size: int,
    dtype: str,
    read_weights: bool,
    settings: Settings | None,
) -> Explanation:
    checkpoint = Checkpoint.open(model)
    quantization = checkpoint.quantization
    architectures = list(checkpoint.config.get("architectures") or ["unknown"])
    found = Explanation(
        model=model,
        architecture=architectures[0],
        quant_method=str(quantization.get("quant_method") or "none"),
        platform=platform.name,
        tp_size=tp_size,
        this_machine=replace(platform, threads=0) == replace(detect_platform(), threads=0),
        weights_read=read_weights,
        file_bytes=sum(header.nbytes for header in checkpoint.headers.values()),
    )
    if not found.this_machine and (assumption := platform.assumption):
        found.notes.append(assumption)
    if not enabled():
        found.notes.append(f"{ENABLE}=0 switches this package off: vLLM runs all of it")
        return found
    if format_of(quantization) is None:
        found.notes.append(_not_ours(quantization))
        return found
    read_by = parse_in(checkpoint.path, quantization)
    if not quantization:
        found.notes.append(
            "the model is not quantized: vLLM uses this package only with "
            "--quantization compressed_linear"
        )
    try:
        ranks = model_layers(
            checkpoint.path,
            architectures,
            tp_size=tp_size,
            dtype=dtype,
            quantized=bool(quantization),
        )
    except ModelUnavailableError as error:
        from vllm.compressed_linear.commands.explain.layers_from_headers import layers_from_headers

        found.notes.append(
            f"vLLM's model class was not used ({error}); names and shapes come from the headers "
            "alone, so fused layers are shown as their parts"
        )
        if tp_size > 1:
            raise ExplainError(
                f"how the model is split among {tp_size} ranks is not known: vLLM's model class "
                f"cannot be built here ({error})"
            ) from error
        ranks = [layers_from_headers(checkpoint.headers, checkpoint.config, read_by, dtype)]
    settings = settings or Settings.read()
    if note := measurements.load(settings.tune_file, platform).note:
        found.notes.append(note)
    explainer = _Explainer(
        platform,
        settings,
        read_by.hints(),
        checkpoint.headers,
        read_weights,
    )
    by_rank = [[explainer.layer(model, layer) for layer in model.layers] for model in ranks]
    if explainer.not_found:
        first, count = explainer.not_found[0], len(set(explainer.not_found))
        found.notes.append(
            f"the files have no tensors {first}.* ({count} such layers): either they are "
            "missing, or the model class renames them while it loads; shown as configured"
        )
    found.layers = [_over_ranks(same) for same in zip(*by_rank, strict=True)]
    found.left = ranks[0].left
    found.dtype, found.model_class = ranks[0].dtype, ranks[0].model_class
    return found


def _not_ours(quantization: dict[str, Any]) -> str:
    name = str(quantization.get("quant_method") or "")
    known = formats().get(name)
    if known is None:
        supported = ", ".join(sorted(filter(None, formats())))
        return f"quant_method {name!r} is left to vLLM (read here: {supported})"
    return f"all of it is left to vLLM: {known.unsupported(quantization)}"


def _over_ranks(plans: tuple[LayerPlan, ...]) -> LayerPlan:
    """Rank 0, with what differs on others."""
    first = _shown(plans[0].cases)
    others = [(r, p.cases) for r, p in enumerate(plans) if r and _shown(p.cases) != first]
    return replace(plans[0], other_ranks=tuple(others))


def _shown(found: tuple[Possibility, ...]) -> list[Any]:
    """Fields in which ranks are compared: not the length of an assumed order."""
    return [
        (
            case.facts,
            [
                ("" if case.from_sample else str(p.descriptor), p.shards, p.runs, p.error)
                for p in case.parts
            ],
        )
        for case in found
    ]


class _Explainer:
    """Possibilities and choices of layers, each computed once for equal layers."""

    def __init__(
        self,
        platform: Platform,
        settings: Settings,
        hints: Hints,
        file_headers: Headers,
        read_weights: bool,
    ) -> None:
        self.platform = platform
        self.settings = settings
        self.hints = hints
        self.file_headers = file_headers
        self.read_weights = read_weights
        self.not_found: list[str] = []
        self._cases: dict[Any, tuple[Possibility, ...]] = {}
        self._parts: dict[Any, PartPlan] = {}

    def layer(self, model: ModelLayers, layer: ModelLayer) -> LayerPlan:
        """Explain one layer. Raises ``CheckpointError`` if headers contradict the configuration."""
        layer = self._settled(layer)
        found = tuple(
            replace(case, parts=tuple(self._part(layer.name, part) for part in case.parts))
            for case in self._layer_cases(model, layer)
        )
        note = layer.notes[layer.context.lookup]
        return LayerPlan(layer.name, layer.kind, found, layer.reasons, note)

    def _settled(self, layer: ModelLayer) -> ModelLayer:
        """Decide where rows of a tied unquantized table are looked up, as at load."""
        if layer.dense is None:
            return layer
        try:
            context = settle_lookup(
                layer.name, [layer.dense], layer.context, self.platform, self.settings
            )
        except NoBackendError:  # the case will report it
            context = layer.context
        return replace(layer, context=context)

    def _layer_cases(self, model: ModelLayers, layer: ModelLayer) -> tuple[Possibility, ...]:
        if layer.dense is not None:
            return possibilities([layer.dense], layer.context, self.hints)
        name, sources = layer.name, layer.sources
        tensors = locate(name, layer.path, sources, model.headers, model.stacked)
        if tensors and self.read_weights:
            read = _reader(model.headers, self.file_headers)
            return (read_possibility(name, sources, layer.context, tensors, read),)
        if not tensors:
            self.not_found.append(name)
            tensors = assumed(sources)
        key = (
            layer.context,
            tuple(replace(source, name=source.name.rpartition(".")[2]) for source in sources),
            tuple((name, *(part.signature for part in found)) for name, found in tensors.items()),
        )
        if key not in self._cases:
            shards = load_shards(name, sources, tensors)
            self._cases[key] = possibilities(shards, layer.context, self.hints)
        return self._cases[key]

    def _part(self, layer: str, part: PartPlan) -> PartPlan:
        quantized = part.descriptor.weight.element.kind != "dense"
        key = (part, self.settings.backend.backend_for(layer, quantized=quantized))
        if key not in self._parts:
            try:
                selection = choose(layer, part.descriptor, self.platform, self.settings)
            except NoBackendError as error:
                return replace(part, error=str(error))
            self._parts[key] = replace(
                part,
                backend=selection.chosen.name,
                variant=selection.variant,
                chosen_by=selection.chosen_by,
                bytes_prepared=selection.chosen.prepared_bytes(part.descriptor),
                rejected=rejections(selection),
                untested_on_hardware=selection.untested,
            )
        return self._parts[key]


def _reader(headers: Headers, file_headers: Headers) -> ReadTensor:
    """Reader by vLLM's names: ``headers`` are ``file_headers`` renamed, in the same order."""
    from safetensors import safe_open

    on_disk = dict(zip(headers, file_headers, strict=True))

    def read(name: str) -> Any:
        with safe_open(headers[name].file, framework="pt") as file:
            return file.get_tensor(on_disk[name])

    return read
