# SPDX-License-Identifier: Apache-2.0
"""Contenders in another process: vLLM as it is without this package, and vLLM with zentorch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.contender import copies_for, nbytes
from benchmarks.machine import ROOT
from benchmarks.timing import Elapsed
from vllm.compressed_linear.checkpoint.weights import to_standard_layout
from vllm.compressed_linear.spec.elements import torch_dtype
from vllm.compressed_linear.spec.packing import Packing, pack
from vllm.compressed_linear.testing import Problem


class CannotRunError(RuntimeError):
    """What vLLM says of a layer that it cannot run."""


def checkpoint_tensors(kind: str, problem: Problem) -> dict[str, torch.Tensor]:
    """The weights of ``problem`` as vLLM's scheme class of ``kind`` loads them."""
    if kind == "dense":
        dtype = torch_dtype(problem.descriptor.input_dtype)
        return {"weight": problem.weight.to(dtype)}
    standard = to_standard_layout(problem.descriptor, problem.weights)
    assert standard.scale is not None
    if kind == "wna16":
        bits = problem.case.element.bits
        tensors = {
            "weight_packed": pack(standard.codes, Packing(bits)),
            "weight_scale": standard.scale.contiguous(),
            "weight_shape": torch.tensor(standard.codes.shape),
        }
        if standard.zero is not None:
            zero = standard.zero.to(torch.uint8)
            tensors["weight_zero_point"] = pack(zero, Packing(bits), 0).contiguous()
        return tensors
    scale = standard.scale.float().contiguous()
    if kind == "int8":
        codes = standard.codes.to(torch.int16) - problem.case.element.bias
        return {"weight": codes.to(torch.int8), "weight_scale": scale}
    if kind == "fp8":
        return {"weight": standard.codes.view(torch.float8_e4m3fn), "weight_scale": scale}
    raise ValueError(f"unknown kind {kind!r} of vLLM's layers")


@dataclass(frozen=True)
class Environment:
    """Where vLLM is run: the Python to start, and variables that decide on its kernel."""

    label: str
    python: Path
    variables: tuple[tuple[str, str], ...] = ()


X_AS_IT_IS = (("VLLM_CPU_INT4_W4A8", "0"),)
"""With it vLLM keeps the x of 4-bit layers. By default it rounds x to 8 bits on processors with
AMX, and with zentorch: that is another contract."""

STOCK = Environment("vLLM", Path(sys.executable), X_AS_IT_IS)
STOCK_DEFAULT = Environment("vLLM by default", Path(sys.executable))


class Vllm:
    """A process of ``environment`` that makes and runs one layer at a time."""

    def __init__(self, environment: Environment) -> None:
        self.label = environment.label
        self._directory = tempfile.TemporaryDirectory(prefix="benchmark-")
        self.scratch = Path(self._directory.name)
        variables = {
            "VLLM_COMPRESSED_LINEAR": "0",
            "VLLM_PLUGINS": "",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "VLLM_LOGGING_LEVEL": "ERROR",
            **dict(environment.variables),
        }
        with (self.scratch / "log").open("w") as errors:
            self._process = subprocess.Popen(
                [str(environment.python), "-m", "benchmarks.stock"],
                cwd=ROOT,
                env={**os.environ, **variables},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """The answer to a command of ``benchmarks.stock``; ``CannotRunError`` if it is an error."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            log = (self.scratch / "log").read_text(errors="replace")
            raise CannotRunError(f"its process ended: {log.strip()[-400:]}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise CannotRunError(answer["error"])
        return answer

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate(timeout=60)
        self._directory.cleanup()


class RemoteContender:
    """The layer that ``vllm`` runs from now on; the members are those of ``Contender``."""

    def __init__(self, vllm: Vllm, kind: str, problem: Problem, tolerance: float) -> None:
        self.tolerance = tolerance
        self._vllm = vllm
        self._x: torch.Tensor | None = None
        file = vllm.scratch / "weights.safetensors"
        tensors = checkpoint_tensors(kind, problem)
        save_file(tensors, file)
        self.weight_bytes = nbytes(tensors)
        built = vllm.ask(
            {
                "build": kind,
                "file": str(file),
                "dtype": problem.descriptor.input_dtype,
                "bits": problem.case.element.bits,
                "copies": copies_for(self.weight_bytes),
            }
        )
        self.name = f"{vllm.label}, {built['name']}"
        self.number_of_copies: int = built["copies"]

    def _send(self, x: torch.Tensor) -> None:
        if x is not self._x:
            file = str(self._vllm.scratch / "x.safetensors")
            save_file({"x": x}, file)
            self._vllm.ask({"input": file})
            self._x = x

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """y for x."""
        self._send(x)
        file = str(self._vllm.scratch / "y.safetensors")
        self._vllm.ask({"output": file})
        return load_file(file)["y"]

    def warm_up(self, x: torch.Tensor) -> None:
        self._send(x)
        self._vllm.ask({"warm_up": True})

    def turn(self, x: torch.Tensor, first: int) -> list[Elapsed]:
        """See ``timing.turn``; the clock is the other process's."""
        self._send(x)
        return [Elapsed(*times) for times in self._vllm.ask({"turn": first})["times"]]
