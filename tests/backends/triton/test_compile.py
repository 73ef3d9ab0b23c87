# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel compiled for architectures that are not here: what the assembler makes of it.

Triton brings NVIDIA's assembler and disassembler, so registers, spills, shared memory and the
instructions themselves are known without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm.compressed_linear.backends.triton import launch as triton_tiles
from vllm.compressed_linear.backends.triton.backend import GATHER_ABOVE, scale_kind
from vllm.compressed_linear.backends.triton.lookup import lookup_constants
from vllm.compressed_linear.backends.triton.packing import scale_dtype, zero_dtype
from vllm.compressed_linear.backends.triton.runtime import missing
from vllm.compressed_linear.backends.triton.spec import KernelSpec
from vllm.compressed_linear.machine.gpus import gpu_facts
from vllm.compressed_linear.spec import elements
from vllm.compressed_linear.spec.descriptor import (
    ChannelOrder,
    CompressedLinearDescriptor,
    ScaleSpec,
    WeightSpec,
    ZeroSpec,
)
from vllm.compressed_linear.spec.elements import NF4, ElementType, torch_dtype, uint
from vllm.compressed_linear.testing.suite import INT8_TOKEN

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

ARCHITECTURES = (80, 90, 100, 120)
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""What one program may have (CUDA C++ Programming Guide, compute capabilities)."""
RESERVED_BYTES = 1 << 10
"""Of each program's shared memory, for the driver (the same table)."""
MOST_REGISTERS = 255
MOST_LOOKUP_REGISTERS = 64
"""Of the kernel that reads rows of embedding tables: enough programs to wait for memory."""
MOST_STACK = 8
"""Bytes of registers that are put aside around the loop; in it nothing is spilled. The assembler
does that by itself where it lets a third program onto a multiprocessor."""
MOST_PER_WEIGHT = {"int4": 6.7, "int4 zero": 6.9, "nvfp4": 8.2, "fp8": 12.0, "int8": 5.4}
"""Instructions in the loop for each weight of a thread, for M = 16 on sm_80; an upper bound of what
was counted, so that a change that costs more is seen."""
TOKENS = (16, 32, 64, 512)
LARGE_MATRICES = {90: "HGMMA", 100: "UTCHMMA"}
TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA")


def _layer(
    element: ElementType,
    group: int = 128,
    scale: str = "bfloat16",
    zero: str | None = None,
    x: str = "bfloat16",
    **more: Any,
) -> CompressedLinearDescriptor:
    row_scale = more.pop("row_scale", None)
    point = None if zero is None else ZeroSpec(zero, "uint8" if zero == "integer" else "float16")
    scales = ScaleSpec(scale, "channel" if group == -1 else "group", group)
    return CompressedLinearDescriptor(
        4096, 4096, WeightSpec(element, scales, point, row_scale), x, x, **more
    )


LAYERS = {
    "int4": _layer(uint(4, 8)),
    "int4 zero": _layer(uint(4), zero="integer"),
    "int4 float zero": _layer(uint(4), 64, "float16", "float", "float16"),
    "int4 g32": _layer(uint(4), 32, "float16", "integer", "float16"),
    "int4 order": _layer(uint(4), zero="integer", channel_order=ChannelOrder(4096)),
    "int4 fp32": _layer(uint(4, 8), x="float32"),
    "int8": _layer(uint(8, 128), -1),
    "int7": _layer(uint(7, 64)),
    "int3 zero": _layer(uint(3), zero="integer"),
    "int1 zero": _layer(uint(1), zero="integer"),
    "w8a8": _layer(uint(8, 128), -1, "float32", activation=INT8_TOKEN),
    "nf4": _layer(NF4, 64, "float32"),
    "nf4 fp16": _layer(NF4, 64, "float32", x="float16"),
    "nf4 fp32": _layer(NF4, 64, "float32", x="float32"),
    "fp8": _layer(elements.E4M3, -1, "float32"),
    "fp8 blocks": _layer(elements.E5M2, 128, "float32"),
    "nvfp4": _layer(elements.E2M1, 16, "float8_e4m3fn", row_scale="float32"),
    "mxfp4": _layer(elements.E2M1, 32, "e8m0"),
    "mxfp4 fp16": _layer(elements.E2M1, 32, "e8m0", x="float16"),
    "mxfp6": _layer(elements.E3M2, 32, "e8m0"),
}
QUICK = (("int4", 16), ("nvfp4", 16), ("fp8", 16), ("int8", 16), ("nf4", 16), ("int4 zero", 16))
"""What a normal run compiles, for the first architecture; the others are slow tests."""


@dataclass(frozen=True)
class Compiled:
    """``shared`` and ``stack``: bytes. ``sass``: instructions without their arguments. ``spills``:
    loads and stores of spilled registers in the longest loop. ``per_weight``: its length by the
    weights that a thread decodes in it."""

    ptx: str
    shared: int
    registers: int
    stack: int
    sass: Counter[str]
    spills: int
    per_weight: float


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is compiled anew, and nothing is left in anybody's home."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def _pointer(dtype: torch.dtype | None) -> str:
    names = {
        None: "constexpr",
        torch.uint8: "*u8",
        torch.bfloat16: "*bf16",
        torch.float16: "*fp16",
        torch.float32: "*fp32",
    }
    return names[dtype]


def _weight_pointers(d: CompressedLinearDescriptor, spec: KernelSpec) -> dict[str, str]:
    """Types of the tensors that both kernels are given."""
    return {
        "packed": "*i32",
        "scale": _pointer(scale_dtype(d)),
        "zero": _pointer(zero_dtype(d)),
        "row_scale": _pointer(torch.float32 if d.weight.row_scale else None),
        "order": "constexpr" if d.channel_order is None else "*i32",
        "table": _pointer(torch.float32 if spec.coded == "table" else None),
    }


def _compile(
    kernel: Any,
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    unaligned: Collection[str],
    architecture: int,
    weights: float,
    **options: int,
) -> Compiled:
    """``unaligned``: the numbers that need not be multiples of 16; ``weights``: how many a thread
    decodes in a loop."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    numbers = [name for name in names if name not in pointers and name not in constants]
    types = {**pointers, **dict.fromkeys(numbers, "i32"), **dict.fromkeys(constants, "constexpr")}
    assert set(types) == set(names)
    values: dict[str, Any] = {name: None for name, kind in types.items() if kind == "constexpr"}
    values |= constants
    aligned = [n for n in names if n not in values and n not in unaligned]
    source = ASTSource(
        kernel,
        {name: types[name] for name in names},
        {(names.index(name),): value for name, value in values.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return _read(compiled, tools, weights)


def compile_linear(d: CompressedLinearDescriptor, m: int, architecture: int) -> Compiled:
    """``linear_kernel`` as ``triton_linear`` would launch it for ``m`` tokens."""
    from vllm.compressed_linear.backends.triton import kernel as triton_kernel

    spec = KernelSpec.of(d)
    cut = triton_tiles.cut(spec, d.n, m, 132, architecture)
    output = torch.float32 if cut.splits > 1 else torch_dtype(d.output_dtype)
    # What is quantized was made fp32 before.
    taken = torch.float32 if d.activation is not None else torch_dtype(d.input_dtype)
    pointers = _weight_pointers(d, spec)
    pointers |= {"x": _pointer(taken), "bias": "constexpr", "out": _pointer(output)}
    if cut.splits > 1:
        pointers["row_scale"] = "constexpr"
    if m > GATHER_ABOVE:
        pointers["order"] = "constexpr"
    return _compile(
        triton_kernel.linear_kernel,
        pointers,
        {**triton_tiles.constants(spec, cut, scale_kind(d)), "INTERPRETED": False},
        ("m", "blocks_of_program"),
        architecture,
        cut.tiles.block_n * cut.tiles.block_k / (32 * cut.tiles.warps),
        num_warps=cut.tiles.warps,
        num_stages=cut.tiles.stages,
    )


def compile_lookup(d: CompressedLinearDescriptor, architecture: int) -> Compiled:
    """``lookup_kernel`` as ``triton_embedding`` would launch it."""
    from vllm.compressed_linear.backends.triton import lookup_kernel as triton_lookup_kernel

    spec = KernelSpec.of(d)
    pointers = {"ids": "*i64", "out": _pointer(torch_dtype(d.output_dtype))}
    return _compile(
        triton_lookup_kernel.lookup_kernel,
        _weight_pointers(d, spec) | pointers,
        {**lookup_constants(spec, scale_kind(d)), "INTERPRETED": False},
        ("m",),
        architecture,
        1.0,
    )


def _read(compiled: Any, tools: Path, weights: float) -> Compiled:
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])

    def output(tool: str, option: str) -> str:
        command = [str(tools / tool), option, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = dict(re.findall(r"(REG|STACK):(\d+)", output("cuobjdump", "-res-usage")))
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loop: list[str] = []
    for line in output("nvdisasm", "-c").splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label.group(1)] = len(instructions)
        if found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)(.*)", line):
            instructions.append(found.group(1))
            back = re.search(r"(\.L_x_\d+)", found.group(2))
            if found.group(1).startswith("BRA") and back and back.group(1) in labels:
                loop = max(loop, instructions[labels[back.group(1)] :], key=len)
    return Compiled(
        compiled.asm["ptx"],
        compiled.metadata.shared,
        int(usage["REG"]),
        int(usage["STACK"]),
        Counter(instructions),
        _count(Counter(loop), "LDL", "STL"),
        len(loop) / weights,
    )


def _count(sass: Counter[str], *names: str) -> int:
    return sum(n for instruction, n in sass.items() if instruction.split(".")[0] in names)


def _check(name: str, m: int, architecture: int) -> None:
    found = compile_linear(LAYERS[name], m, architecture)
    assert found.registers <= MOST_REGISTERS
    assert found.spills == 0
    assert found.stack <= MOST_STACK
    assert found.shared <= SHARED_BYTES[architecture]
    if m == 16:  # the memory is the limit, and two programs wait for it
        assert 2 * (found.shared + RESERVED_BYTES) <= gpu_facts(architecture).shared_bytes
    # Tensor cores, but where nothing exact can be given to them; tiles of 64 tokens and more by
    # whole warp groups and through tensor memory, where there are such.
    spec = KernelSpec.of(LAYERS[name])
    used = {name for name in TENSOR_CORES if _count(found.sass, name)}
    tall = triton_tiles.tiles_of(spec, m, architecture).block_m >= 64
    expected = LARGE_MATRICES.get(architecture, "HMMA") if tall else "HMMA"
    assert used == (set() if spec.operand == "fp32" else {expected})
    # Codes and x come by asynchronous copies.
    assert _count(found.sass, "LDGSTS") > 0
    # Flushed denormals would lose the smallest fp8 weights, which are decoded through them.
    assert "ftz" not in found.ptx
    if m == 16 and architecture == 80 and name in MOST_PER_WEIGHT:
        assert found.per_weight <= MOST_PER_WEIGHT[name]


@pytest.mark.parametrize(("name", "m"), QUICK)
def test_compiles_without_spills(name: str, m: int) -> None:
    _check(name, m, ARCHITECTURES[0])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("name", LAYERS)
def test_compiles_everywhere(name: str, m: int, architecture: int) -> None:
    _check(name, m, architecture)


def _check_lookup(name: str, architecture: int) -> None:
    found = compile_lookup(LAYERS[name], architecture)
    assert found.stack == 0
    assert found.registers <= MOST_LOOKUP_REGISTERS
    assert "ftz" not in found.ptx


def test_the_lookup_compiles_without_spills() -> None:
    _check_lookup("int4 zero", ARCHITECTURES[0])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", LAYERS)
def test_the_lookup_compiles_everywhere(name: str, architecture: int) -> None:
    _check_lookup(name, architecture)
