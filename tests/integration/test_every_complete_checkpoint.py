# SPDX-License-Identifier: Apache-2.0
"""Complete checkpoints of every architecture raise no false alarm, and any gap in them is an error:
small ones that are loaded, and headers of full size.
"""

from __future__ import annotations

import gc
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.header_checkpoints import default_configs, saved_headers
from tests.support.model_loading import engine_args, init_distributed
from tests.support.tiny_checkpoints import (
    FACTORS,
    LOADED_INCOMPLETELY_BY_VLLM,
    shrunk,
    write_tiny,
)
from vllm.compressed_linear.checkpoint.completeness import Finding, Severity
from vllm.compressed_linear.checkpoint.headers import Headers
from vllm.compressed_linear.checkpoint.load_record import LoadRecord
from vllm.compressed_linear.checkpoint.shard import CheckpointError
from vllm.compressed_linear.commands.explain import meta_model
from vllm.compressed_linear.integration import completeness
from vllm.compressed_linear.integration.compat_loading import Loading
from vllm.compressed_linear.integration.completeness_from_headers import findings_from_headers
from vllm.compressed_linear.integration.config import NAME

ARCHITECTURES_AT_LEAST = 45
"""A run that could load fewer has something amiss."""
PARTS = 10
LOADED_AT_LEAST = 60
"""The same of small ones that are loaded, over all parts."""
ADDED_IF_FOUND = {"lm_head.bias"}
"""vLLM's head gets a bias when a file has one, so a model without one is complete too."""
GAPS = 6
"""Kinds of tensors of each architecture, of which one is left out at a time."""


@pytest.fixture
def no_cache_to_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's CPU worker does the same before it loads a model."""
    if not torch.accelerator.is_available():
        monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)


@contextmanager
def built(path: Path, quantization: str | None) -> Iterator[tuple[Any, torch.nn.Module, Any]]:
    config = meta_model.engine_config(
        str(path), dtype="bfloat16", tp_size=1, quantization=quantization
    )
    with meta_model.built_on_meta(config, 0, lambda copied: None) as (model, quant_config):
        yield config, model, quant_config


def stock_vllm_loads(path: Path, headers: Headers) -> bool:
    """Whether vLLM's own loader takes all of it and misses nothing, as far as it checks."""
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    tensors = [
        (name, torch.empty(header.shape, dtype=getattr(torch, header.dtype), device="meta"))
        for name, header in headers.items()
    ]
    # Tables of rotary embeddings are no meta tensors; the record copies nothing into them.
    with built(path, None) as (_, model, _quant_config), LoadRecord(()):
        loaded = model.load_weights(tensors)  # type: ignore[operator]
        if loaded is not None:
            DefaultModelLoader(LoadConfig()).track_weights_loading(model, loaded)
    return True


def one_of_each_kind(names: Iterable[str]) -> list[str]:
    return list({re.sub(r"\d+", "*", name): name for name in names}.values())


def problems(path: Path, headers: Headers, tried: Callable[[str], None]) -> Iterator[str]:
    with built(path, NAME) as (config, model, quant_config):
        unused: set[str] = set()
        for finding in findings_from_headers(model, config, quant_config, headers):
            unused |= set(finding.names)
            if finding.severity is Severity.ERROR:
                yield f"false alarm: {finding.message}"
        for name in one_of_each_kind(name for name in headers if name not in unused)[:GAPS]:
            gap = Headers({n: header for n, header in headers.items() if n != name})
            found = findings_from_headers(model, config, quant_config, gap)
            tried(name)
            if not any(finding.severity is Severity.ERROR for finding in found):
                yield f"no error without {name}"


@pytest.mark.slow
@pytest.mark.usefixtures("inspect_in_process", "torchvision")
def test_every_architecture_that_vllm_loads(tmp_path: Path) -> None:
    init_distributed()
    checked, gaps, failures, skipped = [], [], [], []
    for architecture, config in default_configs().items():
        (tmp_path / "config.json").write_text(json.dumps(config, default=str))
        try:
            headers = saved_headers(architecture, config)
            stock_vllm_loads(tmp_path, headers)
        except Exception as error:  # no such class, no defaults, or vLLM cannot load it here
            skipped.append(f"{architecture}: {type(error).__name__}")
            continue
        if architecture not in LOADED_INCOMPLETELY_BY_VLLM:
            checked.append(architecture)
            failures += [f"{architecture}: {p}" for p in problems(tmp_path, headers, gaps.append)]
        gc.collect()
    print(f"{len(checked)} checked, {len(gaps)} gaps, skipped: {', '.join(skipped)}")
    assert not failures, "\n".join(failures)
    assert len(checked) >= ARCHITECTURES_AT_LEAST


def load(path: Path, **options: Any) -> torch.nn.Module:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model

    config = engine_args(path, "bfloat16", skip_tokenizer_init=True, **options)
    with set_current_vllm_config(built := config.create_engine_config()):
        return get_model(vllm_config=built)


def smallest_that_vllm_loads(architecture: str, config: dict[str, Any], path: Path) -> None:
    """Write the smallest checkpoint that vLLM alone loads to ``path``; raise if there is none."""
    before = ""
    for factor in FACTORS:
        shutil.rmtree(path, ignore_errors=True)
        try:
            write_tiny(architecture, shrunk(config, factor), path)
            load(path)
        except Exception as error:
            if factor == FACTORS[-1] or (found := re.sub(r"\d+", "*", str(error))) == before:
                raise
            before = found
        else:
            return


def problems_of_loading(
    path: Path, monkeypatch: pytest.MonkeyPatch, tried: Callable[[str], None]
) -> Iterator[str]:
    """What is wrong with the load of the complete checkpoint at ``path``, and with those without
    one tensor of each kind."""
    unused: set[str] = set()
    own = completeness.findings_of

    def findings_of(
        loading: Loading, record: LoadRecord, *args: Any, **options: Any
    ) -> list[Finding]:
        found = own(loading, record, *args, **options)
        unused.update(name for finding in found for name in finding.names)
        unused.update(record.held.keys() - record.taken)  # what the class leaves out on purpose
        return found

    with monkeypatch.context() as context:
        context.setattr(completeness, "findings_of", findings_of)
        try:
            load(path, quantization=NAME)
        except Exception as error:
            yield f"false alarm: {type(error).__name__}: {error}"
            return
    tensors = {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}
    with built_for_loading(path) as (config, model):
        needed = (name for name in tensors if name not in unused | ADDED_IF_FOUND)
        for name in one_of_each_kind(needed):
            weights = [item for item in tensors.items() if item[0] != name]
            loading = Loading(
                model, config.model_config, config, partial(_load_into, model, weights)
            )
            tried(name)
            try:
                completeness.load_and_check(loading)
            except CheckpointError:
                continue
            yield f"no error without {name}"


def _load_into(model: Any, weights: list[tuple[str, torch.Tensor]]) -> None:
    model.load_weights(weights)


@contextmanager
def built_for_loading(path: Path) -> Iterator[tuple[Any, torch.nn.Module]]:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    args = engine_args(path, "bfloat16", skip_tokenizer_init=True, quantization=NAME)
    config = args.create_engine_config()
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        yield config, initialize_model(vllm_config=config)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.usefixtures("inspect_in_process", "torchvision", "no_cache_to_empty")
def test_a_small_checkpoint_of_every_architecture_loads(
    part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init_distributed()
    checked, gaps, failures, skipped = [], [], [], []
    for architecture, config in list(default_configs().items())[part::PARTS]:
        if architecture in LOADED_INCOMPLETELY_BY_VLLM:
            continue
        path = tmp_path / architecture
        try:
            smallest_that_vllm_loads(architecture, config, path)
        except Exception as error:  # no such class, no defaults, or vLLM cannot load it here
            skipped.append(f"{architecture} ({type(error).__name__})")
            continue
        finally:
            gc.collect()
        checked.append(architecture)
        found = problems_of_loading(path, monkeypatch, gaps.append)
        failures += [f"{architecture}: {problem}" for problem in found]
        shutil.rmtree(path)
        gc.collect()
    print(f"{len(checked)} loaded: {', '.join(checked)}; {len(gaps)} gaps")
    print(f"skipped: {', '.join(skipped)}")
    assert not failures, "\n".join(failures)
    assert len(checked) >= LOADED_AT_LEAST // PARTS
