# SPDX-License-Identifier: Apache-2.0
"""The numerical contract: the largest error that a backend's result may have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm.compressed_linear.spec.descriptor import ActivationSpec, CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import torch_dtype, widen_scale

InputSlack = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]
"""(x fp32 [M, K] before it is quantized, its static scale fp32 [1], its static zero point int32
[1]) → fp32 [M, K]: the largest deviation of each x̂ from ``spec/activation.py``."""


@dataclass(frozen=True)
class Contract:
    """The error that a backend may make; ``Contract()`` is the standard contract.

    ``constant``: c of ``contract_bound``. ``weight_rounding``: largest relative error of each ŵ
    before it is multiplied, for kernels that round dequantized weights. ``activation``: how x is
    quantized although the descriptor does not ask for it, ``activation_error`` on top; such a
    backend is only taken where the user names it. ``input_slack``: for external kernels that
    multiply by 1/scale, so that ties may round to the neighbouring code. ``input_rounding``:
    largest error of each x̂, as a share of the largest |x| among its ``input_group`` channels, for
    kernels that multiply integers: it is negligible next to the other errors unless those channels
    meet weights that are nearly 0 where |x| is large.
    """

    constant: float = 4.0
    weight_rounding: float = 0.0
    activation: ActivationSpec | None = None
    input_slack: InputSlack | None = None
    input_rounding: float = 0.0
    input_group: int = 0

    @property
    def exact_input(self) -> bool:
        """Whether x̂ is that of ``spec/activation.py``, so that ``input_error`` is 0."""
        return self.activation is None and self.input_slack is None and self.input_rounding == 0

    def input_error(
        self,
        x: torch.Tensor,
        magnitude: torch.Tensor,
        input_scale: torch.Tensor | None = None,
        input_zero: torch.Tensor | None = None,
    ) -> torch.Tensor | float:
        """Largest error that comes from x̂: float64 [M, N], or 0.

        x: [M, K] before it is quantized, in the order of the groups, as ``magnitude`` [N, K] is,
        which is that of ``contract_bound``.
        """
        if self.activation is not None:
            return activation_error(x, magnitude, self.activation)
        if self.input_slack is not None:
            slack = self.input_slack(x, input_scale, input_zero).to(torch.float64)
        elif self.input_rounding:
            slack = _group_largest(x, self.input_group) * self.input_rounding
        else:
            return 0.0
        return slack @ magnitude.to(torch.float64).t()


STANDARD = Contract()


def contract_bound(
    x: torch.Tensor,
    magnitude: torch.Tensor,
    expected: torch.Tensor,
    output_dtype: str,
    contract: Contract = STANDARD,
    input_error: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """Largest error the contract allows, float64 [M, N].

    (c · sqrt(K) · 2⁻²⁴ + ``weight_rounding``) · Σ_k |x| · magnitude + ``input_error``, plus one
    rounding of the output to ``output_dtype``. ``input_error``: of ``Contract.input_error``.
    x: [M, K], quantized where the descriptor says so; ``magnitude``: [N, K], bound of what a kernel
    adds up for each weight (``|ŵ|``, or |s|·(|decode(q)| + |z|) where zero points are subtracted
    apart, see ``weight_magnitude``); ``expected``: [M, N], the exact result.
    """
    total = x.abs().to(torch.float64) @ magnitude.to(torch.float64).t()
    terms = contract.constant * max(x.shape[-1], 1) ** 0.5 * 2.0**-24
    accumulate = (terms + contract.weight_rounding) * total
    return _rounded_once(accumulate + input_error, expected, output_dtype)


def lookup_bound(
    magnitude: torch.Tensor,
    expected: torch.Tensor,
    output_dtype: str,
    contract: Contract = STANDARD,
) -> torch.Tensor:
    """Largest error the contract allows rows that are looked up, float64 [M, K]: ``contract_bound``
    for sums of one term. ``magnitude`` and ``expected``: of those rows, [M, K]."""
    terms = contract.constant * 2.0**-24 + contract.weight_rounding
    return _rounded_once(terms * magnitude.to(torch.float64), expected, output_dtype)


def _rounded_once(
    accumulate: torch.Tensor, expected: torch.Tensor, output_dtype: str
) -> torch.Tensor:
    """``accumulate`` and one rounding of the output."""
    info = torch.finfo(torch_dtype(output_dtype))
    rounding = expected.to(torch.float64).abs() * info.eps / 2 + info.smallest_normal
    # The result before rounding may differ by ``accumulate``, which may cross a binade.
    return accumulate * (1 + info.eps) + rounding


def activation_error(
    x: torch.Tensor, magnitude: torch.Tensor, spec: ActivationSpec
) -> torch.Tensor:
    """Largest error of rounding x to symmetric dynamic integers per token or group: float64 [M, N].

    Half a step of each group, max|x| / (2 · maximum), times Σ magnitude of its channels. x: [M, K]
    in the order of the groups; ``magnitude``: [N, K].
    """
    if spec.element.kind != "integer" or not spec.dynamic or not spec.symmetric:
        raise ValueError(f"no bound is known for x as {spec}")
    size = spec.group_size if spec.granularity == "group" else max(x.shape[1], 1)
    # Scale and division are fp32; and what is added up are the rounded x.
    half = _group_largest(x, size) / spec.maximum * (1 + 2.0**-10) / 2
    return half @ magnitude.to(torch.float64).t()


def _group_largest(x: torch.Tensor, size: int) -> torch.Tensor:
    """The largest |x| of the ``size`` channels that each is among: x [M, K] → float64 [M, K]."""
    k = x.shape[1]
    filled = torch.nn.functional.pad(x.abs().to(torch.float64), (0, -k % size))
    return filled.unflatten(1, (-1, size)).amax(2).repeat_interleave(size, 1)[:, :k]


def weight_magnitude(
    descriptor: CompressedLinearDescriptor,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    row_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """fp32 [n, k]: |s₂·s|·(|q − c| + |z − c|) where zero points exist, with c = 2^(b−1) for integer
    ones and 0 for others; else |ŵ|. ``row_scale``: fp32 [n], s₂.

    Kernels subtract zero points as group sums, so the error follows both terms, not their
    difference. A float zero point is itself rounded, in proportion to |z|.
    """
    element = descriptor.weight.element
    second = 1 if row_scale is None else row_scale.abs().unsqueeze(1)
    if scale is None:
        return element.decode(codes).abs() * second
    size = max(codes.shape[1] // max(scale.shape[1], 1), 1)
    wide = (widen_scale(scale).abs() * second).repeat_interleave(size, 1)
    if zero is None:
        return element.decode(codes).abs() * wide
    whole = element.kind == "integer" and not zero.is_floating_point()
    centre = 1 << (element.bits - 1) if whole else 0
    offset = (zero.to(torch.float32) - centre).abs().repeat_interleave(size, 1)
    return ((element.decode(codes) - centre).abs() + offset) * wide
