# SPDX-License-Identifier: Apache-2.0
"""Fused layers with more partitions than members in the file, whose members are quantized unlike:
the linear attention of Qwen3.5, where q, k and v are one tensor and z is another."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.architectures import WITHOUT_LOGITS, Checkpoint, layer_outputs, write
from tests.support.messages import saying
from tests.support.synthetic import Model, Quant, random_weight
from vllm.compressed_linear.formats.resolution import ConfigError
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN
from vllm.compressed_linear.integration.sharding import Member, ShardGeometry, assign

GPTQ, CT = Quant("gptq", symmetric=False), Quant("ct")
CASES: dict[str, tuple[Quant, dict[str, Quant | None]]] = {
    "gptq-z-plain": (GPTQ, {"in_proj_z": None}),
    "gptq-qkv-plain": (GPTQ, {"in_proj_qkv": None}),
    "gptq-z-8-bit": (GPTQ, {"in_proj_z": Quant("gptq", 8, symmetric=False)}),
    "gptq-a-plain": (GPTQ, {"in_proj_a": None}),
    "awq-qkv-plain": (Quant("awq", symmetric=False), {"in_proj_qkv": None}),
    "ct-z-plain-b-plain": (CT, {"in_proj_z": None, "in_proj_b": None}),
    "ct-qkv-3-bit": (CT, {"in_proj_qkv": Quant("ct", 3, 64)}),
    "ct-z-8-bit-channel": (CT, {"in_proj_z": Quant("ct", 8, -1)}),
}


def _requantize(checkpoint: Checkpoint, quant: Quant, members: dict[str, Quant | None]) -> None:
    """Write ``members`` anew, of both checkpoints, and describe them."""
    generator = torch.Generator().manual_seed(7)
    ideal = load_file(checkpoint.ideal / "model.safetensors")
    stored = load_file(checkpoint.quantized / "model.safetensors")
    for module in checkpoint.modules:
        last = module.rpartition(".")[2]
        if last not in members:
            continue
        stored = {name: t for name, t in stored.items() if not name.startswith(f"{module}.")}
        weight, own = ideal[f"{module}.weight"], members[last]
        if own is None:
            stored[f"{module}.weight"] = weight
            continue
        tensors, meaning = random_weight(own, *weight.shape, generator, None)
        stored |= {f"{module}.{key}": tensor.contiguous() for key, tensor in tensors.items()}
        ideal[f"{module}.weight"] = meaning
    save_file(ideal, checkpoint.ideal / "model.safetensors", {"format": "pt"})
    save_file(stored, checkpoint.quantized / "model.safetensors")
    config = json.loads((checkpoint.quantized / "config.json").read_text())
    config["quantization_config"] = Model(quant, overrides=members).quantization_config()
    (checkpoint.quantized / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module", params=CASES)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, dict[str, Quant | None]]:
    """Written before torchvision has a stand-in, which the transformers library would take."""
    quant, members = CASES[request.param]
    path = tmp_path_factory.mktemp("unlike")
    checkpoint = write(WITHOUT_LOGITS["qwen3.5-hybrid"], quant, path, reference=False)
    _requantize(checkpoint, quant, members)
    return checkpoint, members


@pytest.mark.usefixtures("torchvision", "inspect_in_process")
def test_each_member_has_its_own_scheme(
    written: tuple[Checkpoint, dict[str, Quant | None]],
) -> None:
    checkpoint, members = written
    ours = layer_outputs(checkpoint.quantized)
    notes = " ".join(entry.note for entry in PROCESS_PLAN.entries.values())
    assert all(re.search(rf"\b{member}\b", notes) for member in members)
    stock = layer_outputs(checkpoint.ideal)
    assert ours.keys() == stock.keys()
    assert any("in_proj_qkvz" in name for name in stock)
    for name, expected in stock.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("rows", [(None, 128), (300, 212), (256, 128), (256, 128, 128)])
def test_members_that_end_within_a_partition_are_refused(rows: tuple[int | None, ...]) -> None:
    schemes = [CT.scheme(), Quant("ct", 8).scheme(), CT.scheme()]
    members = [
        Member(f"m{i}", scheme, n) for i, (n, scheme) in enumerate(zip(rows, schemes, strict=False))
    ]
    geometry = [ShardGeometry(n, 64, 0, n, 0, 64) for n in (128, 128, 128, 128)]
    if sum(n or 0 for n in rows) == 512 and rows[0] == 256:
        assert [m.name for m in assign("layer", members, geometry)] == ["m0", "m0", "m1", "m2"]
        return
    with pytest.raises(ConfigError, match=saying("layer", 4, "m0", rows[0] or "unknown", "m1")):
        assign("layer", members, geometry)
