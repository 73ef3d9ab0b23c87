# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel, and one of vLLM's, run by Triton's interpreter, on tensors of this CPU.

Whether Triton interprets is settled when it is imported, so these tests need a process of their
own: ``backends/triton/test_backend.py`` starts it. By hand:
``TRITON_INTERPRET=1 pytest tests/support/triton_interpreted.py``.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import replace

import pytest
import torch
from vllm.model_executor.layers.quantization.utils import fp8_utils

from tests.support import cuda_doubles
from tests.support.vllm_classes import BLOCKS, assert_in_contract
from vllm.compressed_linear.backends.triton import launch, measured, runtime
from vllm.compressed_linear.backends.triton.backend import TritonBackend
from vllm.compressed_linear.backends.triton.measured import TileClass, Tiles
from vllm.compressed_linear.backends.triton.spec import KernelSpec
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec import elements
from vllm.compressed_linear.spec.elements import E4M3, NF4, uint
from vllm.compressed_linear.testing import Case, check_case, conformance_cases
from vllm.compressed_linear.testing.suite import FP8, INT8_TOKEN, MXFP4, NVFP4, mx

pytestmark = pytest.mark.skipif(not runtime.interpreted(), reason="TRITON_INTERPRET=1 is not set")

DTYPES = ("bfloat16", "float16", "float32")
GPU = Platform.parse("cuda:80")
INT4 = Case(uint(4), 40, 96, zero="integer", bias_dtype="bfloat16")
CASES = (
    *(Case(uint(bits, 1 << (bits - 1)), 24, 64) for bits in (1, 2, 4, 7, 8)),
    *(Case(uint(bits), 24, 64, zero="integer", input_dtype="float16") for bits in (3, 8)),
    Case(uint(7), 24, 64, zero="float", scale_dtype="float16"),
    INT4,
    replace(INT4, n=33, k=20, group=4, shards=()),
    replace(INT4, n=130, k=47, group=-1, shards=()),
    replace(INT4, order="act"),
    replace(INT4, order="ragged", input_dtype="float32", output_dtype=""),
    replace(INT4, shards=(19, 11, 10), row_scale="tensor"),
    *(Case(NF4, 24, 64, scale_dtype="float32", input_dtype=x) for x in DTYPES),
    *(replace(FP8, n=24, k=64, shards=(), element=e) for e in (E4M3, elements.E5M2)),
    *(replace(NVFP4, n=24, k=48, shards=(), input_dtype=x, output_dtype="") for x in DTYPES),
    *(replace(MXFP4, n=24, k=64, shards=(), input_dtype=x, output_dtype="") for x in DTYPES),
    replace(
        MXFP4, n=24, k=64, shards=(), element=elements.E3M2, activation=mx(elements.E3M2, 15.0)
    ),
    replace(FP8, n=24, k=64, shards=(), activation=INT8_TOKEN, prescale=True, hadamard=32),
    Case(uint(4, 8), 24, 256, 128),
    Case(uint(4), 24, 256, -1, zero="float"),
)
"""Every way a weight is decoded, scaled and multiplied, once; the last two split K."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Many small products are slow with more than one."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conformance(case: Case) -> None:
    compiled = case is INT4
    found = check_case(TritonBackend, case, GPU, rows=(0, 1, 65), compiled=compiled, device="cpu")
    found.raise_if_failed()
    assert found.outcome == "passed"


@pytest.mark.slow
@pytest.mark.parametrize("case", conformance_cases(), ids=str)
def test_all_of_the_kit(case: Case) -> None:
    found = check_case(TritonBackend, case, GPU, device="cpu")
    found.raise_if_failed()
    dense = case.element.kind == "dense"
    assert found.outcome == ("declined" if dense else "passed")


def _run(case: Case, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the backend gives, what is exact)"""
    problem = case.build()
    backend = TritonBackend(problem.descriptor)
    x = problem.activations(rows)
    tensors = backend.prep_weights_for_execution(problem.weights)
    return backend.apply(tensors, x, problem.bias), problem.expected(x, problem.bias)


@pytest.mark.parametrize("rows", [1, 16, 33])
def test_splits_give_the_same_sum_every_time(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(uint(4, 8), 24, 512, 128, output_dtype="float32", bias_dtype="float32")
    spec = KernelSpec.of(case.build().descriptor)
    assert launch.cut(spec, 24, rows, 8, 80).splits > 1
    first, exact = _run(case, rows)
    again, _ = _run(case, rows)
    assert torch.equal(first, again)
    monkeypatch.setattr(runtime, "gpu", lambda device: (0, 80))
    whole, _ = _run(case, rows)
    torch.testing.assert_close(whole, first, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first.double(), exact, rtol=1e-4, atol=1e-4)


def test_batch_invariance_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are cut alike whatever the batch, so a row has the same bits in any of them."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    problem = Case(uint(4, 8), 24, 512, 128, output_dtype="float32").build()
    backend = TritonBackend(problem.descriptor)
    tensors = backend.prep_weights_for_execution(problem.weights)
    x = problem.activations(70)
    whole = backend.apply(tensors, x)
    for rows in (1, 17):
        assert torch.equal(backend.apply(tensors, x[:rows]), whole[:rows])


@pytest.mark.parametrize(
    "case", [INT4, replace(INT4, order="ragged"), NVFP4, Case(NF4, 24, 64)], ids=str
)
def test_opcheck(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = case.build()
    backend = TritonBackend(problem.descriptor)
    tensors = backend.prep_weights_for_execution(problem.weights)
    seen = []
    op = torch.ops.compressed_linear.triton_linear
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.ops.compressed_linear, "triton_linear", lambda *a: seen.append(a) or op(*a)
        )
        backend.apply(tensors, problem.activations(5), problem.bias)
    torch.library.opcheck(op.default, seen[0])


@pytest.mark.parametrize(
    "case",
    [INT4, replace(INT4, order="ragged", output_dtype="float16"), Case(NF4, 24, 64)],
    ids=str,
)
def test_rows_are_those_of_the_weight_to_the_last_bit(case: Case) -> None:
    """The conformance kit allows what a sum may be off; one product is rounded once."""
    problem = case.build()
    backend = TritonBackend(problem.descriptor)
    tensors = backend.prep_weights_for_execution(problem.weights)
    ids = torch.randint(case.n, (2, 11), dtype=torch.int32)
    found = backend.embedding(tensors, ids)
    assert found.shape == (2, 11, problem.descriptor.in_features)
    expected = problem.weight[ids.flatten().to(torch.int64)].to(found.dtype)
    assert torch.equal(found.flatten(0, 1), expected)


def test_an_id_that_is_no_row_gives_no_number() -> None:
    problem = INT4.build()
    backend = TritonBackend(problem.descriptor)
    tensors = backend.prep_weights_for_execution(problem.weights)
    found = backend.embedding(tensors, torch.tensor([0, -1, 40, 39, 1 << 40]))
    assert found.isnan().all(1).tolist() == [False, True, True, False, True]
    assert not found[[0, 3]].isnan().any()


@pytest.mark.parametrize("case", [INT4, replace(INT4, order="ragged"), NVFP4], ids=str)
def test_opcheck_of_rows(case: Case) -> None:
    problem = case.build()
    backend = TritonBackend(problem.descriptor)
    tensors = backend.prep_weights_for_execution(problem.weights)
    arguments = [tensors.get(name) for name in ("scale", "zero", "row_scale", "perm", "table")]
    torch.library.opcheck(
        torch.ops.compressed_linear.triton_embedding.default,
        (
            torch.tensor([1, 39, 7]),
            tensors["packed"],
            *arguments,
            problem.descriptor.n,
            backend.scale_kind,
            backend.spec,
            torch.bfloat16,
        ),
    )


def test_measured_tiles_are_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.compressed_linear.backends.triton import kernel as triton_kernel

    tiles = Tiles(16, 32, 32, 8, 2)
    monkeypatch.setattr(measured, "table", lambda: {TileClass(80, "16-bit", "1-4", 16): tiles})
    launched = []

    class Watched:
        def __getitem__(self, grid: tuple[int, int]) -> object:
            launched.append(grid)
            return kernel[grid]

    kernel = triton_kernel.linear_kernel
    monkeypatch.setattr(triton_kernel, "linear_kernel", Watched())
    found, exact = _run(Case(uint(4, 8), 64, 64, -1, output_dtype="float32"), 16)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert launched == [(2, 1)]


def test_weights_that_are_no_numbers_stay_so() -> None:
    """fp8's NaN and infinities, which damaged checkpoints hold, are not decoded as numbers."""
    for element in (E4M3, elements.E5M2):
        problem = Case(element, 24, 64, -1, scale_dtype="float32", input_dtype="float32").build()
        backend = TritonBackend(problem.descriptor)
        tensors = backend.prep_weights_for_execution(problem.weights)
        # The first channel of each output channel, which it has alone.
        x = torch.zeros(1, 64)
        x[0, 0] = 1.0
        for code in (0x7F, 0xFF, 0x7C, 0xFC):
            tensors["packed"][0] = (tensors["packed"][0] & ~0xFF) | code
            tensors["scale"].fill_(1.0)
            found = backend.apply(tensors, x)[0, 0]
            expected = element.decode(torch.tensor(code))
            assert torch.equal(found, expected) or (found.isnan() and not expected.isfinite())


@pytest.mark.parametrize("n", [72, 384])
def test_vllms_own_kernel_for_blocks_of_fp8(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``vllm_native`` prepares is what vLLM's Triton kernel computes with. On a CPU vLLM
    leaves its kernels plain functions."""
    real = importlib.import_module("triton")
    language = importlib.import_module("triton.language")
    plain = fp8_utils._w8a8_triton_block_scaled_mm
    constants = [name for name in inspect.signature(plain).parameters if "_SIZE_" in name]
    monkeypatch.setattr(plain, "__annotations__", dict.fromkeys(constants, language.constexpr))
    monkeypatch.setattr(fp8_utils, "triton", real)
    monkeypatch.setattr(fp8_utils, "tl", language)
    monkeypatch.setattr(fp8_utils, "_w8a8_triton_block_scaled_mm", real.jit(plain))
    cuda_doubles.install()
    # The interpreter cuts bf16 off instead of rounding it.
    case = replace(BLOCKS, n=n, shards=(), input_dtype="float16", output_dtype="")
    assert assert_in_contract(case, Platform.parse("cuda:89")) == "TritonFp8BlockScaledMMKernel"
