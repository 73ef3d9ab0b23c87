# SPDX-License-Identifier: Apache-2.0
"""Parameters for the tensors of a checkpoint: one class for every tensor of every format.

A ``CheckpointParameter`` is one flat buffer for all shards of a fused layer that have a tensor of
that name, with a static table shard → region. Its loader only copies: it may be called again, on a
meta copy of the parameter, or with a tensor that is fused on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch.nn import Parameter

from vllm.compressed_linear.checkpoint.counts import count_values
from vllm.compressed_linear.checkpoint.shard import CheckpointError, LoadedShard, ShardSource
from vllm.compressed_linear.checkpoint.symmetry import Counts
from vllm.compressed_linear.spec.elements import torch_dtype
from vllm.compressed_linear.spec.packing import Packing
from vllm.compressed_linear.spec.scheme import Role, StoredTensor

QKV_SHARDS = {"q": 0, "k": 1, "v": 2}
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
"""Of indexes and shapes; torch computes with no others."""
_ALIGNMENT = 16
"""Bytes; regions of different dtypes share one byte buffer."""


@dataclass(frozen=True)
class Region:
    """Region of one shard's tensor in the flat buffer, in bytes."""

    shard: int
    source: ShardSource
    stored: StoredTensor
    dtype: torch.dtype
    offset: int
    nbytes: int


@dataclass
class Arrival:
    """Record of one load call: the packing of the file, the source of the tensor, and the values
    of all of it where they are counted (``counts.py``)."""

    source: ShardSource
    packing: Packing | None
    dtype: torch.dtype
    counts: Counts | None = None


@dataclass
class LoadRecord:
    """Load records by shard. Shared by a parameter and its meta copies, emptied when consumed."""

    arrivals: dict[int, Arrival] = field(default_factory=dict)


class CheckpointParameter(Parameter):
    """Flat buffer with the table ``regions``, ordered by shard; see the module's docstring."""

    regions: tuple[Region, ...]
    record: LoadRecord
    layer_name: str
    tensor_name: str

    def __new__(cls, **kwargs: Any) -> CheckpointParameter:
        return super().__new__(cls, data=kwargs["data"], requires_grad=False)

    def __init__(
        self, *, data: torch.Tensor, regions: Sequence[Region], layer_name: str, tensor_name: str
    ) -> None:
        self.regions = tuple(regions)
        self.record = LoadRecord()
        self.layer_name = layer_name
        self.tensor_name = tensor_name
        axes = self.regions[0].stored.axes
        if "N" in axes:
            # Models that reorder a fused tensor's rows before they load it (Falcon) ask for this.
            self.output_dim = axes.index("N")
        # An instance attribute: vLLM's reload wraps and restores it, and copies
        # the instance dictionary to meta tensors. A plain function holds no reference to a layer.
        self.weight_loader = load_checkpoint_tensor


def create_parameters(
    sources: Sequence[ShardSource], layer_name: str
) -> dict[str, CheckpointParameter]:
    """Create one parameter for each tensor name of the shards, on the default device.

    Raises ``CheckpointError`` for a weight that its layout cannot hold.
    """
    tables: dict[str, list[Region]] = {}
    sizes: dict[str, int] = {}
    for shard, source in enumerate(sources):
        for stored in source.scheme.tensors:
            dtype = torch_dtype(stored.dtype)
            try:
                nbytes = _capacity(sources, shard, stored) * dtype.itemsize
            except ValueError as error:
                raise CheckpointError(
                    f"{layer_name}: tensor {source.name}.{stored.name} {error}"
                ) from None
            offset = sizes.get(stored.name, 0)
            tables.setdefault(stored.name, []).append(
                Region(shard, source, stored, dtype, offset, nbytes)
            )
            sizes[stored.name] = offset + -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    out = {}
    for name, regions in tables.items():
        # One dtype lets vLLM count elements as they load; mixed ones share a byte buffer.
        dtypes = {region.dtype for region in regions}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.uint8
        last = regions[-1]
        data = torch.zeros((last.offset + last.nbytes) // dtype.itemsize, dtype=dtype)
        out[name] = CheckpointParameter(
            data=data, regions=regions, layer_name=layer_name, tensor_name=name
        )
    return out


def _fused(sources: Sequence[ShardSource], shard: int) -> ShardSource:
    """The shard as a part of one tensor on disk in which all shards are concatenated."""
    before = sum(s.full_n for s in sources[:shard])
    source = sources[shard]
    return replace(source, full_n=sum(s.full_n for s in sources), n_start=source.n_start + before)


def _capacity(sources: Sequence[ShardSource], shard: int, stored: StoredTensor) -> int:
    """Largest number of elements over all variants of this tensor; ``ValueError`` if none fits.

    A tiled layout may hold a fused tensor, but not each of its shards separately.
    """
    alone = [sources[shard]]
    fused = [_fused(sources, shard)] if len(sources) > 1 else []
    sizes = []
    for way in (*fused, *alone):
        try:
            sizes += [prod(way.kept_shape(stored, packing)) for packing in stored.packings]
        except ValueError:
            if not sizes and way in alone:
                raise
    return max(sizes)


def load_checkpoint_tensor(
    param: CheckpointParameter, loaded_weight: torch.Tensor, loaded_shard_id: Any = None
) -> None:
    """vLLM's ``weight_loader``. ``loaded_shard_id``: "q"/"k"/"v", an index, a tuple of indices for
    a tensor that holds several shards, or None for all of them.

    Raises ``CheckpointError`` naming layer and tensor when the shape or dtype does not fit.
    """
    shards = (
        tuple(region.shard for region in param.regions)
        if loaded_shard_id is None
        else shard_indices(loaded_shard_id)
    )
    regions = [region for region in param.regions if region.shard in shards]
    missing = set(shards) - {region.shard for region in regions}
    if missing:
        names = ", ".join(sorted({r.source.name for r in param.regions}))
        raise CheckpointError(
            f"{param.layer_name}: the checkpoint has a tensor {param.tensor_name} for shard "
            f"{loaded_shard_id}, but its configuration describes one only for {names}"
        )
    whole = [region.source for region in regions]
    for position, region in enumerate(regions):
        source = region.source if len(regions) == 1 else _fused(whole, position)
        # A file that fuses shards may still have one scalar for each of them.
        each = _is_number(region.stored) and loaded_weight.numel() == len(regions)
        loaded = loaded_weight.flatten()[position] if each else loaded_weight
        _copy(param, region, source, loaded)


def _is_number(stored: StoredTensor) -> bool:
    return all(axis == 1 for axis in stored.axes)


def shard_indices(shard_id: Any) -> tuple[int, ...]:
    """Indices of the shards that vLLM's ``loaded_shard_id`` selects (not None: all of them)."""
    if isinstance(shard_id, tuple):
        return shard_id
    return (QKV_SHARDS[shard_id] if isinstance(shard_id, str) else int(shard_id),)


def _copy(
    param: CheckpointParameter, region: Region, source: ShardSource, loaded: torch.Tensor
) -> None:
    stored = region.stored
    name = f"{source.name}.{stored.name}"
    shape = tuple(loaded.shape)
    none = stored.optional and stored.role is not Role.PRESCALE
    if none and 0 in shape and 0 not in stored.shape(source.extents):
        return  # some tools write an empty tensor where they have none
    if loaded.dtype == torch.float8_e8m0fnu and region.dtype == torch.uint8:
        loaded = loaded.view(torch.uint8)
    if stored.written_as:
        if loaded.dtype != torch_dtype(stored.written_as):
            raise CheckpointError(
                f"{param.layer_name}: tensor {name} has dtype {loaded.dtype}, expected "
                f"torch.{stored.written_as}"
            )
        loaded = loaded.view(region.dtype)
    if prod(shape) == 1 and _is_number(stored):
        loaded, shape = loaded.reshape(stored.shape({})), stored.shape({})
    if stored.flat and prod(shape) == prod(stored.shape(source.extents)):
        loaded = loaded.reshape(stored.shape(source.extents))
        shape = tuple(loaded.shape)
    try:
        packing = stored.packing_of(shape, source.extents)
    except ValueError as error:
        raise CheckpointError(
            f"{param.layer_name}: tensor {name} {error} for {source.scheme}"
        ) from None
    if not _dtype_fits(stored, packing, region.dtype, loaded.dtype):
        raise CheckpointError(
            f"{param.layer_name}: tensor {name} has dtype {loaded.dtype}, expected "
            f"{region.dtype if stored.packing else 'a dtype that ' + stored.dtype + ' holds'}"
        )
    member = replace(
        source,
        n_start=source.n_start - region.source.n_start,
        n=region.source.full_n,
        k_start=0,
        k=source.full_k,
        padding=0,
    )
    counts = count_values(member, stored, packing, _part(member, stored, packing, loaded))
    loaded = _part(source, stored, packing, loaded)
    raw = param.data.view(torch.uint8) if param.data.dtype != region.dtype else param.data
    unit = 1 if raw.dtype == torch.uint8 else region.dtype.itemsize
    flat = raw.narrow(0, region.offset // unit, loaded.numel() * region.dtype.itemsize // unit)
    flat.view(region.dtype).view(loaded.shape).copy_(loaded)
    param.record.arrivals[region.shard] = Arrival(source, packing, loaded.dtype, counts)


def _part(
    source: ShardSource, stored: StoredTensor, packing: Packing | None, loaded: torch.Tensor
) -> torch.Tensor:
    """The part of a tensor on disk that ``source`` describes."""
    if stored.interleave:
        return loaded
    for dim, part in enumerate(source.slices(stored, packing)):
        if part is not None:
            # A rounded-up G axis may end before its last whole run.
            count = min(part.count, loaded.shape[dim] - part.first)
            loaded = loaded.narrow(dim, part.first, count)
    return loaded


def _dtype_fits(
    stored: StoredTensor, packing: Packing | None, container: torch.dtype, found: torch.dtype
) -> bool:
    if packing is not None and packing.single:
        return found in _INTEGERS
    if stored.role is Role.CODES and not found.is_floating_point:
        return found == container
    # No other dtype converts to eight bits without loss.
    if stored.packing is not None or container in (torch.float8_e4m3fn, torch.float8_e5m2):
        return found == container
    if found == torch.float64 and stored.role is not Role.CODES:
        return False  # float32 does not hold it, and no kernel reads it
    if found.is_floating_point or container.is_floating_point:
        return found.is_floating_point and container.is_floating_point
    return found in _INTEGERS


def collect_shards(
    params: Mapping[str, CheckpointParameter],
    sources: Sequence[ShardSource],
    *,
    dummy: Sequence[Mapping[str, str]] | None = None,
) -> list[LoadedShard]:
    """The loaded shards, as views of the parameters' buffers; consumes the load records.

    Raises ``CheckpointError`` if a tensor of a shard was not loaded. ``dummy``: nothing was loaded,
    and the buffers are taken as they are; for each source, dtypes of tensors in the files, as far
    as they are known, so that weights of the files can follow in a reload.
    """
    shards = []
    for index, source in enumerate(sources):
        tensors: dict[str, torch.Tensor] = {}
        packings: dict[str, Packing | None] = {}
        counts: dict[str, Counts] = {}
        actual, tells = source, ""
        for stored in source.scheme.tensors:
            param = params[stored.name]
            region = next(r for r in param.regions if r.shard == index)
            arrival = param.record.arrivals.get(index)
            if arrival is None:
                if stored.optional:
                    continue
                if dummy is None:
                    raise _never_arrived(param, source, stored)
                dtype = dummy[index].get(stored.name)
                found = region.dtype if dtype is None else torch_dtype(dtype)
                arrival = Arrival(source, stored.packing, found)
            if "N" in stored.axes:
                if tells and arrival.source != actual:
                    raise CheckpointError(
                        f"{param.layer_name}: tensor {source.name}.{stored.name} came "
                        f"{'alone' if arrival.source == source else 'fused'}, but {tells} did not"
                    )
                actual, tells = arrival.source, stored.name
            tensors[stored.name] = _view(param, region, arrival)
            packings[stored.name] = arrival.packing
            if arrival.counts is not None:
                counts[stored.name] = arrival.counts
        _check_shape_tensor(params, source, actual, tensors)
        _settle_packings(actual, packings)
        shards.append(LoadedShard(actual, tensors, packings, counts))
    for param in params.values():
        param.record.arrivals.clear()
    return shards


def _settle_packings(source: ShardSource, packings: dict[str, Packing | None]) -> None:
    """If a tensor's shape fits both a dense and a non-straddling packing, decide by other tensors.

    They come from the same packer, which uses one packing; only short axes are ambiguous.
    """
    fitting = {
        stored: [
            packing
            for packing in stored.packings
            if packing is not None
            and stored.shape(source.extents, packing)
            == stored.shape(source.extents, packings[stored.name])
        ]
        for stored in source.scheme.tensors
        if stored.variants and stored.name in packings
    }
    told = {found[0].dense for found in fitting.values() if len(found) == 1}
    if len(told) != 1:
        return
    for stored, found in fitting.items():
        for packing in found:
            if packing.dense in told:
                packings[stored.name] = packing


def _view(param: CheckpointParameter, region: Region, arrival: Arrival) -> torch.Tensor:
    shape = arrival.source.kept_shape(region.stored, arrival.packing)
    raw = param.data.view(torch.uint8) if param.data.dtype != region.dtype else param.data
    unit = 1 if raw.dtype == torch.uint8 else region.dtype.itemsize
    flat = raw.narrow(0, region.offset // unit, prod(shape) * region.dtype.itemsize // unit)
    view = flat.view(region.dtype).view(shape)
    # Scales are loaded in the widest dtype and converted back to the file's own, without loss.
    widened = region.stored.role in (Role.SCALE, Role.ZERO) and region.stored.packing is None
    return view.to(arrival.dtype) if widened and arrival.dtype.is_floating_point else view


def never_arrived(param: CheckpointParameter) -> list[CheckpointError]:
    """One error for each tensor that a shard needs and nothing was loaded for."""
    return [
        _never_arrived(param, region.source, region.stored)
        for region in param.regions
        if not region.stored.optional and region.shard not in param.record.arrivals
    ]


def _never_arrived(
    param: CheckpointParameter, source: ShardSource, stored: StoredTensor
) -> CheckpointError:
    expected = " x ".join(str(n) for n in stored.shape(source.extents))
    return CheckpointError(
        f"{param.layer_name}: tensor {source.name}.{stored.name} is not in the checkpoint; "
        f"expected {stored.dtype} [{expected}] for {source.scheme}"
    )


def _check_shape_tensor(
    params: Mapping[str, CheckpointParameter],
    source: ShardSource,
    actual: ShardSource,
    tensors: Mapping[str, torch.Tensor],
) -> None:
    for stored in source.scheme.tensors:
        if stored.role is Role.SHAPE and stored.name in tensors:
            found = tensors[stored.name].tolist()
            if found not in ([source.full_n, source.full_k], [actual.full_n, actual.full_k]):
                raise CheckpointError(
                    f"{params[stored.name].layer_name}: tensor {source.name}.{stored.name} says "
                    f"{found}, but the model needs {[source.full_n, source.full_k]}"
                )
