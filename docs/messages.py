# SPDX-License-Identifier: Apache-2.0
"""Provoke the errors that ``troubleshooting.md`` quotes, each by its real cause."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
GPTQ = "gptqmodel-gptq-w4-g128-sym-descact"
Q_PROJ = "model.layers.0.self_attn.q_proj"

Change = Callable[[dict[str, Any]], object]


def message(name: str) -> str:
    """The text of the error called ``name``."""
    return ERRORS[name]()


@contextmanager
def changed(
    fixture: str, config: Change | None = None, tensors: Change | None = None
) -> Iterator[Path]:
    """A copy of a fixture whose configuration or tensors were changed in place."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "MODEL"
        shutil.copytree(
            ROOT / "tests" / "fixtures" / fixture, path, ignore=shutil.ignore_patterns("reference")
        )
        if config is not None:
            content = json.loads((path / "config.json").read_text())
            config(content["quantization_config"])
            (path / "config.json").write_text(json.dumps(content))
        if tensors is not None:
            found = load_file(path / "model.safetensors")
            tensors(found)
            save_file(found, path / "model.safetensors", {"format": "pt"})
        yield path


def load(path: Path, dtype: str = "bfloat16", **options: Any) -> None:
    """Load a checkpoint into vLLM's model class, as a server does."""
    sys.path.insert(0, str(ROOT))
    try:
        from tests.support.model_loading import loaded
    finally:
        sys.path.pop(0)
    with loaded(path, dtype, **options):
        pass


def error_of(action: Callable[[], object], directory: Path | None = None) -> str:
    """The message ``action`` raises; paths below ``directory``'s parent are left out."""
    try:
        action()
    except Exception as error:
        cause: BaseException = error
        # vLLM's engine configuration wraps errors; the innermost one is ours.
        while type(cause).__module__.startswith("pydantic") and cause.__context__ is not None:
            cause = cause.__context__
        text = str(cause)
        match = re.search(r"Value error, (.*?) \[type=value_error", text, re.DOTALL)
        text = match[1] if match else text
        if directory is not None:
            text = text.replace(f"{directory.parent}/", "")
        return text.replace(f"{ROOT}/", "")
    raise AssertionError("nothing was raised")


def from_changed(
    config: Change | None = None, tensors: Change | None = None, fixture: str = GPTQ
) -> Callable[[], str]:
    """The error of loading a changed copy of a fixture."""

    def provoke() -> str:
        with changed(fixture, config, tensors) as path:
            return error_of(lambda: load(path), path)

    return provoke


def from_environment(fixture: str, **variables: str) -> Callable[[], str]:
    """The error of loading a fixture under these environment variables."""

    def provoke() -> str:
        with mock.patch.dict("os.environ", variables):
            return error_of(lambda: load(ROOT / "tests" / "fixtures" / fixture))

    return provoke


def truncated() -> str:
    with changed(GPTQ) as path:
        file = path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:500_000])
        return error_of(lambda: load(path), path)


def tensor_set(name: str, index: tuple[int, ...], value: float) -> Change:
    """Sets one element of a tensor."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q_PROJ}.{name}"][index] = value

    return change


def cut(name: str) -> Change:
    """Cuts the last row off a tensor."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q_PROJ}.{name}"] = tensors[f"{Q_PROJ}.{name}"][:-1].clone()

    return change


def no_vllm() -> str:
    spec = importlib.util.spec_from_file_location(
        "finder", ROOT / "overlay" / "_vllm_compressed_linear_finder.py"
    )
    assert spec is not None
    assert spec.loader is not None
    finder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(finder)
    with mock.patch.object(sys, "executable", "python"):
        return str(finder._missing())


def other_vllm() -> str:
    import vllm
    from vllm.compressed_linear.integration import compat

    with mock.patch.object(vllm, "__version__", "0.29.1"):
        return error_of(compat.check_vllm)


def not_built() -> str:
    from vllm.compressed_linear.machine import native

    missing = Path("lib") / native.LIBRARY.name
    with mock.patch.object(native, "LIBRARY", missing), mock.patch.object(native, "_reason", ""):
        return error_of(native.load)


def wrong_numbers() -> str:
    from vllm.compressed_linear.backends.reference import ReferenceBackend
    from vllm.compressed_linear.prepare import self_check

    apply = ReferenceBackend.apply

    def wrong(*arguments: Any) -> torch.Tensor:
        return apply(*arguments) * 1.01

    with (
        mock.patch.object(ReferenceBackend, "apply", wrong),
        mock.patch.dict("os.environ", {"VLLM_COMPRESSED_LINEAR_BACKEND": "reference"}),
    ):
        assert self_check.CHECK_ROWS
        return error_of(lambda: load(ROOT / "tests" / "fixtures" / GPTQ))


def additional_config() -> str:
    from vllm.compressed_linear.settings import Settings

    return error_of(lambda: Settings.read({"compressed_linear": {"backends": "cpu"}}))


def unknown_method() -> str:
    from vllm.compressed_linear.formats.registry import parse

    return error_of(lambda: parse({"quant_method": "aqlm"}))


def without_native(**variables: str) -> Callable[[], str]:
    """The error of loading a fixture where the native library is missing."""

    def provoke() -> str:
        from vllm.compressed_linear.integration import preparation
        from vllm.compressed_linear.machine import native

        with (
            mock.patch.object(native, "available", not_built),
            mock.patch.object(preparation, "_PLATFORM", []),
        ):
            return from_environment("gptqmodel-gptq-w3-g128-asym", **variables)()

    return provoke


def asymmetric_inputs(config: dict[str, Any]) -> None:
    config["config_groups"]["group_0"]["input_activations"]["symmetric"] = False


ERRORS: dict[str, Callable[[], str]] = {
    "no-vllm": no_vllm,
    "other-vllm": other_vllm,
    "not-built": not_built,
    "unknown-method": unknown_method,
    "additional-config": additional_config,
    "rule": from_environment(GPTQ, VLLM_COMPRESSED_LINEAR_BACKEND="*.down_proj="),
    "flag": from_environment(GPTQ, VLLM_COMPRESSED_LINEAR_STRICT="maybe"),
    "cannot-run": from_environment(
        "gptqmodel-gptq-w3-g128-asym", VLLM_COMPRESSED_LINEAR_BACKEND="vllm_native"
    ),
    "not-registered": from_environment(GPTQ, VLLM_COMPRESSED_LINEAR_BACKEND="exllama"),
    "strict": without_native(VLLM_COMPRESSED_LINEAR_STRICT="1"),
    "wrong-numbers": wrong_numbers,
    "refused": from_changed(config=asymmetric_inputs, fixture="llmcompressor-nvfp4"),
    "missing-key": from_changed(config=lambda c: c.pop("bits")),
    "bits": from_changed(config=lambda c: c.update(bits=5)),
    "contradiction": from_changed(config=lambda c: c.update(dynamic={"-:.*q_proj": {}})),
    "truncated": truncated,
    "missing-tensor": from_changed(tensors=lambda t: t.pop(f"{Q_PROJ}.scales")),
    "shape": from_changed(tensors=cut("scales")),
    "group-index": from_changed(tensors=tensor_set("g_idx", (7,), 99)),
    "not-finite": from_changed(tensors=tensor_set("scales", (1, 5), float("nan"))),
    "zero-scale": from_changed(tensors=tensor_set("scales", (1, 5), 0)),
}
