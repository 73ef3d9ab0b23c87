# SPDX-License-Identifier: Apache-2.0
"""The quantization config of vLLM, which creates the method of each layer.

vLLM knows one quantization name, ``compressed_linear``. The config has a format, which describes
each module, and a view of the checkpoint's files, which has precedence over the format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from vllm.compressed_linear.checkpoint.headers import (
    headers_of,
    last_word,
    read_headers,
    shard_names,
)
from vllm.compressed_linear.checkpoint.superseded import Superseded
from vllm.compressed_linear.formats.base import Format
from vllm.compressed_linear.formats.entries import Rename
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.registry import format_of, parse, parse_in
from vllm.compressed_linear.formats.resolution import (
    ConfigError,
    Delegated,
    LayerKind,
    Resolution,
    Unquantized,
)
from vllm.compressed_linear.integration import compat, compat_models
from vllm.compressed_linear.integration.delegation import Delegation
from vllm.compressed_linear.integration.drafter import Drafter, drafter_being_built
from vllm.compressed_linear.integration.embedding import (
    CompressedEmbeddingMethod,
    CompressedUnquantizedEmbeddingMethod,
)
from vllm.compressed_linear.integration.latent_attention import take_exact_weights
from vllm.compressed_linear.integration.linear import (
    CompressedLinearMethod,
    CompressedUnquantizedLinearMethod,
)
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN, ModelPreparation
from vllm.compressed_linear.integration.reload import guard_reloads
from vllm.compressed_linear.integration.sharding import Member
from vllm.compressed_linear.integration.whole_model import watch_models
from vllm.compressed_linear.prepare.plan import Plan
from vllm.compressed_linear.settings import Settings
from vllm.compressed_linear.spec.scheme import CheckpointScheme

NAME = "compressed_linear"

EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")
"""Members by which a format is asked about experts if the file does not tell."""


class CompressedLinearConfig(QuantizationConfig):
    """One checkpoint for vLLM: its ``format``, its ``file`` and the methods of its layers.

    vLLM constructs it without a format for a model without ``quantization_config``, and pickles it
    for the engine's process.
    """

    packed_modules_mapping: dict[str, list[str]]

    _ignore_unexpected_suffixes = ("",)
    """vLLM's loader does not stop at tensors that have no place in the model, whatever they are
    called: what is left over on either side is reported once all is loaded (``completeness``)."""

    def __init__(self, found: Format | None = None) -> None:
        super().__init__()
        self.plan: Plan | None = None
        """Plan in which choices are recorded; None for the plan of the process, which is not
        pickled with a config."""
        self._settings: Settings | None = None
        self._reorders_rows: compat.RowReordering | None = None
        self._cut_by_model: tuple[str, ...] = ()
        self._asked: dict[str, LayerKind | None] = {}
        self._checkpoint = ""
        self._renames: list[Rename] = []
        self._of_drafters: dict[str, Any] = {}
        self._use(parse({}) if found is None else found, FileView())

    def _use(self, found: Format, file: FileView) -> None:
        self.format = found
        self.file = FileView(file.headers, found.marker_tensors, file.disk_names)
        self.delegation = Delegation(found)

    @property
    def settings(self) -> Settings:
        """Settings, read when the first layer is built, since vLLM's config is available then."""
        if self._settings is None:
            self._settings = Settings.read(compat.additional_config())
        return self._settings

    @property
    def model(self) -> ModelPreparation:
        """State that the methods of all layers share."""
        return ModelPreparation(self.settings, self._plan)

    @property
    def _plan(self) -> Plan:
        plan = PROCESS_PLAN if self.plan is None else self.plan
        drafter = drafter_being_built()
        return plan if drafter is None else plan.drafter(drafter.model)

    @property
    def kv_cache_scheme(self) -> dict[str, Any] | None:
        """Read by vLLM's attention layers, to quantize the cache as the checkpoint says."""
        return self.format.kv_cache_scheme()

    def resolve(self, module: str, kind: LayerKind) -> Resolution:
        """Describe what the checkpoint holds for ``module`` (a member, if the layer is fused)."""
        self._asked[module] = kind
        return self.format.resolve(module, kind, self.file)

    def unmatched_entries(self) -> list[tuple[str, str]]:
        """(field, entry) of the configuration's entries that have selected neither a module of the
        files nor one of vLLM's so far."""
        return self.format.unmatched_entries(self.file, self._asked)

    def superseded(self, checkpoint: str = "") -> Superseded:
        """Tensors of the files that must not be loaded; call it when all layers are built.
        ``checkpoint``: another one, whose weights are about to replace those of this one."""
        file = self.file
        if checkpoint not in ("", self._checkpoint):
            headers = read_headers(checkpoint)
            headers = headers and self.format.restated_headers(headers)
            file = FileView(headers, file.marker_tensors, packed=file.packed)
            for rename in self._renames:
                file = file.renamed(rename)
        headers = file.headers
        if headers is None:
            return Superseded()
        plain = set()
        for module, kind in self._asked.items():
            found = headers.modules.get(module, set())
            if kind is None or "weight" not in found or not file.quantized_on_disk(module):
                continue
            scheme = self.format.resolve(module, kind, file)
            if isinstance(scheme, CheckpointScheme) and all(
                tensor.name != "weight" for tensor in scheme.tensors
            ):
                plain.add(f"{file.names_of(module)[-1]}.weight")
        return Superseded(headers.copies, frozenset(plain))

    def describes_model_being_built(self) -> bool:
        """Whether this is the config of the checkpoint that vLLM loads now: a drafter may have one
        of its own."""
        drafter = drafter_being_built()
        return drafter is None or self._checkpoint in ("", drafter.model)

    def name_table(self) -> None:
        """Give a drafter's table, which may be built without asking this config, vLLM's name."""
        drafter = drafter_being_built()
        if drafter is not None and not drafter.is_draft_model:
            self.file = drafter.named(self.file, "model", ["embed_tokens"], self._asked)

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
        """The config of a ``quantization_config``. Raises ``ConfigError``."""
        return cls(parse(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim checkpoints that our formats support, under any of their names.

        Except on CPUs, only if the user passes ``--quantization compressed_linear``: GPU support is
        untested on hardware (docs/gpu.md).
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
        """Read the headers of a checkpoint, local or on the hub, and the separate configuration
        file of tools that write one."""
        self._checkpoint = model_name
        headers = read_headers(model_name)
        if headers is None and (listed := compat.hub_tensors(model_name, revision)):
            headers = headers_of(listed, model_name)
        found = parse_in(model_name, self.format.config)
        self._use(found, FileView(headers and found.restated_headers(headers)))
        self._reorders_rows = compat.row_reordering(hf_config, self.file.modules)
        self._cut_by_model = compat.cut_by_model(hf_config)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.delegation.add_mapper(hf_to_vllm_mapper)
        self._renames.append(hf_to_vllm_mapper.map_name)
        self.format = self.format.renamed(hf_to_vllm_mapper.map_name)
        self.file = self.file.renamed(hf_to_vllm_mapper.map_name)

    def get_checkpoint_weight_mapper(self) -> Any:
        """Keep ``g_idx``, which vLLM's base class drops, except for delegated layers."""
        import regex
        from vllm.model_executor.models.utils import WeightsMapper

        return WeightsMapper(orig_to_new_regex={regex.compile(r"\.experts\..*\.g_idx$"): None})

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        self._announce()
        prefix = prefix.strip(".")  # some models prepend the dot of an empty prefix
        drafter = drafter_being_built()
        if drafter is not None and not self.describes_model_being_built():
            return self._method_of_drafter(drafter, layer, prefix)
        if isinstance(layer, ParallelLMHead):
            kind = LayerKind.HEAD
        elif isinstance(layer, VocabParallelEmbedding):
            kind = LayerKind.EMBEDDING
        elif isinstance(layer, LinearBase):
            kind = LayerKind.LINEAR
        elif self._is_vllms_own(layer, prefix):
            return None
        else:
            return self._delegate(layer, prefix, f"{type(layer).__name__} is not a linear layer")
        if kind is LayerKind.EMBEDDING and not prefix:
            prefix = self.file.only_table()
        if drafter is not None and not drafter.is_draft_model:
            if kind is not LayerKind.LINEAR and not self.file.may_have(prefix):
                return None  # it takes its target's
            if not self.packed_modules_mapping:
                self.packed_modules_mapping = drafter.packed_modules(self.file)
        if self.file.packed is not self.packed_modules_mapping:
            # By reference: some models update their mapping while they are built.
            self.file = replace(self.file, packed=self.packed_modules_mapping)
        if last_word(prefix) in self._cut_by_model and self.file.quantized_on_disk(prefix):
            return self._delegate(layer, prefix, "the model's class cuts its fused weight itself")
        names = shard_names(prefix, self.packed_modules_mapping)
        if drafter is not None:
            members = [name.rpartition(".")[2] for name in names]
            parent = prefix.rpartition(".")[0]
            self.file = drafter.named(self.file, parent, members, self._asked)
        resolved = [(name, self.resolve(name, kind)) for name in names]
        if kind is LayerKind.HEAD and not self.file.may_have(prefix):
            resolved = [(name, Unquantized("tied to the embedding table")) for name in names]
        for name, resolution in resolved:
            self.file.check_against_file(prefix, name, resolution)
            self._check_row_order(prefix, name, resolution)
        handed_over = [r.reason for _, r in resolved if isinstance(r, Delegated)]
        if handed_over:
            return self._delegate(layer, prefix, "; ".join(dict.fromkeys(handed_over)))
        if not compat.knows_how_to_load(layer):
            if all(isinstance(r, Unquantized) for _, r in resolved):
                return self._vllm_unquantized(kind)
            reason = f"{type(layer).__name__} has its own weight loader"
            return self._delegate(layer, prefix, reason)
        fused = [
            Member(
                name,
                resolution,
                self.file.rows(name, resolution),
                self.file.dtypes(name, resolution),
            )
            for name, resolution in resolved
            if not isinstance(resolution, Delegated)
        ]
        self._check_load_format(prefix, [member.resolution for member in fused])
        if any(isinstance(member.resolution, CheckpointScheme) for member in fused):
            method = (
                CompressedEmbeddingMethod if kind is LayerKind.EMBEDDING else CompressedLinearMethod
            )
            return method(prefix, kind, fused, self.model)
        if kind is not LayerKind.LINEAR:
            return CompressedUnquantizedEmbeddingMethod(prefix, self.model)
        return CompressedUnquantizedLinearMethod(prefix, self.model)

    def _method_of_drafter(
        self, drafter: Drafter, layer: torch.nn.Module, prefix: str
    ) -> QuantizeMethodBase | None:
        """vLLM asks the target's config for a layer of a drafter that has a checkpoint of its own:
        what that checkpoint's config says."""
        if drafter.model not in self._of_drafters:
            self._of_drafters[drafter.model] = drafter.own_config()
        own = self._of_drafters[drafter.model]
        if own is None:
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        own.packed_modules_mapping = dict(self.packed_modules_mapping)
        method: QuantizeMethodBase | None = own.get_quant_method(layer, prefix)
        return method

    def _announce(self) -> None:
        """A model of this config is being built in this process."""
        if self.plan is None:
            watch_models()
            compat_models.complete_zero_biases()
            take_exact_weights()
            guard_reloads()
            self._plan.open(self.settings.plan_file)

    def _delegate(
        self, layer: torch.nn.Module, prefix: str, reason: str
    ) -> QuantizeMethodBase | None:
        self._asked.setdefault(prefix, None)
        return self.delegation.create_quant_method(
            layer, prefix, reason, self.packed_modules_mapping, self._plan
        )

    def _check_load_format(self, layer: str, resolutions: Sequence[Resolution]) -> None:
        """Raise ``ConfigError`` if the loader does not give our layers the checkpoint's tensors."""
        form = compat.load_format()
        if form in compat.UNPROCESSED_FORMATS:
            raise ConfigError(
                f"{layer}: --load-format {form} does not prepare weights after loading, which "
                "compressed_linear has to; load the checkpoint's safetensors files, or set "
                "VLLM_COMPRESSED_LINEAR=0"
            )
        if form in compat.RESTORING_FORMATS and any(
            isinstance(resolution, CheckpointScheme) for resolution in resolutions
        ):
            raise ConfigError(
                f"{layer}: --load-format {form} restores weights in the form of the kernels that "
                "saved them, which compressed_linear cannot read; load the original checkpoint"
            )

    def _check_row_order(self, layer: str, module: str, resolution: Resolution) -> None:
        """Raise ``ConfigError`` if vLLM's model reorders some, but not all tensors of a weight."""
        reorders = self._reorders_rows
        if (
            reorders is None
            or not isinstance(resolution, CheckpointScheme)
            or last_word(module) not in reorders.modules
        ):
            return
        missed = [tensor.name for tensor in resolution.tensors if reorders.misses(tensor)]
        if missed:
            does = ", ".join(reorders.tensors or ("tensors with a row for each output channel",))
            raise ConfigError(
                f"{layer}: vLLM's {reorders.model} model reorders the rows of {module} while it "
                f"loads them, but not those of {', '.join(missed)}, so {resolution} would compute "
                f"wrong numbers (only {does} are reordered)"
            )

    def _is_vllms_own(self, layer: torch.nn.Module, prefix: str) -> bool:
        """Whether vLLM leaves this non-linear layer unquantized."""
        if isinstance(layer, AttentionLayerBase):
            return not self.format.has_attention_scales(self.file)
        return compat.holds_experts(layer) and not self._experts_quantized(prefix)

    def _experts_quantized(self, prefix: str) -> bool:
        """Whether the checkpoint quantizes the experts of the layer ``prefix``."""
        found = self.file.experts_quantized(prefix)
        if found is not None:
            return found
        names = [f"{prefix}.0.{part}" for part in EXPERT_PARTS]
        resolved = [self.resolve(name, LayerKind.LINEAR) for name in names]
        return not all(isinstance(resolution, Unquantized) for resolution in resolved)

    def _vllm_unquantized(self, kind: LayerKind) -> QuantizeMethodBase | None:
        return UnquantizedLinearMethod() if kind is LayerKind.LINEAR else None
