# SPDX-License-Identifier: Apache-2.0
"""``tune`` as a command: its options, its file and its errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.support.checkpoints import checkpoint
from tests.support.messages import says
from tests.support.timed_toys import MODEL, Fast, Toy
from vllm.compressed_linear import settings
from vllm.compressed_linear.backends.measurements import read
from vllm.compressed_linear.commands import cli
from vllm.compressed_linear.machine import limits as machine
from vllm.compressed_linear.machine import timing

pytestmark = pytest.mark.usefixtures("only_toys")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(settings.TUNE_FILE, "")
    monkeypatch.setattr(machine, "cache_bytes", lambda threads: 1 << 14)
    monkeypatch.setattr(timing, "clock", lambda threads: lambda: Toy.now)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "100"})

    return run


def test_the_command_writes_where_serving_looks(
    call: Callable[..., Result], tmp_path: Path
) -> None:
    model = str(checkpoint(MODEL))
    assert "slow" in call("explain", model).stdout
    result = call("tune", model, "--budget", "0", "--threads", "1")
    assert result.exit_code == 0, result.output
    file = tmp_path / "cache" / "vllm-compressed-linear" / "tune.json"
    words = " ".join(result.stdout.split())
    assert f"written to {file}" in result.stdout.replace("\n", "")
    for part in (
        "1 thread",
        "model.layers.{0-1}.mlp.gate_up_proj 1024 x 256, 4-bit symmetric, groups of 128 (float16)",
        "ms a call M=1 M=4 M=16 M=64 M=512 expected",
        "fast 1.02 4.10 16.4 65.5 524",
        "the cost model would choose slow",
    ):
        assert part in words, result.stdout
    lines = [line for line in result.stdout.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= 100
    (key,) = read(file)
    assert key.threads == 1


def test_options_of_the_command(call: Callable[..., Result], tmp_path: Path) -> None:
    model, file = str(checkpoint(MODEL)), tmp_path / "own.json"
    options = ("--budget", "0", "--output", str(file), "--dtype", "float32")
    result = call("tune", model, *options, "--threads", "2", "--backends", "slow, fast")
    assert result.exit_code == 0, result.output
    ((key, found),) = read(file).items()
    assert key.threads == 2
    assert {d.input_dtype for d in found.layers} == {"float32"}
    assert {frozenset(backends) for backends in found.layers.values()} == {
        frozenset({"fast", "slow"})
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tune", "no/such/model/here"), ("no/such/model/here",)),
        (("tune", "MODEL", "--backends", "fats"), ("'fats'",)),
        (("tune", "MODEL", "--output", "DAMAGED"), ("JSON",)),
        (("tune", "MODEL", "--tp", "3"), (3,)),
    ],
)
def test_errors_are_one_line(
    arguments: tuple[str, ...], message: tuple[object, ...], tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{")
    places = {"MODEL": str(checkpoint(MODEL)), "DAMAGED": str(damaged)}
    command = [sys.executable, "-m", "vllm.compressed_linear.commands.cli"]
    command += [places.get(argument, argument) for argument in arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert says(errors[0], *message)


def test_what_nothing_can_run_is_an_error_after_the_rest(
    call: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The named backend declines lm_head, which is not quantized."""
    declared = Fast.capabilities
    monkeypatch.setattr(
        Fast,
        "capabilities",
        type(declared)(devices=declared.devices, integer_bits=declared.integer_bits),
    )
    result = call("tune", str(checkpoint(MODEL)), "--budget", "0", "--backends", "fast")
    assert result.exit_code == 1
    assert "Error: lm_head (512x256, bf16" in " ".join(result.stdout.split())
    (found,) = read(tmp_path / "cache" / "vllm-compressed-linear" / "tune.json").values()
    assert len(found.layers) == 4
