# SPDX-License-Identifier: Apache-2.0
"""Modules with weights that this package does not run: whose they are, why, and their bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.compressed_linear.checkpoint.headers import Headers, shard_names
from vllm.compressed_linear.integration import compat

NOT_LINEAR = "not a linear layer, an embedding table or a mixture's experts"


@dataclass(frozen=True)
class LeftToVllm:
    """A module with weights that vLLM's own code runs, and why. ``refusal``: error of that code if
    it cannot run it on this machine. ``nbytes``: of its tensors in the files, for all ranks; if
    they have other names there, of its parameters on this rank."""

    name: str
    kind: str
    method: str
    reason: str
    refusal: str = ""
    nbytes: int = 0


class BytesInFiles:
    """Bytes of the tensors of a module and of all modules inside it."""

    def __init__(self, headers: Headers) -> None:
        own: dict[str, int] = {}
        for name, header in headers.items():
            module = name.rpartition(".")[0]
            own[module] = own.get(module, 0) + header.nbytes
        self._inside: dict[str, int] = {}
        for module, nbytes in own.items():
            parent = module
            while parent:
                self._inside[parent] = self._inside.get(parent, 0) + nbytes
                parent = parent.rpartition(".")[0]

    def of(self, name: str, packed_modules: Mapping[str, Sequence[str]]) -> int:
        """Bytes of ``name``, or of the modules that it fuses; 0 if the files do not have them."""
        if name in self._inside:
            return self._inside[name]
        return sum(self._inside.get(part, 0) for part in shard_names(name, packed_modules))


def bytes_of_parameters(module: Any) -> int:
    """Bytes of all parameters of ``module`` on this rank."""
    return sum(parameter.nbytes for parameter in module.parameters())


def why_left(module: Any, *, asked: bool) -> str:
    """Why vLLM runs ``module``, a linear layer, an embedding table or experts, although its
    configuration was this package's. ``asked``: whether the model asked for its method."""
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    if compat.holds_experts(module):
        return "experts that the checkpoint does not quantize"
    if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
        return "embedding tables are only looked up"
    if not asked:
        return "the model class builds it without a quantization config"
    if not compat.knows_how_to_load(module):
        return f"{type(module).__name__} has its own weight loader"
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 2:
        return f"a weight of {0 if weight is None else weight.ndim} dimensions"
    if getattr(module, "_cpu_skip_gemm_dispatch", False):
        return "the model reads its weight itself"
    return f"its weight is {weight.dtype}".replace("torch.", "")
