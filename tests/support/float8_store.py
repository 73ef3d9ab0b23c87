# SPDX-License-Identifier: Apache-2.0
"""Random weights in 8-bit floats, as checkpoints of many tools store them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests.support import float_definitions as definitions
from tests.support.float_models import Stored, unlike_factor


@dataclass(frozen=True)
class Float8:
    """A ``Store``. ``shape``: of a scale that is neither per block nor a single number, "N" or
    "N1"; or "", "1", "11" for a number. ``x``: "none", "static", "token", "group" or "ue8m0".
    ``plain``: last components of modules that stay as they are. ``four``: scales of blocks have
    four dimensions. ``unlike``: members of a fused layer have very different scales, of x too.
    ``limit``: of max|x| in scales per token."""

    block: tuple[int, int] | None = None
    shape: str = "1"
    scale: str = "weight_scale"
    scale_dtype: torch.dtype = torch.float32
    inverse: bool = False
    e5m2: bool = False
    x: str = "none"
    input_scale: str = "input_scale"
    plain: tuple[str, ...] = ()
    four: bool = False
    unlike: bool = False
    limit: float = float("inf")

    def __call__(self, module: str, n: int, k: int, generator: torch.Generator) -> Stored | None:
        if module.rpartition(".")[2] in self.plain:
            return None
        codes = torch.randint(0, 256, (n, k), generator=generator, dtype=torch.int64)
        # Moderate values: no NaN, and the large ones are rare in weights.
        codes = (codes & 0x80) | (codes & 0x7F) % (0x60 if not self.e5m2 else 0x48)
        codes = codes.to(torch.uint8)
        table = definitions.E5M2 if self.e5m2 else definitions.E4M3
        factor = unlike_factor(module) if self.unlike else 1.0
        scale, wide = self._scale(n, k, generator, factor)
        tensors: dict[str, torch.Tensor] = {
            "weight": codes.view(torch.float8_e5m2 if self.e5m2 else torch.float8_e4m3fn),
            self.scale: scale,
        }
        given = (float(torch.rand((), generator=generator)) * 0.01 + 0.005) * factor
        if self.x == "static":
            tensors[self.input_scale] = torch.tensor(given)
        meaning = table[codes.numpy()] * wide

        def prepare(x: Any) -> definitions.Floats:
            if self.x == "static":
                return definitions.static(x, float(np.float32(given)))
            if self.x == "token":
                return definitions.per_token(x, limit=self.limit)
            if self.x in ("group", "ue8m0"):
                assert self.block is not None
                return definitions.per_token(x, group=self.block[1], ue8m0=self.x == "ue8m0")
            return np.asarray(x, dtype=np.float64)

        return Stored(tensors, meaning, prepare)

    def _scale(
        self, n: int, k: int, generator: torch.Generator, factor: float
    ) -> tuple[torch.Tensor, definitions.Floats]:
        """The scale as stored, and as factors of all weights."""
        rows, columns = n, 1
        if self.block is not None:
            rows, columns = -(-n // self.block[0]), -(-k // self.block[1])
        elif not self.shape.startswith("N"):
            rows = 1
        values = (torch.rand(rows, columns, generator=generator) + 0.5) * 0.02 * factor
        if self.scale_dtype in (torch.uint8, torch.float8_e8m0fnu):
            stored = torch.randint(118, 124, (rows, columns), generator=generator).to(torch.uint8)
            factors = definitions.E8M0[stored.numpy()]
            stored = stored.view(self.scale_dtype)
        else:
            stored = (1 / values if self.inverse else values).to(self.scale_dtype)
            factors = stored.to(torch.float32).numpy().astype(np.float64)
            if self.inverse:
                factors = (np.float32(1) / factors.astype(np.float32)).astype(np.float64)
        block = self.block or (1 if rows == n else n, k)
        wide = definitions.spread(factors, n, block, k)
        if self.four:
            stored = stored.reshape(rows, 1, columns, 1)
        if self.block is None:
            shapes = {"": (), "1": (1,), "11": (1, 1), "N": (n,), "N1": (n, 1)}
            stored = stored.reshape(shapes[self.shape])
        return stored, wide
