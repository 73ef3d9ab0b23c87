# SPDX-License-Identifier: Apache-2.0
"""The numerical contract: the largest error that a backend's result may have."""

from __future__ import annotations

import torch

from vllm.compressed_linear.spec.descriptor import ActivationSpec, CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import torch_dtype, widen_scale

STANDARD_CONSTANT = 4.0
"""c of ``contract_bound`` unless a backend states another."""


def contract_bound(
    x: torch.Tensor,
    magnitude: torch.Tensor,
    expected: torch.Tensor,
    output_dtype: str,
    constant: float = STANDARD_CONSTANT,
    weight_rounding: float = 0.0,
    input_rounding: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """Largest error the contract allows, float64 [M, N].

    (c · sqrt(K) · 2⁻²⁴ + ``weight_rounding``) · Σ_k |x| · magnitude + ``input_rounding``, plus one
    rounding of the output to ``output_dtype``. ``input_rounding``: ``activation_error`` of a
    backend with an ``own_activation``, ``slack_error`` of one with an ``input_slack``.
    x: [M, K], quantised where the descriptor says so; ``magnitude``: [N, K], bound of what a kernel
    adds up for each weight (``|ŵ|``, or |s|·(|decode(q)| + |z|) where zero points are subtracted
    apart, see ``weight_magnitude``); ``expected``: [M, N], the exact result.
    """
    total = x.abs().to(torch.float64) @ magnitude.to(torch.float64).t()
    accumulate = (constant * max(x.shape[-1], 1) ** 0.5 * 2.0**-24 + weight_rounding) * total
    return _rounded_once(accumulate + input_rounding, expected, output_dtype)


def lookup_bound(
    magnitude: torch.Tensor,
    expected: torch.Tensor,
    output_dtype: str,
    constant: float = STANDARD_CONSTANT,
    weight_rounding: float = 0.0,
) -> torch.Tensor:
    """Largest error the contract allows rows that are looked up, float64 [M, K]: ``contract_bound``
    for sums of one term. ``magnitude`` and ``expected``: of those rows, [M, K]."""
    accumulate = (constant * 2.0**-24 + weight_rounding) * magnitude.to(torch.float64)
    return _rounded_once(accumulate, expected, output_dtype)


def _rounded_once(
    accumulate: torch.Tensor, expected: torch.Tensor, output_dtype: str
) -> torch.Tensor:
    """``accumulate`` and one rounding of the output."""
    info = torch.finfo(torch_dtype(output_dtype))
    rounding = expected.to(torch.float64).abs() * info.eps / 2 + info.smallest_normal
    # The result before rounding already lies ``accumulate`` away, which may cross a binade.
    return accumulate * (1 + info.eps) + rounding


def slack_error(slack: torch.Tensor | None, magnitude: torch.Tensor) -> torch.Tensor | float:
    """What ``QuantLinearMethod.input_slack`` [M, K] adds to the error allowed: float64 [M, N], for
    ``magnitude`` [N, K] as ``contract_bound`` takes it."""
    return 0.0 if slack is None else slack.to(torch.float64) @ magnitude.to(torch.float64).t()


def activation_error(
    x: torch.Tensor, magnitude: torch.Tensor, spec: ActivationSpec
) -> torch.Tensor:
    """Largest error of rounding x to symmetric dynamic integers per token or group: float64 [M, N].

    Half a step of each group, max|x| / (2 · maximum), times Σ magnitude of its channels. x: [M, K]
    in the order of the groups; ``magnitude``: [N, K].
    """
    if spec.element.kind != "integer" or not spec.dynamic or not spec.symmetric:
        raise ValueError(f"no bound is known for x as {spec}")
    k = x.shape[1]
    size = spec.group_size if spec.granularity == "group" else max(k, 1)
    filled = torch.nn.functional.pad(x.abs().to(torch.float64), (0, -k % size))
    # Scale and division are fp32; and what is added up are the rounded x.
    step = filled.unflatten(1, (-1, size)).amax(2) / spec.maximum * (1 + 2.0**-10)
    half = (step / 2).repeat_interleave(size, 1)[:, :k]
    return half @ magnitude.to(torch.float64).t()


def weight_magnitude(
    descriptor: CompressedLinearDescriptor,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    row_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """fp32 [n, k]: |s₂·s|·(|q − c| + |z − c|) with c = 2^(b−1) where zero points exist, else |ŵ|.
    ``row_scale``: fp32 [n], s₂.

    Kernels subtract zero points as group sums, so the error follows both terms, not their
    difference.
    """
    element = descriptor.weight.element
    second = 1 if row_scale is None else row_scale.abs().unsqueeze(1)
    if scale is None:
        return element.decode(codes).abs() * second
    size = max(codes.shape[1] // max(scale.shape[1], 1), 1)
    wide = (widen_scale(scale).abs() * second).repeat_interleave(size, 1)
    if zero is None:
        return element.decode(codes).abs() * wide
    centre = 1 << (element.bits - 1) if element.kind == "integer" else 0
    offset = (zero.to(torch.float32) - centre).abs().repeat_interleave(size, 1)
    return ((element.decode(codes) - centre).abs() + offset) * wide
