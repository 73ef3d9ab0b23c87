# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as a configuration and a file describe them: a format and a view, without vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm.compressed_linear.checkpoint.file_header import TensorHeader
from vllm.compressed_linear.checkpoint.headers import Headers, read_headers
from vllm.compressed_linear.formats.base import Format
from vllm.compressed_linear.formats.entries import Rename
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.registry import parse
from vllm.compressed_linear.formats.resolution import LayerKind, Resolution


@dataclass(frozen=True)
class Described:
    """What a format gets to see of one checkpoint."""

    format: Format
    file: FileView

    @classmethod
    def of(cls, config: dict[str, Any], headers: Headers | None = None) -> Described:
        """``config`` with the headers of its files; without any, no file is known."""
        found = parse(config)
        headers = headers and found.restated_headers(headers)
        return cls(found, FileView(headers, found.marker_tensors))

    def with_file(self, file: Path | Sequence[str]) -> Described:
        """The same with another file: the checkpoint in a directory, or one small float16 tensor
        of each name."""
        if isinstance(file, Path):
            headers = read_headers(file)
            headers = headers and self.format.restated_headers(headers)
        else:
            one = TensorHeader("float16", (1,), 2, "model.safetensors")
            headers = Headers(dict.fromkeys(file, one))
        return replace(self, file=FileView(headers, self.format.marker_tensors))

    def renamed(self, rename: Rename) -> Described:
        """As a model sees it that renames its weights."""
        return Described(self.format.renamed(rename), self.file.renamed(rename))

    def resolve(self, module: str, kind: LayerKind = LayerKind.LINEAR) -> Resolution:
        return self.format.resolve(module, kind, self.file)
