# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints a test runs over."""

from __future__ import annotations

from tests.support.checkpoints import checkpoints

WEIGHT_ONLY = [
    name
    for name in checkpoints("gptqmodel-gptq", "autoawq-", "autoround-", "llmcompressor-w")
    if "a8" not in name and "mxfp4" not in name
] + checkpoints("llmcompressor-mixed-int8attn-int4mlp")


OURS = [
    name
    for name in checkpoints("gptqmodel-gptq", "autoawq-", "autoround-", "llmcompressor-")
    if "a8" not in name and "fp" not in name
]
"""Every checkpoint of the zoo of which at least a part is read here."""
