# SPDX-License-Identifier: Apache-2.0
"""The small quantized checkpoints, and what their makers' libraries say of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.repository import ROOT

COPIES = ROOT / "tests" / "fixtures"
OF_OTHER_TOOLS = ("mlx-", "bnb-")
"""Beginnings of names of copies that the fuzzer's own decoder does not read."""


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


def _directory(name: str) -> Path:
    """Where a checkpoint of the zoo or of ``tests/fixtures`` is, if it is there."""
    return zoo() / name if (zoo() / name).is_dir() else COPIES / name


def fuzzed() -> list[Path]:
    """Directories of the copies that are changed by the fuzzer."""
    names = (path for path in COPIES.iterdir() if path.is_dir())
    return sorted(path for path in names if not path.name.startswith(OF_OTHER_TOOLS))


@dataclass(frozen=True)
class Entry:
    """What is known of one checkpoint: the fields of INDEX.json that tests choose by, and what its
    configuration says of its weights."""

    name: str
    tool: str
    quant_method: str | None
    bits: int | str  # or "mixed"
    group_size: int | str | list[int] | None  # or "mixed"; -1 is one group
    symmetric: bool | str  # or "mixed"
    act_order: bool | str | None  # of GPTQModel; "weight" is compressed-tensors' order of rows
    activation: str | None  # how the quantizer's model quantizes activations
    version_field: str | None  # of AWQ: gemm, gemv, gemv_fast

    @cached_property
    def weight_types(self) -> frozenset[str]:
        """``int`` and ``float``, of the weights that its configuration quantizes."""
        config = json.loads((_directory(self.name) / "config.json").read_text())
        quantization = config.get("quantization_config", {})
        if self.quant_method == "compressed-tensors":
            groups = quantization["config_groups"].values()
            return frozenset(group["weights"]["type"] for group in groups)
        if self.quant_method == "auto-round":
            return frozenset({"int" if quantization["data_type"] == "int" else "float"})
        return frozenset({"int"} if self.quant_method in ("gptq", "awq") else ())


@cache
def index() -> tuple[Entry, ...]:
    """The checkpoints that are there: those of the zoo, and copies of others."""
    names = [field.name for field in fields(Entry) if field.name != "name"]
    found = {
        entry["dir"]: Entry(entry["dir"], **{name: entry.get(name) for name in names})
        for directory in (COPIES, zoo())
        for entry in json.loads((directory / "INDEX.json").read_text())
    }
    return tuple(found.values())


def checkpoints(where: Callable[[Entry], bool]) -> list[str]:
    """Names of the checkpoints that are there and of this kind."""
    return sorted(entry.name for entry in index() if where(entry))


def entry_of(name: str) -> Entry:
    """What is known of the checkpoint of this name."""
    return next(entry for entry in index() if entry.name == name)


WHOLE = ("fp8", "compressed-tensors", "modelopt", "quark", "auto-round", "mlx", "bitsandbytes")
"""Methods of which we read every weight, whatever it is, and quantize x as they say."""


def is_ours(entry: Entry) -> bool:
    """Whether our formats read it: integers that are multiplied with x as it is, or all of a
    method."""
    if entry.quant_method in WHOLE:
        return True
    methods = ("gptq", "awq")
    return (
        entry.quant_method in methods and entry.activation is None and "int" in entry.weight_types
    )


def is_weight_only(entry: Entry) -> bool:
    """Whether our formats read all of it, and x stays as it is: of bitsandbytes' int8 too."""
    return is_ours(entry) and (entry.activation is None or entry.quant_method == "bitsandbytes")


def quantizes_inputs(entry: Entry) -> bool:
    """Whether our formats read all of it, and x is quantized."""
    return is_ours(entry) and not is_weight_only(entry)


def checkpoint(name: str) -> Path:
    """The directory of one checkpoint; skips the test if this copy of the zoo lacks it."""
    path = _directory(name)
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
