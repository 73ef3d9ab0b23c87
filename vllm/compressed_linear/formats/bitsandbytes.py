# SPDX-License-Identifier: Apache-2.0
"""``quant_method: bitsandbytes``: nf4 and fp4 in blocks, and int8. Source: bitsandbytes
``functional.py`` (``QuantState``, ``dequantize_4bit``), transformers
``integrations/bitsandbytes.py``.

Weights of 4 bits are a flat array of bytes, the even element in the high nibble, with one
``absmax`` for ``blocksize`` elements that follow each other; double quantization stores these as
bytes too. Weights of int8 have ``SCB`` for each output channel: ŵ = code · SCB / 127. LLM.int8
multiplies outlier channels of x apart and rounds the others; here x stays as it is.

``restated`` turns the tensors of a file into those that ``resolve`` describes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar, Self

import torch

from vllm.compressed_linear.checkpoint.file_header import TensorHeader
from vllm.compressed_linear.checkpoint.headers import Headers
from vllm.compressed_linear.checkpoint.shard import CheckpointError
from vllm.compressed_linear.formats.base import Format, register_format
from vllm.compressed_linear.formats.entries import Components
from vllm.compressed_linear.formats.fields import Fields
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.resolution import (
    ConfigError,
    LayerKind,
    Resolution,
    Unquantized,
)
from vllm.compressed_linear.spec.descriptor import ScaleSpec, WeightSpec
from vllm.compressed_linear.spec.elements import (
    INT8,
    NF4,
    ElementType,
    dtype_name,
    torch_dtype,
)
from vllm.compressed_linear.spec.packing import Packing
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StoredTensor

Weights = Iterable[tuple[str, torch.Tensor]]

_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_FP4 = tuple(
    float(torch.tensor(sign * twelfths / 12, dtype=torch.float32))
    for sign in (1, -1)
    for twelfths in _FP4_TWELFTHS
)
"""Not e2m1 of OCP: other values, in another order."""
ELEMENTS = {
    "nf4": NF4,
    "fp4": ElementType("bnb_fp4", 4, codebook=_FP4),
}

_SIDE = re.compile(
    r"(?P<module>.+)\.weight\."
    r"(?P<last>absmax|quant_map|nested_absmax|nested_quant_map|"
    r"quant_state\.bitsandbytes__(?P<kind>nf4|fp4))"
)
NESTED = ("nested_absmax", "nested_quant_map")
STATE = "quant_state"
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
USUAL_BLOCK = 64
STORAGE = "bnb_4bit_quant_storage"


@register_format("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")
@dataclass(frozen=True)
class BitsAndBytes(Format):
    """``kind``: "nf4" or "fp4", if the file does not say; ``storage``: dtype that files give the
    bytes of 4-bit weights."""

    aliases = ("bitsandbytes",)
    marker_tensors = ("absmax_nf4", "absmax_fp4", "SCB")
    restates: ClassVar[bool] = True

    kind: str
    storage: str
    skipped: Components

    @classmethod
    def parse(cls, config: dict[str, Any]) -> Self:
        fields = Fields(config)
        kind = fields.word("bnb_4bit_quant_type") or "fp4"
        storage = fields.word(STORAGE).removeprefix("torch.") or "uint8"
        if kind not in ELEMENTS:
            raise ConfigError(f"bnb_4bit_quant_type is {kind!r}, expected nf4 or fp4")
        if storage not in ("uint8", "int8", "bfloat16", "float16", "float32"):
            raise ConfigError(
                f"{STORAGE} is {storage!r}, expected uint8 or a float of 16 or 32 bits"
            )
        field = "llm_int8_skip_modules"
        return cls(config, kind, storage, Components.of(field, fields.names(field)))

    def resolve(self, module: str, kind: LayerKind, file: FileView) -> Resolution:
        if (found := file.unquantized_on_disk(module)) is not None:
            return found
        held = file.tensors_on_disk(module)
        if held is None or not file.quantized_on_disk(module):
            if kind is not LayerKind.LINEAR or held is not None:
                return Unquantized("bitsandbytes quantizes linear layers only")
            if (entry := self.skipped.first(file.names_of(module))) is not None:
                return Unquantized(f"{self.skipped.field}: {entry}")
        eight = bool(Fields(self.config).flag("load_in_8bit")) if held is None else "SCB" in held
        if eight:
            return _int8()
        kinds = [name for name in ELEMENTS if f"absmax_{name}" in (held or ())]
        of_4_bits = kinds[0] if kinds else self.kind
        scale, weight = file.header(module, f"absmax_{of_4_bits}"), file.header(module, "weight")
        block = USUAL_BLOCK
        if scale is not None and weight is not None and (blocks := prod(scale.shape)):
            found_block = 2 * weight.nbytes // blocks
            # Any other number is that of a damaged file, which ``restated`` tells.
            block = found_block if found_block in BLOCKS else block
        return _four_bits(of_4_bits, block)

    def restated_headers(self, headers: Headers) -> Headers:
        kinds = {
            match["module"]: match["kind"]
            for name in headers
            if (match := _SIDE.fullmatch(name)) and match["kind"]
        }
        found: dict[str, TensorHeader] = {}
        for name, header in headers.items():
            module, _, last = name.rpartition(".")
            if match := _SIDE.fullmatch(name):
                if match["last"] == "absmax":
                    kind = kinds.get(match["module"], self.kind)
                    found[f"{match['module']}.absmax_{kind}"] = header._replace(dtype="float32")
            elif last == "weight" and module in kinds:
                found[name] = header._replace(dtype="uint8", shape=(header.nbytes, 1))
            elif last != "weight_format":
                found[name] = header
        return Headers(found, headers.copies)

    def restated(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """Raises ``CheckpointError`` for tensors that are missing or contradict each other."""
        storage = torch_dtype(self.storage)
        waiting: dict[str, Parts] = {}
        for name, tensor in weights:
            module, _, last = name.rpartition(".")
            if match := _SIDE.fullmatch(name):
                module, last = match["module"], match["last"].partition(".")[0]
            elif last == "SCB" and tensor.is_floating_point():
                yield name, tensor.to(torch.float32) / 127
                continue
            elif last == "weight_format":
                _check_format(name, tensor)
                continue
            elif (
                last != "weight"
                or tensor.shape[1:] != (1,)
                or tensor.dtype
                not in (
                    storage,
                    torch.uint8,
                )
            ):
                yield name, tensor
                continue
            parts = waiting.setdefault(module, Parts(module))
            parts.tensors[last] = tensor
            if match and match["kind"]:
                parts.kind = match["kind"]
            if not parts.missing:
                yield from waiting.pop(module).restated()
        for module, parts in waiting.items():
            if set(parts.tensors) == {"weight"}:  # of another layer with one input channel
                yield f"{module}.weight", parts.tensors["weight"]
                continue
            raise CheckpointError(
                f"tensor {module}.{parts.missing[0]} is not in the checkpoint; it holds "
                f"{', '.join(sorted(parts.tensors))} of {module}"
            )


def _four_bits(kind: str, block: int) -> CheckpointScheme:
    high_first = Packing(4, "K", container="uint8", order=(1, 0))
    return CheckpointScheme(
        WeightSpec(ELEMENTS[kind], ScaleSpec("float32", "group", block)),
        (
            StoredTensor("weight", Role.CODES, "uint8", ("N", "K"), high_first, flat=True),
            StoredTensor(f"absmax_{kind}", Role.SCALE, "float32", ("N", "G"), flat=True),
        ),
    )


def _int8() -> CheckpointScheme:
    codes = Packing(8, "K", container="int8", signed=True)
    return CheckpointScheme(
        WeightSpec(INT8, ScaleSpec("float32", "channel")),
        (
            StoredTensor("weight", Role.CODES, "int8", ("N", "K"), codes),
            StoredTensor("SCB", Role.SCALE, "float32", ("N",)),
        ),
        note="x stays as it is; LLM.int8 would round all but its outliers to 8 bits",
    )


def _check_format(name: str, tensor: torch.Tensor) -> None:
    if tensor.numel() != 1 or int(tensor) != 0:
        raise CheckpointError(
            f"tensor {name} is {tensor.flatten()[:4].tolist()}, expected 0: codes of int8 in other "
            "orders than rows are not read; save the model again with a newer bitsandbytes"
        )


@dataclass
class Parts:
    """Tensors of one weight of 4 bits, as far as they have been read. ``kind``: of its state."""

    module: str
    kind: str = ""
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        """Names of tensors that are needed, behind that of the module."""
        needed = ["weight", "absmax", "quant_map", STATE]
        scale = self.tensors.get("absmax")
        if scale is not None and scale.dtype == torch.uint8:
            needed += NESTED
        names = [name for name in needed if name not in self.tensors]
        return [name if name == "weight" else f"weight.{name}" for name in names]

    def restated(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Bytes of the codes, and fp32 scales of the blocks; both flat."""
        shape, block, state = self._state()
        codes = self.tensors["weight"].contiguous().view(torch.uint8).reshape(-1, 1)
        if 2 * codes.numel() != prod(shape):
            raise self._error("weight", f"holds {2 * codes.numel()} codes, expected {prod(shape)}")
        self._check_table()
        scale = self._scale(prod(shape) // block, state)
        # Of weights that are all 0 bitsandbytes stores a scale of 0 and codes of anything.
        if bool((dead := scale == 0).any()):
            nothing = ELEMENTS[self.kind].codebook.index(0.0)
            codes = codes.clone()
            codes.view(-1, block // 2)[dead] = nothing << 4 | nothing
        yield f"{self.module}.weight", codes
        yield f"{self.module}.absmax_{self.kind}", scale

    def _scale(self, blocks: int, state: Mapping[str, Any]) -> torch.Tensor:
        scale = self.tensors["absmax"].flatten()
        if scale.dtype != torch.uint8:
            return self._numbers("absmax", blocks)
        if scale.numel() != blocks:
            raise self._error("weight.absmax", f"is uint8 {list(scale.shape)}, expected [{blocks}]")
        size = int(state.get("nested_blocksize") or 256)
        outer = self._numbers("nested_absmax", -(-blocks // size))
        table = self._numbers("nested_quant_map", 256)
        factors = outer.repeat_interleave(size)[:blocks]
        return table[scale.to(torch.int64)] * factors + float(state.get("nested_offset") or 0.0)

    def _numbers(self, name: str, length: int) -> torch.Tensor:
        """fp32 [length] of a tensor of finite floats."""
        found = self.tensors[name]
        if found.numel() != length or not found.is_floating_point():
            what = f"is {dtype_name(found.dtype)} {list(found.shape)}, expected floats [{length}]"
            raise self._error(f"weight.{name}", what)
        if not bool(torch.isfinite(found).all()):
            raise self._error(f"weight.{name}", "holds numbers that are not finite")
        return found.flatten().to(torch.float32)

    def _check_table(self) -> None:
        expected = torch.tensor(ELEMENTS[self.kind].codebook, dtype=torch.float32)
        found = self._numbers("quant_map", 16)
        if not torch.allclose(found, expected, rtol=1e-6, atol=1e-7):
            begins = ", ".join(f"{float(value):.4g}" for value in found[:4])
            raise self._error(
                "weight.quant_map", f"is {begins} …, expected the table of {self.kind}"
            )

    def _state(self) -> tuple[list[int], int, dict[str, Any]]:
        """Shape and block size by the JSON that a tensor of bytes holds, and all of it."""
        name = f"weight.{STATE}.bitsandbytes__{self.kind}"
        try:
            state = json.loads(bytes(self.tensors[STATE].to(torch.uint8).flatten().tolist()))
            shape, block = [int(length) for length in state["shape"]], int(state["blocksize"])
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise self._error(name, f"does not describe a weight: {error}") from None
        if state.get("quant_type") != self.kind or block < 1 or any(n < 1 for n in shape):
            raise self._error(
                name,
                f"says {json.dumps(state)[:120]}, expected quant_type {self.kind}, and a blocksize "
                "and a shape that are positive",
            )
        return shape, block, state

    def _error(self, tensor: str, what: str) -> CheckpointError:
        return CheckpointError(f"tensor {self.module}.{tensor} {what}")
