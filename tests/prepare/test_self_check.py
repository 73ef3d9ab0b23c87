# SPDX-License-Identifier: Apache-2.0
"""A backend that computes wrong numbers stops the load of a model."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from tests.support.checkpoints import checkpoint, entry_of
from tests.support.messages import saying
from tests.support.model_loading import loaded
from vllm.compressed_linear import settings
from vllm.compressed_linear.backends.reference import ReferenceBackend
from vllm.compressed_linear.backends.registry import register_backend
from vllm.compressed_linear.prepare.self_check import SelfCheckError

CHECKPOINTS = ["gptqmodel-gptq-w4-g32-asym-descact", "autoawq-awq-gemm-g128-asym"]


class _Wrong(ReferenceBackend):
    """``reference`` with one thing wrong in its result."""

    def spoil(self, out: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def apply(
        self,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.spoil(super().apply(tensors, x, bias))


class OnePercentOff(_Wrong):
    name = "one_percent_off"

    def spoil(self, out: torch.Tensor) -> torch.Tensor:
        return out * 1.01


class LastChannelMissing(_Wrong):
    name = "last_channel_missing"

    def spoil(self, out: torch.Tensor) -> torch.Tensor:
        out[..., -1] = 0
        return out


class IgnoresOrder(ReferenceBackend):
    """Forgets that channels were reordered."""

    name = "ignores_order"

    def apply(
        self,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        kept = {name: t for name, t in tensors.items() if name != "order"}
        return super().apply(kept, x, bias)


class GivesNan(_Wrong):
    name = "gives_nan"

    def spoil(self, out: torch.Tensor) -> torch.Tensor:
        return torch.full_like(out, float("nan"))


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize("wrong", [OnePercentOff, LastChannelMissing, IgnoresOrder, GivesNan])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_backend_that_computes_wrong_numbers_stops_the_load(
    name: str, wrong: type[ReferenceBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    if wrong is IgnoresOrder and not entry_of(name).act_order:
        pytest.skip("nothing is reordered in this checkpoint")
    register_backend(wrong)
    monkeypatch.setenv(settings.BACKEND, wrong.name)
    message = saying("model.layers.0", f"backend {wrong.name}", "wrong", "uint4")
    with pytest.raises(SelfCheckError, match=message), loaded(checkpoint(name)):
        pass
