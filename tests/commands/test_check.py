# SPDX-License-Identifier: Apache-2.0
"""``check``: its findings, and that its status is that of a load of the same checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from tests.support.checkpoints import checkpoint
from tests.support.messages import says
from tests.support.model_loading import loaded
from vllm.compressed_linear.checkpoint.completeness import Severity
from vllm.compressed_linear.commands.check import Report, check
from vllm.compressed_linear.commands.cli import app
from vllm.compressed_linear.integration.preparation import detect_platform
from vllm.compressed_linear.machine.platform import Platform

GPTQ = "gptqmodel-gptq-w4-g128-sym"
CT = "llmcompressor-w4a16-sym-g128"
AWQ = "autoawq-awq-gemm-g128-asym"
DOWN = "model.layers.1.mlp.down_proj"


def config(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the config.json of the checkpoint at ``path``."""
    file = path / "config.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of the checkpoint at ``path``."""
    file = next(path.glob("*.safetensors"))
    found = load_file(file)
    change(found)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, file)


def quantization(**changes: Any) -> Callable[[Path], None]:
    return lambda path: config(path, lambda c: c["quantization_config"].update(changes))


def drop(*names: str) -> Callable[[Path], None]:
    return lambda path: tensors(path, lambda t: [t.pop(name) for name in names])


def rewrite(name: str, new: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda path: tensors(path, lambda t: t.update({name: new(t[name])}))


def truncate(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    with file.open("rb+") as stream:
        stream.truncate(file.stat().st_size - 1000)


def index_of_a_missing_file(path: Path) -> None:
    weights = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(weights))


def without_configuration(path: Path) -> None:
    config(path, lambda c: c.pop("quantization_config"))
    for name in ("quantize_config.json", "quant_config.json"):
        (path / name).unlink(missing_ok=True)


def keep(path: Path) -> None:
    """A sound checkpoint."""


CASES: dict[str, tuple[str, Callable[[Path], None], tuple[object, ...]]] = {
    "sound gptq": (GPTQ, keep, ()),
    "sound compressed-tensors": (CT, keep, ()),
    "sound awq": (AWQ, keep, ()),
    "truncated": (GPTQ, truncate, ("truncated",)),
    "a file of the index is missing": (GPTQ, index_of_a_missing_file, ("missing",)),
    "no bits": (
        GPTQ,
        lambda p: config(p, lambda c: c["quantization_config"].pop("bits")),
        ("bits",),
    ),
    "another group size": (GPTQ, quantization(group_size=32), ("q_proj", "shape")),
    "other bits": (GPTQ, quantization(bits=8), ("q_proj", "shape")),
    "no scales": (GPTQ, drop(f"{DOWN}.scales"), (f"{DOWN}.scales",)),
    "no codes": (CT, drop(f"{DOWN}.weight_packed"), (DOWN,)),
    "codes of another shape": (
        GPTQ,
        rewrite(f"{DOWN}.qweight", lambda t: t[: t.shape[0] // 2]),
        (f"{DOWN}.qweight", "shape"),
    ),
    "an unknown strategy": (
        CT,
        lambda p: config(
            p,
            lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(
                num_bits=17
            ),
        ),
        ("17",),
    ),
    "ignored, but with codes": (
        CT,
        lambda p: config(p, lambda c: c["quantization_config"]["ignore"].append(DOWN)),
        (DOWN,),
    ),
    "no norm": (CT, drop("model.norm.weight"), ("model.norm.weight",)),
    "no layer norm": (
        GPTQ,
        drop("model.layers.0.input_layernorm.weight"),
        ("model.layers.0.input_layernorm.weight",),
    ),
    "no head": (AWQ, drop("lm_head.weight"), ("lm_head.weight",)),
    "no configuration": (GPTQ, without_configuration, ("quantized weights",)),
    "no such class": (
        GPTQ,
        lambda p: config(p, lambda c: c.update(architectures=["NoSuchModel"])),
        ("NoSuchModel",),
    ),
    "an unquantized head of the wrong shape": (
        GPTQ,
        rewrite("lm_head.weight", lambda t: t[:, :100]),
        ("lm_head.weight",),
    ),
}
"""Name → (fixture, what is changed, what the error says; nothing if it loads)."""


def load_error(path: Path) -> Exception | None:
    try:
        with loaded(path):
            return None
    except Exception as error:
        return error


@pytest.mark.parametrize("name", CASES)
def test_the_status_is_that_of_a_load(name: str, tmp_path: Path) -> None:
    fixture, change, said = CASES[name]
    path = tmp_path / "model"
    shutil.copytree(checkpoint(fixture), path)
    change(path)
    report = check(str(path), platform=detect_platform())
    error = load_error(path)
    assert report.loads == (error is None), (error, report.findings)
    assert report.loads == (not said)
    if said:
        assert any(says(finding.message, *said) for finding in report.findings)


def test_what_nothing_takes_or_matches_is_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(checkpoint(CT), path)
    tensors(path, lambda t: t.update({"model.layers.0.mlp.act.scales": torch.ones(8)}))
    config(path, lambda c: c["quantization_config"]["ignore"].append("vision_tower"))
    report = check(str(path), platform=detect_platform())
    assert report.loads
    warnings = [finding.message for finding in report.of(Severity.WARNING)]
    assert any("model.layers.0.mlp.act.scales" in message for message in warnings)
    assert any("vision_tower" in message for message in warnings)
    assert load_error(path) is None


def call(*arguments: str, columns: int = 100) -> Result:
    return CliRunner().invoke(app, ["check", *arguments], env={"COLUMNS": str(columns)})


def test_words_for_a_sound_one() -> None:
    result = call(str(checkpoint(GPTQ)))
    assert result.exit_code == 0, result.output
    assert says(result.stdout, "tensors", "LlamaForCausalLM", "Nothing is wrong")


@pytest.mark.parametrize("columns", [80, 120])
def test_words_for_a_damaged_one(columns: int, tmp_path: Path) -> None:
    shutil.copytree(checkpoint(GPTQ), tmp_path / "model")
    quantization(group_size=32)(tmp_path / "model")
    result = call(str(tmp_path / "model"), columns=columns)
    assert result.exit_code == 1
    assert max(map(len, result.stdout.splitlines())) <= columns
    assert "layers like it" in " ".join(result.stdout.split())
    assert says(result.stdout, "Error", "damaged")


def test_json_has_the_findings_of_explain(tmp_path: Path) -> None:
    shutil.copytree(checkpoint(GPTQ), tmp_path / "model")
    drop(f"{DOWN}.scales")(tmp_path / "model")
    found = json.loads(call(str(tmp_path / "model"), "--json").stdout)
    assert not found["loads"]
    explained = CliRunner().invoke(app, ["explain", str(tmp_path / "model"), "--json"])
    assert found["findings"] == json.loads(explained.stdout)["findings"]
    assert explained.exit_code == 1


def test_a_sound_checkpoint_that_this_machine_cannot_serve() -> None:
    report: Report = check(str(checkpoint("hqq-w4-g64")), platform=detect_platform())
    assert not report.loads
    assert says(report.verdict, "Nothing is wrong with the files", report.platform)
    assert check(str(checkpoint("hqq-w4-g64")), platform=Platform.parse("cuda:90")).loads


def test_nowhere() -> None:
    result = call("/nowhere/at/all")
    assert result.exit_code == 1
    assert says(result.stdout, "/nowhere/at/all", "does not exist")


@pytest.mark.parametrize("command", ["check", "explain"])
def test_pickled_weights_are_neither_unpickled_nor_called_broken(
    command: str, tmp_path: Path
) -> None:
    """vLLM loads such files, so status 1 would be wrong, and status 0 would be a guess."""
    shutil.copy(checkpoint(GPTQ) / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    result = CliRunner().invoke(app, [command, str(tmp_path)])
    assert result.exit_code == 2
    words = " ".join(result.output.split())
    assert "not examined, because only unpickling would read it" in words
    assert "convert the weights to safetensors" in words
