# SPDX-License-Identifier: Apache-2.0
"""Random weights as AMD Quark stores them, and their configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests.support import float_definitions as floats
from tests.support import integer_definitions as integers
from tests.support.float_models import Stored, unlike_factor

REORDER = (0, 2, 4, 6, 1, 3, 5, 7)
E3M2 = np.array([floats._decoded(c, 3, 2, set(), set()) for c in range(64)])


def entry(dtype: str, scheme: str, *, dynamic: bool = False, **other: Any) -> dict[str, Any]:
    """One entry of a configuration."""
    symmetric = other.pop("symmetric", True)
    return {
        "dtype": dtype,
        "qscheme": scheme,
        "is_dynamic": dynamic,
        "symmetric": symmetric,
        "group_size": None,
        "block_size": None,
        **other,
    }


@dataclass(frozen=True)
class QuarkWeight:
    """A ``Store``. ``kind``: "int8", "int8-groups", "uint8-groups", "int4", "uint4", "int4-fp8",
    "fp8", "mxfp4", "mxfp6" or "nvfp4". ``channel``: a scale for each channel instead of one, or
    groups for 4 bits. ``x``: "none", "static", "token" of int8 or fp8, or "own", the inputs of MX
    and NVFP4. ``unlike``: members of a fused layer have very different scales, of x too."""

    kind: str
    channel: bool = False
    x: str = "none"
    pack_method: str = "reorder"
    unlike: bool = False

    @property
    def config(self) -> dict[str, Any]:
        scheme = "per_channel" if self.channel else "per_tensor"
        group: dict[str, Any] = {"group_size": 32}
        mx: dict[str, Any] = {**group, "scale_format": "e8m0"}
        two = [
            entry("fp4", "per_group", group_size=16),
            entry("fp8_e4m3", "per_tensor"),
        ]
        weight: Any = {
            "int8": entry("int8", scheme),
            "int8-groups": entry("int8", "per_group", **group),
            "uint8-groups": entry("uint8", "per_group", symmetric=False, **group),
            "fp8": entry("fp8_e4m3", scheme),
            "int4": entry("int4", scheme if self.channel else "per_group", **group),
            "uint4": entry("uint4", "per_group", symmetric=False, **group),
            "int4-fp8": [entry("fp8_e4m3", "per_tensor"), entry("int4", "per_channel")],
            "mxfp4": entry("fp4", "per_group", **mx),
            "mxfp6": entry("fp6_e3m2", "per_group", **mx),
            "nvfp4": two,
        }[self.kind]
        small = "int8" if self.kind == "int8" else "fp8_e4m3"
        inputs: Any = {
            "none": None,
            "static": entry(small, "per_tensor"),
            "token": entry(small, "per_tensor", dynamic=True),
            "own": [{**two[0], "is_dynamic": True}, two[1]]
            if self.kind == "nvfp4"
            else {**weight, "is_dynamic": True}
            if isinstance(weight, dict)
            else None,
        }[self.x]
        return {
            "quant_method": "quark",
            "global_quant_config": {"weight": weight, "input_tensors": inputs},
            "exclude": ["*lm_head"],
            "export": {"pack_method": self.pack_method, "kv_cache_group": []},
        }

    def __call__(self, module: str, n: int, k: int, generator: torch.Generator) -> Stored:
        tensors, meaning = self._weight(n, k, generator)
        factor = unlike_factor(module) if self.unlike else 1.0  # a power of two
        if factor != 1:
            outer = "weight_scale_2" if self.kind == "nvfp4" else "weight_scale"
            tensors[outer] = tensors[outer] * factor
            meaning = meaning * factor
        given = float(np.float32(float(torch.rand((), generator=generator)) * 0.02 + 0.02))
        given *= factor
        if self.x == "static":
            tensors["input_scale"] = torch.tensor(given)
            if self.kind == "int8":
                tensors["input_zero_point"] = torch.tensor(0, dtype=torch.int8)
        if self.kind == "nvfp4" and self.x == "own":
            given = float(np.float32(given / 10))
            tensors["input_scale_2"] = torch.tensor(given)

        def prepare(x: Any) -> floats.Floats:
            if self.x == "static":
                if self.kind == "int8":
                    return integers.int8_static(x, given)
                return floats.static(x, given)
            if self.x == "token":
                return integers.int8_per_token(x) if self.kind == "int8" else floats.per_token(x)
            if self.x == "own":
                if self.kind == "nvfp4":
                    return floats.nvfp4(x, given)
                if self.kind == "mxfp6":
                    # max|x| is rounded to two bits of mantissa first; 16 is e3m2's largest power.
                    return integers.mx(x, E3M2, 2, 4)
                return integers.mxfp4(x)
            return np.asarray(x, dtype=np.float64)

        return Stored(tensors, meaning, prepare)

    def _weight(
        self, n: int, k: int, generator: torch.Generator
    ) -> tuple[dict[str, torch.Tensor], floats.Floats]:
        def scales(*shape: int) -> torch.Tensor:
            return (torch.rand(shape, generator=generator) + 0.5) * 0.01

        def codes(bits: int) -> torch.Tensor:
            return torch.randint(0, 1 << bits, (n, k), generator=generator)

        scale = scales(n) if self.channel else scales()
        wide = scale.double().numpy().reshape(-1, 1)
        if self.kind == "int8":
            signed = codes(8) - 128
            tensors = {
                "weight": signed.to(torch.int8),
                "weight_scale": scale,
                "weight_zero_point": torch.zeros_like(scale, dtype=torch.int8),
            }
            return tensors, signed.double().numpy() * wide
        if self.kind.endswith("8-groups"):
            group = scales(k // 32, n)
            signs = self.kind == "int8-groups"
            values = codes(8) - (128 if signs else 0)
            dtype = torch.int8 if signs else torch.uint8
            zero = codes(8)[:, : k // 32].t() - (128 if signs else 0)
            tensors = {"weight": values.t().to(dtype), "weight_scale": group}
            if not signs:
                tensors["weight_zero_point"] = zero.to(dtype)
            points = np.repeat(zero.numpy(), 32, 0).T if not signs else 0
            return tensors, (values.numpy() - points) * np.repeat(group.double().numpy(), 32, 0).T
        if self.kind == "fp8":
            small = (codes(8) % 0x60).to(torch.uint8)
            tensors = {"weight": small.view(torch.float8_e4m3fn), "weight_scale": scale}
            return tensors, floats.E4M3[small.numpy()] * wide
        if self.kind in ("int4", "uint4", "int4-fp8"):
            return self._int4(codes(4), scales, n, k)
        if self.kind == "nvfp4":
            small = codes(4).to(torch.uint8)
            group = (torch.rand(n, k // 16, generator=generator) * 100 + 1).to(torch.float8_e4m3fn)
            outer = scales()
            factors = np.repeat(group.double().numpy(), 16, 1) * outer.double().item()
            tensors = {
                "weight": small[:, 0::2] | small[:, 1::2] << 4,
                "weight_scale": group,
                "weight_scale_2": outer,
            }
            return tensors, floats.E2M1[small.numpy()] * factors
        exponents = torch.randint(116, 122, (n, k // 32), generator=generator).to(torch.uint8)
        factors = np.repeat(floats.E8M0[exponents.numpy()], 32, 1)
        if self.kind == "mxfp4":
            small = codes(4).to(torch.uint8)
            tensors = {"weight": small[:, 0::2] | small[:, 1::2] << 4, "weight_scale": exponents}
            return tensors, floats.E2M1[small.numpy()] * factors
        small = codes(6).to(torch.uint8)
        bits = np.unpackbits(small.numpy()[..., None], axis=-1, bitorder="little")[..., :6]
        packed = np.packbits(bits.reshape(n, -1), axis=-1, bitorder="little")
        tensors = {"weight": torch.from_numpy(packed), "weight_scale": exponents}
        return tensors, E3M2[small.numpy()] * factors

    def _int4(
        self, codes: torch.Tensor, scales: Any, n: int, k: int
    ) -> tuple[dict[str, torch.Tensor], floats.Floats]:
        order = REORDER if self.pack_method == "reorder" else tuple(range(8))

        def words(values: torch.Tensor) -> torch.Tensor:
            fields = values.numpy().astype(np.uint64).reshape(values.shape[0], -1, 8)
            out = np.zeros(fields.shape[:2], dtype=np.uint64)
            for slot, element in enumerate(order):
                out |= fields[:, :, element] << np.uint64(4 * slot)
            return torch.from_numpy(out.astype(np.uint32).view(np.int32))

        if self.kind == "uint4":
            scale, zero = scales(k // 32, n), codes[:, : k // 32].t() % 16
            tensors = {
                "weight": words(codes.t()),
                "weight_scale": scale,
                "weight_zero_point": words(zero),
            }
            spread = np.repeat(scale.double().numpy(), 32, 0).T
            return tensors, (codes.double().numpy() - np.repeat(zero.numpy(), 32, 0).T) * spread
        signed = np.where(codes.numpy() >= 8, codes.numpy() - 16, codes.numpy()).astype(np.float64)
        if self.kind == "int4-fp8":
            outer, rows = scales(), scales(n) * 100
            tensors = {
                "weight": words(codes),
                "weight_scale": outer,
                "weight_scale_2": rows,
                "weight_zero_point_2": torch.zeros(n // 8, dtype=torch.int32),
            }
            return tensors, signed * rows.double().numpy()[:, None] * outer.double().item()
        if self.channel:
            rows = scales(n)
            tensors = {"weight": words(codes), "weight_scale": rows}
            return tensors, signed * rows.double().numpy()[:, None]
        scale = scales(k // 32, n)
        tensors = {"weight": words(codes.t()), "weight_scale": scale}
        return tensors, signed * np.repeat(scale.double().numpy(), 32, 0).T
