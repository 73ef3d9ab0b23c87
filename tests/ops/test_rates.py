# SPDX-License-Identifier: Apache-2.0
"""Rates of instructions, measured by the library. How fast they are is nobody's test."""

from __future__ import annotations

import math

import pytest
import torch

from vllm.compressed_linear.machine import native
from vllm.compressed_linear.machine.profiles import INSTRUCTIONS
from vllm.compressed_linear.machine.this_cpu import cpu_features

pytestmark = pytest.mark.skipif(native.available() is not None, reason=str(native.available()))


def test_every_instruction_of_this_processor_that_a_profile_knows_is_measured() -> None:
    lines = torch.ops.compressed_linear.measure_rates().splitlines()
    found = {name: float(value) for name, value in (line.split() for line in lines)}
    features = cpu_features()
    known = {name for name, i in INSTRUCTIONS.items() if i.features and i.features <= features}
    assert set(found) == known | {"clock"}
    assert all(math.isfinite(value) and value > 0 for value in found.values())
