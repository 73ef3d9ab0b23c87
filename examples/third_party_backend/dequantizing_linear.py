# SPDX-License-Identifier: Apache-2.0
"""A backend of another package: weights as plain matrices in the activations' dtype."""

import torch

from vllm.compressed_linear.backends.base import Capabilities, QuantLinearMethod
from vllm.compressed_linear.backends.contract import Contract
from vllm.compressed_linear.spec.elements import torch_dtype


class DequantizingBackend(QuantLinearMethod):
    name = "dequantizing"
    capabilities = Capabilities(
        devices=frozenset({"cpu", "cuda"}),
        integer_bits=frozenset(range(1, 9)),
        codebooks=True,
        input_dtypes=frozenset({"bfloat16", "float32"}),
        zero_kinds=frozenset({"integer", "float"}),
        channel_order=True,
        padded_order=True,
    )

    @classmethod
    def further_reasons(cls, d, platform):
        if {d.output_dtype, d.bias_dtype or d.input_dtype} != {d.input_dtype}:
            yield "output or bias of another dtype than the input"

    @classmethod
    def contract(cls, d):
        return Contract(weight_rounding=torch.finfo(torch_dtype(d.input_dtype)).eps / 2)

    @classmethod
    def seconds(cls, d, platform, m):
        size, limits = d.n * d.in_features, platform.limits
        return size * max(torch_dtype(d.input_dtype).itemsize / limits.read, 2 * m / limits.bf16)

    def prep_weights_for_execution(self, weights):
        d = self.descriptor
        dense = torch.zeros(d.n, d.in_features, dtype=torch_dtype(d.input_dtype))
        order = torch.arange(d.k) if weights.permutation is None else weights.permutation.cpu()
        for start, stop in weights.chunks():
            rows = weights.rows(start, stop)
            values = d.weight.element.decode(rows.codes).unflatten(1, (d.groups, d.group_size))
            zero = 0 if rows.zero is None else rows.zero.float().unsqueeze(-1)
            values = ((values - zero) * rows.scale.float().unsqueeze(-1)).flatten(1).cpu()
            dense[start:stop, order[order >= 0]] = values[:, order >= 0].to(dense.dtype)
        return {"weight": dense.to(weights.device)}

    def apply(self, tensors, x, bias=None):
        return torch.nn.functional.linear(x, tensors["weight"], bias)
