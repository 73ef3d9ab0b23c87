# SPDX-License-Identifier: Apache-2.0
"""Explain the choice of backends for a checkpoint without loading it.

The input is ``config.json`` and safetensors headers; the choice itself is made by the same code as
at load. Facts that depend on values are listed as alternatives (``possibilities.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from vllm.compressed_linear.backends import measurements
from vllm.compressed_linear.backends.registry import NoBackendError, Selection
from vllm.compressed_linear.checkpoint.completeness import Severity
from vllm.compressed_linear.checkpoint.headers import Headers, without_collection
from vllm.compressed_linear.checkpoint.shard import CheckpointError
from vllm.compressed_linear.commands.explain.checkpoint import Checkpoint
from vllm.compressed_linear.commands.explain.configuration import say_of_configuration
from vllm.compressed_linear.commands.explain.explanation import (
    Explanation,
    LayerPlan,
    PartPlan,
    Possibility,
)
from vllm.compressed_linear.commands.explain.findings import About
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
from vllm.compressed_linear.commands.text import compress_all
from vllm.compressed_linear.formats.base import Format, Hints, quant_method_of
from vllm.compressed_linear.formats.registry import format_of, parse_in, why_not_read
from vllm.compressed_linear.integration import compat
from vllm.compressed_linear.integration.preparation import detect_platform
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.prepare.layer import choose, product_of, settle_lookup
from vllm.compressed_linear.prepare.plan import rejections, rounding_note
from vllm.compressed_linear.settings import ENABLE, Settings, enabled
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor


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

    Raises ``ExplainError`` for a checkpoint that cannot be read, ``ConfigError`` for a
    configuration that cannot, and ``TensorParallelError``. What is wrong with single layers does
    not raise: tensors that contradict the configuration, refusals of vLLM's, layers that no
    backend can or may run are in ``Explanation.findings``.
    """
    with _one_thread(), without_collection():
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
        quant_method=str(
            quantization.get("quant_method") or quant_method_of(quantization) or "none"
        ),
        platform=platform.name,
        rates=platform.rates.origin if platform.device == "cpu" else "",
        tp_size=tp_size,
        this_machine=replace(platform, threads=0) == replace(detect_platform(), threads=0),
        weights_read=read_weights,
        tensors=len(checkpoint.headers),
        file_bytes=sum(header.nbytes for header in checkpoint.headers.values()),
    )
    if not found.this_machine and (assumption := platform.assumption):
        found.say(Severity.NOTE, About.SERVING, assumption)
    if not enabled():
        found.say(
            Severity.NOTE,
            About.SERVING,
            f"{ENABLE}=0 switches this package off: vLLM runs all of it",
        )
        return found
    ours = format_of(quantization) is not None
    read_by = parse_in(checkpoint.path, quantization) if ours else None
    if read_by is not None:
        checkpoint = replace(checkpoint, headers=read_by.restated_headers(checkpoint.headers))
        read_weights = read_weights and not read_by.restates
    vllms_reason = ""
    if read_by is None:
        vllms_reason = "all of the checkpoint is left to vLLM"
        found.say(
            Severity.NOTE,
            About.SERVING,
            f"all of it is left to vLLM: {why_not_read(quantization)}",
        )
    say_of_configuration(found, checkpoint, read_by, platform)
    ranks = _ranks(found, checkpoint, read_by, architectures, dtype, vllms_reason)
    settings = settings or Settings.read()
    if note := measurements.load(settings.tune_file, platform).note:
        found.say(Severity.NOTE, About.SERVING, note)
    hints = Hints() if read_by is None else read_by.hints()
    explainer = _Explainer(platform, settings, hints, checkpoint.headers, read_weights)
    for same in zip(*(rank.layers for rank in ranks), strict=True):
        try:
            plans = [
                explainer.layer(model, layer) for model, layer in zip(ranks, same, strict=True)
            ]
        except CheckpointError as error:
            found.say(Severity.ERROR, About.CHECKPOINT, str(error), (same[0].name,))
        else:
            found.layers.append(_over_ranks(plans))
    parts = [part for layer in found.layers for part in layer.likely.parts]
    if note := rounding_note((part.backend, part.rejected) for part in parts):
        found.say(Severity.NOTE, About.SERVING, note)
    for message, names in _same_refusals(ranks).items():
        found.say(Severity.ERROR, About.CHECKPOINT, message, names)
    _say_what_is_left_over(found, ranks, explainer.not_found)
    if ranks:
        found.left, found.others = ranks[0].left, ranks[0].others
        found.dtype, found.model_class = ranks[0].dtype, ranks[0].model_class
    if not found.this_machine:
        _leave_unasked(found)
    return found


def _ranks(
    found: Explanation,
    checkpoint: Checkpoint,
    read_by: Format | None,
    architectures: list[str],
    dtype: str,
    vllms_reason: str,
) -> list[ModelLayers]:
    """The layers of every rank, from the headers alone if vLLM cannot build the model here."""
    try:
        if (drafter := compat.drafter_among(architectures)) is None:
            return model_layers(
                checkpoint.path,
                architectures,
                tp_size=found.tp_size,
                dtype=dtype,
                vllms_reason=vllms_reason,
                headers=checkpoint.headers,
            )
        found.say(
            Severity.NOTE,
            About.SERVING,
            f"{drafter} is a drafter, which vLLM builds for a target only (--speculative-config): "
            "layers and names are those of its files",
        )
    except ModelUnavailableError as error:
        if not found.this_machine:
            found.say(
                Severity.NOTE,
                About.SERVING,
                f"this machine cannot build vLLM's model class ({error}); whether "
                f"{found.platform} can is not asked here",
            )
        elif error.certain:
            found.say(Severity.ERROR, About.SERVING, f"vLLM cannot build this model here: {error}")
        else:
            found.say(
                Severity.WARNING,
                About.SERVING,
                "vLLM's model class cannot be built without its weights, so whether it loads is "
                f"not known ({error})",
            )
    if read_by is None:
        return []
    from vllm.compressed_linear.commands.explain.layers_from_headers import layers_from_headers

    split = ""
    if found.tp_size > 1:
        split = f", and every layer as one rank has it, not split among {found.tp_size}"
        found.tp_size = 1
    found.say(
        Severity.NOTE,
        About.SERVING,
        f"names and shapes come from the headers alone: fused layers are shown as parts{split}",
    )
    return [layers_from_headers(checkpoint.headers, checkpoint.config, read_by, dtype)]


def _same_refusals(ranks: Sequence[ModelLayers]) -> dict[str, tuple[str, ...]]:
    """Message → layers; those whose messages differ by the name that they begin with have one."""
    layers: dict[tuple[bool, str], dict[str, None]] = {}
    for refusal in (refusal for rank in ranks for refusal in rank.refused):
        text = refusal.message.removeprefix(f"{refusal.name}: ")
        layers.setdefault((text != refusal.message, text), {})[refusal.name] = None
    return {
        f"{', '.join(compress_all(tuple(names)))}: {text}" if named else text: tuple(names)
        for (named, text), names in layers.items()
    }


def _say_what_is_left_over(
    found: Explanation, ranks: Sequence[ModelLayers], not_found: Sequence[str]
) -> None:
    """Add what a load would say of parameters without tensors, tensors that nothing takes and
    entries that match nothing. Its errors are not said again of layers with errors of their own."""
    left_over = [finding for rank in ranks for finding in rank.findings]
    broken = any(f.about is About.CHECKPOINT and f.severity is Severity.ERROR for f in found.stated)
    for finding in left_over:
        if not (broken and finding.severity is Severity.ERROR):
            found.say(finding.severity, About.CHECKPOINT, finding.message, finding.names)
    if not_found and not found.errors:
        first, count = not_found[0], len(set(not_found))
        found.say(
            Severity.NOTE,
            About.CHECKPOINT,
            f"the files have no tensors {first}.* ({count} such layers): the model class renames "
            "them while it loads; shown as configured",
        )


def _leave_unasked(found: Explanation) -> None:
    """Drop the refusals of this machine, which is not the one that was asked about."""
    refused = [left for left in found.left if left.refusal]
    if not refused:
        return
    found.left = [replace(left, refusal="") for left in found.left]
    found.say(
        Severity.NOTE,
        About.SERVING,
        f"whether vLLM's own code can run the {len(refused)} layers that are left to it on "
        f"{found.platform} is not asked here",
    )


def _over_ranks(plans: Sequence[LayerPlan]) -> LayerPlan:
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
                bytes_prepared=_prepared_bytes(selection, part.descriptor, self.platform),
                rejected=rejections(selection),
                untested_on_hardware=selection.untested,
            )
        return self._parts[key]


def _prepared_bytes(
    selection: Selection, descriptor: CompressedLinearDescriptor, platform: Platform
) -> int | None:
    """Bytes of a part's prepared tensors, with the numbers of a quantized output."""
    product = selection.chosen.prepared_bytes(product_of(descriptor, platform))
    output = descriptor.output_activation
    if product is None or output is None:
        return product
    return product + (8 if output.needs_zero else 4)


def _reader(headers: Headers, file_headers: Headers) -> ReadTensor:
    """Reader by vLLM's names: ``headers`` are ``file_headers`` renamed, in the same order."""
    from safetensors import safe_open

    on_disk = dict(zip(headers, file_headers, strict=True))

    def read(name: str) -> Any:
        with safe_open(headers[name].file, framework="pt") as file:
            return file.get_tensor(on_disk[name])

    return read
