# SPDX-License-Identifier: Apache-2.0
"""What ``explain`` says of configurations outside config.json, missing ones, and the flag that a
GPU needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import checkpoint
from tests.support.explained import explained
from tests.support.messages import says
from tests.support.model_loading import loaded
from vllm.compressed_linear.commands.explain.explain import explain
from vllm.compressed_linear.commands.explain.explanation import Explanation
from vllm.compressed_linear.machine.platform import Platform

NAME = "gptqmodel-gptq-w4-g128-sym"
FLAG = "--quantization compressed_linear"


def without_configuration(path: Path, name: str = NAME) -> dict[str, Any]:
    """Copy a fixture to ``path`` without its quantization_config, which is returned."""
    shutil.copytree(checkpoint(name), path)
    for other in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):
        (path / other).unlink(missing_ok=True)
    config = json.loads((path / "config.json").read_text())
    quantization: dict[str, Any] = config.pop("quantization_config")
    (path / "config.json").write_text(json.dumps(config))
    return quantization


def loads(path: Path, **options: Any) -> bool:
    try:
        with loaded(path, **options):
            return True
    except Exception:
        return False


def test_a_configuration_beside_config_json_needs_the_flag(tmp_path: Path) -> None:
    quantization = without_configuration(tmp_path / "model")
    quantization.pop("quant_method")
    (tmp_path / "model" / "quantize_config.json").write_text(json.dumps(quantization))
    found = explained(tmp_path / "model")
    assert found.quant_method == "gptq"
    assert any(says(note, "quantize_config.json", FLAG) for note in found.notes)
    assert not any("not quantized" in note for note in found.notes)
    # The plan is that of a load with the flag; without it, the load fails.
    assert not found.errors
    assert loads(tmp_path / "model", quantization="compressed_linear")
    assert not loads(tmp_path / "model")


@pytest.mark.parametrize("name", [NAME, "llmcompressor-w4a16-sym-g128"])
def test_codes_without_any_configuration_are_an_error(name: str, tmp_path: Path) -> None:
    without_configuration(tmp_path / "model", name)
    found = explained(tmp_path / "model")
    (error,) = found.errors
    assert says(error, "hold quantized weights", "14 such modules", "quantization_config")
    assert not any("not quantized" in note for note in found.notes)
    assert not loads(tmp_path / "model")
    assert not loads(tmp_path / "model", quantization="compressed_linear")


def test_the_separate_file_of_modelopt_is_read_as_vllm_reads_it(tmp_path: Path) -> None:
    without_configuration(tmp_path / "model", NAME)
    (tmp_path / "model" / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}})
    )
    found = explained(tmp_path / "model")
    assert found.quant_method == "modelopt"
    assert any("vLLM reads hf_quant_config.json" in note for note in found.notes)
    assert not any("not quantized" in note for note in found.notes)


def of_gpu(path: Path) -> Explanation:
    return explain(str(path), platform=Platform.parse("cuda:90"))


def test_a_gpu_needs_the_flag() -> None:
    found = of_gpu(checkpoint(NAME))
    assert any(says(note, "GPU", FLAG) for note in found.notes)
    assert not any(FLAG in note for note in explained(NAME).notes)


def test_the_switch_is_mentioned_before_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_COMPRESSED_LINEAR", "0")
    assert not any(FLAG in note for note in of_gpu(checkpoint(NAME)).notes)
