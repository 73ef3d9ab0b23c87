# SPDX-License-Identifier: Apache-2.0
"""vLLM's own kernel classes behind a descriptor: right numbers from any format, honest refusals."""

from __future__ import annotations

import dataclasses
import importlib
import platform as host
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.checkpoints import (
    assert_matches_reference,
    checkpoint_reference,
    checkpoint_tensors,
)
from tests.support.messages import saying, says
from vllm.compressed_linear.backends import vllm_native
from vllm.compressed_linear.backends.contract import contract_bound
from vllm.compressed_linear.backends.reference import ReferenceBackend
from vllm.compressed_linear.backends.vllm_native import VllmNativeBackend, op
from vllm.compressed_linear.backends.vllm_native.classes import mixed_precision, operators, tables
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.parts import Part, refine
from vllm.compressed_linear.checkpoint.shard import LoadedShard, ShardSource
from vllm.compressed_linear.machine.platform import Platform, cpu_features
from vllm.compressed_linear.spec.descriptor import (
    ActivationSpec,
    ChannelOrder,
    CompressedLinearDescriptor,
    ScaleSpec,
    TransformSpec,
    WeightSpec,
    ZeroSpec,
)
from vllm.compressed_linear.spec.elements import BF16, E2M1, ElementType, torch_dtype, uint
from vllm.compressed_linear.spec.packing import Packing, ZeroBump, pack
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StoredTensor
from vllm.compressed_linear.testing import check_backend

HERE = Platform("cpu", host.machine(), cpu_features())
FORMATS = ("gptq", "awq", "compressed-tensors")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
LEAST_NORMAL = torch.finfo(torch.float32).smallest_normal

needs_kernel = pytest.mark.skipif(
    tables.unavailable("mixed precision") is not None
    or operators.missing_op(vllm_native.CPU_OP, HERE) is not None,
    reason="vLLM's cpu_gemm_wna16 cannot run here",
)


@pytest.fixture(autouse=True)
def fresh_answers(w4a16: None) -> Iterator[None]:
    """Tests change vLLM's classes; what was cached about them must not outlive a test."""
    yield
    tables.unavailable.cache_clear()
    op.ready.cache_clear()
    mixed_precision.repacked_attributes.cache_clear()


@dataclass(frozen=True)
class Values:
    """A weight: codes [N, K], zero [N, G] or None, scale [N, G], group index [K] or None."""

    codes: torch.Tensor
    zero: torch.Tensor | None
    scale: torch.Tensor
    group: int
    index: torch.Tensor | None = None
    element: ElementType = uint(4, 8)  # noqa: RUF009  # frozen


def values(
    n: int = 64,
    k: int = 128,
    group: int = 32,
    *,
    zero: bool = False,
    scale_dtype: str = "bfloat16",
    seed: int = 0,
) -> Values:
    random = torch.Generator().manual_seed(seed)
    groups = k // group
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=random)
    points = torch.randint(0, 16, (n, groups), dtype=torch.uint8, generator=random)
    scale = torch.rand(n, groups, generator=random) * 0.02 + 0.001
    element = uint(4) if zero else uint(4, 8)
    return Values(
        codes,
        points if zero else None,
        scale.to(torch_dtype(scale_dtype)),
        group,
        element=element,
    )


def stored(fmt: str, v: Values) -> tuple[tuple[StoredTensor, ...], dict[str, torch.Tensor]]:
    """The weight as ``fmt`` lays it out on disk: the tensors' descriptions and the tensors."""
    index = StoredTensor("g_idx", Role.GROUP_INDEX, "int32", ("K",))
    if fmt == "gptq":
        # v1 stores each zero point less one.
        along_k, along_n = Packing(4, "K"), Packing(4, "N", zero_bump=ZeroBump.FIELD)
        described = [
            StoredTensor("qweight", Role.CODES, "int32", ("K", "N"), along_k),
            StoredTensor("scales", Role.SCALE, "float32", ("G", "N")),
            StoredTensor("qzeros", Role.ZERO, "int32", ("G", "N"), along_n),
        ]
        tensors = {"qweight": pack(v.codes.t(), along_k, 0), "scales": v.scale.t().contiguous()}
        if v.zero is not None:
            tensors["qzeros"] = pack(v.zero.t(), along_n)
    elif fmt == "awq":
        awq = Packing(4, "N", order=AWQ_ORDER)
        described = [
            StoredTensor("qweight", Role.CODES, "int32", ("K", "N"), awq),
            StoredTensor("scales", Role.SCALE, "float32", ("G", "N")),
            StoredTensor("qzeros", Role.ZERO, "int32", ("G", "N"), awq),
        ]
        tensors = {"qweight": pack(v.codes.t(), awq), "scales": v.scale.t().contiguous()}
        if v.zero is not None:
            tensors["qzeros"] = pack(v.zero.t(), awq)
    else:
        along_k, along_n = Packing(4, "K"), Packing(4, "N")
        described = [
            StoredTensor("weight_packed", Role.CODES, "int32", ("N", "K"), along_k),
            StoredTensor("weight_scale", Role.SCALE, "float32", ("N", "G")),
            StoredTensor("weight_zero_point", Role.ZERO, "int32", ("N", "G"), along_n),
        ]
        tensors = {"weight_packed": pack(v.codes, along_k), "weight_scale": v.scale.clone()}
        if v.zero is not None:
            tensors["weight_zero_point"] = pack(v.zero, along_n, 0)
    if v.zero is None:
        described = [tensor for tensor in described if tensor.role is not Role.ZERO]
    if v.index is not None:
        described.append(index)
        tensors["g_idx"] = v.index.to(torch.int32)
    return tuple(described), tensors


def part_of(fmt: str, v: Values, dtype: str = "bfloat16") -> Part:
    """Descriptor and weights of the layer, by the same way a checkpoint takes."""
    described, tensors = stored(fmt, v)
    weight = WeightSpec(
        v.element,
        ScaleSpec("float32", "group", v.group),
        None if v.zero is None else ZeroSpec("integer", "uint8"),
    )
    n, k = v.codes.shape
    source = ShardSource("layer", CheckpointScheme(weight, described), n, k, 0, n, 0, k)
    (part,) = refine([LoadedShard(source, tensors)], LayerContext(dtype, dtype))
    return part


def prepared(part: Part) -> tuple[VllmNativeBackend, dict[str, torch.Tensor]]:
    verdict = VllmNativeBackend.can_implement(part.descriptor, HERE)
    assert verdict, str(verdict)
    backend = VllmNativeBackend(part.descriptor)
    return backend, backend.prep_weights_for_execution(part.weights)


def reference_output(part: Part, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``ReferenceBackend`` with fp32 output."""
    wide = ReferenceBackend(replace(part.descriptor, output_dtype="float32"))
    return wide.apply(wide.prep_weights_for_execution(part.weights), x, bias)


def as_multiplied(part: Part) -> torch.Tensor:
    """ŵ [N, K of x] as the contract says the kernel multiplies it: scale cast, product rounded."""
    rows = part.weights.rows(0, part.weights.n)
    assert rows.scale is not None
    dtype = torch_dtype(part.descriptor.input_dtype)
    code = part.descriptor.weight.element.decode(rows.codes)
    if rows.zero is not None:
        code = code - rows.zero.float().repeat_interleave(part.descriptor.group_size, 1)
    scale = rows.scale.to(dtype).float().repeat_interleave(part.descriptor.group_size, 1)
    weight = (code * scale).to(dtype).double()
    if part.weights.permutation is None:
        return weight
    order = part.weights.permutation.long()
    out = torch.zeros(weight.shape[0], part.descriptor.in_features, dtype=torch.float64)
    return out.index_add_(1, order[order >= 0], weight[:, order >= 0])


def assert_within_contract(
    part: Part, got: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """``got`` [M, N] is in the stated contract, and in the standard one for rounded weights."""
    d = part.descriptor
    offset = 0.0 if bias is None else bias.double()
    plain = part.weights.dequantize(0, d.n)
    expected = x.double() @ plain.double().t() + offset
    allowed = contract_bound(
        x,
        plain.abs(),
        expected,
        d.output_dtype,
        VllmNativeBackend.contract(d),
    )
    reference = reference_output(part, x, bias).double()
    slack = contract_bound(x, plain.abs(), expected, "float32", ReferenceBackend.contract(d))
    assert bool(((got.double() - expected).abs() <= allowed).all())
    assert bool(((got.double() - reference).abs() <= allowed + slack).all())

    # This bound is much closer: one code off by one in a row of hundreds breaks it.
    weight = as_multiplied(part)
    rounded = x.double() @ weight.t() + offset
    close = contract_bound(x, weight.abs(), rounded, d.output_dtype)
    worst = float(((got.double() - rounded).abs() / close).max()) if got.numel() else 0.0
    assert worst <= 1, f"{worst:.3g} times the error allowed for weights rounded to {d.input_dtype}"


# --- right numbers -------------------------------------------------------------------------------


@needs_kernel
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("n", "k", "group", "m"),
    [
        (32, 32, 32, 1),
        (64, 128, 32, 5),
        (96, 96, 2, 3),
        (32, 160, 10, 9),
        (224, 640, 128, 33),
        (64, 1024, 1024, 2),
    ],
)
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_output_is_within_the_contract(
    fmt: str, zero: bool, dtype: str, n: int, k: int, group: int, m: int, with_bias: bool
) -> None:
    part = part_of(fmt, values(n, k, group, zero=zero, scale_dtype=dtype), dtype)
    backend, tensors = prepared(part)
    x = torch.randn(m, k).to(torch_dtype(dtype))
    bias = torch.randn(n).to(torch_dtype(dtype)) if with_bias else None
    got = backend.apply(tensors, x, bias)
    assert got.dtype == torch_dtype(dtype)
    assert_within_contract(part, got, x, bias)


@needs_kernel
@settings(max_examples=25)
@given(
    n=st.integers(1, 6).map(lambda b: 32 * b),
    half_group=st.sampled_from([1, 2, 4, 8, 16, 32, 48]),
    multiple=st.integers(1, 4),
    m=st.integers(0, 20),
    fmt=st.sampled_from(FORMATS),
    zero=st.booleans(),
    scale_dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    seed=st.integers(0, 1 << 16),
)
def test_any_accepted_shape_is_right(
    n: int,
    half_group: int,
    multiple: int,
    m: int,
    fmt: str,
    zero: bool,
    scale_dtype: str,
    seed: int,
) -> None:
    group = 2 * half_group
    k = 96 * multiple * group // torch.gcd(torch.tensor(96), torch.tensor(group)).item()
    part = part_of(fmt, values(n, int(k), group, zero=zero, scale_dtype=scale_dtype, seed=seed))
    backend, tensors = prepared(part)
    x = torch.randn(m, int(k), generator=torch.Generator().manual_seed(seed)).bfloat16()
    assert_within_contract(part, backend.apply(tensors, x), x)


@needs_kernel
def test_a_single_wrong_code_breaks_the_close_bound() -> None:
    """The tests above can fail: one code off by one among 256 is noticed."""
    right = values(32, 256, 128, zero=True)
    codes = right.codes.clone()
    codes[3, 177] ^= 1
    backend, tensors = prepared(part_of("awq", replace(right, codes=codes)))
    x = torch.randn(4, 256).sign().bfloat16()
    with pytest.raises(AssertionError, match="times the error allowed"):
        assert_within_contract(part_of("awq", right), backend.apply(tensors, x), x)


@needs_kernel
def test_the_standard_contract_would_be_a_lie() -> None:
    """Weights are rounded, so ``weight_rounding`` is not 0, and it is one rounding of the dtype."""
    part = part_of("compressed-tensors", values(64, 256, 32))
    backend, tensors = prepared(part)
    x = torch.randn(8, 256).bfloat16()
    plain = part.weights.dequantize(0, 64)
    expected = x.double() @ plain.double().t()
    error = (backend.apply(tensors, x).double() - expected).abs()
    assert bool((error > contract_bound(x, plain.abs(), expected, "bfloat16")).any())
    assert VllmNativeBackend.contract(part.descriptor).weight_rounding == 2.0**-8
    half = replace(part.descriptor, input_dtype="float16")
    assert VllmNativeBackend.contract(half).weight_rounding == pytest.approx(2.0**-10, rel=1e-3)


@needs_kernel
@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "asymmetric"])
def test_every_format_is_prepared_to_the_same_tensors(zero: bool) -> None:
    first, *others = (prepared(part_of(fmt, values(64, 256, 64, zero=zero)))[1] for fmt in FORMATS)
    names = ["weight_packed", "weight_scale", *(["weight_zero_point"] if zero else [])]
    assert set(first) == {f"cpuwna16_{name}" for name in names}
    for other in others:
        assert first.keys() == other.keys()
        for name, tensor in first.items():
            assert torch.equal(tensor, other[name]), name
            assert type(other[name]) is torch.Tensor


@needs_kernel
@pytest.mark.parametrize("bias", [0, 7, 15])
def test_other_biases_become_constant_zero_points(bias: int) -> None:
    """vLLM's class accepts ``uint4`` without zero points; its operator then takes code 8 as 0."""
    part = part_of("compressed-tensors", replace(values(), element=uint(4, bias)))
    backend, tensors = prepared(part)
    assert "cpuwna16_weight_zero_point" in tensors
    x = torch.randn(3, 128).bfloat16()
    assert_within_contract(part, backend.apply(tensors, x), x)


@needs_kernel
def test_zero_points_all_in_the_middle_need_no_zero_points() -> None:
    plain = values(zero=True)
    part = part_of("awq", replace(plain, zero=torch.full_like(plain.scale, 8, dtype=torch.uint8)))
    backend, tensors = prepared(part)
    assert part.descriptor.weight.element == uint(4, 8)
    assert "cpuwna16_weight_zero_point" not in tensors
    x = torch.randn(3, 128).bfloat16()
    assert_within_contract(part, backend.apply(tensors, x), x)


@needs_kernel
@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("uneven", [False, True], ids=["equal groups", "filled groups"])
def test_activation_order_is_a_gather(zero: bool, uneven: bool) -> None:
    plain = values(64, 256, 64, zero=zero)
    index = (torch.arange(256) // 64)[torch.randperm(256)]
    if uneven:
        index[:1] = (index[:1] + 1) % 4
    part = part_of("gptq", replace(plain, index=index))
    order = part.descriptor.channel_order
    assert order is not None
    assert order.padded == uneven
    backend, tensors = prepared(part)
    x = torch.randn(5, 256).bfloat16()
    x[:, 0] = 0
    kept = x.clone()
    assert_within_contract(part, backend.apply(tensors, x), x)
    assert torch.equal(x, kept), "apply changed its input"


@needs_kernel
@pytest.mark.parametrize("ordered", [False, True], ids=["", "act order"])
def test_any_strides_and_ranks(ordered: bool) -> None:
    plain = values(64, 128, 32, zero=True)
    index = (torch.arange(128) // 32).flip(0)
    part = part_of("gptq", replace(plain, index=index if ordered else None))
    backend, tensors = prepared(part)
    base = torch.randn(6, 128).bfloat16()
    want = backend.apply(tensors, base)
    assert_within_contract(part, want, base)
    wide = torch.zeros(6, 300, dtype=torch.bfloat16)
    wide[:, 7:263:2] = base
    for x in (base.t().contiguous().t(), wide[:, 7:263:2]):
        assert not x.is_contiguous()
        assert torch.equal(backend.apply(tensors, x), want)
    wide[:, 100:228] = base
    assert torch.equal(backend.apply(tensors, wide[:, 100:228]), want)
    assert torch.equal(backend.apply(tensors, base.view(2, 3, 128)), want.view(2, 3, 64))
    assert torch.equal(backend.apply(tensors, base[0]), want[0])
    assert torch.equal(backend.apply(tensors, base[:1].expand(4, 128)), want[:1].expand(4, 64))
    assert backend.apply(tensors, base[:0]).shape == (0, 64)
    assert backend.apply(tensors, base.new_empty(2, 0, 128)).shape == (2, 0, 64)


@needs_kernel
def test_pieces_join_to_what_one_repacking_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    part = part_of("awq", values(224, 128, 32, zero=True))
    whole = prepared(part)[1]
    monkeypatch.setattr(vllm_native.cpu, "PIECE_CODES", 96 * 128)
    pieces = prepared(part)[1]
    for name, tensor in whole.items():
        assert torch.equal(tensor, pieces[name]), name
        assert pieces[name].is_contiguous()


# --- what ran ------------------------------------------------------------------------------------


@needs_kernel
def test_vllms_own_class_repacks_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel

    ran: list[str] = []

    def recorded(method: str) -> Any:
        real = getattr(CPUWNA16LinearKernel, method)

        def record(self: Any, *args: Any, **keywords: Any) -> Any:
            ran.append(method)
            return real(self, *args, **keywords)

        return record

    for method in ("process_weights_after_loading", "apply_weights"):
        monkeypatch.setattr(CPUWNA16LinearKernel, method, recorded(method))
    part = part_of("gptq", values(zero=True))
    assert VllmNativeBackend.variant(part.descriptor, HERE) == CPUWNA16LinearKernel.__name__
    backend, tensors = prepared(part)
    assert ran == ["process_weights_after_loading"]
    vllm_native.CALLS.reset()
    backend.apply(tensors, torch.randn(2, 128).bfloat16())
    backend.apply(tensors, torch.randn(1, 128).bfloat16())
    assert ran.count("apply_weights") == vllm_native.CALLS.count == 2


@needs_kernel
def test_a_new_instance_needs_only_the_tensors() -> None:
    """Prepared tensors may come from another process: nothing else may be remembered."""
    part = part_of("gptq", values(zero=True))
    backend, tensors = prepared(part)
    x = torch.randn(2, 128).bfloat16()
    want = backend.apply(tensors, x)
    op.ready.cache_clear()
    mixed_precision.repacked_attributes.cache_clear()
    copied = {name: tensor.clone() for name, tensor in tensors.items()}
    assert torch.equal(VllmNativeBackend(part.descriptor).apply(copied, x), want)


@needs_kernel
@pytest.mark.parametrize("ordered", [False, True], ids=["", "act order"])
def test_compiled_without_a_graph_break_and_still_counted(ordered: bool) -> None:
    index = (torch.arange(128) // 32).flip(0)
    part = part_of("gptq", replace(values(zero=True), index=index if ordered else None))
    backend, tensors = prepared(part)
    bias = torch.randn(64).bfloat16()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(backend.apply(tensors, x * 2, bias)) + 1

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for m in (3, 8, 1):
        x = torch.randn(m, 128).bfloat16()
        vllm_native.CALLS.reset()
        got = compiled(x)
        assert vllm_native.CALLS.count == 1
        assert torch.equal(got, layer(x))


@needs_kernel
@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "asymmetric"])
def test_the_op_is_a_well_behaved_custom_op(zero: bool) -> None:
    part = part_of("gptq", values(zero=zero))
    backend, prefixed = prepared(part)
    t = {name.removeprefix("cpuwna16_"): tensor for name, tensor in prefixed.items()}
    order = torch.arange(127, -1, -1, dtype=torch.int32)
    x = torch.randn(4, 128).bfloat16()
    for gather in (None, order):
        torch.library.opcheck(
            torch.ops.compressed_linear.vllm_native_linear.default,
            (
                *(x, list(t.values()), gather, None, None, ",".join(t)),
                *("cpuwna16", backend.text, "cpu", 64, torch.bfloat16),
            ),
        )


# --- refusals ------------------------------------------------------------------------------------


def descriptor(
    n: int = 64,
    k: int = 128,
    element: ElementType = uint(4, 8),  # noqa: B008  # frozen
    scale: ScaleSpec | None = ScaleSpec("bfloat16", "group", 32),  # noqa: B008  # frozen
    zero: ZeroSpec | None = None,
    dtype: str = "bfloat16",
    **fields: Any,
) -> CompressedLinearDescriptor:
    weight = WeightSpec(element, scale, zero, fields.pop("row_scale", None))
    fields.setdefault("output_dtype", dtype)
    return CompressedLinearDescriptor(k, n, weight, dtype, **fields)


def reasons(d: CompressedLinearDescriptor, platform: Platform = HERE) -> str:
    verdict = VllmNativeBackend.can_implement(d, platform)
    assert not verdict
    return "\n".join(verdict.reasons)


@needs_kernel
@pytest.mark.parametrize(
    ("declined", "expected"),
    [
        (descriptor(n=40), ["CPUWNA16LinearKernel: Output size (40)"]),
        (descriptor(k=144, scale=ScaleSpec("bfloat16", "group", 16)), ["Input size (144)"]),
        (
            descriptor(k=96, scale=ScaleSpec("bfloat16", "group", 3)),
            ["CPUWNA16LinearKernel: Group size (3)"],
        ),
        (
            descriptor(element=uint(8, 128)),
            [
                "8-bit integer weights (supported bits: 4)",
                "CPUWNA16LinearKernel: Quant type (uint8b128)",
                "Dynamic4bitLinearKernel: Unsupported quant type uint8b128",
                "ZentorchWNA16LinearKernel:",
            ],
        ),
        (descriptor(element=uint(3, 4)), ["3-bit integer weights", "Quant type (uint3b4)"]),
        (descriptor(element=E2M1), ["e2m1 weights (supported: uint4)"]),
        (
            descriptor(element=uint(4), zero=ZeroSpec("float", "float16")),
            ["float zero points (supported: integer)"],
        ),
        (descriptor(zero=ZeroSpec("integer", "uint8")), ["zero points on top of a bias of 8"]),
        (descriptor(element=uint(4, 16)), ["bias 16 (supported: 0 to 15)"]),
        (descriptor(scale=None), ["weights without scales"]),
        (descriptor(element=BF16, scale=None), ["bf16 weights (supported: uint4)"]),
        (descriptor(scale=ScaleSpec("float8_e4m3fn", "group", 32)), ["scale dtype float8_e4m3fn"]),
        (descriptor(dtype="float32"), ["input dtype float32 (supported: bfloat16, float16)"]),
        (descriptor(dtype="float16"), ["scale dtype bfloat16 with float16 activations"]),
        (descriptor(output_dtype="float32"), ["output dtype float32"]),
        (descriptor(bias_dtype="float32"), ["bias dtype float32"]),
        (descriptor(row_scale="float32"), ["second-level scales"]),
        (descriptor(prescale="float16"), ["a per-channel scale of the activations"]),
        (descriptor(transform=TransformSpec("hadamard", "input", 32)), ["Hadamard"]),
        (
            descriptor(activation=ActivationSpec(uint(8, 128), True, "token")),
            ["activations as int8 dynamic per token (supported: none)"],
        ),
        (descriptor(n=0), ["an empty weight (0x128)"]),
        (
            descriptor(
                channel_order=ChannelOrder(144, padded=True),
                k=128,
                scale=ScaleSpec("bfloat16", "group", 16),
            ),
            ["Input size (144)"],
        ),
        (
            descriptor(
                n=40,
                k=84,
                element=uint(8, 128),
                scale=ScaleSpec("float8_e4m3fn", "group", 21),
                zero=ZeroSpec("float", "float16"),
                dtype="float32",
                output_dtype="bfloat16",
                bias_dtype="float16",
            ),
            [
                "8-bit integer weights",
                "input dtype float32",
                "scale dtype float8_e4m3fn",
                "float zero points",
                "output dtype bfloat16",
                "bias dtype float16",
                "zero points on top of a bias of 128",
                "Quant type",
                "Group size (21)",
                "Input size (84)",
                "Output size (40)",
            ],
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, CompressedLinearDescriptor) else "",
)
def test_every_reason_is_given(declined: CompressedLinearDescriptor, expected: list[str]) -> None:
    text = reasons(declined)
    for reason in expected:
        assert reason in text
    if len(expected) == 1:
        own = [
            line
            for line in text.splitlines()
            # What the other classes say of the same descriptor is listed too.
            if not line.startswith(("Dynamic4bit", "Zentorch"))
        ]
        assert len(own) == 1, own


@needs_kernel
def test_a_declined_descriptor_is_not_prepared_either() -> None:
    """vLLM's constructor asserts a tuple, which is always true; ours asks."""
    request = mixed_precision.KernelRequest(100, 64, 4, 8, False, -1, "bfloat16")
    kernel = tables.kernel_class("mixed precision", "cpu", vllm_native.CPU_KERNEL)
    with pytest.raises(ValueError, match=r"Input size \(100\)"):
        mixed_precision.build(kernel, request)
    with pytest.raises(ValueError, match=saying("Nothing")):
        tables.kernel_class("mixed precision", "cpu", "Nothing")


@needs_kernel
def test_a_scale_that_float16_weights_cannot_have_is_refused() -> None:
    plain = values(scale_dtype="float16")
    plain.scale[3, 2] = 5000.0
    part = part_of("awq", plain, "float16")
    with pytest.raises(ValueError, match=saying("scale", 5000, 0, 63)):
        VllmNativeBackend(part.descriptor).prep_weights_for_execution(part.weights)


@needs_kernel
def test_a_zero_point_that_does_not_fit_is_refused() -> None:
    plain = values(zero=True)
    assert plain.zero is not None
    plain.zero[5, 1] = 16
    scheme = (
        StoredTensor("c", Role.CODES, "uint8", ("N", "K"), Packing(8, "K", "uint8")),
        StoredTensor("s", Role.SCALE, "float32", ("N", "G")),
        StoredTensor("z", Role.ZERO, "uint8", ("N", "G")),
    )
    weight = WeightSpec(uint(4), ScaleSpec("float32", "group", 32), ZeroSpec("integer", "uint8"))
    source = ShardSource("layer", CheckpointScheme(weight, scheme), 64, 128, 0, 64, 0, 128)
    tensors = {"c": plain.codes, "s": plain.scale, "z": plain.zero}
    (part,) = refine([LoadedShard(source, tensors)], LayerContext("bfloat16", "bfloat16"))
    with pytest.raises(ValueError, match=saying("zero point", 16, 0, 63)):
        VllmNativeBackend(part.descriptor).prep_weights_for_execution(part.weights)


# --- machines and vLLMs that are not here --------------------------------------------------------


def test_the_operator_is_looked_for_in_the_library_of_the_platform() -> None:
    if host.machine() != "x86_64":
        pytest.skip("the tiers are those of x86")
    assert "_C_AVX2, the library vLLM loads on cpu:avx2, has no operator cpu_gemm_wna16" in reasons(
        descriptor(), Platform.parse("cpu:avx2")
    )
    assert VllmNativeBackend.can_implement(descriptor(), Platform.parse("cpu:avx512"))
    assert VllmNativeBackend.can_implement(descriptor(), Platform.parse("cpu:avx512bf16"))
    avx2 = Platform.parse("cpu:avx2")
    assert VllmNativeBackend.can_implement(
        descriptor(), dataclasses.replace(avx2, ops=avx2.ops | {"_C::cpu_gemm_wna16"})
    )
    told = dataclasses.replace(HERE, missing=(("_C::cpu_gemm_wna16", "not built today"),))
    assert "not built today" in reasons(descriptor(), told)


def test_another_architecture_is_declined() -> None:
    other = "aarch64" if host.machine() == "x86_64" else "x86_64"
    assert "the vLLM installed here is for" in reasons(
        descriptor(), Platform("cpu", other, frozenset())
    )


def test_silent_activation_quantization_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    if host.machine() != "x86_64":
        pytest.skip("AMX is x86")
    amx = Platform.parse("cpu:amx")
    monkeypatch.delenv("VLLM_CPU_INT4_W4A8", raising=False)
    assert says(reasons(descriptor(), amx), "VLLM_CPU_INT4_W4A8=0")
    half = descriptor(dtype="float16", scale=ScaleSpec("float16", "group", 32))
    assert VllmNativeBackend.can_implement(half, amx)
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "0")
    assert VllmNativeBackend.can_implement(descriptor(), amx)


@needs_kernel
def test_weights_repacked_for_8_bit_activations_stop_the_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part = part_of("gptq", values())
    real = mixed_precision.repack

    def repack(*args: Any) -> torch.nn.Module:
        layer = real(*args)
        layer.use_w4a8 = True  # type: ignore[assignment]
        return layer

    monkeypatch.setattr(mixed_precision, "repack", repack)
    with pytest.raises(RuntimeError, match=saying("8-bit")):
        VllmNativeBackend(part.descriptor).prep_weights_for_execution(part.weights)


@pytest.mark.parametrize("device", ["rocm", "xpu"])
def test_devices_of_others_are_asked_class_by_class(device: str) -> None:
    text = reasons(descriptor(element=uint(8, 128)), Platform.parse(device))
    names = {
        "rocm": ("RDNA3W4A16LinearKernel", "TritonW4A16LinearKernel"),
        "xpu": ("XPUwNa16LinearKernel",),
    }
    for name in names[device]:
        assert f"{name}: " in text


@needs_kernel
def test_vllms_own_switch_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", "CPUWNA16LinearKernel")
    assert says(reasons(descriptor()), "CPUWNA16LinearKernel", "VLLM_DISABLED_KERNELS")


_HOME = "vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel"


def test_a_vllm_with_another_interface_is_a_reason_and_no_exception(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = importlib.import_module(_HOME)

    @dataclass
    class Newer:
        full_weight_shape: tuple[int, int]
        quant_key: Mapping[str, str]

    monkeypatch.setattr(home, "MPLinearLayerConfig", Newer)
    tables.unavailable.cache_clear()
    assert says(reasons(descriptor()), "'quant_key'")


def test_a_class_without_our_keywords_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    home = importlib.import_module(_HOME)

    def init(self: Any, config: Any) -> None: ...

    monkeypatch.setattr(home.MPLinearKernel, "__init__", init)
    tables.unavailable.cache_clear()
    assert says(reasons(descriptor()), "'c'")


@needs_kernel
def test_a_check_that_fails_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel

    def broken(config: Any) -> tuple[bool, str | None]:
        raise KeyError("capability")

    monkeypatch.setattr(CPUWNA16LinearKernel, "can_implement", broken)
    assert says(reasons(descriptor()), "can_implement", "KeyError", "'capability'")


@needs_kernel
def test_a_class_that_accepts_but_is_not_wired_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.kernels.linear.mixed_precision.zentorch import (
        ZentorchWNA16LinearKernel,
    )

    monkeypatch.setattr(ZentorchWNA16LinearKernel, "can_implement", lambda config: (True, None))
    text = reasons(descriptor(n=40))
    assert says(text, "ZentorchWNA16LinearKernel", "descriptors")
    assert "CPUWNA16LinearKernel: Output size (40)" in text


# --- real checkpoints ----------------------------------------------------------------------------

_GPTQ_ZERO = Packing(4, "N", zero_bump=ZeroBump.WORD)
_CHECKPOINTS = {
    "gptqmodel-gptq-w4-g128-sym": ("gptq", 128, _GPTQ_ZERO),
    "gptqmodel-gptq-w4-g32-asym-descact": ("gptq", 32, _GPTQ_ZERO),
    "gptqmodel-gptqv2-w4-g64-asym": ("gptq", 64, Packing(4, "N")),
    "autoawq-awq-gemm-g128-asym": ("awq", 128, None),
    "llmcompressor-w4a16-asym-g32": ("compressed-tensors", 32, None),
    "llmcompressor-w4a16-sym-channel": ("compressed-tensors", -1, None),
}
_LINEARS = ("self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")


@needs_kernel
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", _CHECKPOINTS)
def test_real_checkpoints(name: str, dtype: str) -> None:
    fmt, group, zero_packing = _CHECKPOINTS[name]
    tensors, reference = checkpoint_tensors(name), checkpoint_reference(name)
    for layer in (f"model.layers.1.{linear}" for linear in _LINEARS):
        own = {
            key.removeprefix(layer + "."): tensor
            for key, tensor in tensors.items()
            if key.startswith(layer + ".")
        }
        own.pop("weight_shape", None)
        part = _checkpoint_part(fmt, group, zero_packing, own, dtype)
        plain = part.weights.dequantize(0, part.weights.n)
        assert_matches_reference(plain, reference, layer)
        if dtype == "float16" and part.descriptor.weight.scale.dtype != "float16":  # type: ignore[union-attr]
            assert says(reasons(part.descriptor), "float16", "activations")
            continue
        backend, ready = prepared(part)
        # Through the identity the kernel shows each weight as it multiplies it.
        seen = backend.apply(ready, torch.eye(plain.shape[1]).to(torch_dtype(dtype))).t()
        rounding = VllmNativeBackend.contract(part.descriptor).weight_rounding
        assert bool(
            ((seen.double() - plain.double()).abs() <= rounding * plain.abs() + 2.0**-25).all()
        )
        x = torch.randn(7, plain.shape[1]).to(torch_dtype(dtype))
        assert_within_contract(part, backend.apply(ready, x), x)


def _checkpoint_part(
    fmt: str,
    group: int,
    zero_packing: Packing | None,
    own: dict[str, torch.Tensor],
    dtype: str,
) -> Part:
    """The layer as its tool stored it, described as ``stored`` describes synthetic ones."""
    codes = own["weight_packed" if fmt == "compressed-tensors" else "qweight"]
    n, k = {
        "gptq": (codes.shape[1], codes.shape[0] * 8),
        "awq": (codes.shape[1] * 8, codes.shape[0]),
        "compressed-tensors": (codes.shape[0], codes.shape[1] * 8),
    }[fmt]
    asymmetric = "qzeros" in own or "weight_zero_point" in own
    nothing = torch.zeros(8, 8, dtype=torch.uint8)
    sample = Values(
        nothing,
        nothing if asymmetric else None,
        nothing.float(),
        8,
        own.get("g_idx"),
    )
    described = tuple(
        replace(tensor, packing=zero_packing)
        if tensor.role is Role.ZERO and zero_packing is not None
        else tensor
        for tensor in stored(fmt, sample)[0]
    )
    weight = WeightSpec(
        uint(4) if asymmetric else uint(4, 8),
        ScaleSpec("float32", "group", group),
        ZeroSpec("integer", "uint8") if asymmetric else None,
    )
    source = ShardSource("layer", CheckpointScheme(weight, described), n, k, 0, n, 0, k)
    (part,) = refine([LoadedShard(source, own)], LayerContext(dtype, dtype))
    return part


@needs_kernel
def test_conformance() -> None:
    report = check_backend(VllmNativeBackend, HERE)
    report.raise_if_failed()
    assert len(report.of("passed")) >= 30
