# SPDX-License-Identifier: Apache-2.0
"""Where the small quantized checkpoints are, and what several test files share.

Tests import the plain functions (``from conftest import checkpoints``) for parametrisation; the
fixtures below are for everything else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import load_file

from vllm.compressed_linear import native
from vllm.compressed_linear.backends.vllm_native.cpu import CPU_OP
from vllm.compressed_linear.compat_kernels import missing_cpu_op
from vllm.compressed_linear.platform import Platform

ROOT = Path(__file__).resolve().parent.parent
COPIES = ROOT / "tests" / "fixtures"

ISAS = native.supported_isas() if native.available() is None else []
"""Instruction sets this processor can run, best first; empty without the native library."""

ISAS_INT8 = native.supported_isas_int8() if native.available() is None else []
"""The same for integer activations."""

# Nobody's own measurements decide what a test sees.
os.environ.setdefault("VLLM_COMPRESSED_LINEAR_TUNE_FILE", "off")

settings.register_profile(
    "default",
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("default")


W4A16 = {"VLLM_CPU_INT4_W4A8": "0"}
"""Environment in which vLLM's own 4-bit layers take x as it is. On a CPU with AMX they quantise
bfloat16 x to 8 bits by default, elsewhere this changes nothing."""


@pytest.fixture
def w4a16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets ``W4A16``: what is tested multiplies 4-bit weights with x as it is."""
    for name, value in W4A16.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def no_int4_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM refuses experts of 4 bits on the CPU, as it does on one without AMX."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt4

    monkeypatch.setattr(CPUExpertsInt4, "_supports_current_device", staticmethod(lambda: False))


def needs_vllms_4_bit_kernel() -> None:
    """Skips the test where this CPU's library of vLLM has none, as that for AVX2."""
    if (lacks := missing_cpu_op(CPU_OP, Platform.detect())) is not None:
        pytest.skip(lacks)


def zoo() -> Path:
    """The directory of small checkpoints: ``COMPRESSED_LINEAR_ZOO``, one beside the repository, or
    the copies in ``tests/fixtures`` (fewer formats, the same files)."""
    named = os.environ.get("COMPRESSED_LINEAR_ZOO")
    if named:
        if not (Path(named) / "INDEX.json").is_file():
            raise pytest.UsageError(f"COMPRESSED_LINEAR_ZOO={named} holds no INDEX.json")
        return Path(named)
    beside = ROOT.parent / "shared" / "zoo"
    return beside if (beside / "INDEX.json").is_file() else COPIES


def index() -> list[dict[str, Any]]:
    """The entries of the zoo's INDEX.json: dir, tool, quant_method, bits, group_size, ..."""
    return json.loads((zoo() / "INDEX.json").read_text())


def checkpoints(*prefixes: str) -> list[str]:
    """Names of the checkpoints that are there and start with one of ``prefixes`` (none: all)."""
    names = sorted(entry["dir"] for entry in index())
    return [name for name in names if not prefixes or name.startswith(prefixes)]


def checkpoint(name: str) -> Path:
    """The directory of one checkpoint; skips the test if this copy of the zoo lacks it."""
    path = zoo() / name
    if not path.is_dir():
        pytest.skip(f"checkpoint {name} is not in {zoo()}")
    return path


def checkpoint_tensors(name: str) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint by their names on disk."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint(name).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def checkpoint_reference(name: str) -> dict[str, torch.Tensor]:
    """``input_ids``, ``logits``, and for each linear ``.corner``, ``.rowsum`` and ``.colsum``."""
    return load_file(checkpoint(name) / "reference" / "reference.safetensors")


def assert_matches_reference(
    weight: torch.Tensor, reference: dict[str, torch.Tensor], linear: str
) -> None:
    """Compare a dequantized fp32 weight [N, K] with the corner and sums the quantizer's own library
    gave; sums may differ by their own fp32 rounding."""
    wide = weight.double()
    torch.testing.assert_close(
        weight[:8, :64],
        reference[f"{linear}.corner"],
        rtol=2e-7,
        atol=1e-12,
        msg=f"{linear}.corner",
    )
    for name, dim in (("rowsum", 1), ("colsum", 0)):
        error = (wide.sum(dim) - reference[f"{linear}.{name}"].double()).abs()
        allowed = 2.0**-22 * wide.abs().sum(dim) + 1e-12
        assert bool((error <= allowed).all()), (
            f"{linear}.{name}: {float((error / allowed).max()):.3g} times the allowed error"
        )


def tiled(values: torch.Tensor) -> torch.Tensor:
    """[N, G] → [tiles, G, 16], as the ops want scales and zero points."""
    missing = -len(values) % native.TILE
    padded = torch.nn.functional.pad(values, (0, 0, 0, missing))
    return padded.unflatten(0, (-1, native.TILE)).transpose(1, 2).contiguous()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with each instruction set."""
    before = native.isa()
    torch.ops.compressed_linear.select_isa(request.param)
    yield request.param
    torch.ops.compressed_linear.select_isa(before)


@pytest.fixture(params=ISAS_INT8)
def isa_int8(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with each instruction set for integer activations."""
    before = native.isa_int8()
    torch.ops.compressed_linear.select_isa_int8(request.param)
    yield request.param
    torch.ops.compressed_linear.select_isa_int8(before)


@pytest.fixture
def clean_registry() -> Iterator[None]:
    """Backends that a test registers or removes are put back afterwards."""
    from vllm.compressed_linear import registry

    known = dict(registry._REGISTERED)
    points = set(registry._LOADED)
    yield
    registry._REGISTERED.clear()
    registry._REGISTERED.update(known)
    registry._LOADED.clear()
    registry._LOADED.update(points)


@pytest.fixture
def inspect_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM inspects each model class in a process of its own, which takes seconds."""
    from vllm.model_executor.models import registry

    def inspect(self: Any) -> Any:
        return registry._ModelInfo.from_model_cls(self.load_model_cls())

    monkeypatch.setattr(registry._LazyRegisteredModel, "inspect_model_cls", inspect)
