# SPDX-License-Identifier: Apache-2.0
"""Random weights as bitsandbytes stores them (``functional.py``: ``QuantState.as_dict``;
``backends/default/ops.py``), and their configuration."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests.support.float_models import Stored

NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    dtype=np.float32,
)
_HALF = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
TABLES = {"nf4": NF4, "fp4": np.concatenate([_HALF, -_HALF]).astype(np.float32)}


@dataclass(frozen=True)
class BitsAndBytesWeight:
    """A ``Store``. ``kind``: "nf4", "fp4" or "int8". ``double``: block scales in bytes.
    ``storage``: dtype of the bytes of codes."""

    kind: str = "nf4"
    block: int = 64
    double: bool = False
    storage: str = "uint8"

    @property
    def config(self) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": self.kind != "int8",
            "load_in_8bit": self.kind == "int8",
            "bnb_4bit_quant_type": "fp4" if self.kind == "int8" else self.kind,
            "bnb_4bit_quant_storage": self.storage,
            "bnb_4bit_use_double_quant": self.double,
            "llm_int8_skip_modules": ["lm_head"],
        }

    def __call__(self, module: str, n: int, k: int, generator: torch.Generator) -> Stored:
        if self.kind == "int8":
            codes = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
            largest = torch.rand(n, generator=generator) + 0.1
            one = torch.tensor(0, dtype=torch.uint8)
            tensors = {"weight": codes, "SCB": largest, "weight_format": one}
            meaning = codes.double().numpy() * (largest.double().numpy() / 127)[:, None]
            return Stored(tensors, meaning)
        codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
        flat = codes.flatten()
        packed = flat[::2] << 4 | flat[1::2]
        blocks = n * k // self.block
        state: dict[str, Any] = {
            "quant_type": self.kind,
            "blocksize": self.block,
            "dtype": "bfloat16",
            "shape": [n, k],
        }
        tensors = {
            "weight": packed.view(getattr(torch, self.storage)).reshape(-1, 1),
            "weight.quant_map": torch.from_numpy(TABLES[self.kind]),
        }
        if self.double:
            table = torch.sort(torch.rand(256, generator=generator) * 2 - 1).values
            outer = torch.rand(-(-blocks // 256), generator=generator) * 0.1
            small = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
            tensors |= {
                "weight.absmax": small,
                "weight.nested_absmax": outer,
                "weight.nested_quant_map": table,
            }
            scale = table[small.long()] * outer.repeat_interleave(256)[:blocks] + 0.25
        else:
            scale = torch.rand(blocks, generator=generator) + 0.1
            tensors["weight.absmax"] = scale
        text = json.dumps(state).encode()
        tensors[f"weight.quant_state.bitsandbytes__{self.kind}"] = torch.tensor(
            list(text), dtype=torch.uint8
        )
        values = TABLES[self.kind].astype(np.float64)[codes.numpy()]
        factors = scale.double().numpy().repeat(self.block).reshape(n, k)
        return Stored(tensors, values * factors)
