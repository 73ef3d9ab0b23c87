# SPDX-License-Identifier: Apache-2.0
"""The command ``vllm-compressed-linear`` as users call it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from tests.support.checkpoints import checkpoint
from tests.support.messages import says
from vllm.compressed_linear import settings
from vllm.compressed_linear.commands.backends import declared
from vllm.compressed_linear.commands.cli import app
from vllm.compressed_linear.commands.explain.explain import explain
from vllm.compressed_linear.commands.explain.text import in_words, print_explanation
from vllm.compressed_linear.commands.text import compress_names, size
from vllm.compressed_linear.integration.preparation import detect_platform
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor

PLAIN = "llmcompressor-w4a16-sym-g128"
MIXED = "gptqmodel-gptq-dynamic"


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``main`` does for the whole process."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")


def call(*arguments: str, columns: int = 100) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": str(columns)})


def test_version() -> None:
    result = call("--version")
    assert result.exit_code == 0
    assert result.stdout.split() == ["vllm-compressed-linear", version("vllm-compressed-linear")]


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_fits_and_has_everything(columns: int) -> None:
    result = call("explain", str(checkpoint(MIXED)), columns=columns)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    text = " ".join(result.stdout.split())
    assert "\x1b" not in result.stdout
    for part in (
        "LlamaForCausalLM, quantization gptq, bfloat16 activations",
        "model.layers.{0-1}.self_attn.qkv_proj",
        "q_proj: 256 x 256, 8-bit symmetric, groups of 64 (float16)",
        "v_proj: 128 x 256, 8-bit symmetric, groups of 32 (float16)",
        "not quantized: dynamic -:.*o_proj$",
        "vllm_native cannot run",
        "8-bit integer weights (supported bits: 4)",
        "model.embed_tokens (UnquantizedEmbeddingMethod)",
        "What only the data decides",
        "9 layers",
    ):
        # The columns of a narrow table interrupt a line.
        words = part.split()
        assert part in text or all(word in text for word in words), part


def test_json_has_every_case_reason_and_byte() -> None:
    result = call("explain", str(checkpoint(MIXED)), "--json")
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    found = explain(str(checkpoint(MIXED)), platform=detect_platform())
    assert data == json.loads(json.dumps(found.to_json()))
    names = [name for layer in data["layers"] for name in layer["names"]]
    assert sorted(names) == sorted(layer.name for layer in found.layers)
    first = data["layers"][0]["cases"][0]
    assert first["likely"]
    assert first["facts"]
    part = first["parts"][0]
    assert part["shards"] == ["q_proj"]
    assert part["bytes_checkpoint"] > part["bytes_prepared"] > 0
    assert {r["backend"]: bool(r["reasons"]) for r in part["rejected"]} == {
        "cpu_int8": True,
        "marlin": True,
        "triton": True,
        "vllm_native": True,
        "reference": False,
    }
    assert str(CompressedLinearDescriptor.from_json(part["fields"])) == part["descriptor"]


def test_read_weights_leaves_one_case() -> None:
    data = json.loads(call("explain", str(checkpoint(MIXED)), "--json", "--read-weights").stdout)
    assert data["weights_read"]
    assert {len(layer["cases"]) for layer in data["layers"]} == {1}


def test_ranks_that_differ_are_mentioned() -> None:
    path = str(checkpoint("gptqmodel-gptq-w4-g32-asym-descact"))
    result = call("explain", path, "--tp", "2", "--read-weights")
    assert result.exit_code == 0
    assert "rank 0 of 2" in result.stdout
    assert "Ranks that differ from rank 0" in result.stdout
    assert "rank 1: 256 x " in result.stdout


def test_platforms() -> None:
    result = call("explain", str(checkpoint(PLAIN)), "--platform", "cpu:avx2")
    assert "cpu (avx2)" in result.stdout
    unknown = call("explain", str(checkpoint(PLAIN)), "--platform", "abacus")
    assert unknown.exit_code == 1
    assert says(unknown.stderr, "'abacus'", "cpu, cpu:generic, cpu:avx2,")


def test_a_backend_that_cannot_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.BACKEND, "unquantized=vllm_native")
    result = call("explain", str(checkpoint(PLAIN)), columns=200)
    assert result.exit_code == 1
    assert says(result.stdout, "'vllm_native'", "lm_head")
    assert says(result.stdout, "bf16", "uint4")
    data = call("explain", str(checkpoint(PLAIN)), "--json")
    assert data.exit_code == 1
    assert "lm_head" in json.loads(data.stdout)["errors"][0]
    assert "lm_head" in data.stderr


def test_settings_that_make_no_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.BACKEND, "=cpu")
    result = call("explain", str(checkpoint(PLAIN)))
    assert result.exit_code == 1
    assert says(result.stderr, "NAME", "PATTERN=NAME")


def test_damage_is_one_line_and_status_1(tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(checkpoint(PLAIN), copy)
    file = next(copy.glob("*.safetensors"))
    with file.open("rb+") as stream:
        stream.truncate(100)
    result = call("explain", str(copy))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {file}: ")
    missing = call("explain", str(tmp_path / "nothing"))
    assert missing.exit_code == 1
    assert says(missing.stderr, "directory", tmp_path / "nothing", "not")


def test_the_installed_command_writes_json_only_to_stdout() -> None:
    command = Path(sys.executable).with_name("vllm-compressed-linear")
    result = subprocess.run(
        [command, "explain", checkpoint(PLAIN), "--json"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["architecture"] == "LlamaForCausalLM"


# The table's parts.


def test_names_are_compressed() -> None:
    assert compress_names(["lm_head"]) == "lm_head"
    assert compress_names([f"m.{i}.mlp" for i in (0, 1, 2, 5)]) == "m.{0-2,5}.mlp"
    experts = [f"m.{i}.experts.{e}.w1" for i in (3, 4) for e in range(8)]
    assert compress_names(experts) == "m.{3-4}.experts.{0-7}.w1"
    assert compress_names(experts[:-1]) == "m.3.experts.0.w1 and 14 more"


def test_sizes() -> None:
    assert [size(n) for n in (None, 0, 999, 1000, 1536, 10 * 2**20, 5 * 2**30)] == [
        "?",
        "0 B",
        "999 B",
        "0.98 KiB",
        "1.50 KiB",
        "10.0 MiB",
        "5.00 GiB",
    ]


def test_descriptors_in_words() -> None:
    layers = explain(
        str(checkpoint("gptqmodel-gptq-w4-g32-asym-descact")),
        platform=detect_platform(),
        read_weights=True,
    ).layers
    words = in_words(layers[0].likely.parts[0].descriptor, "bfloat16")
    assert words == (
        "512 x 256, 4-bit, groups of 32 (float16), integer zero points, channels reordered"
    )
    assert in_words(layers[-1].likely.parts[0].descriptor).endswith("bf16, bfloat16 activations")


def test_colours_go_to_terminals_only() -> None:
    found = explain(str(checkpoint(PLAIN)), platform=detect_platform())
    console = Console(force_terminal=True, color_system="standard", width=100)
    with console.capture() as captured:
        print_explanation(found, console)
    assert "\x1b[" in captured.get()


def test_backends_are_listed_with_what_they_declare() -> None:
    rows = {row["name"]: row for row in json.loads(call("backends", "--json").stdout)}
    assert {"cpu", "reference", "vllm_native"} <= rows.keys()
    assert rows["cpu"]["weights"][0] == "integers of 1 to 8 bits"
    assert "reordered channels" in rows["cpu"]["further"]
    assert rows["cpu"]["reasons"] == []
    gpu = call("backends", "--platform", "cuda:90", columns=200)
    assert says(gpu.stdout, "device cuda", "cpu")
    for name in ("marlin", "triton", "vllm_native"):
        assert says(gpu.stdout, name, "runs on cuda:90, untested on hardware")


def test_backends_that_have_not_run_on_hardware_say_so() -> None:
    def tested(platform: str) -> dict[str, bool]:
        rows = declared(Platform.parse(platform))
        return {row["name"]: row["hardware_tested"] for row in rows if not row["reasons"]}

    ours = {"cpu": True, "cpu_int8": True, "cpu_int8_fast": True, "reference": True}
    assert tested("cpu:avx512bf16") == {**ours, "vllm_native": True}
    assert tested("cpu:amx") == {**ours, "vllm_native": True}
    arm = {**dict.fromkeys(ours, False), "reference": True, "vllm_native": False}
    assert tested("cpu:aarch64") == arm
    never = dict.fromkeys(("marlin", "triton", "vllm_native", "reference"), False)
    assert tested("cuda:90") == never
    assert max(map(len, call("backends", columns=80).stdout.splitlines())) <= 80
