# SPDX-License-Identifier: Apache-2.0
"""Every code of the 8-bit floats, in every place of a block, multiplied by 1: its exact value."""

from __future__ import annotations

import pytest
import torch

from tests.support import op_calls
from tests.support.weight_only_ops import pack

N, K = 256, 64
KINDS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@pytest.mark.parametrize("rows", [1, 2, 7, 100])
@pytest.mark.parametrize("element", KINDS)
def test_every_code_in_every_place_is_its_value(isa: str, element: str, rows: int) -> None:
    codes = (torch.arange(N)[:, None] + 7 * torch.arange(K)).to(torch.uint8)
    values = codes.view(KINDS[element]).to(torch.float32)
    finite = torch.isfinite(values)
    codes, values = torch.where(finite, codes, 0), torch.where(finite, values, 0)
    packed = pack(codes, K, element)
    for first in range(0, K, rows):
        places = torch.arange(first, first + rows) % K
        x = torch.nn.functional.one_hot(places, K).to(torch.bfloat16)
        y = op_calls.linear(
            x=x,
            packed=packed,
            scale=None,
            zero=None,
            bias=None,
            perm=None,
            table=None,
            n=N,
            k=K,
            group_size=K,
            element=element,
            element_bias=0,
            out_dtype=torch.float32,
        )
        assert torch.equal(y, values[:, places].t())
