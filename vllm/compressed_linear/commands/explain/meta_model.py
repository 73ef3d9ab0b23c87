# SPDX-License-Identifier: Apache-2.0
"""Construction of a vLLM model class without weights, devices or other processes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

_GROUPS = ("_WORLD", "_TP", "_PP", "_DP", "_EP", "_DCP", "_PCP")
_OVER_RANKS = frozenset({"_WORLD", "_TP", "_EP"})


@dataclass(frozen=True)
class PretendGroup:
    """Stand-in for a process group while layers are built; it cannot communicate."""

    world_size: int
    rank_in_group: int

    @property
    def rank(self) -> int:
        return self.rank_in_group

    @property
    def local_rank(self) -> int:
        return self.rank_in_group

    @property
    def ranks(self) -> list[int]:
        return list(range(self.world_size))

    @property
    def device_group(self) -> PretendGroup:
        return self

    @property
    def cpu_group(self) -> PretendGroup:
        return self

    def size(self) -> int:
        return self.world_size

    @property
    def first_rank(self) -> int:
        return 0

    @property
    def last_rank(self) -> int:
        return self.world_size - 1

    @property
    def is_first_rank(self) -> bool:
        return self.rank_in_group == 0

    @property
    def is_last_rank(self) -> bool:
        return self.rank_in_group == self.world_size - 1


@contextmanager
def pretend_parallel(rank: int, size: int) -> Iterator[None]:
    """Context in which this process is tensor-parallel rank ``rank`` of ``size``."""
    from vllm.distributed import parallel_state

    names = [name for name in _GROUPS if hasattr(parallel_state, name)]
    before = {name: getattr(parallel_state, name) for name in names}
    for name in names:
        wide = name in _OVER_RANKS
        setattr(parallel_state, name, PretendGroup(size, rank) if wide else PretendGroup(1, 0))
    try:
        yield
    finally:
        for name, group in before.items():
            setattr(parallel_state, name, group)


def inspect_models_here(architectures: list[str]) -> None:
    """Import these model classes into this process.

    vLLM would inspect each one in a subprocess, which takes seconds.
    """
    from vllm.model_executor.models import registry

    known = registry.ModelRegistry.models
    if not any(name in known for name in architectures):
        # vLLM wraps the class of the transformers library then.
        architectures = [
            name for name in known if re.fullmatch(r"Transformers\w*ForCausalLM", name)
        ]
    for name in architectures:
        model = known.get(name)
        if type(model).__name__ == "_LazyRegisteredModel":
            cls = model.load_model_cls()
            known[name] = registry._RegisteredModel.from_model_cls(cls)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def engine_config(path: str, *, dtype: str, tp_size: int, quantization: str | None) -> Any:
    """vLLM's config for the model at ``path``.

    ``tp_size`` is put in afterwards, so this machine need not have that many devices; the model's
    own limits on it are checked (``ValueError``).
    """
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=path,
        dtype=dtype,
        quantization=quantization,
        skip_tokenizer_init=True,
        enforce_eager=True,
    ).create_engine_config()
    config.parallel_config.tensor_parallel_size = tp_size
    return config


def check_tensor_parallel(config: Any) -> None:
    """Raise ``ValueError`` if the model cannot be split among that many ranks."""
    config.model_config.verify_with_parallel_config(config.parallel_config)


def build_on_meta(
    config: Any, rank: int, change: Callable[[Any], None]
) -> tuple[torch.nn.Module, Any]:
    """The model of ``config`` on rank ``rank`` with meta tensors, and its quantization config.

    ``config`` can be used again: names in the quantization config are mapped on a copy, to which
    ``change`` is applied first.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    pristine = config.quant_config
    config.quant_config = copy.deepcopy(pristine)
    change(config.quant_config)
    layers = config.compilation_config.static_forward_context
    before = dict(layers)
    layers.clear()
    try:
        with (
            pretend_parallel(rank, config.parallel_config.tensor_parallel_size),
            set_current_vllm_config(config),
            _default_dtype(config.model_config.dtype),
            torch.device("meta"),
        ):
            model = initialize_model(config, model_config=config.model_config)
        return model, config.quant_config
    finally:
        config.quant_config = pristine
        layers.clear()
        layers.update(before)


def stacked_names(
    model: torch.nn.Module, names: Mapping[str, str]
) -> dict[str, list[tuple[str, Any]]]:
    """Tensors that the mappers of the model and its parts fuse during loading: name of the fused
    tensor → (name of a part, its shard). ``names``: name in the files → vLLM's name of the part."""
    found: dict[str, list[tuple[str, Any]]] = {}
    for path, module in model.named_modules():
        mapper: Any = getattr(module, "hf_to_vllm_mapper", None)
        if not getattr(mapper, "orig_to_new_stacked", None):
            continue
        prefix = f"{path}." if path else ""
        for on_disk, part in names.items():
            if not part.startswith(prefix):
                continue
            # The outermost mapper is given names as they are in the files, inner ones renamed.
            own = part.removeprefix(prefix) if path else on_disk
            fused, shard = mapper._map_name_with_shard(own) or ("", None)
            if shard is not None:
                for one in shard if isinstance(shard, list) else [shard]:
                    found.setdefault(prefix + fused, []).append((part, one))
    return found


@contextmanager
def as_while_building(config: Any, rank: int) -> Iterator[None]:
    """The contexts in which ``build_on_meta`` builds a model, for more work on it."""
    from vllm.config import set_current_vllm_config

    with (
        pretend_parallel(rank, config.parallel_config.tensor_parallel_size),
        set_current_vllm_config(config),
        _default_dtype(config.model_config.dtype),
        torch.device("meta"),
    ):
        yield
