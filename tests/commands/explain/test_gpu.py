# SPDX-License-Identifier: Apache-2.0
"""The plan that a GPU would get, made on a machine that has none."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from rich.console import Console

from tests.support import table_models
from tests.support.checkpoints import checkpoint, checkpoints, is_ours
from tests.support.messages import says
from vllm.compressed_linear.backends.vllm_native.classes import tables
from vllm.compressed_linear.commands.explain.explain import explain
from vllm.compressed_linear.commands.explain.explanation import Explanation, PartPlan
from vllm.compressed_linear.commands.explain.text import group_layers, print_explanation
from vllm.compressed_linear.machine.gpus import GPUS
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor

pytestmark = pytest.mark.skipif(
    tables.unavailable("mixed precision") is not None,
    reason="this vLLM has no kernel classes that are known here",
)


@cache
def planned(name: str, capability: int) -> Explanation:
    platform = Platform.parse(f"cuda:{capability}")
    return explain(str(checkpoint(name)), platform=platform, dtype="bfloat16")


def parts(found: Explanation) -> list[PartPlan]:
    return [part for layer in found.layers for part in layer.likely.parts]


def vllm_has_a_kernel(d: CompressedLinearDescriptor) -> bool | None:
    """By the formats that vLLM's documentation of Marlin lists, not by what the adapter says; None
    for x that is quantized or scaled and for small floats, where it depends on the GPU."""
    element, zero = d.weight.element, d.weight.zero
    if element.kind == "dense":
        return True
    if d.activation or d.prescale or element.kind != "integer":
        return None
    symmetric = zero is None and element.bits in (4, 8)
    asymmetric = zero is not None and zero.kind == "integer" and element.bits == 4
    return (symmetric or asymmetric) and d.group_size in (32, 64, 128, d.k)


@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize("name", checkpoints(is_ours))
def test_nothing_runs_on_reference_and_vllms_kernels_are_candidates(
    name: str, capability: int
) -> None:
    found = planned(name, capability)
    assert not found.errors
    assert parts(found)
    for part in parts(found):
        assert part.backend != "reference", str(part.descriptor)
        reasons = {r.backend: r.reasons for r in part.rejected}
        if (known := vllm_has_a_kernel(part.descriptor)) is None:
            assert part.backend == "vllm_native" or "vllm_native" in reasons
        elif known:
            assert not reasons.get("vllm_native"), str(part.descriptor)
        elif part.backend != "vllm_native":
            assert reasons["vllm_native"], str(part.descriptor)


@pytest.mark.parametrize("capability", GPUS)
def test_the_plan_names_vllms_class_and_says_what_is_assumed(capability: int) -> None:
    found = planned("gptqmodel-gptq-w4-g128-sym", capability)
    runs = {part.variant for part in parts(found) if part.descriptor.weight.element.bits == 4}
    assert runs == {"MacheteLinearKernel" if capability == 90 else "MarlinLinearKernel"}
    assert says(found.notes[0], f"cuda:{capability}")
    assert says(found.notes[0], "0.33.0")
    assert GPUS[capability].product in found.notes[0]


def test_reordered_channels_and_zero_points_keep_their_kernel() -> None:
    found = planned("gptqmodel-gptq-w4-g32-asym-descact", 90)
    quantized = [p for p in parts(found) if p.descriptor.weight.element.bits == 4]
    assert {p.variant for p in quantized} == {"MarlinLinearKernel"}
    assert any(p.descriptor.channel_order is not None for p in quantized)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_table_is_looked_up_on_the_gpu(
    tied: bool, capability: int, tmp_path: Path
) -> None:
    """... by a kernel that a CUDA graph can hold, and not by ``reference``."""
    table_models.write(table_models.TableModel("llama", tied=tied), tmp_path / "model")
    platform = Platform.parse(f"cuda:{capability}")
    found = explain(str(tmp_path / "model"), platform=platform, dtype="bfloat16")
    (part,) = [part for part in parts(found) if part.descriptor.lookup]
    assert part.backend == "triton"
    reasons = {r.backend: r.reasons for r in part.rejected}
    for name in ("marlin", "vllm_native"):
        assert reasons[name] == ("lookup of rows (an embedding table) is not supported",)


def test_other_backends_say_that_they_are_not_for_gpus() -> None:
    found = planned("gptqmodel-gptq-w4-g128-sym", 80)
    reasons = {r.backend: r.reasons for r in parts(found)[0].rejected}
    assert says(reasons["cpu"][0], "device cuda", "cpu")


def test_backends_that_have_not_run_on_a_gpu_are_marked() -> None:
    found = planned("gptqmodel-gptq-w4-g128-sym", 90)
    for part in parts(found):
        able = [r.backend for r in part.rejected if not r.reasons]
        assert set(part.untested_on_hardware) == {part.backend, *able}
    (layer, *_) = found.to_json()["layers"]
    assert "vllm_native" in layer["cases"][0]["parts"][0]["untested_on_hardware"]
    for width in (80, 160):
        console = Console(width=width, record=True, file=io.StringIO())
        print_explanation(found, console)
        text = " ".join(console.export_text().split())
        assert says(text, "MacheteLinearKernel")
        assert says(text, "marlin (untested on hardware) could run #1")
        assert text.count("untested on hardware") > len(group_layers(found.layers))


def test_backends_that_have_run_on_cpus_are_not_marked() -> None:
    path = str(checkpoint("gptqmodel-gptq-w4-g128-sym"))
    found = explain(path, platform=Platform.parse("cpu:avx2"), dtype="bfloat16")
    assert {part.untested_on_hardware for part in parts(found)} == {()}


@pytest.mark.slow
def test_the_command_prints_it() -> None:
    command = [sys.executable, "-m", "vllm.compressed_linear.commands.cli", "explain", "--json"]
    path = str(checkpoint("llmcompressor-w4a16-sym-g128"))
    out = subprocess.run(
        [*command, "--platform", "cuda:100", path], capture_output=True, text=True, check=True
    )
    assert json.loads(out.stdout)["platform"] == "cuda:100"
