# SPDX-License-Identifier: Apache-2.0
"""Numbers of tensors in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tests.support.fuzzing.files import Tensor

Array = npt.NDArray[Any]
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


class NoMeaningError(Exception):
    """The tensors say nothing: a shape, a dtype or a value that the layout does not have."""


def floats(tensor: Tensor) -> Array:
    """float64 values. Raises ``NoMeaningError`` for integers and for infinite values."""
    if tensor.dtype == "BF16":
        wide = np.frombuffer(tensor.data, "<u2").astype(np.uint32) << 16
        values = wide.view(np.float32).astype(np.float64)
    elif tensor.dtype in FLOATS:
        values = np.frombuffer(tensor.data, FLOATS[tensor.dtype]).astype(np.float64)
    else:
        raise NoMeaningError(f"{tensor.dtype} is not a float")
    return values.reshape(tensor.shape)
