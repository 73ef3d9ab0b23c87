# SPDX-License-Identifier: Apache-2.0
"""The Triton backend: what it says of itself, how weights lie, how work is cut, and the kernel in
Triton's interpreter (``triton_interpreted.py``, in a process of its own)."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support.messages import saying
from tests.support.repository import ROOT, environment
from vllm.compressed_linear.backends.triton import launch, runtime
from vllm.compressed_linear.backends.triton import measured as triton_measured
from vllm.compressed_linear.backends.triton.backend import TritonBackend
from vllm.compressed_linear.backends.triton.measured import EVERY_M, TileClass, Tiles
from vllm.compressed_linear.backends.triton.packing import columns, pack_codes, packed_rows
from vllm.compressed_linear.backends.triton.spec import KernelSpec, planes
from vllm.compressed_linear.machine.gpus import GPUS
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec import elements
from vllm.compressed_linear.spec.elements import BF16, E4M3, NF4, uint
from vllm.compressed_linear.testing import Case, conformance_cases
from vllm.compressed_linear.testing.suite import INT8_TOKEN, MXFP4, NVFP4

GPU = Platform.parse("cuda:90")
CODED = [case for case in conformance_cases() if case.element.kind != "dense"]


def interpreted(*options: str) -> None:
    """Run ``triton_interpreted.py`` where Triton interprets; its output is this test's."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    found = subprocess.run(
        [*command, str(ROOT / "tests" / "support" / "triton_interpreted.py")],
        env=environment(TRITON_INTERPRET="1"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    print(found.stdout[-20000:], found.stderr[-2000:])
    assert found.returncode == 0
    assert " passed" in found.stdout
    assert "skipped" not in found.stdout


@pytest.mark.needs_vllm
@pytest.mark.skipif(runtime.missing() is not None, reason=str(runtime.missing()))
def test_in_the_interpreter() -> None:
    interpreted()


@pytest.mark.slow
@pytest.mark.skipif(runtime.missing() is not None, reason=str(runtime.missing()))
def test_all_of_the_kit_in_the_interpreter() -> None:
    interpreted("-m", "slow")


@pytest.mark.parametrize("case", CODED[::5], ids=str)
def test_takes_every_coded_weight(case: Case) -> None:
    descriptor = case.build().descriptor
    assert TritonBackend.can_implement(descriptor, GPU)
    seconds = [TritonBackend.seconds(descriptor, GPU, m) for m in (1, 64, 4096)]
    assert 0 < seconds[0] <= seconds[1] <= seconds[2]


@pytest.mark.parametrize(
    ("case", "platform", "reason"),
    [
        (Case(uint(4, 8)), "cuda:75", "compute capability 75 is too old (needs 80)"),
        (Case(uint(4, 8)), "cpu:avx2", "device cpu (supported: cuda)"),
        (Case(BF16), "cuda:90", "bf16 weights"),
    ],
)
def test_declines_with_a_reason(case: Case, platform: str, reason: str) -> None:
    verdict = TritonBackend.can_implement(case.build().descriptor, Platform.parse(platform))
    assert any(text.startswith(reason) for text in verdict.reasons)


def test_says_that_triton_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    verdict = TritonBackend.can_implement(Case(uint(4, 8)).build().descriptor, GPU)
    assert verdict.reasons == ("Triton is not installed",)


@pytest.mark.parametrize(
    ("case", "scaling", "multiplied"),
    [
        (Case(uint(4, 8)), "block", "bf16"),
        (Case(uint(4, 8), group=-1), "row", "bf16"),
        (Case(uint(4), zero="float", group=-1), "block", "bf16"),
        (Case(uint(4, 8), input_dtype="float16"), "block", "fp16"),
        (Case(uint(4, 8), input_dtype="float32"), "block", "bf16 in 3 parts"),
        (Case(uint(8, 128), group=-1, activation=INT8_TOKEN), "row", "bf16 in 3 parts"),
        (Case(NF4), "block", "bf16 in 3 parts"),
        (Case(NF4, input_dtype="float16"), "block", "tf32 in 3 parts"),
        (Case(NF4, input_dtype="float32"), "block", "fp32"),
        (NVFP4, "element", "bf16"),
        (replace(NVFP4, input_dtype="float16"), "element", "fp16"),
        (MXFP4, "element", "bf16"),
        (replace(MXFP4, input_dtype="float16"), "block", "fp16"),
        (replace(MXFP4, element=E4M3, k=256, group=128), "block", "bf16"),
    ],
    ids=str,
)
def test_what_is_multiplied_is_exact(case: Case, scaling: str, multiplied: str) -> None:
    descriptor = case.build().descriptor
    assert KernelSpec.of(descriptor).scaling == scaling
    assert TritonBackend.variant(descriptor, GPU) == multiplied


def _unpacked(packed: torch.Tensor, spec: KernelSpec) -> torch.Tensor:
    """[n, k filled], read bit by bit as ``triton_layout`` describes it."""
    codes = torch.zeros(packed.shape[1], spec.k_filled, dtype=torch.int64)
    row = below = 0
    for width in planes(spec.bits):
        fields = 32 // width
        for k in range(spec.k_filled):
            word = packed[row + k // fields].to(torch.int64) & 0xFFFFFFFF
            codes[:, k] |= ((word >> (k % fields * width)) & ((1 << width) - 1)) << below
        row += spec.k_filled // fields
        below += width
    assert row == packed.shape[0] == packed_rows(spec)
    return codes


@pytest.mark.parametrize(("k", "group"), [(64, 32), (60, 20), (75, -1), (96, 48)])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_packed_as_described(bits: int, k: int, group: int) -> None:
    spec = KernelSpec.of(Case(uint(bits), 5, k, group, zero="integer").build().descriptor)
    codes = torch.randint(1 << bits, (5, k), dtype=torch.uint8)
    segments = _unpacked(pack_codes(codes, spec), spec).unflatten(1, (-1, spec.filled))
    assert torch.equal(segments[..., : spec.segment].flatten(1), codes.to(torch.int64))
    assert not segments[..., spec.segment :].any()


@pytest.mark.parametrize("case", CODED[::3], ids=str)
def test_every_block_lies_in_a_segment(case: Case) -> None:
    spec = KernelSpec.of(case.build().descriptor)
    assert KernelSpec.parse(spec.text) == spec
    for capability, m in itertools.product((80, 120), (1, 17, 64, 65, 4096)):
        cut = launch.cut(spec, case.n, m, 132, capability)
        block = cut.tiles.block_k
        assert block >= 16
        assert spec.filled % block == 0
        assert all(block % (32 // width) == 0 for width in spec.planes)
        total = spec.k_filled // block
        assert (cut.splits - 1) * cut.blocks < total <= cut.splits * cut.blocks
        assert spec.scaling != "element" or block % spec.group_size == 0


@pytest.mark.parametrize("m", [1, 64, 4096])
def test_few_tokens_fill_the_gpu(m: int) -> None:
    spec = KernelSpec.of(Case(uint(4, 8), 8, 4096, 128).build().descriptor)
    cut = launch.cut(spec, 4096, m, 132, 90)
    programs = -(-m // cut.tiles.block_m) * 4096 // cut.tiles.block_n * cut.splits
    assert programs >= 132
    assert (cut.splits > 1) == (m < 4096)


INT4_CLASS = TileClass(90, "16-bit", "1-4", 16)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 103, 120, 121])
def test_more_is_loaded_ahead_where_there_is_more_shared_memory(capability: int) -> None:
    for operand, codes, up_to in itertools.product(
        ("16-bit", "parts", "32-bit"), ("1-4", "5-8"), launch.M_CLASSES
    ):
        here = launch.declared(TileClass(capability, operand, codes, up_to))
        small = launch.declared(TileClass(120, operand, codes, up_to))
        assert here.block_k * here.stages >= small.block_k * small.stages
        assert (here == small) or capability in (80, 90, 100, 103)


@pytest.mark.parametrize(
    ("case", "m", "operand", "codes", "up_to"),
    [
        (Case(uint(4, 8)), 1, "16-bit", "1-4", 16),
        (Case(uint(5, 16)), 17, "16-bit", "5-8", 32),
        (Case(uint(8, 128), input_dtype="float32"), 64, "parts", "5-8", 64),
        (Case(NF4), 65, "parts", "1-4", EVERY_M),
        (Case(NF4, input_dtype="float16"), 1 << 40, "32-bit", "1-4", EVERY_M),
    ],
    ids=str,
)
def test_classes_of_calls(case: Case, m: int, operand: str, codes: str, up_to: int) -> None:
    spec = KernelSpec.of(case.build().descriptor)
    assert launch.class_of(spec, m, 90) == TileClass(90, operand, codes, up_to)


@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize(("codes", "bits"), [("1-4", 4), ("5-8", 8)])
def test_enough_weights_are_on_the_way(codes: str, bits: int, capability: int) -> None:
    """As the table's docstring says: the memory's rate times 0.8 µs, by two programs of each
    multiprocessor."""
    tiles = launch.declared(TileClass(capability, "16-bit", codes, 16))
    loaded = 2 * (tiles.stages - 1) * tiles.block_n * tiles.block_k * bits / 8
    facts = GPUS[capability]
    assert loaded >= facts.limits.read * 0.8e-6 / facts.multiprocessors


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file of measured tiles that is this process's."""
    path = tmp_path / "tiles.json"
    monkeypatch.setattr(triton_measured, "PATH", path)
    triton_measured.table.cache_clear()
    yield path
    triton_measured.table.cache_clear()


def test_measured_tiles_go_before_the_table(measured: Path) -> None:
    spec = KernelSpec.of(Case(uint(4, 8), 8, 4096, 128).build().descriptor)
    first, second = Tiles(16, 64, 32, 8, 2), Tiles(16, 64, 256, 4, 5)
    other = replace(INT4_CLASS, up_to=32)
    triton_measured.add(measured, {INT4_CLASS: first, other: first}, "a GPU")
    triton_measured.add(measured, {INT4_CLASS: second}, "a GPU")
    assert triton_measured.table() == {INT4_CLASS: second, other: first}
    assert len(measured.read_text().splitlines()) == 4
    # Groups of 128 are filled up to 128 channels, so steps are no longer.
    assert launch.tiles_of(spec, 16, 90) == replace(second, block_k=128)
    assert launch.tiles_of(spec, 32, 90) == first
    for m, capability in ((16, 80), (33, 90)):
        declared = launch.declared(launch.class_of(spec, m, capability))
        assert launch.tiles_of(spec, m, capability) == declared


def test_tiles_measured_with_another_triton_do_not_count(
    measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton_measured.add(measured, {INT4_CLASS: Tiles(16, 64, 32, 8, 2)}, "a GPU")
    monkeypatch.setattr(triton_measured, "triton_version", lambda: "2.0")
    assert triton_measured.table() == {}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"version": 1', '"version": 2', (2, "'triton tiles'")),
        ('"block_n": 64', '"block_n": 256', (128,)),
        ('"warps": 8', '"warps": 3', ("powers of two",)),
        ('"capability": 90', '"capability": "90"', ("['capability']",)),
        ('"entries"', '"rows"', ("KeyError", "'entries'")),
        ('"version": 1', "", ("JSONDecodeError",)),
    ],
)
def test_a_damaged_file_is_named(
    measured: Path, old: str, new: str, message: tuple[object, ...]
) -> None:
    triton_measured.add(measured, {INT4_CLASS: Tiles(16, 64, 32, 8, 2)}, "a GPU")
    text = measured.read_text()
    assert old in text
    measured.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=saying("tiles.json", *message)):
        triton_measured.table()


def test_shapes_are_known_without_numbers() -> None:
    problem = Case(uint(4), 40, 96, zero="integer", order="act", output_dtype="float32").build()
    backend = TritonBackend(problem.descriptor)
    tensors = backend.prep_weights_for_execution(problem.weights)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
        out = backend.apply(fake, torch.empty(2, 3, 96, dtype=torch.bfloat16), None)
    assert out.shape == (2, 3, 40)
    assert out.dtype == torch.float32


def test_refuses_what_it_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Case(uint(4), 40, 96, zero="integer").build()
    backend = TritonBackend(problem.descriptor)
    tensors = backend.prep_weights_for_execution(problem.weights)
    x = problem.activations(2)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=saying("x", "cpu", "cuda")):
        backend.apply(tensors, x)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=saying("x", [2, 95], "[M, 96]")):
        backend.apply(tensors, x[:, :95])
    with pytest.raises(ValueError, match=saying("packed", "torch.int32", [11, 128])):
        backend.apply({**tensors, "packed": tensors["packed"][1:]}, x)
    assert columns(40) == 128


def test_prepared_numbers_keep_their_bits() -> None:
    problem = replace(NVFP4, n=40, shards=()).build()
    tensors = TritonBackend(problem.descriptor).prep_weights_for_execution(problem.weights)
    scale = problem.own.rows(0, 40).scale
    assert scale is not None
    assert torch.equal(tensors["scale"][:, :40].t(), scale.view(torch.uint8))
    assert not tensors["scale"][:, 40:].any()
    assert tensors["table"].tolist() == elements.E2M1.table().tolist()
