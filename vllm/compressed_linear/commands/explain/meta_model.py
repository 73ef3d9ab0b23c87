# SPDX-License-Identifier: Apache-2.0
"""Construction of a vLLM model class without weights, devices or other processes."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

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


@contextmanager
def built_on_meta(
    config: Any, rank: int, change: Callable[[Any], None]
) -> Iterator[tuple[torch.nn.Module, Any]]:
    """Context with the model of ``config`` on rank ``rank`` with meta tensors, and its quantization
    config, in which the model can load meta tensors.

    ``config`` can be used again: names in the quantization config are mapped on a copy, to which
    ``change`` is applied first.
    """
    from vllm.config import set_current_vllm_config

    pristine = config.quant_config
    config.quant_config = copy.deepcopy(pristine)
    if config.quant_config is not None:
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
            StayOnMeta(),
        ):
            yield _construct(config), config.quant_config
    finally:
        config.quant_config = pristine
        layers.clear()
        layers.update(before)


def _construct(config: Any) -> torch.nn.Module:
    """As vLLM's loader does, which also records how to reload the model, a third of the time."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import utils

    model_class, _ = utils.get_model_architecture(config.model_config)
    if not {"vllm_config", "prefix"} <= inspect.signature(model_class.__init__).parameters.keys():
        return utils.initialize_model(config, model_config=config.model_config)
    if config.quant_config is not None:
        utils.configure_quant_config(config.quant_config, model_class)
    with set_current_vllm_config(config, check_compile=True, prefix=""):
        return model_class(vllm_config=config, prefix="")


class StayOnMeta(TorchFunctionMode):
    """Context in which moves of a meta tensor to a device do nothing: some classes move their
    towers while they are built, and what has no data cannot be moved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.cpu, torch.Tensor.cuda) and args[0].is_meta:
            return args[0]
        if func is torch.Tensor.to and args[0].is_meta:
            given = [*args[1:], *kwargs.values()]
            dtypes = [v.dtype if isinstance(v, torch.Tensor) else v for v in given]
            dtype = next((v for v in dtypes if isinstance(v, torch.dtype)), args[0].dtype)
            return func(args[0], dtype)
        return func(*args, **kwargs)


def only_without_weights(message: str) -> bool:
    """Whether an error while a model was built is about meta tensors or the missing process groups,
    which a load does not have."""
    return "meta" in re.findall(r"[a-z]+", message.lower()) or PretendGroup.__name__ in message


def stacked_names(
    model: torch.nn.Module, names: Iterable[str], renamed: Iterable[str]
) -> dict[str, list[tuple[str, Any]]]:
    """Tensors that the mappers of the model and its parts fuse during loading: name of the fused
    tensor → (name of a part, its shard). ``names``: of the files; ``renamed``: vLLM's for the same
    tensors."""
    found: dict[str, list[tuple[str, Any]]] = {}
    for path, module in model.named_modules():
        mapper: Any = getattr(module, "hf_to_vllm_mapper", None)
        if not getattr(mapper, "orig_to_new_stacked", None):
            continue
        prefix = f"{path}." if path else ""
        for on_disk, part in zip(names, renamed, strict=True):
            if not part.startswith(prefix):
                continue
            # The outermost mapper is given names as they are in the files, inner ones renamed.
            own = part.removeprefix(prefix) if path else on_disk
            fused, shard = mapper._map_name_with_shard(own) or ("", None)
            if shard is not None:
                for one in shard if isinstance(shard, list) else [shard]:
                    found.setdefault(prefix + fused, []).append((part, one))
    return found
