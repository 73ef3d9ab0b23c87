# SPDX-License-Identifier: Apache-2.0
"""Compare a few rows of every prepared layer with the checkpoint's own meaning."""

from __future__ import annotations

import torch

from vllm.compressed_linear.backends.base import QuantLinearMethod
from vllm.compressed_linear.backends.contract import contract_bound, lookup_bound, weight_magnitude
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import E4M3, torch_dtype

CHECK_ROWS = 6


CHECK_TOKENS = 2


class SelfCheckError(RuntimeError):
    """A backend's result for a layer exceeds the error of its contract."""


def self_check(
    name: str,
    method: QuantLinearMethod,
    tensors: dict[str, torch.Tensor],
    weights: CompressedWeights,
) -> None:
    """Hold a few output rows, the first and last among them, against the checkpoint's own meaning.

    The expected values come from ``CompressedWeights.dequantize``, which knows nothing of channel
    plans or packed layouts. Raises ``SelfCheckError``.
    """
    descriptor = method.descriptor
    if descriptor.n == 0 or descriptor.in_features == 0 or weights.device.type == "meta":
        return
    generator = torch.Generator().manual_seed(descriptor.n * 31 + descriptor.k)
    x = torch.randn(CHECK_TOKENS, descriptor.in_features, generator=generator)
    x[-1] *= _reach(descriptor, weights)
    x = x.to(weights.device, torch_dtype(descriptor.input_dtype))
    inner = torch.randint(descriptor.n, (CHECK_ROWS,), generator=generator).tolist()
    rows = sorted({0, descriptor.n - 1, *inner})
    y = method.apply(tensors, x)[:, rows].to(torch.float64)

    ideal = weights.dequantize_runs([(row, row + 1) for row in rows]).to(torch.float64)
    taken = weights.prepare_input(descriptor, x)
    expected = weights.in_stored_order(taken).to(torch.float64) @ ideal.t()
    magnitude = torch.cat([_magnitude(descriptor, weights, row) for row in rows])
    contract = method.contract(descriptor)
    input_error: torch.Tensor | float = 0.0
    if not contract.exact_input:
        plain = weights.prepare_unquantized(descriptor, x)
        input_error = contract.input_error(
            plain, magnitude, weights.input_scale, weights.input_zero
        )
    bound = contract_bound(
        taken, magnitude, expected, descriptor.output_dtype, contract, input_error
    )
    if wrong := _first_wrong(y, expected, bound):
        (_, column), text = wrong
        raise SelfCheckError(_complaint(name, method, f"output channel {rows[column]} {text}"))
    if not descriptor.lookup:
        return
    if weights.permutation is not None:
        order = weights.permutation.to(torch.int64)
        stored = magnitude.new_zeros(len(rows), descriptor.in_features)
        magnitude = stored.index_add_(1, order[order >= 0], magnitude[:, order >= 0])
    found = method.embedding(tensors, torch.tensor(rows, device=weights.device))
    bound = lookup_bound(magnitude, ideal, descriptor.output_dtype, contract)
    if wrong := _first_wrong(found.to(torch.float64), ideal, bound):
        (row, column), text = wrong
        where = f"channel {column} of row {rows[row]}, looked up, {text}"
        raise SelfCheckError(_complaint(name, method, where))


def _first_wrong(
    found: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor
) -> tuple[tuple[int, int], str] | None:
    """Position and description of the first number whose error exceeds ``bound``, or None. All
    float64 [rows, columns]."""
    wrong = ~((found - expected).abs() <= bound)
    if not bool(wrong.any()):
        return None
    row, column = (int(i) for i in wrong.nonzero()[0])
    return (row, column), (
        f"is {float(found[row, column]):.6g}, expected {float(expected[row, column]):.6g} ± "
        f"{float(bound[row, column]):.3g}"
    )


def _complaint(name: str, method: QuantLinearMethod, what: str) -> str:
    return (
        f"{name}: backend {method.name} computes wrong numbers for {method.descriptor}: {what}. "
        "Choose another with VLLM_COMPRESSED_LINEAR_BACKEND, and report this"
    )


def _reach(descriptor: CompressedLinearDescriptor, weights: CompressedWeights) -> float:
    """Where static scales saturate, since a wrong zero point shows only there; otherwise 1."""
    activation = descriptor.activation
    if activation is None or not activation.needs_scale or weights.input_scale is None:
        return 1.0
    integer = activation.element.kind == "integer"
    largest = float(1 << (activation.element.bits - 1)) if integer else activation.element.largest
    if activation.scale_dtype == "float8_e4m3fn":
        largest *= E4M3.largest
    # Far from where the dtype of x ends.
    limit = torch.finfo(torch_dtype(descriptor.input_dtype)).max / 64
    return min(largest * abs(float(weights.input_scale)), limit)


def _magnitude(
    descriptor: CompressedLinearDescriptor, weights: CompressedWeights, row: int
) -> torch.Tensor:
    s = weights.rows(row, row + 1)
    second = None if weights.row_scale is None else weights.row_scale[row : row + 1]
    return weight_magnitude(descriptor, s.codes, s.scale, s.zero, second)
