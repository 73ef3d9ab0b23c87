# SPDX-License-Identifier: Apache-2.0
"""A drafter's module in its own files, under the name that vLLM gives it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.drafters import Eagle3, write_eagle3
from vllm.compressed_linear.integration import config as config_module
from vllm.compressed_linear.integration.config import CompressedLinearConfig
from vllm.compressed_linear.integration.drafter import Drafter, parent_on_disk

QKV, GATE_UP, FC = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("fc",)


@dataclass(frozen=True)
class Case:
    """vLLM's ``parent`` of modules ``members``, those of the file, and the parent there."""

    parent: str
    members: tuple[str, ...]
    modules: tuple[str, ...]
    expected: str | None
    taken: tuple[str, ...] = field(default=())


def layers(front: str, *numbers: int) -> tuple[str, ...]:
    return tuple(f"{front}{n}.self_attn.{name}" for n in numbers for name in QKV)


EAGLE3 = (*(f"midlayer.self_attn.{name}" for name in QKV), "midlayer.mlp.gate_proj", "fc")
CASES = {
    "eagle3": Case("model.layers.32.self_attn", QKV, EAGLE3, "midlayer.self_attn"),
    "eagle3-mlp": Case("model.layers.32.mlp", GATE_UP, EAGLE3, "midlayer.mlp"),
    "eagle3-fc": Case("model", FC, EAGLE3, ""),
    "fc-of-a-layer-is-another": Case("model", FC, ("layers.0.fc",), None),
    "eagle": Case("model.layers.32.self_attn", QKV, layers("layers.", 0), "layers.0.self_attn"),
    "eagle-of-two-layers": Case(
        "model.layers.33.self_attn", QKV, layers("layers.", 0, 1), "layers.1.self_attn"
    ),
    "mtp-next-to-its-target": Case(
        "model.layers.32.self_attn",
        QKV,
        layers("model.layers.", 0, 1) + layers("model.mtp_layers.", 0),
        "model.mtp_layers.0.self_attn",
        taken=layers("model.layers.", 0, 1),
    ),
    "mtp-of-two-layers": Case(
        "model.layers.33.self_attn",
        QKV,
        layers("model.layers.", 0, 1) + layers("model.mtp_layers.", 0, 1),
        "model.mtp_layers.1.self_attn",
        taken=layers("model.layers.", 0, 1),
    ),
    "mtp-in-a-block": Case(
        "model.layers.32.mtp_block.self_attn",
        QKV,
        layers("model.layers.", 0, 32),
        "model.layers.32.self_attn",
        taken=layers("model.layers.", 0),
    ),
    "nothing-alike": Case("model.layers.32.self_attn", QKV, ("layers.0.self_attn.o_proj",), None),
    "no-telling": Case("model.layers.40.self_attn", QKV, layers("layers.", 0, 1), None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_parent_in_the_file(name: str) -> None:
    case = CASES[name]
    modules = dict.fromkeys(case.modules)
    assert parent_on_disk(case.parent, case.members, modules, 32, case.taken) == case.expected


@pytest.mark.parametrize("quantized", [True, False])
def test_a_target_s_config_asks_the_drafter_s_own(
    quantized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of vLLM's classes give layers of a drafter the config of the target's checkpoint."""
    from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod

    write_eagle3(tmp_path / "target", Eagle3(head=None))
    write_eagle3(tmp_path / "drafter", Eagle3())
    own: dict[str, Any] = {}
    for name in ("target", "drafter"):
        own[name] = CompressedLinearConfig()
        own[name].maybe_update_config(str(tmp_path / name))
    drafter = Drafter("eagle", str(tmp_path / "drafter"), 2, SimpleNamespace(), None)
    monkeypatch.setattr(config_module, "drafter_being_built", lambda: drafter)
    monkeypatch.setattr(Drafter, "own_config", lambda self: own["drafter"] if quantized else None)
    asked = []
    monkeypatch.setattr(
        own["drafter"], "get_quant_method", lambda layer, prefix: asked.append(prefix)
    )
    layer = ReplicatedLinear.__new__(ReplicatedLinear)
    torch.nn.Module.__init__(layer)
    method = own["target"].get_quant_method(layer, "model.layers.2.self_attn.o_proj")
    assert asked == (["model.layers.2.self_attn.o_proj"] if quantized else [])
    assert quantized or type(method) is UnquantizedLinearMethod
