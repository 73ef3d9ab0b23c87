# SPDX-License-Identifier: Apache-2.0
"""Random weights as NVIDIA ModelOpt stores them, by the rules of its ``export/quant_utils.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests.support import float_definitions as definitions
from tests.support.float_models import Stored, unlike_factor


@dataclass(frozen=True)
class ModelOptWeights:
    """A ``Store``. ``kind``: "nvfp4", "mxfp8", "mxfp4", "int4" or "int8". ``x``: "none", "nvfp4",
    "mxfp8", "mxfp4", "fp8" or "int8". ``prescaled``: last components of modules with a prescale.
    ``unused``: tensors that are written and mean nothing. ``unlike``: members of a fused layer have
    very different scales of x, and second ones of NVFP4."""

    kind: str
    x: str = "none"
    group: int = 0
    prescaled: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    unlike: bool = False

    def __call__(self, module: str, n: int, k: int, generator: torch.Generator) -> Stored | None:
        last = module.rpartition(".")[2]
        if last in self.plain:
            return None
        tensors, meaning = getattr(self, f"_{self.kind}")(n, k, generator)
        unlike = unlike_factor(module) if self.unlike else 1.0
        if "weight_scale_2" in tensors:
            tensors["weight_scale_2"] *= unlike  # powers of two
            meaning = meaning * unlike
        given = float(np.float32(torch.rand((), generator=generator)) * 0.01 + 0.005)
        if self.x == "nvfp4":
            given /= 20  # the static scale of scales up to 448
        given *= unlike
        given = float(np.float32(given))
        if self.x in ("nvfp4", "fp8", "int8"):
            tensors["input_scale"] = torch.tensor(given)
        for name in self.unused:
            tensors[name] = torch.tensor(0.7)
        factor = None
        if last in self.prescaled:
            factor = (torch.rand(k, generator=generator) + 0.5).to(torch.bfloat16)
            tensors["pre_quant_scale"] = factor

        def prepare(x: Any) -> definitions.Floats:
            x = x.astype(np.float32)
            if factor is not None:
                x = x * factor.float().numpy()
            quantized = {
                "nvfp4": lambda: definitions.nvfp4(x, given),
                "mxfp8": lambda: definitions.mx8(x),
                "mxfp4": lambda: definitions.mx4(x),
                "fp8": lambda: definitions.static(x, given),
                "int8": lambda: definitions.int8(x, given),
                "none": lambda: x.astype(np.float64),
            }
            return quantized[self.x]()

        return Stored(tensors, meaning, prepare)

    def _nvfp4(
        self, n: int, k: int, generator: torch.Generator
    ) -> tuple[dict[str, torch.Tensor], definitions.Floats]:
        packed = _bytes((n, k // 2), generator)
        size = self.group or 16
        scale = (torch.rand(n, k // size, generator=generator) * 100 + 10).to(torch.float8_e4m3fn)
        second = torch.rand((), generator=generator) * 2e-4 + 1e-4
        codes = definitions.low_nibbles_first(packed.numpy())
        wide = np.repeat(definitions.E4M3[scale.view(torch.uint8).numpy()], size, 1)
        tensors = {"weight": packed, "weight_scale": scale, "weight_scale_2": second}
        return tensors, definitions.E2M1[codes] * wide * float(second)

    def _mxfp4(
        self, n: int, k: int, generator: torch.Generator
    ) -> tuple[dict[str, torch.Tensor], definitions.Floats]:
        packed = _bytes((n, k // 2), generator)
        scale = torch.randint(118, 122, (n, k // 32), generator=generator).to(torch.uint8)
        codes = definitions.low_nibbles_first(packed.numpy())
        wide = np.repeat(definitions.E8M0[scale.numpy()], 32, 1)
        return {"weight": packed, "weight_scale": scale}, definitions.E2M1[codes] * wide

    def _mxfp8(
        self, n: int, k: int, generator: torch.Generator
    ) -> tuple[dict[str, torch.Tensor], definitions.Floats]:
        codes = (_bytes((n, k), generator) & 0x80) | _bytes((n, k), generator) % 0x60
        scale = torch.randint(117, 122, (n, k // 32), generator=generator).to(torch.uint8)
        wide = np.repeat(definitions.E8M0[scale.numpy()], 32, 1)
        tensors = {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scale}
        return tensors, definitions.E4M3[codes.numpy()] * wide

    def _int4(
        self, n: int, k: int, generator: torch.Generator
    ) -> tuple[dict[str, torch.Tensor], definitions.Floats]:
        packed = _bytes((n // 2, k), generator)
        size = self.group or 128
        scale = torch.rand(n, -(-k // size), generator=generator) * 0.01 + 0.005
        codes = np.empty((n, k), dtype=np.int64)
        codes[0::2], codes[1::2] = packed.numpy() & 15, packed.numpy() >> 4
        codes = np.where(codes > 7, codes - 16, codes)
        wide = np.repeat(scale.numpy().astype(np.float64), size, 1)[:, :k]
        return {"weight": packed, "weight_scale": scale}, codes * wide

    def _int8(
        self, n: int, k: int, generator: torch.Generator
    ) -> tuple[dict[str, torch.Tensor], definitions.Floats]:
        codes = torch.randint(-128, 128, (n, k), generator=generator).to(torch.int8)
        scale = torch.rand(n, generator=generator) * 0.001 + 0.0005
        meaning = codes.numpy().astype(np.float64) * scale.double().numpy()[:, None]
        return {"weight": codes, "weight_scale": scale}, meaning


def _bytes(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
