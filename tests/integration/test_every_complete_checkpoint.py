# SPDX-License-Identifier: Apache-2.0
"""Complete checkpoints of every architecture raise no false alarm, and any gap in them is an error.

Headers of full size stand for the files, so nothing is read; ``test_completeness`` loads weights.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.header_checkpoints import default_configs, saved_headers
from tests.support.model_loading import init_distributed
from vllm.compressed_linear.checkpoint.completeness import Severity
from vllm.compressed_linear.checkpoint.headers import Headers
from vllm.compressed_linear.commands.explain import meta_model
from vllm.compressed_linear.integration.completeness_from_headers import findings_from_headers
from vllm.compressed_linear.integration.config import NAME

ARCHITECTURES_AT_LEAST = 45
"""A run that could load fewer has something amiss."""
GAPS = 6
"""Kinds of tensors of each architecture, of which one is left out at a time."""
LOADED_INCOMPLETELY_BY_VLLM = {"LagunaForCausalLM"}
"""vLLM 0.32 looks for ``e_score_correction_bias`` of its router under another name than that of the
files, and leaves it at zero."""


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
    with built(path, None) as (_, model, _quant_config):
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
