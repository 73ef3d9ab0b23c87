# SPDX-License-Identifier: Apache-2.0
"""Damaged and contradictory checkpoints, loaded as vLLM loads them: one clear error each, which
names the tensor and the layer, what was found and what was expected."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.checkpoints import checkpoint, checkpoint_tensors
from tests.support.messages import saying
from tests.support.model_loading import loaded
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN

GPTQ = "gptqmodel-gptq-w4-g128-sym"
ACT_ORDER = "gptqmodel-gptq-w4-g128-sym-descact"
AWQ = "autoawq-awq-gemm-g128-asym"
PACKED = "llmcompressor-w4a16-asym-g32"

QKV = "model.layers.0.self_attn.qkv_proj"
K = "model.layers.0.self_attn.k_proj"
DOWN = "model.layers.1.mlp.down_proj"

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]


def copy(
    name: str,
    directory: Path,
    tensors: Callable[[Tensors], object] = lambda tensors: None,
    config: Callable[[Config], object] = lambda config: None,
) -> Path:
    """A copy of a checkpoint whose tensors and quantization_config were changed in place."""
    loose = checkpoint_tensors(name)
    tensors(loose)
    save_file(
        {key: value.contiguous() for key, value in loose.items()}, directory / "model.safetensors"
    )
    described = json.loads((checkpoint(name) / "config.json").read_text())
    config(described["quantization_config"])
    (directory / "config.json").write_text(json.dumps(described))
    for file in checkpoint(name).glob("tokenizer*"):
        shutil.copy(file, directory)
    return directory


Change = Callable[[torch.Tensor], torch.Tensor]


def replaced(
    tensor: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({tensor: change(tensors[tensor])})


def dropped(*names: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


def with_value(*index: int, value: float) -> Change:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


TENSOR_DAMAGES: dict[str, tuple[str, Callable[[Tensors], object], str, str, tuple[object, ...]]] = {
    # what: (checkpoint, damage, layer, tensor, complaint)
    "scales are missing": (
        GPTQ,
        dropped(f"{K}.scales"),
        QKV,
        f"{K}.scales",
        (
            (
                "checkpoint",
                "uint4",
                "group 128",
                "qweight, scales",
                "model.safetensors",
                "g_idx, qweight, qzeros",
            )
        ),
    ),
    "zero points are missing": (
        AWQ,
        dropped(f"{DOWN}.qzeros"),
        DOWN,
        f"{DOWN}.qzeros",
        ("checkpoint",),
    ),
    "packed zero points are missing": (
        PACKED,
        dropped(f"{K}.weight_zero_point"),
        QKV,
        f"{K}.weight_zero_point",
        ("checkpoint",),
    ),
    "codes are missing": (
        PACKED,
        dropped(f"{DOWN}.weight_packed"),
        DOWN,
        f"{DOWN}.weight_packed",
        ("checkpoint",),
    ),
    "a whole module is missing": (
        AWQ,
        dropped(f"{K}.qweight", f"{K}.qzeros", f"{K}.scales"),
        QKV,
        f"{K}.qweight",
        ("checkpoint", "int32", "[256 x 16]", "uint4", "group 128"),
    ),
    "codes of a wrong shape": (
        GPTQ,
        replaced(f"{K}.qweight", lambda t: t[:, :-8]),
        QKV,
        f"{K}.qweight",
        ([32, 120], [32, 128]),
    ),
    "codes of a wrong rank": (
        AWQ,
        replaced(f"{DOWN}.qweight", lambda t: t.flatten()),
        DOWN,
        f"{DOWN}.qweight",
        ([16384], [512, 32]),
    ),
    "transposed scales": (
        AWQ,
        replaced(f"{DOWN}.scales", lambda t: t.t()),
        DOWN,
        f"{DOWN}.scales",
        ([256, 4], [4, 256]),
    ),
    "scales of another group size": (
        PACKED,
        replaced(f"{K}.weight_scale", lambda t: t[:, ::2]),
        QKV,
        f"{K}.weight_scale",
        ([128, 4], [128, 8]),
    ),
    "a group index that is too short": (
        ACT_ORDER,
        replaced(f"{DOWN}.g_idx", lambda t: t[:-1]),
        DOWN,
        f"{DOWN}.g_idx",
        ([511], [512]),
    ),
    "a group index beyond the last group": (
        ACT_ORDER,
        replaced(f"{DOWN}.g_idx", with_value(5, value=4)),
        DOWN,
        f"{DOWN}.g_idx",
        (0, 4, 0, 3),
    ),
    "a negative group index": (
        ACT_ORDER,
        replaced(f"{K}.g_idx", with_value(0, value=-1)),
        QKV,
        f"{K}.g_idx",
        (-1,),
    ),
    "a scale that is no number": (
        GPTQ,
        replaced(f"{K}.scales", with_value(1, 7, value=float("nan"))),
        QKV,
        f"{K}.scales",
        (1, 256, "finite", "nan", "channel 7", "group 1"),
    ),
    "an infinite scale": (
        PACKED,
        replaced(f"{DOWN}.weight_scale", with_value(3, 2, value=float("inf"))),
        DOWN,
        f"{DOWN}.weight_scale",
        ("finite", "inf", "channel 3", "group 2"),
    ),
    "a scale of zero": (
        GPTQ,
        replaced(f"{DOWN}.scales", with_value(2, 9, value=0)),
        DOWN,
        f"{DOWN}.scales",
        ("scale", 0, "channel 9", "group 2"),
    ),
    "integer scales": (
        AWQ,
        replaced(f"{K}.scales", lambda t: t.to(torch.int32)),
        QKV,
        f"{K}.scales",
        ("torch.int32",),
    ),
    "float codes": (
        GPTQ,
        replaced(f"{DOWN}.qweight", lambda t: t.to(torch.float32)),
        DOWN,
        f"{DOWN}.qweight",
        ("torch.float32", "torch.int32"),
    ),
    "codes in other containers": (
        PACKED,
        replaced(f"{DOWN}.weight_packed", lambda t: t.to(torch.int64)),
        DOWN,
        f"{DOWN}.weight_packed",
        ("torch.int64", "torch.int32"),
    ),
    "zero points in other containers": (
        AWQ,
        replaced(f"{DOWN}.qzeros", lambda t: t.to(torch.int16)),
        DOWN,
        f"{DOWN}.qzeros",
        ("torch.int16", "torch.int32"),
    ),
    "a float group index": (
        ACT_ORDER,
        replaced(f"{DOWN}.g_idx", lambda t: t.to(torch.float32)),
        DOWN,
        f"{DOWN}.g_idx",
        ("torch.float32",),
    ),
    "another shape than weight_shape says": (
        PACKED,
        replaced(f"{DOWN}.weight_shape", lambda t: t + 8),
        DOWN,
        f"{DOWN}.weight_shape",
        ([264, 520], [256, 512]),
    ),
    "unpacked codes with packed zero points": (
        PACKED,
        lambda tensors: (
            tensors.update({f"{DOWN}.weight": torch.zeros(256, 512, dtype=torch.int8)})
            or tensors.pop(f"{DOWN}.weight_packed")
        ),
        DOWN,
        f"{DOWN}.weight_zero_point",
        ([32, 16], [256, 16]),
    ),
}


@pytest.mark.parametrize(
    ("name", "damage", "layer", "tensor", "complaint"),
    [pytest.param(*case, id=what) for what, case in TENSOR_DAMAGES.items()],
)
def test_damaged_tensors(
    name: str,
    damage: Callable[[Tensors], object],
    layer: str,
    tensor: str,
    complaint: tuple[object, ...],
    tmp_path: Path,
) -> None:
    path = copy(name, tmp_path, tensors=damage)
    with (
        pytest.raises(ValueError, match=saying(tensor, *complaint)) as caught,
        loaded(path),
    ):
        pass
    assert layer in str(caught.value)
    assert "\n" not in str(caught.value)


CONFIG_DAMAGES: dict[str, tuple[str, Config, tuple[object, ...]]] = {
    "4 bits, but the codes are 8 bits wide": (
        "gptqmodel-gptq-w8-g64-asym-descact",
        {"bits": 4},
        ("model.layers.0", "model.layers.0", "shape", "uint4"),
    ),
    "8 bits, but the codes are 4 bits wide": (
        AWQ,
        {"bits": 8},
        ("AWQ", 8),
    ),
    "another group size": (
        GPTQ,
        {"group_size": 64},
        ("model.layers.0", re.compile(r"\.(scales|qzeros)\b"), "[4, ", "[8, ", "uint4", "group 64"),
    ),
    "a module is excluded, but the file has codes for it": (
        GPTQ,
        {"dynamic": {r"-:.*layers\.1\.mlp\.down_proj": {}}},
        (
            *(DOWN, DOWN, "unquantized", "dynamic", r"-:.*layers\.1\.mlp\.down_proj"),
            *("model.safetensors", f"{DOWN}.qweight"),
        ),
    ),
    "a part of a fused layer is excluded, but the file has codes for it": (
        PACKED,
        {"ignore": ["lm_head", K]},
        (QKV, K, "unquantized", "ignore", K, "model.safetensors", f"{K}.weight_packed"),
    ),
    "nothing is targeted, but the file has codes": (
        PACKED,
        {"ignore": ["re:.*"]},
        (QKV, "unquantized"),
    ),
    "a width that the layout lacks": (
        GPTQ,
        {"bits": 5},
        ("GPTQ", 5, "gptq_p", "gptq"),
    ),
    "unknown bits": (GPTQ, {"bits": 17}, ("GPTQ", 17)),
    "bits that are no number": (GPTQ, {"bits": "many"}, ("bits", "'many'", "int")),
    "no bits": (AWQ, {"bits": None}, ("bits",)),
    "gemv, but written as gemm": (
        AWQ,
        {"version": "gemv"},
        ("model.layers.0", "model.layers.0", "shape"),
    ),
    "Marlin, but written as gptq": (
        GPTQ,
        {"checkpoint_format": "marlin"},
        ("qkv_proj", ".B", "checkpoint", "B, s", "g_idx"),
    ),
}


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [pytest.param(*case, id=what) for what, case in CONFIG_DAMAGES.items()],
)
def test_contradictory_configurations(
    name: str, change: Config, complaint: tuple[object, ...], tmp_path: Path
) -> None:
    path = copy(name, tmp_path, config=lambda config: config.update(change))
    with pytest.raises(ValueError, match=saying(*complaint)), loaded(path):
        pass


def test_a_truncated_file_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    file = copy(GPTQ, tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=saying(file, "truncated", "tensor")), loaded(tmp_path):
        pass


def test_a_file_that_holds_no_safetensors(tmp_path: Path) -> None:
    file = copy(GPTQ, tmp_path) / "model.safetensors"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=saying(file, "header")), loaded(tmp_path):
        pass


def test_a_plain_weight_under_a_quantized_configuration_runs_unquantized(tmp_path: Path) -> None:
    def plain(tensors: Tensors) -> None:
        for last in ("qweight", "qzeros", "scales", "g_idx"):
            tensors.pop(f"{DOWN}.{last}")
        tensors[f"{DOWN}.weight"] = torch.ones(256, 512, dtype=torch.float16)

    with loaded(copy(GPTQ, tmp_path, tensors=plain)):
        assert "fp32" in PROCESS_PLAN.entries[DOWN, 0].descriptor
        assert "uint4b8" in PROCESS_PLAN.entries[DOWN.replace("1", "0"), 0].descriptor


def test_a_dead_group_is_no_damage(tmp_path: Path) -> None:
    """Scale 0 over codes that all mean zero loses nothing; quantizers write such groups."""

    def kill(tensors: Tensors) -> None:
        tensors[f"{DOWN}.qweight"][:16] = torch.tensor(0x88888888 - (1 << 32), dtype=torch.int32)
        tensors[f"{DOWN}.scales"][0] = 0

    with loaded(copy(GPTQ, tmp_path, tensors=kill)):
        assert (DOWN, 0) in PROCESS_PLAN.entries
