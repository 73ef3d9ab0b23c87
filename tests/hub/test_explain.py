# SPDX-License-Identifier: Apache-2.0
"""`explain` on published configurations with files of full size: what runs on a CPU and on GPUs,
and what does not and why. docs/published-checkpoints.md has the tables of all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.hub.checkpoints import HUB, published
from tests.support.hub.table import CPU_HEAD, GPU_HEAD, PAGE, Row, row, rows, table_of
from vllm.compressed_linear.formats.registry import format_of
from vllm.compressed_linear.integration import compat
from vllm.compressed_linear.integration.config import NAME, CompressedLinearConfig

pytestmark = pytest.mark.usefixtures("inspect_in_process", "torchvision")

RUN_WHOLLY = {
    "Qwen-Qwen2.5-7B-Instruct-AWQ": ("MarlinLinearKernel",) * 2,
    "Qwen-Qwen3-32B-FP8": ("CutlassFp8BlockScaledMMKernel",) * 2,
    "Qwen-Qwen3.5-27B-GPTQ-Int4": ("MacheteLinearKernel", "MarlinLinearKernel"),
    "RedHatAI-Llama-4-Scout-17B-16E-Instruct-quantized.w4a16": (
        "MacheteLinearKernel",
        "MarlinLinearKernel",
    ),
    "google-gemma-4-31B-it-qat-w4a16-ct": ("MarlinLinearKernel",) * 2,
    "neuralmagic-2024": ("MacheteLinearKernel", "MarlinLinearKernel"),
    "nvidia-Qwen3-8B-NVFP4": ("triton (bf16 in 3 parts)", "CutlassNvFp4LinearKernel"),
}
"""With one path of each kind to all of their linear layers, but for routed experts → what computes
the quantized ones on an H100 and a B200."""
COMPUTE = {
    "CutlassFP8ScaledMMLinearKernel",
    "CutlassFp8BlockScaledMMKernel",
    "CutlassInt8ScaledMMLinearKernel",
    "CutlassNvFp4LinearKernel",
    "MacheteLinearKernel",
    "MarlinFP8ScaledMMLinearKernel",
    "MarlinLinearKernel",
    "MarlinNvFp4LinearKernel",
    "TritonInt8ScaledMMLinearKernel",
    "marlin",
    "triton",
}
"""vLLM's classes and our kernels that may run a published checkpoint on one of these GPUs."""


def test_every_published_configuration_has_a_row() -> None:
    assert len(published()) == len(list(HUB.glob("*.json"))) >= 99
    page = PAGE.read_text()
    for one in published().values():
        assert f"| {one.name} | {one.architecture} |" in page


def test_all_quantized_layers_of_published_checkpoints_run_on_gpus() -> None:
    """Or the table of the CPU says why there are none."""
    on_cpu, on_gpus = table_of(PAGE.read_text(), CPU_HEAD), table_of(PAGE.read_text(), GPU_HEAD)
    assert {name for name, *cells in on_cpu if cells[2] not in ("0", "not tried")} == {
        name for name, *_ in on_gpus
    }
    for name, *cells in on_gpus:
        for cell in cells:
            found = {part.split()[1] for part in cell.split(", ") if part[0].isdigit()}
            assert found <= COMPUTE, name


@pytest.mark.parametrize("device", ["cuda", "rocm", "xpu", "cpu"])
def test_published_configurations_are_claimed_on_gpus_on_request_only(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "current_device", lambda: device)
    claimed = CompressedLinearConfig.override_quantization_method
    for one in published().values():
        ours = NAME if format_of(one.quantization) is not None else None
        assert claimed(one.quantization, NAME) == ours
        assert claimed(one.quantization, None) == (ours if device == "cpu" else None), one.name


@pytest.mark.parametrize("name", RUN_WHOLLY)
def test_what_is_quantized_runs_here(name: str, tmp_path: Path) -> None:
    found = row(published()[name], tmp_path / "checkpoint")
    _check_cpu(found)
    for cell, compute in zip(found.gpus, RUN_WHOLLY[name], strict=True):
        assert cell.partition(" ")[2] == compute


def _check_cpu(found: Row) -> None:
    quantized, _, left, refused = found.cpu
    assert "reference" not in quantized
    assert int(quantized.split()[0]) >= 28
    assert left in ("", "48: the experts of a mixture", "64: Attention is not a linear layer")
    assert refused == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", published())
def test_the_tables_are_what_explain_says(name: str) -> None:
    (found,) = rows([name])
    page = PAGE.read_text()
    for line in found.lines:
        assert line in page
