# SPDX-License-Identifier: Apache-2.0
"""Pack a weight from standard layout into a checkpoint's tensors, as tests and tools need it."""

from __future__ import annotations

import torch

from vllm.compressed_linear.checkpoint.shard import ShardSource
from vllm.compressed_linear.spec.descriptor import WeightSpec
from vllm.compressed_linear.spec.elements import torch_dtype, widen_scale
from vllm.compressed_linear.spec.packing import pack
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StandardWeights, StoredTensor


def from_standard_layout(
    scheme: CheckpointScheme,
    standard: StandardWeights,
    group_index: torch.Tensor | None = None,
    *,
    row_scale: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    input_zero: torch.Tensor | None = None,
    prescale: torch.Tensor | None = None,
    output_scale: torch.Tensor | None = None,
    output_zero: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Write a weight as a checkpoint of ``scheme`` holds it: the inverse of ``LoadedShard``'s
    ``codes``, ``scale``, ``zero`` and ``group_index`` for a weight that is not sharded.

    ``standard``: codes [N, K] in the checkpoint's channel order, scale and zero [N, G].
    ``group_index``: int [K], the group of each channel; None is ``k // group_size``.
    ``row_scale`` [N], ``prescale`` [K], scales and zero points of x and y [1]: as ``LoadedShard``
    gives them. Returns the tensors by name, each in the first of its packings. Raises
    ``ValueError`` if the scheme cannot represent ``standard`` (an interleave, a shared scale with
    different values, a group index without a tensor for it).
    """
    n, k = standard.codes.shape
    extents = ShardSource("", scheme, n, k, 0, n, 0, k).extents
    plain = torch.arange(k) // max(scheme.weight.group_size(k), 1)
    if group_index is None:
        group_index = plain
    elif not any(t.role is Role.GROUP_INDEX for t in scheme.tensors) and not torch.equal(
        group_index.to(torch.int64), plain
    ):
        raise ValueError(f"{scheme}: a group index is given, but the scheme has no tensor for one")
    values = {
        Role.CODES: standard.codes,
        Role.SCALE: standard.scale,
        Role.ZERO: standard.zero,
        Role.GROUP_INDEX: group_index,
        Role.SHAPE: torch.tensor([n, k]),
        Role.ROW_SCALE: None if row_scale is None else row_scale.reshape(n, 1),
        Role.INPUT_SCALE: None if input_scale is None else input_scale.reshape(1, 1),
        Role.INPUT_ZERO: None if input_zero is None else input_zero.reshape(1, 1),
        Role.OUTPUT_SCALE: None if output_scale is None else output_scale.reshape(1, 1),
        Role.OUTPUT_ZERO: None if output_zero is None else output_zero.reshape(1, 1),
        Role.IGNORED: None,
        Role.PRESCALE: None if prescale is None else prescale.reshape(k, 1),
    }
    out = {}
    for stored in scheme.tensors:
        value = values[stored.role]
        if value is not None:
            out[stored.name] = _store(stored, value, extents, scheme.weight)
        elif not stored.optional:
            raise ValueError(f"{scheme}: {stored.name} is needed, but there is no {stored.role}")
    return out


def _store(
    stored: StoredTensor, value: torch.Tensor, extents: dict[str, int], weight: WeightSpec
) -> torch.Tensor:
    if stored.role is Role.SHAPE or stored.role is Role.GROUP_INDEX:
        return value.to(torch_dtype(stored.dtype))
    if stored.reciprocal:
        value = 1 / widen_scale(value)
    dims = [axis for axis in stored.axes if isinstance(axis, str)]
    if len(dims) < 2 or "B" in dims:
        # Shared along the axes that the tensor lacks, or by blocks of rows.
        block = 1 if weight.scale is None else weight.scale.block_rows
        kept = value[::block] if "B" in dims else value if {"N", "K"} & set(dims) else value[:1]
        kept = kept if "G" in dims else kept[:, :1]
        whole = kept.repeat_interleave(block, 0)[: len(value)] if "B" in dims else kept
        if value.numel() and not bool((value == whole).all()):
            raise ValueError(
                f"{stored.name} has axes {stored.axes}, but its values differ along others"
            )
        kept = kept.t() if dims and dims[-1] in ("N", "B") else kept
        return kept.reshape(stored.shape(extents)).contiguous()
    if stored.interleave:
        raise ValueError(f"{stored.name}: cannot write interleave {stored.interleave!r}")
    if "G" in dims:
        value = torch.nn.functional.pad(value, (0, -value.shape[1] % stored.group_multiple))
    if dims[0] != "N":
        value = value.t()
    if stored.packing is None:
        raw = stored.role is Role.CODES and value.dtype == torch.uint8
        return (value.view(torch_dtype(stored.dtype)) if raw else value).contiguous()
    return pack(value, stored.packing, dims.index(stored.packing.axis))
