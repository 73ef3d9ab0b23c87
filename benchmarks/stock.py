# SPDX-License-Identifier: Apache-2.0
"""vLLM's own layers, without this package, in a process of their own: run as a worker.

    python -m benchmarks.stock            commands on stdin, answers on stdout, a JSON line each

vLLM's scheme classes make, load and run the layer, so vLLM itself decides on the kernel; started
by the Python of an environment that has zentorch, it decides as it does there. Commands:

* ``{"build": KIND, "file": FILE, "dtype": D, "bits": B, "copies": C}``: makes the layer of the
  tensors in FILE up to C times; answers with the name of the kernel and the number of copies
* ``{"input": FILE}``: keeps x of FILE
* ``{"warm_up": true}``: calls every copy once
* ``{"output": FILE}``: writes y = layer(x)
* ``{"turn": FIRST}``: answers with [wall, CPU] seconds of a few calls, see ``timing.turn``

An answer ``{"error": …}`` says what vLLM said. Log lines go to stderr.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.rotation import repeated
from benchmarks.timing import allow_tiles, turn

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Built:
    """A layer, what runs it with x and a bias, and the name of the kernel that vLLM decided on.
    ``tensors_only``: the kernel keeps nothing but the layer's tensors."""

    layer: Any
    run: Callable[[Any, torch.Tensor, torch.Tensor | None], torch.Tensor]
    name: str
    tensors_only: bool = False

    def on_copied_tensors(self) -> Built:
        """The same with tensors of its own; quicker than packing again, which takes a second."""
        layer = copy.copy(self.layer)
        layer._parameters = {
            name: None if p is None else torch.nn.Parameter(p.data.clone(), requires_grad=False)
            for name, p in self.layer._parameters.items()
        }
        for name, value in vars(self.layer).items():
            if isinstance(value, torch.Tensor):
                setattr(layer, name, value.clone())
        return replace(self, layer=layer)


@contextmanager
def one_rank(dtype: torch.dtype) -> Iterator[None]:
    """vLLM's configuration and process groups, which its parameter classes ask for."""
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config

    config = VllmConfig(compilation_config=CompilationConfig(mode=0))
    before = torch.get_default_dtype()
    with set_current_vllm_config(config, check_compile=False):
        _groups()
        config.model_config = SimpleNamespace(dtype=dtype)  # all that a linear layer asks of it
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@cache
def _groups() -> None:
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    rendezvous = Path(tempfile.mkdtemp(prefix="benchmark-")) / "rank"
    init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
    initialize_model_parallel(1, 1)


def _scheme_layer(
    scheme: Any, tensors: Tensors, shape: Sequence[int], dtype: torch.dtype
) -> torch.nn.Module:
    """A layer as vLLM's scheme class of compressed-tensors makes and loads it."""
    n, k = shape
    layer = torch.nn.Module()
    layer.register_parameter("bias", None)
    scheme.create_weights(
        layer=layer,
        output_partition_sizes=[n],
        input_size=k,
        input_size_per_partition=k,
        output_size=n,
        params_dtype=dtype,
        weight_loader=lambda *_: None,
    )
    for name, tensor in tensors.items():
        getattr(layer, name).data.copy_(tensor)
    scheme.process_weights_after_loading(layer)
    return layer


def _wna16(tensors: Tensors, dtype: torch.dtype, bits: int) -> Built:
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        CompressedTensorsWNA16,
    )

    n, k = tensors["weight_shape"].tolist()
    scheme = CompressedTensorsWNA16(
        strategy="group",
        num_bits=bits,
        group_size=k // tensors["weight_scale"].shape[1],
        symmetric="weight_zero_point" not in tensors,
    )
    layer = _scheme_layer(scheme, tensors, (n, k), dtype)
    return Built(layer, scheme.apply_weights, type(scheme.kernel).__name__, tensors_only=True)


def _int8(tensors: Tensors, dtype: torch.dtype, bits: int) -> Built:
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        CompressedTensorsW8A8Int8,
    )

    scheme = CompressedTensorsW8A8Int8("channel", False, True)
    layer = _scheme_layer(scheme, tensors, tensors["weight"].shape, dtype)
    return Built(layer, scheme.apply_weights, type(scheme.kernel).__name__)


def _fp8(tensors: Tensors, dtype: torch.dtype, bits: int) -> Built:
    from compressed_tensors.quantization import QuantizationArgs
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        CompressedTensorsW8A8Fp8,
    )

    weights = QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True)
    scheme = CompressedTensorsW8A8Fp8(weights, False)
    layer = _scheme_layer(scheme, tensors, tensors["weight"].shape, dtype)
    return Built(layer, scheme.apply_weights, type(scheme.fp8_linear).__name__)


DENSE_OPS = ("onednn_mm", "zentorch_linear", "weight_packed_linear")
"""What the function that vLLM puts on an unquantized layer may call."""


def _dense(tensors: Tensors, dtype: torch.dtype, bits: int) -> Built:
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    layer: Any = torch.nn.Module()
    layer.register_parameter("bias", None)
    layer.weight = torch.nn.Parameter(tensors["weight"].clone(), requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    names = [n for n in layer.cpu_linear.__code__.co_names if n.startswith(DENSE_OPS)]
    return Built(
        layer,
        lambda layer, x, bias: layer.cpu_linear(x, layer.weight, bias),
        names[0] if names else "F.linear",
    )


KINDS: dict[str, Callable[[Tensors, torch.dtype, int], Built]] = {
    "wna16": _wna16,
    "int8": _int8,
    "fp8": _fp8,
    "dense": _dense,
}


class Worker:
    """The layer that was built last, in all its copies, and the last x."""

    def __init__(self) -> None:
        self.built: tuple[Built, ...] = ()
        self.x = torch.empty(0)

    def build(self, kind: str, file: str, dtype: str, bits: int, copies: int) -> dict[str, Any]:
        self.built = ()
        tensors, of_dtype = load_file(file), getattr(torch, dtype)
        with one_rank(of_dtype):
            make: Callable[[], Built] = partial(KINDS[kind], tensors, of_dtype, bits)
            if (first := make()).tensors_only:
                make = first.on_copied_tensors
            self.built = repeated(make, lambda _: copies)
        return {"name": first.name, "copies": len(self.built)}

    def call(self, index: int) -> torch.Tensor:
        built = self.built[index % len(self.built)]
        return built.run(built.layer, self.x, None)

    def turn(self, first: int) -> dict[str, Any]:
        times = turn(self.call, first)
        return {"times": [(t.wall, t.cpu) for t in times]}

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        with torch.inference_mode():
            if "build" in command:
                kind = command.pop("build")
                return self.build(kind, **command)
            if "input" in command:
                self.x = load_file(command["input"])["x"]
                return {}
            if "warm_up" in command:
                for index in range(len(self.built)):
                    self.call(index)
                return {}
            if "output" in command:
                save_file({"y": self.call(0).contiguous()}, command["output"])
                return {}
            return self.turn(command["turn"])


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # so that nothing vLLM prints is taken for an answer
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    allow_tiles()
    worker = Worker()
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        # Whatever vLLM raises is the answer: that it cannot run a layer is a result.
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
