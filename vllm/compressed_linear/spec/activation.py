# SPDX-License-Identifier: Apache-2.0
"""Reference definition of input preparation: transform, reorder, prescale, quantize.

Kernels must compute the same x̂, bit for bit. All arithmetic is fp32 with IEEE division; ``round``
is to nearest, ties to even; ``max`` and ``min`` are over the values that share a scale.

* dynamic, symmetric: s = max|x| / maximum; q = clamp(round(x / s)); x̂ = q·s
* dynamic, asymmetric, an integer of b bits: lo = min(x, 0), hi = max(x, 0),
  s = (hi − lo) / (2^b − 1), zero = clamp(round(−2^(b−1) − lo / s)),
  q = clamp(round(x / s) + zero), x̂ = (q − zero)·s
* static: the same with s and zero from the checkpoint
* e8m0 scales (MX): s = 2^⌊log2(max|x| / maximum)⌋, the exponent held to −127 … 127
* e4m3 scales (NVFP4) with the static scale g: t = e4m3(clamp((max|x| / maximum) / g)), s = t·g
* with a limit, x is clamped to ± it first
* where s is 0, since x is or by underflow, x̂ = 0: asymmetric integers divide by 1, the others have
  q = 0

For integers ``clamp`` is to −2^(b−1) … 2^(b−1) − 1. For floats ``round`` is to the nearest value of
the type, its subnormals included, and ``clamp`` to the largest finite ones: they saturate.

``maximum`` where frameworks differ:

* int8: vLLM (``scaled_int8_quant``) 127, compressed-tensors (``calculate_qparams``) 127.5
* MX by the OCP Microscaling Formats specification 1.0, section 6.3 (the exponent of max|x| less
  that of the type's largest power of two): 4 for e2m1 and e2m3, 16 for e3m2, 256 for e4m3, 32768
  for e5m2
* MX as Quark's "even" mode (vLLM's emulation of MXFP4 and MXFP6) and compressed-tensors' MXFP4 have
  it, which first round max|x| to the type's mantissa: 3.5 for e2m1, 3.875 for e2m3, 15 for e3m2
* compressed-tensors' MXFP8: 224. vLLM's takes the smallest power of two under which nothing
  saturates: the next float32 after 224

NVFP4 is vLLM's ``ref_nvfp4_quant`` with divisions where that multiplies with rounded reciprocals;
its ``global_scale`` is 1 / g.
"""

from __future__ import annotations

import torch

from vllm.compressed_linear.spec.descriptor import ActivationSpec
from vllm.compressed_linear.spec.elements import E2M1, E4M3, E8M0, ElementType


def just_above(value: float) -> float:
    """The next float32 after ``value``. As ``maximum`` of e8m0 scales it gives the smallest power
    of two under which max|x| is at most 2·``value``."""
    return float(torch.nextafter(torch.tensor(value), torch.tensor(float("inf"))))


JUST_ABOVE_224 = just_above(224.0)
"""``maximum`` of vLLM's MXFP8."""


def nvfp4_input(size: int = 16) -> ActivationSpec:
    """x of NVFP4, with e4m3 scales of ``size`` channels each."""
    return ActivationSpec(E2M1, True, "group", True, size, "float8_e4m3fn", E2M1.largest)


def gather_channels(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Gather x[:, order] of x [M, K], contiguous; ``order`` int [k], −1 for a channel of zeros."""
    return x.index_select(1, order.clamp(min=0)).masked_fill_(order < 0, 0.0)


def prepare_input(
    x: torch.Tensor,
    activation: ActivationSpec | None = None,
    *,
    hadamard_block: int = 0,
    order: torch.Tensor | None = None,
    prescale: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    input_zero: torch.Tensor | None = None,
) -> torch.Tensor:
    """x̂: fp32 [M, k] for x [M, K] of any float dtype.

    ``hadamard_block``: of the transform, 0 for none; ``order`` int [k], −1 for a channel of zeros;
    ``prescale`` fp32 [k]; ``input_scale`` fp32 [1]; ``input_zero`` int [1]. Steps whose argument is
    absent are skipped. Raises ``ValueError`` if a static scale is missing.
    """
    wide = x.to(torch.float32)
    if hadamard_block:
        wide = hadamard(wide, hadamard_block)
    if order is not None:
        wide = gather_channels(wide, order)
    if prescale is not None:
        wide = wide * prescale
    if activation is not None:
        wide = quantize_dequantize(wide, activation, input_scale, input_zero)
    return wide


def quantize_dequantize(
    x: torch.Tensor,
    spec: ActivationSpec,
    input_scale: torch.Tensor | None = None,
    input_zero: torch.Tensor | None = None,
    *,
    nudge: float = 1.0,
) -> torch.Tensor:
    """Quantize and dequantize fp32 [M, k] as ``spec`` says; see the module's docstring.

    ``nudge``: factor for every scale, to see the effect of an imprecise one; only for symmetric
    and static specs."""
    if spec.needs_scale and input_scale is None:
        raise ValueError(f"x as {spec} needs a static scale")
    if spec.needs_zero and input_zero is None:
        raise ValueError(f"x as {spec} needs a static zero point")
    if x.numel() == 0:
        return x.to(torch.float32)
    wide = x.to(torch.float32)
    groups = _grouped(wide.clamp(-spec.limit, spec.limit) if spec.limit else wide, spec)
    input_scale = None if input_scale is None else input_scale * nudge
    if not spec.symmetric:
        out = _asymmetric(groups, spec, input_scale, input_zero)
    elif spec.dynamic:
        scale = _dynamic_scale(groups.abs().amax(-1, keepdim=True), spec, input_scale) * nudge
        out = round_to(groups / torch.where(scale == 0, 1, scale), spec.element) * scale
    else:
        assert input_scale is not None
        out = round_to(groups / input_scale, spec.element) * input_scale
    return out.reshape(x.shape[0], -1)[:, : x.shape[1]] if out.dim() == 3 else out.reshape(x.shape)


def _grouped(x: torch.Tensor, spec: ActivationSpec) -> torch.Tensor:
    """[…, members of a group]; a short last group is padded with zeros, which change nothing."""
    if spec.granularity == "tensor":
        return x.reshape(1, -1)
    if spec.granularity == "token":
        return x
    filled = torch.nn.functional.pad(x, (0, -x.shape[1] % spec.group_size))
    return filled.unflatten(1, (-1, spec.group_size))


def _dynamic_scale(
    largest: torch.Tensor, spec: ActivationSpec, input_scale: torch.Tensor | None
) -> torch.Tensor:
    scale = _divided(largest, spec.maximum)
    if spec.scale_dtype == "e8m0":
        _, exponent = torch.frexp(scale)
        # NaN and infinity are kept.
        return torch.where(torch.isfinite(scale), _power_of_two(exponent - 1), scale)
    if spec.scale_dtype == "float8_e4m3fn":
        assert input_scale is not None
        return round_to(scale / input_scale, E4M3) * input_scale
    return scale


def _asymmetric(
    x: torch.Tensor,
    spec: ActivationSpec,
    input_scale: torch.Tensor | None,
    input_zero: torch.Tensor | None,
) -> torch.Tensor:
    half = 1 << (spec.element.bits - 1)
    if spec.dynamic:
        low = x.amin(-1, keepdim=True).clamp(max=0)
        high = x.amax(-1, keepdim=True).clamp(min=0)
        scale = _divided(high - low, 2 * half - 1)
        scale = torch.where(scale == 0, 1, scale)
        zero = torch.round(-half - low / scale).clamp(-half, half - 1)
    else:
        assert input_scale is not None
        assert input_zero is not None
        scale, zero = input_scale, input_zero.to(torch.float32)
    return ((torch.round(x / scale) + zero).clamp(-half, half - 1) - zero) * scale


def _divided(values: torch.Tensor, number: float) -> torch.Tensor:
    # By a tensor: some devices multiply with the reciprocal of a Python number.
    return values / torch.full((), number, dtype=torch.float32, device=values.device)


def round_to(values: torch.Tensor, element: ElementType) -> torch.Tensor:
    """Round fp32 to the nearest value of ``element`` (ties to even, saturating), as fp32.

    Integers are counted from their middle code.
    """
    if element.kind == "integer":
        half = 1 << (element.bits - 1)
        return torch.round(values).clamp(-half, half - 1)
    largest = element.largest
    held = values.clamp(-largest, largest)
    # The spacing of the values (ulp) is 2^(exponent − mantissa bits), and constant for subnormals.
    _, exponent = torch.frexp(held)
    lowest = 2 - (1 << (element.exponent - 1))
    step = _power_of_two((exponent - 1).clamp(min=lowest) - element.mantissa)
    return torch.round(held / step) * step


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """Exact fp32 2^exponent of integer exponents, which are clamped to −127 … 127."""
    return E8M0.decode(exponent.clamp(-127, 127) + 127)


def hadamard(x: torch.Tensor, block: int) -> torch.Tensor:
    """Hadamard transform of x [M, K]: blocks of ``block`` channels times the normalized matrix.

    The matrix is Sylvester's, H[i, j] = (−1)^popcount(i & j) / sqrt(block), which is symmetric.
    Sums are in the order of the fast transform: adjacent channels first, then adjacent pairs, ….
    """
    values, width = x.unflatten(1, (-1, block)), 1
    while width < block:
        pairs = values.unflatten(2, (-1, 2, width))
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        values = torch.stack((low + high, low - high), -2).flatten(2)
        width *= 2
    return values.flatten(1) * block**-0.5
