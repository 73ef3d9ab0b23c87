# SPDX-License-Identifier: Apache-2.0
"""The checkpoint that ``explain`` reads: configuration and headers, no weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm.compressed_linear.checkpoint.bounded_read import read_json_file
from vllm.compressed_linear.checkpoint.headers import Headers, read_headers
from vllm.compressed_linear.checkpoint.shard import CheckpointError
from vllm.compressed_linear.formats.base import mlx_configuration
from vllm.compressed_linear.formats.registry import formats
from vllm.compressed_linear.formats.unquantized import CONFIG_FILES

MODELOPT_FILE = "hf_quant_config.json"
"""Name of the file that early ModelOpt wrote instead of changing config.json."""

PICKLED = (".bin", ".pt", ".pth")
"""Suffixes of files of weights that are read by unpickling."""

_UNQUANTIZED = ("float64", "float32", "float16", "bfloat16")


class ExplainError(ValueError):
    """The checkpoint cannot be explained: it is missing or would not load."""


class PickledError(ExplainError):
    """The weights are in files that only unpickling reads. vLLM may load them; we do not unpickle
    a file in order to describe it."""


@dataclass(frozen=True)
class Checkpoint:
    """A local checkpoint: its directory, config.json and headers."""

    path: Path
    config: dict[str, Any]
    headers: Headers

    @cached_property
    def quantization(self) -> dict[str, Any]:
        """The ``quantization_config``, from the places where vLLM looks; empty if there is none.

        Raises ``ExplainError`` if it is something else than a map.
        """
        inner = self.config.get("text_config")
        places = {
            "quantization_config": self.config,
            "text_config.quantization_config": inner if isinstance(inner, dict) else {},
            "compression_config": self.config,
        }
        for field, place in places.items():
            found = place.get(field.rpartition(".")[2])
            if found and not isinstance(found, dict):
                raise ExplainError(
                    f"{self.path / 'config.json'}: {field} is a {type(found).__name__}, expected "
                    "a map"
                )
            if found:
                return dict(found)
        return mlx_configuration(self.config) or self._of_modelopt()

    def _of_modelopt(self) -> dict[str, Any]:
        """The separate file of early ModelOpt, which vLLM reads if config.json says nothing."""
        file = self.path / MODELOPT_FILE
        if self.config.get("quantization_config") is not None or not file.is_file():
            return {}
        found = read_json_file(file, "the configuration of ModelOpt")
        if not isinstance(found, dict):
            raise ExplainError(f"{file} holds a {type(found).__name__}, expected a map")
        return {"quant_method": "modelopt", **found}

    @property
    def separate_file(self) -> str:
        """Name of the file that has the configuration although config.json does not."""
        if any(self.config.get(key) for key in ("quantization_config", "compression_config")):
            return ""
        names = (MODELOPT_FILE, *CONFIG_FILES)
        return next((name for name in names if (self.path / name).is_file()), "")

    def modules_with_codes(self) -> list[str]:
        """Modules whose tensors only a quantizer writes, whatever the configuration says."""
        markers = {name for known in formats().values() for name in known.marker_tensors}
        markers |= {"qweight", "weight_packed"}
        return [
            module
            for module, names in self.headers.modules.items()
            if names & markers
            or ("weight" in names and self.headers[f"{module}.weight"].dtype not in _UNQUANTIZED)
        ]

    @classmethod
    def open(cls, model: str) -> Checkpoint:
        """``model``: a directory, or a model id whose files huggingface_hub has in its cache.

        Raises ``ExplainError`` if it or one of its files is missing or damaged, ``PickledError`` if
        its weights are pickled.
        """
        path = _local_directory(model)
        file = path / "config.json"
        if not file.is_file():
            raise ExplainError(f"{path}: not a checkpoint directory: no config.json")
        try:
            config = read_json_file(file, "the configuration", infinities=True)
            headers = read_headers(path)
        except CheckpointError as error:
            raise ExplainError(str(error)) from error
        if not isinstance(config, dict):
            raise ExplainError(f"{file} holds a {type(config).__name__}, expected a map")
        if headers is None:
            others = sorted(f.name for f in path.iterdir() if f.suffix in (".gguf", *PICKLED))
            if pickled := [name for name in others if name.endswith(PICKLED)]:
                raise PickledError(
                    f"{path / pickled[0]}: not examined, because only unpickling would read it. "
                    "vLLM may load it; convert the weights to safetensors to examine them"
                )
            found = f" (it has {', '.join(others[:3])})" if others else ""
            raise ExplainError(f"{path} has no *.safetensors file{found}")
        return cls(path, config, headers)


def _local_directory(model: str) -> Path:
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise ExplainError(f"{model} is a file, expected the directory of a checkpoint")
    if model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise ExplainError(f"directory {model} does not exist")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise ExplainError(
            f"{model} is neither a directory nor in the local cache of huggingface_hub; explain "
            "does not download, so fetch it first (hf download …) or give a directory"
        ) from error
