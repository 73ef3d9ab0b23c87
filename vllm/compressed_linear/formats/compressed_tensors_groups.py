# SPDX-License-Identifier: Apache-2.0
"""One of compressed-tensors' ``config_groups``: how it says that its modules are quantized."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from vllm.compressed_linear.formats.compressed_tensors_arguments import Arguments, activation_of
from vllm.compressed_linear.formats.compressed_tensors_schemes import (
    Form,
    HeaderOf,
    ZeroForm,
    form_on_disk,
    fp4_scheme,
    fp8_scheme,
    input_tensors,
    int8_scheme,
    output_tensors,
    pack_quantized_scheme,
)
from vllm.compressed_linear.formats.fields import Fields
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.resolution import (
    ConfigError,
    Delegated,
    LayerKind,
    Resolution,
    Unquantized,
)
from vllm.compressed_linear.spec.descriptor import ActivationSpec
from vllm.compressed_linear.spec.scheme import CheckpointScheme

DENSE_SINCE = (0, 18)
FORMATS = {
    "": None,
    "mixed-precision": None,
    "naive-quantized": None,
    "pack-quantized": Form.WORDS,
    "int-quantized": Form.INT8,
    "float-quantized": Form.FP8,
    "nvfp4-pack-quantized": Form.FP4,
    "mxfp4-pack-quantized": Form.FP4,
    "mxfp8-quantized": Form.FP8,
}
"""``format`` → the container of codes, where it says one."""
STRATEGIES = {
    Form.WORDS: ("group", "channel"),
    Form.INT8: ("tensor", "channel", "group", "block"),
    Form.FP8: ("tensor", "channel", "group", "block"),
    Form.FP4: ("group", "tensor_group"),
}


@dataclass(frozen=True)
class Group:
    """One of ``config_groups``. ``reason``: why its modules are left to vLLM or not quantized;
    ``refusal``: why they cannot run at all; ``sparsity``: why those cannot whose codes the files do
    not have. ``form``: of the codes, unless the files show another.
    """

    name: str
    weights: Arguments | None = None
    form: Form = Form.WORDS
    activation: ActivationSpec | None = None
    output: ActivationSpec | None = None
    group_index: bool = False
    dense_first: bool = True
    reason: str = ""
    refusal: str = ""
    sparsity: str = ""

    @property
    def weighted(self) -> bool:
        return self.weights is not None

    def resolve(self, module: str, kind: LayerKind, file: FileView) -> Resolution:
        """What it says of one of its modules. The file tells how codes, scales and zero points are
        stored."""
        if self.reason or self.weights is None:
            return Delegated(self.reason) if self.weighted else Unquantized(self.reason)
        header = partial(file.header, module)
        form = self._form(header)
        scheme = self._weight(module, form, self.weights, file)
        # Nothing is multiplied with the rows of a table that are looked up.
        if kind is LayerKind.EMBEDDING:
            return scheme
        if self.activation is not None:
            tensors = (*scheme.tensors, *input_tensors(self.activation, header))
            scheme = replace(scheme, activation=self.activation, tensors=tensors)
        if self.output is not None:
            # vLLM leaves what was not calibrated as it is (``CompressedTensorsWNA8O8Int``).
            tensors = (*scheme.tensors, *output_tensors(self.output, header))
            scheme = replace(
                scheme, output_activation=self.output, tensors=tensors, zero_is_off=True
            )
        return scheme

    def _form(self, header: HeaderOf) -> Form:
        """The form of the files, if it is one of numbers of this kind."""
        found = form_on_disk(header)
        integers = (Form.WORDS, Form.INT8)
        if found is None or (found in integers) != (self.form in integers):
            return self.form
        return found

    def _weight(
        self, module: str, form: Form, weights: Arguments, file: FileView
    ) -> CheckpointScheme:
        header = partial(file.header, module)
        if form is Form.FP8:
            return fp8_scheme(weights, header)
        if form is Form.FP4:
            return fp4_scheme(weights, header)
        stored = file.tensors_on_disk(module)
        self._check_order(module, weights, stored)
        # Whatever the configuration says, an order that is there counts.
        group_index = self.group_index or stored is None or "weight_g_idx" in stored
        zeros = ZeroForm.UNKNOWN
        if stored is not None:
            zeros = _zeros_on_disk(header)
            if zeros is ZeroForm.NONE and not weights.symmetric:
                zeros = ZeroForm.PACKED
        elif weights.symmetric and file.headers is not None:
            zeros = ZeroForm.NONE
        if form is Form.INT8:
            if zeros is not ZeroForm.NONE:
                zeros = ZeroForm.SIGNED
            return int8_scheme(weights, header, zeros=zeros, group_index=group_index)
        return pack_quantized_scheme(
            weights.bits,
            weights.group_size,
            symmetric=weights.symmetric,
            group_index=group_index,
            dense_first=self.dense_first,
            zeros=zeros,
        )

    def _check_order(self, module: str, weights: Arguments, stored: set[str] | None) -> None:
        """Raise ``ConfigError`` if channels were reordered and the file does not say how."""
        if stored is None or not self.group_index or weights.group_size == -1:
            return
        if "weight_packed" in stored and "weight_g_idx" not in stored:
            raise ConfigError(
                f"{module}: actorder of {self.name} says that channels have the order of "
                f"weight_g_idx, but the file has no {module}.weight_g_idx; expected one, or "
                'actorder: "static" for channels in order'
            )


def _zeros_on_disk(header: HeaderOf) -> ZeroForm:
    zeros, codes = header("weight_zero_point"), header("weight_packed")
    if zeros is None:
        return ZeroForm.NONE
    if codes is None or not zeros.shape:
        return ZeroForm.UNKNOWN
    return ZeroForm.SIGNED if zeros.shape[0] == codes.shape[0] else ZeroForm.PACKED


def read_groups(config: Fields) -> list[tuple[Group, list[str]]]:
    """All groups with their targets, in the order of the configuration.

    Raises ``ConfigError`` for numbers that cannot be.
    """
    return [
        (_group(name, group, config), group.names("targets"))
        for name, group in config.maps("config_groups").items()
    ]


def _group(name: str, group: Fields, config: Fields) -> Group:
    sparsity = _sparsity(config)
    fields = group.fields("weights")
    if not fields:
        return Group(name, reason=f"config group {name} has no weights", refusal=_alone(group))
    word = group.word("format") or config.word("format")
    packed = word in ("", "pack-quantized")
    weights = Arguments.read(fields, default_strategy="channel" if packed else "tensor")
    assert weights is not None
    inputs = Arguments.read(group.fields("input_activations"))
    activation = None if inputs is None else activation_of(inputs, weights)
    outputs = Arguments.read(group.fields("output_activations"))
    output = None if outputs is None else activation_of(outputs, weights)
    refusal = ""
    if outputs is not None and (output is None or output.dynamic):
        refusal = (
            f"{outputs.where} asks for outputs as {outputs}, which neither this package nor vLLM "
            "computes (known: static, per tensor); set it to null to run the layer with outputs "
            "that are not quantized"
        )
    form = FORMATS.get(word) or _likely_form(weights)
    reasons = []
    if word not in FORMATS:
        reasons.append(f"format {word}")
    elif weights.kind not in ("int", "float") or (weights.kind == "int") != (
        form in (Form.WORDS, Form.INT8)
    ):
        reasons.append(f"{weights.kind} weights in format {word}")
    elif weights.kind == "float" and weights.bits != (4 if form is Form.FP4 else 8):
        reasons.append(f"{weights.bits}-bit float weights in format {word}")
    elif weights.strategy not in STRATEGIES[form]:
        reasons.append(f"weights with strategy {weights.strategy} in format {word}")
    if weights.kind == "float" and not weights.symmetric:
        reasons.append("asymmetric float weights")
    if inputs is not None and activation is None:
        reasons.append(f"inputs as {inputs}")
    if reasons:
        reason = f"compressed-tensors {name}: {', '.join(reasons)}"
        return Group(name, weights, reason=reason, refusal=refusal, sparsity=sparsity)
    order = fields.values.get("actorder")
    found = Group(
        name,
        weights,
        form,
        activation,
        None if refusal else output,
        group_index=order is True or (order not in (None, False) and _by_channel(fields)),
        dense_first=_version(config.values.get("version")) >= DENSE_SINCE,
        refusal=refusal,
        sparsity=sparsity,
    )
    found.resolve("", LayerKind.LINEAR, FileView())  # raises for widths that do not exist
    return found


def _alone(group: Fields) -> str:
    """Why modules whose weights are not quantized cannot run; empty if nothing else is either."""
    sides = ("input", "output")
    found = [side for side in sides if group.fields(f"{side}_activations")]
    if not found:
        return ""
    return (
        f"{group.where}.{found[0]}_activations asks for quantized {found[0]}s of layers whose "
        "weights are not quantized, which neither this package nor vLLM computes; set it to null "
        "to run the layer without"
    )


def _likely_form(weights: Arguments) -> Form:
    """The form of weights whose format does not say it."""
    if weights.kind == "float":
        return Form.FP4 if weights.bits == 4 else Form.FP8
    return Form.WORDS if weights.bits < 8 or weights.strategy in ("group",) else Form.INT8


def _sparsity(config: Fields) -> str:
    """Why weights that were stored without their zeros cannot run; empty if none were."""
    form = config.fields("sparsity_config").word("format")
    if form in ("", "dense"):
        return ""
    return (
        f"sparsity_config.format is {form}: weights are stored without their zeros, which neither "
        "this package nor vLLM reads; decompress the checkpoint with the release of "
        "compressed-tensors that wrote it, or take one that is not sparse"
    )


def _by_channel(weights: Fields) -> bool:
    """Whether ``actorder`` leaves groups of channels that are not next to each other."""
    return weights.word("actorder") not in ("weight", "static")


def _version(text: Any) -> tuple[int, ...]:
    """Leading numbers of a version; an unknown one is taken for the current one."""
    found = re.match(r"(\d+)\.(\d+)", str(text or ""))
    return (int(found[1]), int(found[2])) if found else DENSE_SINCE
