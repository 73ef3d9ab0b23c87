# SPDX-License-Identifier: Apache-2.0
"""Mutators of tensors: the file stays one that any reader of safetensors accepts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.support.fuzzing.decode import INTEGERS
from tests.support.fuzzing.decode_floats import FLOATS8
from tests.support.fuzzing.files import Mutant, Tensor
from tests.support.fuzzing.numbers import floats

Draw = Callable[[st.SearchStrategy[Any]], Any]

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
WIDTHS |= {"U8": 1, "U16": 2, "U32": 4, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "BOOL": 1}
CODES = ("qweight", "weight_packed")
SCALES = ("scales", "weight_scale", "weight_scale_inv")
ZEROS = ("qzeros", "weight_zero_point")


def choose(draw: Draw, mutant: Mutant, *lasts: str) -> str:
    """The name of a tensor of a linear layer; of these last components, if any are given."""
    names = sorted(
        name
        for name in mutant.tensors
        if ("_proj." in name or name.startswith("lm_head."))
        and (not lasts or name.rpartition(".")[2] in lasts)
    )
    name = draw(st.sampled_from(names))
    mutant.about += [name.rpartition(".")[0]]
    return name


def drop(draw: Draw, mutant: Mutant) -> None:
    name = choose(draw, mutant)
    del mutant.tensors[name]
    mutant.done.append(f"drop {name}")


def drop_layer(draw: Draw, mutant: Mutant) -> None:
    layer = choose(draw, mutant).rpartition(".")[0]
    for name in [n for n in mutant.tensors if n.startswith(f"{layer}.")]:
        del mutant.tensors[name]
    mutant.done.append(f"drop all of {layer}")


def rename(draw: Draw, mutant: Mutant) -> None:
    name = choose(draw, mutant)
    other = draw(st.sampled_from(["x", "weight", "qweight", "scales", "bias", "B", "g_idx", ""]))
    new = f"{name.rpartition('.')[0]}.{other}"
    mutant.tensors = {new if k == name else k: v for k, v in mutant.tensors.items()}
    mutant.about.append(new)
    mutant.done.append(f"rename {name} to {new}")


def truncate(draw: Draw, mutant: Mutant) -> None:
    name = choose(draw, mutant)
    tensor = mutant.tensors[name]
    if not tensor.shape or not min(tensor.shape):
        return
    axis = draw(st.integers(0, len(tensor.shape) - 1))
    length = draw(st.integers(0, tensor.shape[axis] - 1))
    array = _array(tensor).take(range(length), axis)
    mutant.tensors[name] = replace(tensor, shape=array.shape, data=array.tobytes())
    mutant.done.append(f"truncate {name} to {length} along {axis}")


def reshape(draw: Draw, mutant: Mutant) -> None:
    name = choose(draw, mutant)
    tensor = mutant.tensors[name]
    count = int(np.prod(tensor.shape))
    shapes = [(count,), (1, count), (count, 1), (*tensor.shape, 1), (1, *tensor.shape)]
    shapes += [tensor.shape[::-1], (count // 2, 2)]
    shape = draw(st.sampled_from([s for s in shapes if int(np.prod(s)) == count]))
    mutant.tensors[name] = replace(tensor, shape=shape)
    # The same numbers in the same order: for a vector, the same tensor.
    mutant.harmless = True
    mutant.done.append(f"reshape {name} to {shape}")


def retype(draw: Draw, mutant: Mutant) -> None:
    name = choose(draw, mutant)
    tensor = mutant.tensors[name]
    width = WIDTHS[tensor.dtype]
    dtype = draw(
        st.sampled_from([d for d, w in WIDTHS.items() if w == width and d != tensor.dtype])
    )
    mutant.tensors[name] = replace(tensor, dtype=dtype)
    mutant.done.append(f"retype {name} to {dtype}")


def widen(draw: Draw, mutant: Mutant) -> None:
    """The same values in another dtype."""
    name = choose(draw, mutant)
    tensor = mutant.tensors[name]
    if tensor.dtype in INTEGERS:
        values, dtype = _array(tensor), draw(st.sampled_from(["I64", "I32", "I16", "I8", "F32"]))
    elif tensor.dtype in FLOATS8:
        values = FLOATS8[tensor.dtype][_array(tensor)]
        dtype = draw(st.sampled_from(["F32", "F64"]))
    else:
        values, dtype = floats(tensor), draw(st.sampled_from(["F32", "F64", "I32"]))
    kind = INTEGERS.get(dtype) or {"F32": "<f4", "F64": "<f8"}[dtype]
    with np.errstate(all="ignore"):
        data = values.astype(kind)
    same = bool((data == values).all())
    mutant.tensors[name] = Tensor(dtype, tensor.shape, data.tobytes())
    mutant.harmless = same
    mutant.done.append(f"store {name} as {dtype}")


def transpose(draw: Draw, mutant: Mutant) -> None:
    name = choose(draw, mutant)
    tensor = mutant.tensors[name]
    array = np.ascontiguousarray(_array(tensor).T)
    mutant.tensors[name] = replace(tensor, shape=array.shape, data=array.tobytes())
    mutant.done.append(f"transpose {name}")


def permute_header(draw: Draw, mutant: Mutant) -> None:
    names = draw(st.permutations(sorted(mutant.tensors)))
    mutant.tensors = {name: mutant.tensors[name] for name in names}
    mutant.must_read = True
    mutant.done.append("order the tensors in another way")


def scales(draw: Draw, mutant: Mutant) -> None:
    """NaN, infinite, 0, negative and tiny scales and float zero points."""
    name = choose(draw, mutant, *SCALES, "qzeros")
    tensor = mutant.tensors[name]
    if tensor.dtype in INTEGERS or tensor.dtype in FLOATS8:
        return
    value = draw(st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0, -1.0, 6e-8, 65504.0]))
    values = floats(tensor).astype(np.float32)
    whole = draw(st.sampled_from([False, False, True]))
    at = draw(st.integers(0, values.size - 1))
    values.reshape(-1)[slice(None) if whole else at] = value
    mutant.tensors[name] = Tensor(tensor.dtype, tensor.shape, _as(values, tensor.dtype))
    mutant.done.append(f"{'all' if whole else at} of {name} = {value}")


def codes(draw: Draw, mutant: Mutant) -> None:
    """Other codes are other weights, and nothing else."""
    coded = (*FLOATS8, "U8", "I8")
    called_weight = any(
        name.endswith("_proj.weight") and tensor.dtype in coded
        for name, tensor in mutant.tensors.items()
    )
    name = choose(draw, mutant, *CODES, *(("weight",) if called_weight else ()))
    tensor = mutant.tensors[name]
    if name.endswith(".weight") and tensor.dtype not in coded:
        return
    array = _array(tensor).copy()
    at = draw(st.integers(0, array.size - 1))
    array.reshape(-1)[at] ^= 1 << draw(st.integers(0, 8 * array.itemsize - 2))
    mutant.tensors[name] = replace(tensor, data=array.tobytes())
    mutant.done.append(f"flip a bit of word {at} of {name}")


def zero_points(draw: Draw, mutant: Mutant) -> None:
    names = {name.rpartition(".")[2] for name in mutant.tensors}
    if not names & set(ZEROS):
        return
    name = choose(draw, mutant, *ZEROS)
    tensor = mutant.tensors[name]
    if tensor.dtype not in INTEGERS:
        return
    array = _array(tensor).copy()
    fill = draw(st.sampled_from([None, 0, 0x77777777, 0x88888888, 0xFFFFFFFF, 0x80808080]))
    if fill is None:
        at = draw(st.integers(0, array.size - 1))
        array.reshape(-1)[at] ^= 1 << draw(st.integers(0, 8 * array.itemsize - 2))
    else:
        array.view(np.uint32)[...] = fill
        # Tools also write constants that stand for "symmetric".
        mutant.harmless = bool(mutant.quantization.get("sym"))
    mutant.tensors[name] = replace(tensor, data=array.tobytes())
    mutant.done.append(f"zero points of {name}: {fill}")


def group_index(draw: Draw, mutant: Mutant) -> None:
    """Out of range, negative, constant, reversed, all zero."""
    if not any(name.endswith(".g_idx") for name in mutant.tensors):
        return
    name = choose(draw, mutant, "g_idx")
    tensor = mutant.tensors[name]
    if tensor.dtype != "I32":
        return
    array = _array(tensor).copy()
    at = draw(st.integers(0, array.size - 1))
    change = draw(st.sampled_from(["last", "negative", "huge", "zeros", "reverse", "swap", "ones"]))
    if change == "zeros":
        array[:] = 0
    elif change == "ones":
        array[:] = 1
    elif change == "reverse":
        array = array[::-1].copy()
    elif change == "swap":
        array[[0, at]] = array[[at, 0]]
    else:
        top = int(array.max()) + 1
        array[at] = {"last": top, "negative": -1, "huge": 2**31 - 1}[change]
    mutant.tensors[name] = replace(tensor, data=array.tobytes())
    mutant.done.append(f"{name}: {change}")


def add(draw: Draw, mutant: Mutant) -> None:
    """A tensor that no layer needs."""
    layer = choose(draw, mutant).rpartition(".")[0]
    last = draw(st.sampled_from(["g_idx", "weight", "bias", "qzeros", "act.scales", "x", "B"]))
    source = mutant.tensors[choose(draw, mutant)]
    mutant.tensors.setdefault(f"{layer}.{last}", source)
    mutant.about.append(layer)
    mutant.harmless = True
    mutant.done.append(f"add {layer}.{last}")


def _array(tensor: Tensor) -> Any:
    kinds = {1: "u1", 2: "<u2", 4: "<u4", 8: "<u8"}
    kind = INTEGERS.get(tensor.dtype) or kinds[WIDTHS[tensor.dtype]]
    return np.frombuffer(tensor.data, kind).reshape(tensor.shape)


def _as(values: Any, dtype: str) -> bytes:
    """float32 values in the bytes of a float dtype."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    with np.errstate(all="ignore"):
        return values.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).tobytes()


MUTATORS = (
    drop,
    drop_layer,
    rename,
    truncate,
    reshape,
    retype,
    widen,
    transpose,
    permute_header,
    scales,
    codes,
    zero_points,
    group_index,
    add,
)
