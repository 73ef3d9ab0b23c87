# SPDX-License-Identifier: Apache-2.0
"""What would run each layer of a checkpoint and why, without loading it.

Everything comes from ``config.json`` and safetensors headers; the choice itself is made by the same
code as at load. What only values decide is listed as alternatives (``late_facts.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vllm.compressed_linear import tune_file
from vllm.compressed_linear.config import CompressedLinearConfig, format_of, formats
from vllm.compressed_linear.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.execution import choose, settle_lookup
from vllm.compressed_linear.headers import Headers, read_headers
from vllm.compressed_linear.late_facts import Case, Hints, PartShape, cases, read_case
from vllm.compressed_linear.linear import detect_platform
from vllm.compressed_linear.model_layout import (
    LayerLayout,
    LeftToVllm,
    ModelLayout,
    ModelUnavailableError,
    model_layouts,
)
from vllm.compressed_linear.on_disk import ReadTensor, assumed, load_shards, locate
from vllm.compressed_linear.plan import Rejection, rejections
from vllm.compressed_linear.platform import Platform
from vllm.compressed_linear.registry import NoBackendError
from vllm.compressed_linear.settings import ENABLE, Settings, enabled
from vllm.compressed_linear.weights import CheckpointError


class ExplainError(ValueError):
    """The checkpoint cannot be explained: it would not load, or it is not there."""


@dataclass(frozen=True)
class PartPlan:
    """What would run (a run of like shards of) a layer. ``error``: why nothing may, then
    ``backend`` is empty. ``bytes_prepared`` is None where a backend cannot tell beforehand."""

    start: int
    shards: tuple[str, ...]
    descriptor: CompressedLinearDescriptor
    bytes_checkpoint: int
    backend: str = ""
    variant: str = ""
    chosen_by: str = ""
    bytes_prepared: int | None = None
    rejected: tuple[Rejection, ...] = ()
    error: str = ""

    @property
    def runs(self) -> str:
        """Backend and code path in one word."""
        return f"{self.backend} ({self.variant})" if self.variant else self.backend or "nothing"


@dataclass(frozen=True)
class CasePlan:
    """``late_facts.Case`` with what would run each part; no facts: it is so for sure."""

    facts: tuple[str, ...]
    likely: bool
    parts: tuple[PartPlan, ...]
    uniform: bool = True
    from_sample: bool = False


@dataclass(frozen=True)
class LayerPlan:
    """One layer on rank 0, the likely case first; ``other_ranks`` holds what differs elsewhere."""

    name: str
    kind: str
    cases: tuple[CasePlan, ...]
    unquantized: tuple[str, ...] = ()
    note: str = ""
    other_ranks: tuple[tuple[int, tuple[CasePlan, ...]], ...] = ()

    @property
    def likely(self) -> CasePlan:
        return self.cases[0]


@dataclass
class Explanation:
    """Everything ``explain`` prints."""

    model: str
    architecture: str
    quant_method: str
    platform: str
    tp_size: int
    this_machine: bool = True
    dtype: str = ""
    model_class: str = ""
    weights_read: bool = False
    file_bytes: int = 0
    layers: list[LayerPlan] = field(default_factory=list)
    left: list[LeftToVllm] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def errors(self) -> list[str]:
        """Why loading would stop, one message a layer, as far as that is likely or sure."""
        ranks = [case_list[0] for layer in self.layers for _, case_list in layer.other_ranks] + [
            layer.likely for layer in self.layers
        ]
        errors = [p.error for case in ranks for p in case.parts if p.error]
        if self.this_machine:
            first: dict[str, str] = {}
            for left in self.left:
                first.setdefault(left.refusal, left.name)
            errors += [f"{name} and its like: {why}" for why, name in first.items() if why]
        return list(dict.fromkeys(errors))

    def bytes_checkpoint(self) -> int:
        """Of the layers that would run here, on rank 0."""
        return sum(p.bytes_checkpoint for layer in self.layers for p in layer.likely.parts)

    def bytes_prepared(self) -> int | None:
        """The same after preparation; None if a backend cannot tell."""
        sizes = [p.bytes_prepared for layer in self.layers for p in layer.likely.parts]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values. Layers that differ by name only share an entry."""
        data = asdict(replace(self, layers=[]))
        groups: dict[LayerPlan, list[str]] = {}
        for layer in self.layers:
            groups.setdefault(replace(layer, name=""), []).append(layer.name)
        data["layers"] = [_layers_json(plan, names) for plan, names in groups.items()]
        data["errors"] = self.errors
        data["bytes_checkpoint"] = self.bytes_checkpoint()
        data["bytes_prepared"] = self.bytes_prepared()
        return data


def _layers_json(plan: LayerPlan, names: list[str]) -> dict[str, Any]:
    def plain(found: tuple[CasePlan, ...]) -> list[dict[str, Any]]:
        out = []
        for case in found:
            entry = asdict(case)
            for part, data in zip(case.parts, entry["parts"], strict=True):
                data["descriptor"] = str(part.descriptor)
                data["fields"] = part.descriptor.to_json()
            out.append(entry)
        return out

    return {
        "names": names,
        "kind": str(plan.kind),
        "unquantized": list(plan.unquantized),
        "note": plan.note,
        "cases": plain(plan.cases),
        "other_ranks": {str(rank): plain(found) for rank, found in plan.other_ranks},
    }


@dataclass(frozen=True)
class Checkpoint:
    """A local checkpoint: its directory, config.json and headers."""

    path: Path
    config: dict[str, Any]
    headers: Headers

    @property
    def quantization(self) -> dict[str, Any]:
        """Where vLLM looks for it too; empty for an unquantized model."""
        inner = self.config.get("text_config") or {}
        found = (
            self.config.get("quantization_config")
            or inner.get("quantization_config")
            or self.config.get("compression_config")
            or {}
        )
        return dict(found)

    @classmethod
    def open(cls, model: str) -> Checkpoint:
        """``model``: a directory, or a model id whose files huggingface_hub has in its cache.

        Raises ``ExplainError`` when it is not there, or a file of it is missing or damaged.
        """
        path = _local_directory(model)
        file = path / "config.json"
        if not file.is_file():
            raise ExplainError(f"{path} has no config.json, so it is no checkpoint directory")
        try:
            config = json.loads(file.read_text())
        except ValueError as error:
            raise ExplainError(f"{file} is no JSON: {error}") from None
        try:
            headers = read_headers(path)
        except CheckpointError as error:
            raise ExplainError(str(error)) from error
        if headers is None:
            others = sorted(f.name for f in path.iterdir() if f.suffix in (".gguf", ".bin", ".pt"))
            found = f" (it has {', '.join(others[:3])})" if others else ""
            raise ExplainError(f"{path} has no *.safetensors file{found}")
        return cls(path, config, headers)


def _local_directory(model: str) -> Path:
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise ExplainError(f"{model} is a file, expected the directory of a checkpoint")
    if model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise ExplainError(f"there is no directory {model}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise ExplainError(
            f"{model} is no directory and not in the local cache of huggingface_hub; explain does "
            "not download, so fetch it first (hf download …) or give a directory"
        ) from error


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
    ``CheckpointError`` for tensors that contradict it, ``TensorParallelError``. Layers that nothing
    can or may run do not raise; they are in ``Explanation.errors``.
    """
    with _one_thread():
        return _explain(model, platform, tp_size, dtype, read_weights, settings)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Many small tensor operations: threads that wait for each other take longer than the work."""
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
    CompressedLinearConfig.from_config(quantization)
    if not quantization:
        found.notes.append(
            "the model is not quantized: vLLM uses this package only with "
            "--quantization compressed_linear"
        )
    try:
        layouts = model_layouts(
            checkpoint.path,
            architectures,
            tp_size=tp_size,
            dtype=dtype,
            quantized=bool(quantization),
        )
    except ModelUnavailableError as error:
        from vllm.compressed_linear.headers_layout import layout_from_headers

        found.notes.append(
            f"vLLM's model class was not used ({error}); names and shapes come from the headers "
            "alone, so fused layers are shown as their parts"
        )
        if tp_size > 1:
            raise ExplainError(
                f"how the model is split among {tp_size} ranks is not known: vLLM's model class "
                f"cannot be built here ({error})"
            ) from error
        layouts = [layout_from_headers(checkpoint.headers, checkpoint.config, quantization, dtype)]
    settings = settings or Settings.read()
    if note := tune_file.load(settings.tune_file, platform).note:
        found.notes.append(note)
    explainer = _Explainer(
        platform,
        settings,
        _hints(quantization),
        checkpoint.headers,
        read_weights,
    )
    by_rank = [[explainer.layer(layout, layer) for layer in layout.layers] for layout in layouts]
    if explainer.not_found:
        first, count = explainer.not_found[0], len(set(explainer.not_found))
        found.notes.append(
            f"no tensors are called {first}.* in the files ({count} such layers): either they are "
            "missing, or the model class renames them while it loads; shown as configured"
        )
    found.layers = [_over_ranks(same) for same in zip(*by_rank, strict=True)]
    found.left = layouts[0].left
    found.dtype, found.model_class = layouts[0].dtype, layouts[0].model_class
    return found


def _not_ours(quantization: dict[str, Any]) -> str:
    name = str(quantization.get("quant_method") or "")
    known = formats().get(name)
    if known is None:
        supported = ", ".join(sorted(filter(None, formats())))
        return f"quant_method {name!r} is left to vLLM (read here: {supported})"
    return f"all of it is left to vLLM: {known.unsupported(quantization)}"


def _hints(quantization: dict[str, Any]) -> Hints:
    # Only compressed-tensors has a group index on purpose; GPTQ files have one in any case.
    by_default = quantization.get("quant_method") == "compressed-tensors"
    return Hints(
        reordered=bool(quantization.get("desc_act", by_default)),
        symmetric=bool(quantization.get("sym", False)),
    )


def _over_ranks(plans: tuple[LayerPlan, ...]) -> LayerPlan:
    """Rank 0, with what differs on others."""
    first = _shown(plans[0].cases)
    others = [(r, p.cases) for r, p in enumerate(plans) if r and _shown(p.cases) != first]
    return replace(plans[0], other_ranks=tuple(others))


def _shown(found: tuple[CasePlan, ...]) -> list[Any]:
    """What makes a rank differ: not the length of an order that was made up."""
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
    """Cases and choices, each thought out once for all layers that are alike."""

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
        self._cases: dict[Any, tuple[Case, ...]] = {}
        self._parts: dict[Any, PartPlan] = {}

    def layer(self, layout: ModelLayout, layer: LayerLayout) -> LayerPlan:
        """Raises ``CheckpointError`` where headers contradict the configuration."""
        layer = self._settled(layer)
        found = tuple(
            CasePlan(
                case.facts,
                case.likely,
                tuple(self._part(layer.name, part) for part in case.parts),
                case.uniform,
                case.from_sample,
            )
            for case in self._layer_cases(layout, layer)
        )
        note = layer.notes[layer.context.lookup]
        return LayerPlan(layer.name, layer.kind, found, layer.reasons, note)

    def _settled(self, layer: LayerLayout) -> LayerLayout:
        """Where rows of a tied table that is not quantized are looked up, as at load."""
        if layer.dense is None:
            return layer
        try:
            context = settle_lookup(
                layer.name, [layer.dense], layer.context, self.platform, self.settings
            )
        except NoBackendError:  # which the case will say
            context = layer.context
        return replace(layer, context=context)

    def _layer_cases(self, layout: ModelLayout, layer: LayerLayout) -> tuple[Case, ...]:
        if layer.dense is not None:
            return cases([layer.dense], layer.context, self.hints)
        name, sources = layer.name, layer.sources
        tensors = locate(name, layer.path, sources, layout.headers, layout.stacked)
        if tensors and self.read_weights:
            read = _reader(layout.headers, self.file_headers)
            return (read_case(name, sources, layer.context, tensors, read),)
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
            self._cases[key] = cases(shards, layer.context, self.hints)
        return self._cases[key]

    def _part(self, layer: str, part: PartShape) -> PartPlan:
        quantized = part.descriptor.weight.element.kind != "dense"
        key = (part, self.settings.backend.backend_for(layer, quantized=quantized))
        if key not in self._parts:
            plan = PartPlan(part.start, part.shards, part.descriptor, part.bytes_checkpoint)
            try:
                selection = choose(layer, part.descriptor, self.platform, self.settings)
            except NoBackendError as error:
                return replace(plan, error=str(error))
            self._parts[key] = replace(
                plan,
                backend=selection.chosen.name,
                variant=selection.variant,
                chosen_by=selection.chosen_by,
                bytes_prepared=selection.chosen.prepared_bytes(part.descriptor),
                rejected=rejections(selection),
            )
        return self._parts[key]


def _reader(headers: Headers, file_headers: Headers) -> ReadTensor:
    """Reads by vLLM's names: ``headers`` are ``file_headers`` renamed, in the same order."""
    from safetensors import safe_open

    on_disk = dict(zip(headers, file_headers, strict=True))

    def read(name: str) -> Any:
        with safe_open(headers[name].file, framework="pt") as file:
            return file.get_tensor(on_disk[name])

    return read
