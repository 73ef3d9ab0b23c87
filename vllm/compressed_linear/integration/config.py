# SPDX-License-Identifier: Apache-2.0
"""The base quantization config: from a checkpoint's configuration to a method for each layer.

vLLM knows one quantization name, ``compressed_linear``. ``from_config`` picks the format by
``quant_method``; formats say what each module is (``resolve``), and everything else happens here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from vllm.compressed_linear.checkpoint.headers import (
    Headers,
    headers_of,
    last_word,
    read_headers,
    shard_names,
)
from vllm.compressed_linear.formats.resolution import Delegated, LayerKind, Resolution, Unquantized
from vllm.compressed_linear.integration import compat
from vllm.compressed_linear.integration.embedding import (
    CompressedEmbeddingMethod,
    CompressedUnquantizedEmbeddingMethod,
)
from vllm.compressed_linear.integration.linear import (
    CompressedLinearMethod,
    CompressedUnquantizedLinearMethod,
)
from vllm.compressed_linear.prepare.plan import DELEGATED, PLAN, PlanEntry
from vllm.compressed_linear.settings import Settings
from vllm.compressed_linear.spec.scheme import CheckpointScheme

NAME = "compressed_linear"

EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")
"""What a format is asked about where no file tells whether a layer's experts are quantized."""

logger = compat.logger(__name__)


class ConfigError(ValueError):
    """A checkpoint's quantization configuration is incomplete, unknown or contradictory."""


class RefusedByVllmError(RuntimeError):
    """A layer that is left to vLLM's own code, which does not run it here."""


_FORMATS: dict[str, type[CompressedLinearConfig]] = {}

C = TypeVar("C", bound="type[CompressedLinearConfig]")


def register_format(*quant_methods: str) -> Callable[[C], C]:
    """Class decorator: this config reads checkpoints whose ``quant_method`` is one of these."""

    def add(cls: C) -> C:
        for quant_method in quant_methods:
            known = _FORMATS.get(quant_method)
            if known is not None and known.__qualname__ != cls.__qualname__:
                raise ValueError(f"quant_method {quant_method!r} is taken by {known.__qualname__}")
            _FORMATS[quant_method] = cls
        return cls

    return add


def formats() -> dict[str, type[CompressedLinearConfig]]:
    """quant_method → config class of every format."""
    from vllm.compressed_linear import formats as own

    own.register_all()
    return dict(_FORMATS)


def format_of(config: dict[str, Any]) -> type[CompressedLinearConfig] | None:
    """The format that reads ``config`` and supports at least a part of it, or None."""
    found = formats().get(quant_method_of(config))
    return found if found is not None and found.unsupported(config) is None else None


def quant_method_of(config: dict[str, Any]) -> str:
    """``quant_method`` in lower case, as some tools wrote it in upper case."""
    return str(config.get("quant_method") or "").lower()


class CompressedLinearConfig(QuantizationConfig):
    """What all formats share. Subclasses implement ``parse`` and ``resolve``."""

    aliases: ClassVar[tuple[str, ...]] = ()
    """Values of ``--quantization`` that mean this format."""
    vllm_name: str | None = None
    """vLLM's own name for it, for layers that are delegated."""
    codes_tensors: tuple[str, ...] = ()
    """Last parts of the names of tensors that only a quantized module has."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.config = dict(config or {})
        self.headers: Headers | None = None
        self.disk_names: dict[str, str] = {}
        self._settings: Settings | None = None
        self._delegate: QuantizationConfig | None = None
        self._mappers: list[Any] = []
        self._reorders_rows: compat.RowReordering | None = None

    @property
    def settings(self) -> Settings:
        """Read when the first layer is built, where vLLM's config can be asked."""
        if self._settings is None:
            self._settings = Settings.read(compat.additional_config())
        return self._settings

    # What formats implement.

    @classmethod
    def parse(cls, config: dict[str, Any]) -> CompressedLinearConfig:
        """Read the configuration. Raises ``ConfigError`` naming the field."""
        raise NotImplementedError

    @classmethod
    def unsupported(cls, config: dict[str, Any]) -> str | None:
        """Why none of this checkpoint is for us (then vLLM's own code gets it), or None."""
        return None

    def resolve(self, module: str, kind: LayerKind) -> Resolution:
        """What the checkpoint holds for ``module``, a name without fused layers."""
        raise NotImplementedError

    def map_names(self, rename: Any) -> None:
        """Rename modules in lists of names from the checkpoint's to vLLM's (a WeightsMapper)."""

    def has_attention_scales(self) -> bool:
        """Whether the checkpoint quantizes the KV cache, which vLLM's own config sees to."""
        return False

    @property
    def kv_cache_scheme(self) -> dict[str, Any] | None:
        """vLLM's attention layers ask for it, to quantize the cache as the checkpoint says."""
        return self.config.get("kv_cache_scheme") if self.has_attention_scales() else None

    def create_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The legacy path: a ready method for a layer, or None for the ordinary way."""
        return None

    # Help for formats.

    def require(self, key: str, kind: type, *aliases: str) -> Any:
        """``config[key]`` (or an alias) as ``kind``. ``ConfigError`` when absent or no number."""
        for name in (key, *aliases):
            if name in self.config and self.config[name] is not None:
                try:
                    return kind(self.config[name])
                except (TypeError, ValueError):
                    raise ConfigError(
                        f"quantization_config.{name} is {self.config[name]!r}, "
                        f"expected {kind.__name__}"
                    ) from None
        raise ConfigError(f"quantization_config has no {key} (keys: {', '.join(self.config)})")

    def names_of(self, module: str) -> tuple[str, ...]:
        """vLLM's name of ``module`` and, where a model renames its weights, the checkpoint's.

        Regular expressions of a configuration were written for the latter.
        """
        other = self.disk_names.get(module, module)
        return (module,) if other == module else (module, other)

    def tensors_on_disk(self, module: str) -> set[str] | None:
        """Last parts of the names of the module's tensors; None when the file does not say."""
        return None if self.headers is None else self.headers.modules.get(module)

    def quantized_on_disk(self, module: str) -> bool:
        """Whether the file is known to hold codes for ``module``."""
        return bool((self.tensors_on_disk(module) or set()) & set(self.codes_tensors))

    def unquantized_on_disk(self, module: str) -> Unquantized | None:
        """``Unquantized`` when the file has a float ``weight`` for ``module`` and no codes, or has
        its name under other parents only (models rename while they load), never with codes."""
        if self.headers is None:
            return None
        found = self.tensors_on_disk(module)
        if found is None:
            name = last_word(module)
            alike = [m for m in self.headers.modules if last_word(m) == name]
            if alike and not any(self.quantized_on_disk(m) for m in alike):
                return Unquantized(f"no {name} of the checkpoint is quantized")
            return None
        if "weight" not in found or self.quantized_on_disk(module):
            return None
        if self.headers[f"{module}.weight"].dtype not in ("bfloat16", "float16", "float32"):
            return None
        return Unquantized(f"the checkpoint holds a plain {module}.weight")

    def check_against_file(self, layer: str, module: str, resolution: Resolution) -> None:
        """``ConfigError`` where the configuration and the tensors the file has contradict."""
        found = self.tensors_on_disk(module)
        if found is None or self.headers is None:
            return
        if isinstance(resolution, Unquantized):
            codes = sorted(found & set(self.codes_tensors))
            if codes:
                tensor = f"{module}.{codes[0]}"
                raise ConfigError(
                    f"{layer}: the configuration leaves {module} unquantized "
                    f"({resolution.reason}), but {self.headers[tensor].file} holds {tensor}"
                )
        elif isinstance(resolution, CheckpointScheme):
            needed = [t.name for t in resolution.tensors if not t.optional]
            missing = [name for name in needed if name not in found]
            if missing:
                file = self.headers[f"{module}.{min(found)}"].file
                raise ConfigError(
                    f"{layer}: tensor {module}.{missing[0]} is not in the checkpoint; {resolution} "
                    f"needs {', '.join(needed)}, but {file} holds {', '.join(sorted(found))}"
                )

    # vLLM's interface.

    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CompressedLinearConfig:
        """The format's config object. Raises ``ConfigError``."""
        quant_method = quant_method_of(config)
        found = formats().get(quant_method)
        if found is None:
            known = ", ".join(sorted(name for name in formats() if name))
            raise ConfigError(f"quant_method {quant_method!r} is not known (known: {known})")
        return found.parse(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim what our formats support, whichever of its names the user passed.

        On anything but a CPU the user has to ask for it by ``--quantization compressed_linear``:
        what runs there has never run on hardware (docs/gpu.md).
        """
        found = format_of(hf_quant_cfg)
        if found is None:
            return None
        if user_quant == NAME:
            return NAME
        if compat.current_device() != "cpu":
            return None
        return NAME if user_quant in (None, *found.aliases) else None

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Read the headers of a local checkpoint, or of one on the hub: the file knows what it
        holds."""
        self.headers = read_headers(model_name)
        if self.headers is None and (listed := compat.hub_tensors(model_name, revision)):
            self.headers = headers_of(listed, model_name)
        self._reorders_rows = compat.row_reordering(hf_config)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self._mappers.append(hf_to_vllm_mapper)
        self.map_names(hf_to_vllm_mapper)
        if self.headers is not None:
            names = {name: hf_to_vllm_mapper.map_name(name) for name in self.headers}
            self.headers = self.headers.renamed({k: v for k, v in names.items() if v})
            modules = {
                name.rpartition(".")[0]: mapped.rpartition(".")[0]
                for name, mapped in names.items()
                if mapped
            }
            self.disk_names |= {
                after: self.disk_names.get(before, before)
                for before, after in modules.items()
                if before != after
            }

    def get_checkpoint_weight_mapper(self) -> Any:
        """vLLM's base class drops ``g_idx``; only layers that are delegated must not get one."""
        import regex
        from vllm.model_executor.models.utils import WeightsMapper

        return WeightsMapper(orig_to_new_regex={regex.compile(r"\.experts\..*\.g_idx$"): None})

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        prefix = prefix.strip(".")  # some models prepend the dot of an empty prefix
        ready = self.create_quant_method(layer, prefix)
        if ready is not None:
            return ready
        if isinstance(layer, ParallelLMHead):
            kind = LayerKind.HEAD
        elif isinstance(layer, VocabParallelEmbedding):
            kind = LayerKind.EMBEDDING
        elif isinstance(layer, LinearBase):
            kind = LayerKind.LINEAR
        elif self._is_vllms_own(layer, prefix):
            return None
        else:
            return self.delegate(layer, prefix, f"{type(layer).__name__} is not a linear layer")
        if kind is LayerKind.EMBEDDING and not prefix:
            prefix = self._only_table_on_disk()
        names = shard_names(prefix, self.packed_modules_mapping)
        resolved = [(name, self.resolve(name, kind)) for name in names]
        if kind is LayerKind.HEAD and not self._has_head_on_disk(prefix):
            resolved = [(name, Unquantized("tied to the embedding table")) for name in names]
        for name, resolution in resolved:
            self.check_against_file(prefix, name, resolution)
            self._check_row_order(prefix, name, resolution)
        handed_over = [r.reason for _, r in resolved if isinstance(r, Delegated)]
        if handed_over:
            return self.delegate(layer, prefix, "; ".join(dict.fromkeys(handed_over)))
        if not compat.knows_how_to_load(layer):
            if all(isinstance(r, Unquantized) for _, r in resolved):
                return self._vllm_unquantized(kind)
            reason = f"{type(layer).__name__} loads its weights in its own way"
            return self.delegate(layer, prefix, reason)
        schemes = [(n, r) for n, r in resolved if not isinstance(r, Delegated)]
        if any(isinstance(r, CheckpointScheme) for _, r in schemes):
            method = (
                CompressedEmbeddingMethod if kind is LayerKind.EMBEDDING else CompressedLinearMethod
            )
            return method(prefix, kind, schemes, self.settings)
        if kind is not LayerKind.LINEAR:
            return CompressedUnquantizedEmbeddingMethod(prefix, self.settings)
        return CompressedUnquantizedLinearMethod(prefix, self.settings)

    def _check_row_order(self, layer: str, module: str, resolution: Resolution) -> None:
        """``ConfigError`` where vLLM's model reorders some tensors of a weight and not others."""
        reorders = self._reorders_rows
        if (
            reorders is None
            or not isinstance(resolution, CheckpointScheme)
            or last_word(module) not in reorders.modules
        ):
            return
        with_rows = [t.name for t in resolution.tensors if "N" in t.axes]
        missed = [name for name in with_rows if name not in reorders.tensors]
        if missed:
            raise ConfigError(
                f"{layer}: vLLM's {reorders.model} model reorders the rows of {module} while it "
                f"loads them, but not those of {', '.join(missed)}, so {resolution} would compute "
                f"wrong numbers (only {', '.join(reorders.tensors)} are reordered)"
            )

    def _is_vllms_own(self, layer: torch.nn.Module, prefix: str) -> bool:
        """Whether vLLM runs this layer, which is no linear one, without any quantization."""
        if isinstance(layer, AttentionLayerBase):
            return not self.has_attention_scales()
        return compat.holds_experts(layer) and self._experts_unquantized(prefix)

    def _only_table_on_disk(self) -> str:
        """What the file calls its embedding table, for models that give theirs no name; empty when
        there are several or the file is not known."""
        modules = () if self.headers is None else self.headers.modules
        tables = [m for m in modules if re.search(r"emb|wte", last_word(m))]
        quantized = [m for m in tables if self.quantized_on_disk(m)]
        found = quantized or tables
        return found[0] if len(found) == 1 else ""

    def _has_head_on_disk(self, prefix: str) -> bool:
        """Whether the file has a head of its own, under whichever parent, or is not known."""
        last = prefix.rpartition(".")[2]
        modules = () if self.headers is None else self.headers.modules
        return not modules or any(m.rpartition(".")[2] == last for m in modules)

    def _experts_unquantized(self, prefix: str) -> bool:
        """Whether the checkpoint leaves the experts of the layer ``prefix`` as they are."""
        if self.headers is not None:
            for parent in (prefix, prefix.rpartition(".")[0]):  # some fuse them beside the layer
                inside = [m for m in self.headers.modules if f"{m}.".startswith(f"{parent}.")]
                if inside and not any(self.quantized_on_disk(module) for module in inside):
                    return True
                if inside and parent == prefix:
                    return False
        names = [f"{prefix}.0.{part}" for part in EXPERT_PARTS]
        return all(isinstance(self.resolve(n, LayerKind.LINEAR), Unquantized) for n in names)

    def _vllm_unquantized(self, kind: LayerKind) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        return UnquantizedLinearMethod() if kind is LayerKind.LINEAR else None

    def delegate(
        self, layer: torch.nn.Module, prefix: str, reason: str
    ) -> QuantizeMethodBase | None:
        """vLLM's own method for ``layer``, noted in the plan when there is one."""
        if self.vllm_name is None:
            return None
        if self._delegate is None:
            try:
                self._delegate = compat.builtin_config(self.vllm_name, self.config)
            except Exception as error:
                raise ConfigError(
                    f"{prefix}: {reason}, so it is left to vLLM's {self.vllm_name}, which refuses "
                    f"this checkpoint: {error}"
                ) from error
            for mapper in self._mappers:
                self._delegate.apply_vllm_mapper(mapper)
        # By reference: some models update the mapping while they are built.
        self._delegate.packed_modules_mapping = self.packed_modules_mapping
        try:
            method = self._delegate.get_quant_method(layer, prefix)
        except Exception as error:
            raise RefusedByVllmError(
                f"{prefix}: {reason}, so it is left to vLLM's {self.vllm_name}, which cannot run "
                f"it: {error}"
            ) from error
        if method is not None:
            PLAN.add(
                PlanEntry(
                    name=prefix,
                    kind=type(layer).__name__,
                    backend=DELEGATED,
                    variant=type(method).__name__,
                    descriptor=f"delegated to vLLM: {reason}",
                    bytes_checkpoint=0,
                    bytes_prepared=0,
                    prepare_seconds=0.0,
                    note=reason,
                )
            )
        return method
