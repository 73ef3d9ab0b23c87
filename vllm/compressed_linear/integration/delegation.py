# SPDX-License-Identifier: Apache-2.0
"""Delegation of layers to vLLM's own config of the format, recorded in the plan."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from vllm.compressed_linear.checkpoint.shard import CheckpointError
from vllm.compressed_linear.formats.base import Format
from vllm.compressed_linear.formats.resolution import ConfigError
from vllm.compressed_linear.integration import compat
from vllm.compressed_linear.prepare.plan import DELEGATED, Plan, PlanEntry


class RefusedByVllmError(RuntimeError):
    """vLLM's own code cannot run a layer that is left to it for ``reason``; the cause is its
    error."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def _explain_refusals(method: Any, refused: str, reason: str) -> None:
    """Let an error of vLLM's ``method`` after loading say of which layer it is: some of its methods
    find out only then that they have no kernel."""
    process = getattr(method, "process_weights_after_loading", None)
    if process is None:
        return

    def explained(*args: Any, **kwargs: Any) -> Any:
        try:
            return process(*args, **kwargs)
        except (ConfigError, CheckpointError, RefusedByVllmError):
            raise
        except Exception as error:
            raise RefusedByVllmError(f"{refused}: {error}", reason) from error

    method.process_weights_after_loading = explained


class Delegation:
    """vLLM's own config for one checkpoint, created for the first delegated layer."""

    def __init__(self, found: Format) -> None:
        self.vllm_name, self._config = found.delegated()
        self._misread = found.misread_by_vllm()
        self._vllm_config: QuantizationConfig | None = None
        self._mappers: list[Any] = []

    def add_mapper(self, mapper: Any) -> None:
        """Add a WeightsMapper that renames modules. Call it before any layer is built."""
        self._mappers.append(mapper)

    def create_quant_method(
        self,
        layer: torch.nn.Module,
        prefix: str,
        reason: str,
        packed_modules: dict[str, list[str]],
        plan: Plan,
    ) -> QuantizeMethodBase | None:
        """vLLM's method for ``layer``, recorded in ``plan`` with ``reason``; None if vLLM has none,
        or no config of this format.

        ``packed_modules`` is the model's ``packed_modules_mapping``. Raises ``ConfigError`` if
        vLLM refuses the checkpoint and ``RefusedByVllmError`` if it refuses the layer.
        """
        if self.vllm_name is None:
            return None
        if self._misread:
            raise ConfigError(
                f"{prefix}: {reason}, so it would be left to vLLM's {self.vllm_name}, which would "
                f"compute wrong numbers: {self._misread}"
            )
        config = self._own_config(prefix, reason)
        # By reference, because some models update the mapping while they are built.
        config.packed_modules_mapping = packed_modules
        refused = (
            f"{prefix}: {reason}, so it is left to vLLM's {self.vllm_name}, which cannot run it"
        )
        try:
            method = config.get_quant_method(layer, prefix)
        except Exception as error:
            raise RefusedByVllmError(f"{refused}: {error}", reason) from error
        if method is not None:
            _explain_refusals(method, refused, reason)
            if compat.holds_experts(layer):
                # Its loader asks it for its name, on which the form of the tensors depends.
                layer.quant_config = config
            plan.add(
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

    def _own_config(self, prefix: str, reason: str) -> QuantizationConfig:
        if self._vllm_config is None:
            try:
                self._vllm_config = compat.builtin_config(str(self.vllm_name), self._config)
            except Exception as error:
                raise ConfigError(
                    f"{prefix}: {reason}, so it is left to vLLM's {self.vllm_name}, which refuses "
                    f"this checkpoint: {error}"
                ) from error
            for mapper in self._mappers:
                self._vllm_config.apply_vllm_mapper(mapper)
        return self._vllm_config
