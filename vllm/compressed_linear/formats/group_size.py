# SPDX-License-Identifier: Apache-2.0
"""Group sizes that a configuration does not state: those of the file's scales.

128 comes first, which is the default of GPTQModel, AutoAWQ, AutoRound and the transformers library
(``GPTQConfig``, ``AwqConfig``, ``AutoRoundConfig``).
"""

from __future__ import annotations

from collections.abc import Callable

from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.spec.scheme import CheckpointScheme

SIZES = (128, 64, 32, 16, 256, 512, 1024, -1)


def group_size_on_disk(
    module: str, file: FileView, scheme_of: Callable[[int], CheckpointScheme]
) -> int:
    """The first of ``SIZES`` with which the tensors of ``module`` are those of ``scheme_of(size)``;
    128 if there is none."""
    return next((size for size in SIZES if file.fits(module, scheme_of(size))), SIZES[0])
