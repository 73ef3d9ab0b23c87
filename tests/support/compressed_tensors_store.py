# SPDX-License-Identifier: Apache-2.0
"""Random weights as compressed-tensors stores them, and their configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests.support import float_definitions as floats
from tests.support import integer_definitions as integers
from tests.support.float_models import Stored, unlike_factor

Arguments = dict[str, Any]


def arguments(bits: int, kind: str, strategy: str, **other: Any) -> Arguments:
    """``QuantizationArgs`` of a configuration."""
    return {"num_bits": bits, "type": kind, "strategy": strategy, **other}


@dataclass(frozen=True)
class CompressedWeight:
    """A ``Store`` of integers of ``bits``, packed into words or one in each int8, or of fp4.

    ``strategy``, ``group``, ``block``: of the scales. ``x``: "none", "token", "token-asymmetric",
    "static", "static-asymmetric", "fp8", "nvfp4" or "mxfp4". ``y``: whether outputs are static
    int8; an ``uncalibrated`` side has a scale of 0, which changes nothing. ``rotation``: block of a
    Hadamard transform of all inputs, also of modules that stay as they are.
    ``plain``: last components of modules that stay as they are. ``unlike``: members of a fused
    layer have very different scales, of x too.
    """

    bits: int = 8
    form: str = "int-quantized"
    strategy: str = "channel"
    group: int = 32
    block: tuple[int, int] = (32, 64)
    x: str = "none"
    y: bool = False
    uncalibrated: tuple[str, ...] = ()
    rotation: int = 0
    scale_dtype: torch.dtype = torch.float32
    plain: tuple[str, ...] = ()
    unlike: bool = False

    @property
    def config_group(self) -> dict[str, Any]:
        """Its group in a configuration."""
        sizes: dict[str, Any] = {}
        if self.strategy in ("group", "tensor_group"):
            sizes["group_size"] = self.group
        if self.strategy == "block":
            sizes["block_structure"] = list(self.block)
        if self.form == "mxfp4-pack-quantized":
            sizes["scale_dtype"] = "torch.uint8"
        kind = "float" if "fp4" in self.form else "int"
        static = arguments(8, "int", "tensor", dynamic=False)
        inputs: dict[str, Arguments | None] = {
            "none": None,
            "token": arguments(8, "int", "token", dynamic=True),
            "token-asymmetric": arguments(8, "int", "token", dynamic=True, symmetric=False),
            "static": static,
            "static-asymmetric": {**static, "symmetric": False},
            "fp8": arguments(8, "float", "token", dynamic=True),
            "nvfp4": arguments(4, "float", "tensor_group", dynamic="local", group_size=16),
            "mxfp4": arguments(
                4, "float", "group", dynamic=True, group_size=32, scale_dtype="torch.uint8"
            ),
        }
        return {
            "format": self.form,
            "targets": ["Linear"],
            "weights": arguments(self.bits, kind, self.strategy, **sizes),
            "input_activations": inputs[self.x],
            "output_activations": static if self.y else None,
        }

    @property
    def config(self) -> dict[str, Any]:
        apply = [{"targets": ["Linear"], "location": "input", "ignore": ["lm_head"]}]
        scheme = {"type": "hadamard", "head_dim": self.rotation, "apply": apply}
        transforms = {"config_groups": {"R": scheme}} if self.rotation else {}
        return {
            "quant_method": "compressed-tensors",
            "transform_config": transforms,
            "format": self.form,
            "config_groups": {"group_0": self.config_group},
            "ignore": [f"re:.*{name}$" for name in self.plain],
        }

    def __call__(self, module: str, n: int, k: int, generator: torch.Generator) -> Stored | None:
        if module.rpartition(".")[2] in self.plain:
            if not self.rotation:
                return None
            plain = torch.randn(n, k, generator=generator) * 0.05
            return Stored({"weight": plain}, plain.double().numpy(), self._rotated)
        if "fp4" in self.form:
            tensors, meaning = self._fp4(n, k, generator)
        else:
            tensors, meaning = self._integers(n, k, generator)
        factor = unlike_factor(module) if self.unlike else 1.0  # a power of two
        if factor != 1 and "weight_global_scale" in tensors:
            tensors["weight_global_scale"] /= factor
        elif factor != 1:
            tensors["weight_scale"] *= factor
        meaning = meaning * factor
        given = (float(torch.rand((), generator=generator)) * 0.02 + 0.02) * factor
        points = 0
        if self.x.startswith("static"):
            tensors["input_scale"] = torch.tensor([0.0 if "x" in self.uncalibrated else given])
            if self.x == "static-asymmetric":
                points = -17
                tensors["input_zero_point"] = torch.tensor([points], dtype=torch.int8)
        if self.x == "nvfp4":
            given = (600.0 + 100 * float(torch.rand((), generator=generator))) / factor
            tensors["input_global_scale"] = torch.tensor([given])
        step = float(torch.rand((), generator=generator)) * 0.05 + 0.02
        if self.y:
            tensors["output_scale"] = torch.tensor([0.0 if "y" in self.uncalibrated else step])
        rounds = self.y and "y" not in self.uncalibrated

        def prepare(x: Any) -> floats.Floats:
            return self._prepared(self._rotated(x).astype(np.float32), given, points)

        def finish(y: Any) -> floats.Floats:
            return integers.int8_static(y, float(np.float32(step))) if rounds else y

        return Stored(tensors, meaning, prepare, finish, step if rounds else 0.0)

    def _rotated(self, x: Any) -> floats.Floats:
        """x times Sylvester's matrix, in blocks (``transform/utils/hadamard`` of the library)."""
        matrix = np.ones((1, 1))
        while len(matrix) < self.rotation:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
        blocks = x.astype(np.float64).reshape(x.shape[0], -1, len(matrix))
        result: floats.Floats = (blocks @ matrix.T / len(matrix) ** 0.5).reshape(x.shape)
        return result

    def _prepared(self, x: Any, given: float, points: int) -> floats.Floats:
        if self.x.startswith("static") and "x" not in self.uncalibrated:
            return integers.int8_static(x, given, points)
        if self.x.startswith("token"):
            return integers.int8_per_token(x, symmetric=self.x == "token")
        if self.x == "fp8":
            return floats.per_token(x)
        if self.x == "nvfp4":
            return floats.nvfp4(x, float(np.float32(1) / np.float32(given)))
        if self.x == "mxfp4":
            return integers.mxfp4(x)
        return np.asarray(x, dtype=np.float64)

    def _integers(
        self, n: int, k: int, generator: torch.Generator
    ) -> tuple[dict[str, torch.Tensor], floats.Floats]:
        half = 1 << (self.bits - 1)
        codes = torch.randint(-half, half, (n, k), generator=generator)
        shape = {
            "tensor": (1,),
            "channel": (n, 1),
            "group": (n, k // self.group),
            "block": (-(-n // self.block[0]), -(-k // self.block[1])),
        }[self.strategy]
        scale = (torch.rand(shape, generator=generator) + 0.5) * (0.2 / half)
        scale = scale.to(self.scale_dtype)
        wide = scale.double().numpy()
        if self.strategy == "block":
            wide = floats.spread(wide, n, self.block, k)
        elif self.strategy == "group":
            wide = np.repeat(wide, self.group, 1)
        tensors = {"weight_scale": scale}
        if self.form == "int-quantized":
            tensors["weight"] = codes.to(torch.int8)
        else:
            per_word = 32 // self.bits
            fields = (codes + half).reshape(n, -1, per_word).numpy().astype(np.uint64)
            shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(self.bits)
            words = (fields << shifts).sum(2).astype(np.uint32).view(np.int32)
            tensors |= {
                "weight_packed": torch.from_numpy(words),
                "weight_shape": torch.tensor([n, k]),
            }
        return tensors, codes.double().numpy() * wide

    def _fp4(
        self, n: int, k: int, generator: torch.Generator
    ) -> tuple[dict[str, torch.Tensor], floats.Floats]:
        codes = torch.randint(0, 16, (n, k), generator=generator).to(torch.uint8)
        packed = codes[:, 0::2] | codes[:, 1::2] << 4
        values = floats.E2M1[codes.numpy()]
        if self.form == "mxfp4-pack-quantized":
            scale = torch.randint(118, 124, (n, k // 32), generator=generator).to(torch.uint8)
            wide = np.repeat(floats.E8M0[scale.numpy()], 32, 1)
            return {"weight_packed": packed, "weight_scale": scale}, values * wide
        scale = (torch.rand(n, k // 16, generator=generator) * 100 + 1).to(torch.float8_e4m3fn)
        outer = torch.rand((), generator=generator) * 1000 + 500
        wide = np.repeat(scale.double().numpy(), 16, 1)
        tensors = {
            "weight_packed": packed,
            "weight_scale": scale,
            "weight_global_scale": outer.reshape(1),
        }
        return tensors, values * wide * float(np.float32(1) / np.float32(outer.item()))
