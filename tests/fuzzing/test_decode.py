# SPDX-License-Identifier: Apache-2.0
"""The oracle of the mutants, against what the quantizers' own libraries gave."""

from __future__ import annotations

import pytest
import torch

from tests.support.checkpoints import COPIES, assert_matches_reference, fuzzed
from tests.support.fuzzing.decode import stored_layers, weight
from tests.support.fuzzing.files import unmutated

NAMES = [path.name for path in fuzzed()]


@pytest.mark.parametrize("name", NAMES)
def test_numpy_reads_what_the_makers_libraries_read(name: str) -> None:
    from safetensors.torch import load_file

    checkpoint = unmutated(COPIES / name)
    reference = load_file(COPIES / name / "reference" / "reference.safetensors")
    layers = stored_layers(checkpoint.config, checkpoint.tensors)
    assert len(layers) >= 10
    for layer, stored in layers.items():
        if f"{layer}.corner" in reference:
            found = torch.from_numpy(weight(layer, stored, checkpoint.tensors)).float()
            assert_matches_reference(found, reference, layer)
