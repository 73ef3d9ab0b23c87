# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's algorithms (``quant_algo``): how each stores a weight and what it does to x.

* NVFP4: ŵ = e2m1 · ``weight_scale`` · ``weight_scale_2``, all factors; even channels in low nibbles
  (modelopt ``quantization/qtensor/nvfp4_tensor.py``); ``input_scale`` is the static scale of x
* MX: e8m0 scales for 32 channels (``qtensor/mxfp4_tensor.py``, ``mxfp8_tensor.py``)
* AWQ: two output channels in a byte, the even one in the low nibble, two's complement
  (``export/quant_utils.py`` ``pack_int4_in_uint8``); ``weight_scale_2`` of W4A8 is for kernels that
  multiply in 8 bits, and no factor
* ``pre_quant_scale``: factors of x, of AWQ and SmoothQuant
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.float8 import (
    PER_TOKEN,
    STATIC,
    Names,
    float8_scheme,
    per_group,
)
from vllm.compressed_linear.spec.activation import just_above, nvfp4_input
from vllm.compressed_linear.spec.descriptor import ActivationSpec, ScaleSpec, WeightSpec
from vllm.compressed_linear.spec.elements import E2M1, E4M3, INT8, uint
from vllm.compressed_linear.spec.packing import Packing
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StoredTensor

NVFP4_INPUT = nvfp4_input()
MXFP8_INPUT = per_group(32, powers_of_two=True)
MXFP4_INPUT = replace(MXFP8_INPUT, element=E2M1, maximum=just_above(3.0))
"""The scale is the smallest power of two under which x fits 6."""
INT8_INPUT = ActivationSpec(INT8, False, "tensor", maximum=127.0)
BYTES = ("uint8", "float8_e8m0fnu")


@dataclass(frozen=True)
class Algorithm:
    """``weight``: "fp8", "mxfp8", "nvfp4", "mxfp4", "int4" or "int8". ``activation``: of x.
    ``vllm_name``: vLLM's config for it, "" if there is none. ``blocks``, ``by_channel``: of fp8."""

    weight: str
    activation: ActivationSpec | None
    vllm_name: str = ""
    blocks: bool = False
    by_channel: bool = False

    def with_inputs(self, said: bool, config: dict[str, Any]) -> Algorithm:
        """As vLLM reads config groups: NVFP4 of which none has inputs is for weights only. MXFP4
        is the name of both, too."""
        groups = config.get("config_groups")
        if self.activation == NVFP4_INPUT and groups and not said:
            return replace(self, activation=None)
        if self.weight == "mxfp4" and self.activation is None and said:
            return replace(self, activation=MXFP4_INPUT)
        return self


_FP4 = "modelopt_fp4"
ALGORITHMS = {
    "FP8": Algorithm("fp8", STATIC, "modelopt"),
    "FP8_PER_CHANNEL_PER_TOKEN": Algorithm("fp8", PER_TOKEN, "modelopt", by_channel=True),
    "FP8_PB_WO": Algorithm("fp8", None, "modelopt", blocks=True),
    "FP8_PB_REAL": Algorithm("fp8", None, blocks=True),
    "MXFP8": Algorithm("mxfp8", MXFP8_INPUT, "modelopt_mxfp8"),
    "NVFP4": Algorithm("nvfp4", NVFP4_INPUT, _FP4),
    "NVFP4_AWQ": Algorithm("nvfp4", NVFP4_INPUT),
    "W4A16_NVFP4": Algorithm("nvfp4", None, _FP4),
    "W4A8_NVFP4_FP8": Algorithm("nvfp4", STATIC),
    "MXFP4": Algorithm("mxfp4", None),
    "W4A8_MXFP4_FP8": Algorithm("mxfp4", STATIC),
    "W4A16_AWQ": Algorithm("int4", None),
    "INT4_AWQ": Algorithm("int4", None),
    "W4A8_AWQ": Algorithm("int4", STATIC),
    "W8A16": Algorithm("int8", None),
    "W8A8_SQ_PER_CHANNEL": Algorithm("int8", INT8_INPUT),
    "INT8_SQ": Algorithm("int8", INT8_INPUT),
}
_BY_TENSORS = {
    # (weights, whether there is a scale of x)
    ("fp8", True): ALGORITHMS["FP8"],
    ("fp8", False): Algorithm("fp8", None),
    ("mxfp8", False): ALGORITHMS["MXFP8"],
    ("nvfp4", True): ALGORITHMS["NVFP4"],
    ("nvfp4", False): ALGORITHMS["W4A16_NVFP4"],
    ("mxfp4", True): ALGORITHMS["W4A8_MXFP4_FP8"],
    ("mxfp4", False): ALGORITHMS["MXFP4"],
    ("int4", True): ALGORITHMS["W4A8_AWQ"],
    ("int4", False): ALGORITHMS["W4A16_AWQ"],
    ("int8", True): ALGORITHMS["W8A8_SQ_PER_CHANNEL"],
    ("int8", False): ALGORITHMS["W8A16"],
}
"""What tensors mean of which the configuration says nothing, or something else."""

NO_INPUT_SCALE = (
    "x is not quantized, although the configuration says so: the file has no input_scale at all"
)


def algorithm_on_disk(module: str, file: FileView, stated: Algorithm | None) -> Algorithm | None:
    """``stated``, unless the tensors of the module are those of another one; None if they are of
    none, or there is none."""
    kind = _weight_on_disk(module, file)
    if kind is None or (stated is not None and stated.weight == kind):
        return stated
    found = file.tensors_on_disk(module) or set()
    return _BY_TENSORS.get((kind, "input_scale" in found))


def _weight_on_disk(module: str, file: FileView) -> str | None:
    """The kind of the module's weight by its dtypes; None if they do not tell."""
    weight, scale = file.header(module, "weight"), file.header(module, "weight_scale")
    if weight is None or scale is None:
        return None
    powers = scale.dtype in BYTES
    second = "weight_scale_2" in (file.tensors_on_disk(module) or ())
    if powers and second:
        return None
    if weight.dtype in ("float8_e4m3fn", "float8_e5m2"):
        return "mxfp8" if powers else "fp8"
    if weight.dtype == "uint8":
        if scale.dtype == "float8_e4m3fn":
            return "nvfp4"
        if powers:
            return "mxfp4"
        # Two output channels are in a byte.
        return "int4" if scale.shape[:1] == (2 * weight.shape[0],) else None
    return "int8" if weight.dtype == "int8" else None


def modelopt_scheme(
    module: str, file: FileView, algorithm: Algorithm, group_size: int
) -> CheckpointScheme:
    """The scheme of ``module``; ``group_size`` 0 if it is not given."""
    activation, note = algorithm.activation, ""
    if activation is not None and activation.needs_scale and file.lacks("input_scale"):
        activation, note = None, NO_INPUT_SCALE
    if algorithm.weight == "fp8":
        scheme = _fp8(module, file, algorithm, activation, group_size)
    else:
        scheme = _grouped(module, file, algorithm.weight, activation, group_size)
    return replace(scheme, tensors=(*scheme.tensors, *_of_x(module, file, scheme)), note=note)


def _of_x(module: str, file: FileView, scheme: CheckpointScheme) -> list[StoredTensor]:
    """Tensors that any algorithm may have: factors of x, and a scale of x that is not used."""
    found = file.tensors_on_disk(module)
    tensors = []
    if found is None or "pre_quant_scale" in found:
        tensors.append(
            StoredTensor("pre_quant_scale", Role.PRESCALE, "float32", ("K",), optional=True)
        )
    known = {tensor.name for tensor in scheme.tensors}
    tensors += [
        StoredTensor(name, Role.IGNORED, "float32", (1,), optional=True)
        for name in ("input_scale", "weight_scale_2")
        if name not in known and name in (found or ())
    ]
    return tensors


def _fp8(
    module: str,
    file: FileView,
    algorithm: Algorithm,
    activation: ActivationSpec | None,
    group_size: int,
) -> CheckpointScheme:
    scale, weight = file.header(module, "weight_scale"), file.header(module, "weight")
    blocks = algorithm.blocks
    if scale is not None and weight is not None and len(scale.shape) > 1:
        blocks = blocks or scale.shape not in ((weight.shape[0], 1), (1, 1))
    size = group_size if group_size > 1 else 128
    return float8_scheme(
        module,
        file,
        Names(),
        activation,
        block=(size, size) if blocks else None,
        by_channel=algorithm.by_channel,
    )


def _grouped(
    module: str, file: FileView, kind: str, activation: ActivationSpec | None, group_size: int
) -> CheckpointScheme:
    """Weights with scales of groups of channels, or in 8-bit integers, of output channels."""
    element, codes, scale, usual = {
        "mxfp8": (
            E4M3,
            StoredTensor("weight", Role.CODES, "float8_e4m3fn", ("N", "K")),
            "e8m0",
            32,
        ),
        "nvfp4": (E2M1, _packed(Packing(4, "K", container="uint8")), "float8_e4m3fn", 16),
        "mxfp4": (E2M1, _packed(Packing(4, "K", container="uint8")), "e8m0", 32),
        "int4": (
            uint(4, 8),
            _packed(Packing(4, "N", container="uint8", signed=True)),
            "float32",
            128,
        ),
        "int8": (INT8, _packed(Packing(8, "K", container="int8", signed=True)), "float32", -1),
    }[kind]
    size = group_size or usual
    if kind == "int4" and not group_size:
        size = _group(module, file, size)
    elif kind == "int8":
        size = -1
    header = file.header(module, "weight_scale")
    axes: tuple[str | int, ...] = ("N", "G")
    if kind == "int8":
        axes = ("N", 1) if header is not None and len(header.shape) == 2 else ("N",)
        if header is not None and all(length == 1 for length in header.shape):
            axes = (1,)
    tensors = [codes, StoredTensor("weight_scale", Role.SCALE, scale, axes)]
    if kind == "nvfp4":
        tensors.append(StoredTensor("weight_scale_2", Role.ROW_SCALE, "float32", (1,)))
    if activation is not None and activation.needs_scale:
        tensors.append(StoredTensor("input_scale", Role.INPUT_SCALE, "float32", (1,)))
    granularity = "channel" if size == -1 else "group"
    weight = WeightSpec(
        element,
        ScaleSpec(scale, granularity, size),
        row_scale="float32" if kind == "nvfp4" else None,
    )
    return CheckpointScheme(weight, tuple(tensors), activation)


def _packed(packing: Packing) -> StoredTensor:
    return StoredTensor("weight", Role.CODES, packing.container, ("N", "K"), packing)


def _group(module: str, file: FileView, stated: int) -> int:
    """Channels that share a scale: ``stated``, unless the file has more groups, into which they
    divide evenly. config.json may not have the size of integers' groups, and of too few scales some
    are lost."""
    weight, scale = file.header(module, "weight"), file.header(module, "weight_scale")
    if weight is None or scale is None or len(weight.shape) != 2 or len(scale.shape) != 2:
        return stated
    k, groups = weight.shape[1], scale.shape[1]
    if groups <= -(-k // stated) or k % groups:
        return stated
    return k // groups
