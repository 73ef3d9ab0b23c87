# SPDX-License-Identifier: Apache-2.0
"""Whole models through the prepared-weights cache, as vLLM loads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import checkpoint, checkpoint_reference
from tests.support.model_loading import loaded, logits
from tests.support.reloading import reload, worst_error
from tests.support.synthetic import Model, Quant, write
from vllm.compressed_linear import settings
from vllm.compressed_linear.integration import preparation
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN
from vllm.compressed_linear.machine import native
from vllm.compressed_linear.prepare.cache.inventory import read_cache


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(settings.CACHE, str(tmp_path / "cache"))
    preparation._opened_cache.cache_clear()
    return tmp_path / "cache"


def packing_calls() -> int:
    return sum(n for name, n in native.call_counts().items() if "pack" in name.split("/")[0])


def cached() -> set[str]:
    return {entry.cache for entry in PROCESS_PLAN.entries.values()}


@pytest.mark.parametrize(
    "name",
    [
        "gptqmodel-gptq-w4-g128-sym-descact",
        "llmcompressor-w3a16-asym-g64",
        "autoawq-awq-gemm-g64-asym-skip-v",
        "gptqmodel-gptq-w4-g64-sym-lmhead",
    ],
)
def test_the_second_load_of_a_model_prepares_nothing(name: str, directory: Path) -> None:
    reference = checkpoint_reference(name)
    native.reset_call_counts()
    with loaded(checkpoint(name)) as model:
        assert cached() == {"miss"}
        assert packing_calls() > 0
        first = logits(model, reference["input_ids"])
        assert PROCESS_PLAN.summary().endswith(", 0 from the cache")
    native.reset_call_counts()
    with loaded(checkpoint(name)) as model:
        assert cached() == {"hit"}
        assert packing_calls() == 0
        assert torch.equal(logits(model, reference["input_ids"]), first)
        assert PROCESS_PLAN.summary().endswith(f", {len(PROCESS_PLAN.entries)} from the cache")
    found = read_cache(directory)
    assert {entry.entry.label.model for entry in found if entry.entry} == {str(checkpoint(name))}
    assert not any(entry.foreign for entry in found)


def test_dtypes_do_not_share_entries(directory: Path) -> None:
    """What a kernel gets depends on the activations, and what is prepared may."""
    name = "llmcompressor-w4a16-sym-g128"
    for dtype in ("float32", "bfloat16"):
        with loaded(checkpoint(name), dtype):
            assert cached() == {"miss"}


def test_weights_that_are_made_up_are_never_kept(directory: Path) -> None:
    with loaded(checkpoint("llmcompressor-w4a16-sym-g128"), load_format="dummy"):
        assert cached() == {""}
    assert not directory.exists()


def test_a_reload_into_mapped_weights(directory: Path, tmp_path: Path) -> None:
    """vLLM writes new weights into the tensors of the old; the files must not change."""
    models = [Model(Quant("gptq", symmetric=False), seed=seed) for seed in (0, 1)]
    first, second = (write(m, tmp_path / str(m.seed)) for m in models)
    for expected in ("miss", "hit"):
        with loaded(tmp_path / "0", skip_tokenizer_init=True) as model:
            assert cached() == {expected}
            assert worst_error(logits(model, first["input_ids"]), first) <= 1e-4
            files = {entry.path: entry.path.read_bytes() for entry in read_cache(directory)}
            reload(model, tmp_path / "1")
            assert worst_error(logits(model, second["input_ids"]), second) <= 1e-4
            assert {e.path: e.path.read_bytes() for e in read_cache(directory)} == files


def test_no_cache_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(settings.CACHE, raising=False)
    with loaded(checkpoint("llmcompressor-w4a16-sym-g128")):
        assert cached() == {""}
        assert PROCESS_PLAN.summary().endswith(" s")
