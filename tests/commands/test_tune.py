# SPDX-License-Identifier: Apache-2.0
"""``tune``: what it measures, on backends that compute right and take the time a test gives them,
and what loading then chooses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

from tests.support.checkpoints import checkpoint
from tests.support.messages import saying, says
from tests.support.model_loading import loaded
from vllm.compressed_linear import settings
from vllm.compressed_linear.backends import measurements, registry
from vllm.compressed_linear.backends.measurements import MachineKey, Measured, TuneFileError, read
from vllm.compressed_linear.backends.reference import ReferenceBackend
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.parts import refine
from vllm.compressed_linear.commands import cli
from vllm.compressed_linear.commands.explain.explain import explain
from vllm.compressed_linear.commands.tune import tune as tuning
from vllm.compressed_linear.commands.tune.random_weights import random_weights
from vllm.compressed_linear.commands.tune.text import print_result
from vllm.compressed_linear.commands.tune.tune import Measuring, TuneError, tune
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN, detect_platform
from vllm.compressed_linear.machine import limits as machine
from vllm.compressed_linear.machine import timing
from vllm.compressed_linear.machine.cost import GPU_MIX, MIX, expected_seconds
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.prepare.self_check import SelfCheckError, self_check
from vllm.compressed_linear.settings import Settings
from vllm.compressed_linear.spec.descriptor import (
    ActivationSpec,
    CompressedLinearDescriptor,
    ScaleSpec,
    TransformSpec,
    WeightSpec,
)
from vllm.compressed_linear.spec.elements import E2M1, E4M3, INT8, torch_dtype, uint
from vllm.compressed_linear.testing import Case, conformance_cases

MODEL = "gptqmodel-gptq-w4-g128-sym"
ACT_ORDER = "gptqmodel-gptq-w4-g32-asym-descact"


class Toy(ReferenceBackend):
    """Computes as ``reference`` does, in ``per_row`` seconds for each token and output channel of a
    clock that nothing else moves. ``price`` is what it says of itself."""

    per_row: ClassVar[float]
    price: ClassVar[float]
    now: ClassVar[float] = 0.0
    sizes: ClassVar[list[int]] = []

    @classmethod
    def seconds(cls, descriptor: CompressedLinearDescriptor, platform: Platform, m: int) -> float:
        return cls.price

    def apply(
        self,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        Toy.now += x.shape[0] * self.descriptor.n * self.per_row
        Toy.sizes.append(self.descriptor.n)
        return super().apply(tensors, x, bias)


class Fast(Toy):
    name = "fast"
    per_row = 1e-6
    price = 2.0


class Slow(Toy):
    """Says that it is the faster one."""

    name = "slow"
    per_row = 3e-6
    price = 1.0


MEASURING = Measuring(budget=0.0, cache_bytes=1 << 16, now=lambda: Toy.now, matrix=16)


@pytest.fixture(autouse=True)
def only_toys(clean_registry: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in registry.backends():
        if name != registry.REFERENCE:
            registry.unregister_backend(name)
    registry.register_backend(Fast)
    registry.register_backend(Slow)
    measurements._load.cache_clear()
    monkeypatch.setattr(Toy, "sizes", [])
    # The rates of a machine on which only toys take time.
    monkeypatch.setattr(timing, "best_rate", lambda work, action, seconds, now: 12345678.9)
    yield
    measurements._load.cache_clear()


def tuned(model: str, output: Path, **options: Any) -> tuning.TuneResult:
    given = {"platform": detect_platform(), "measuring": MEASURING, **options}
    return tune(str(checkpoint(model)), output=output, **given)


def test_every_distinct_layer_is_measured_for_every_m(tmp_path: Path) -> None:
    file = tmp_path / "tune.json"
    steps: list[tuple[str, int, int]] = []
    result = tuned(MODEL, file, progress=lambda *step: steps.append(step))
    assert not result.failures
    assert len(result.layers) == 5
    for layer in result.layers:
        n = layer.descriptor.n
        assert set(layer.measured) == {"fast", "slow"}
        for name, per_row in (("fast", 1e-6), ("slow", 3e-6)):
            for m in MIX:
                assert layer.measured[name].seconds[m] == pytest.approx(m * n * per_row, rel=1e-3)
        assert (layer.chosen, layer.estimate) == ("fast", "slow")
    assert {name for layer in result.layers for name in layer.layers} >= {
        "lm_head",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    }
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)
    assert steps[-1][1:] == (len(result.layers) * len(MIX),) * 2
    key = MachineKey.of(detect_platform())
    assert key is not None
    assert read(file) == {key: result.measurements}
    limits = result.measurements.limits
    assert limits == machine.MachineLimits(*[1.235e7] * 4)


def test_loading_and_explain_choose_by_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tune.json"
    tuned(MODEL, file)

    def choices() -> set[tuple[str, str]]:
        with loaded(checkpoint(MODEL), "bfloat16"):
            return {(entry.backend, entry.chosen_by) for entry in PROCESS_PLAN.entries.values()}

    assert choices() == {("slow", "cost model")}
    monkeypatch.setenv(settings.TUNE_FILE, str(file))
    assert choices() == {("fast", "tuned")}
    found = explain(str(checkpoint(MODEL)), platform=detect_platform(), settings=Settings.read())
    parts = [part for layer in found.layers for part in layer.likely.parts]
    assert {(part.backend, part.chosen_by) for part in parts} == {("fast", "tuned")}
    monkeypatch.setenv(settings.BACKEND, "slow,unquantized=reference")
    assert choices() == {("slow", "asked for"), ("reference", "asked for")}


def test_a_file_of_other_threads_is_mentioned_once_and_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tune.json"
    tuned(MODEL, file)
    data = json.loads(file.read_text())
    data["machines"][0]["key"]["threads"] += 1
    file.write_text(json.dumps(data))
    monkeypatch.setenv(settings.TUNE_FILE, str(file))
    from vllm.compressed_linear.integration import preparation

    said: list[str] = []
    monkeypatch.setattr(preparation.logger, "warning", lambda text, *a: said.append(text % a))
    with loaded(checkpoint(MODEL), "bfloat16"):
        assert {entry.chosen_by for entry in PROCESS_PLAN.entries.values()} == {"cost model"}
    assert [line for line in said if "tune file" in line] == [
        measurements.load(str(file), detect_platform()).note
    ]
    assert "was made with threads" in said[0]
    found = explain(str(checkpoint(MODEL)), platform=detect_platform(), settings=Settings.read())
    assert said[0] in found.notes


def test_facts_of_the_data_are_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channel order and zero points are known only from the tensors, on every rank."""
    result = tuned(ACT_ORDER, tmp_path / "tune.json")
    orders = [layer.descriptor.channel_order is not None for layer in result.layers]
    assert orders.count(False) == 1  # lm_head
    monkeypatch.setenv(settings.TUNE_FILE, str(tmp_path / "tune.json"))
    with loaded(checkpoint(ACT_ORDER), "bfloat16"):
        assert {entry.chosen_by for entry in PROCESS_PLAN.entries.values()} == {"tuned"}


def test_all_ranks_are_measured(tmp_path: Path) -> None:
    result = tuned(ACT_ORDER, tmp_path / "tune.json", tp_size=2)
    wanted = set()
    for layer in explain(
        str(checkpoint(ACT_ORDER)),
        platform=detect_platform(),
        tp_size=2,
        read_weights=True,
        settings=Settings(),
    ).layers:
        for cases in (layer.cases, *(cases for _, cases in layer.other_ranks)):
            wanted |= {part.descriptor for part in cases[0].parts}
    assert {layer.descriptor for layer in result.layers} == wanted
    assert len(wanted) > 5


def test_only_the_named_backends(tmp_path: Path) -> None:
    file = tmp_path / "tune.json"
    result = tuned(MODEL, file, only=["slow"])
    assert {name for layer in result.layers for name in layer.measured} == {"slow"}
    # What was measured goes before what was not.
    assert {layer.chosen for layer in result.layers} == {"slow"}
    again = tuned(MODEL, file, only=["fast"])
    assert {layer.chosen for layer in again.layers} == {"fast"}
    (found,) = read(file).values()
    assert {frozenset(backends) for backends in found.layers.values()} == {
        frozenset({"fast", "slow"})
    }
    named = tuned(MODEL, file, only=["reference"])
    assert {name for layer in named.layers for name in layer.measured} == {"reference"}


def test_reference_is_measured_where_it_is_alone(tmp_path: Path) -> None:
    registry.unregister_backend("fast")
    registry.unregister_backend("slow")
    result = tuned(MODEL, tmp_path / "tune.json")
    assert {name for layer in result.layers for name in layer.measured} == {"reference"}


def test_a_large_layer_is_cut_and_its_time_scaled(tmp_path: Path) -> None:
    few = Measuring(budget=0.0, cache_bytes=4096, now=lambda: Toy.now, matrix=16)
    result = tuned(MODEL, tmp_path / "tune.json", measuring=few)
    assert max(layer.descriptor.n for layer in result.layers) == 1024
    unit = tuning.ROW_UNIT * torch.get_num_threads()
    assert set(Toy.sizes) == {256, min(512, unit)}
    for layer in result.layers:
        expected = 16 * layer.descriptor.n * 1e-6
        assert layer.measured["fast"].seconds[16] == pytest.approx(expected, rel=1e-3)


def test_a_layer_is_rotated_until_it_leaves_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def apply(self: Toy, tensors: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        seen.append(tensors["codes"].data_ptr())
        return ReferenceBackend.apply(self, tensors, x, bias)

    monkeypatch.setattr(Fast, "apply", apply)
    descriptor = Case(uint(4, 8), 64, 64).build().descriptor
    able = tuning.candidates(descriptor, detect_platform(), ["fast"])
    now = iter(range(10**6))
    measuring = Measuring(budget=30, cache_bytes=8192, now=lambda: float(next(now)))
    tuning.measure_descriptor(descriptor, able, measuring)
    copies = len(set(seen))
    assert copies * 64 * 64 >= tuning.CACHE_MULTIPLE * 8192
    rounds = seen[1 : 1 + copies]  # after the self-check
    assert len(set(rounds)) == copies


def test_what_was_measured_before_an_interruption_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tune.json"
    measure = tuning.measure_descriptor
    done: list[Any] = []

    def interrupted(*arguments: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(arguments[0])
        return measure(*arguments)

    monkeypatch.setattr(tuning, "measure_descriptor", interrupted)
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        tuned(MODEL, file)
    (found,) = read(file).values()
    assert list(found.layers) == done
    assert torch.get_num_threads() == threads


def test_wrong_numbers_are_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Fast.apply
    monkeypatch.setattr(Fast, "apply", lambda *a: right(*a) * 1.5)
    with pytest.raises(SelfCheckError, match=saying("backend fast", "wrong")):
        tuned(MODEL, tmp_path / "tune.json")
    assert not (tmp_path / "tune.json").exists()


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    file = tmp_path / "tune.json"
    with pytest.raises(TuneError, match=saying("'fats'", "fast", "slow")):
        tuned(MODEL, file, only=["fats"])
    with pytest.raises(TuneError, match=saying("cuda:90")):
        tuned(MODEL, file, platform=Platform.parse("cuda:90"))
    file.write_text("{}")
    with pytest.raises(TuneFileError, match=saying("tune file")):
        tuned(MODEL, file)
    assert not Toy.sizes
    assert file.read_text() == "{}"


@pytest.mark.parametrize("case", conformance_cases()[::5], ids=str)
def test_random_weights_are_what_the_descriptor_says(case: Case) -> None:
    """Held against the checkpoint's rules, which know nothing of channel plans."""
    descriptor = case.build().descriptor
    weights = random_weights(descriptor)
    assert (weights.n, weights.k) == (descriptor.n, descriptor.k)
    rows = weights.rows(0, weights.n)
    assert rows.codes.shape == (descriptor.n, descriptor.k)
    for values, spec in (
        (rows.scale, descriptor.weight.scale),
        (rows.zero, descriptor.weight.zero),
    ):
        assert (values is None) == (spec is None)
        if values is not None and spec is not None:
            assert values.shape == (descriptor.n, descriptor.groups)
            assert values.dtype == torch_dtype(spec.dtype)
    order = descriptor.channel_order
    assert (weights.permutation is None) == (order is None)
    if weights.permutation is not None and order is not None:
        assert bool((weights.permutation < 0).any()) == order.padded
    method = ReferenceBackend(descriptor)
    self_check("made up", method, method.prep_weights_for_execution(weights), weights)
    again = random_weights(descriptor).rows(0, descriptor.n)
    assert torch.equal(again.codes, rows.codes)
    if not (order is not None and order.padded) and descriptor.n > 2:
        assert described_anew(descriptor) == descriptor


def described_anew(descriptor: CompressedLinearDescriptor) -> CompressedLinearDescriptor:
    """What loading would say of random weights for ``descriptor``."""
    context = LayerContext(descriptor.input_dtype, descriptor.output_dtype, descriptor.bias_dtype)
    (part,) = refine(random_weights(descriptor).shards, context)
    return part.descriptor


NVFP4 = WeightSpec(E2M1, ScaleSpec("float8_e4m3fn", "group", 16), row_scale="float32")
MXFP4 = WeightSpec(E2M1, ScaleSpec("e8m0", "group", 32))
FP8 = WeightSpec(E4M3, ScaleSpec("float32", "channel"))
INT4 = WeightSpec(uint(4, 8), ScaleSpec("float16", "group", 32))


@pytest.mark.parametrize(
    ("weight", "input_side"),
    [
        (NVFP4, {}),
        (MXFP4, {}),
        (NVFP4, {"activation": ActivationSpec(E2M1, True, "group", True, 16, "float8_e4m3fn", 6)}),
        (FP8, {"activation": ActivationSpec(E4M3, False, "tensor", maximum=448)}),
        (INT4, {"activation": ActivationSpec(INT8, False, "tensor", symmetric=False)}),
        (INT4, {"activation": ActivationSpec(INT8, True, "token")}),
        (INT4, {"prescale": "float32"}),
        (INT4, {"transform": TransformSpec("hadamard", "input", 64)}),
    ],
    ids=str,
)
def test_random_weights_of_quantized_inputs(weight: WeightSpec, input_side: Any) -> None:
    descriptor = CompressedLinearDescriptor(128, 48, weight, "bfloat16", "bfloat16", **input_side)
    assert described_anew(descriptor) == descriptor
    weights = random_weights(descriptor)
    assert (weights.row_scale is not None) == (weight.row_scale is not None)
    activation = descriptor.activation
    assert (weights.input_scale is not None) == bool(activation and activation.needs_scale)
    assert (weights.input_zero is not None) == bool(activation and activation.needs_zero)
    assert bool(torch.isfinite(weights.dequantize(0, 48)).all())
    assert float(weights.dequantize(0, 48).abs().max()) > 0


# The command.


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(settings.TUNE_FILE, "")
    monkeypatch.setattr(machine, "cache_bytes", lambda threads: 1 << 14)
    monkeypatch.setattr(timing, "clock", lambda threads: lambda: Toy.now)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "100"})

    return run


def test_the_command_writes_where_serving_looks(
    call: Callable[..., Result], tmp_path: Path
) -> None:
    model = str(checkpoint(MODEL))
    assert "slow" in call("explain", model).stdout
    result = call("tune", model, "--budget", "0", "--threads", "1")
    assert result.exit_code == 0, result.output
    file = tmp_path / "cache" / "vllm-compressed-linear" / "tune.json"
    words = " ".join(result.stdout.split())
    assert f"written to {file}" in result.stdout.replace("\n", "")
    for part in (
        "1 thread",
        "model.layers.{0-1}.mlp.gate_up_proj 1024 x 256, 4-bit symmetric, groups of 128 (float16)",
        "ms a call M=1 M=4 M=16 M=64 M=512 expected",
        "fast 1.02 4.10 16.4 65.5 524",
        "the cost model would choose slow",
    ):
        assert part in words, result.stdout
    lines = [line for line in result.stdout.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= 100
    (key,) = read(file)
    assert key.threads == 1


def test_options_of_the_command(call: Callable[..., Result], tmp_path: Path) -> None:
    model, file = str(checkpoint(MODEL)), tmp_path / "own.json"
    options = ("--budget", "0", "--output", str(file), "--dtype", "float32")
    result = call("tune", model, *options, "--threads", "2", "--backends", "slow, fast")
    assert result.exit_code == 0, result.output
    ((key, found),) = read(file).items()
    assert key.threads == 2
    assert {d.input_dtype for d in found.layers} == {"float32"}
    assert {frozenset(backends) for backends in found.layers.values()} == {
        frozenset({"fast", "slow"})
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tune", "no/such/model/here"), ("no/such/model/here",)),
        (("tune", "MODEL", "--backends", "fats"), ("'fats'",)),
        (("tune", "MODEL", "--output", "DAMAGED"), ("JSON",)),
        (("tune", "MODEL", "--tp", "3"), (3,)),
    ],
)
def test_errors_are_one_line(
    arguments: tuple[str, ...], message: tuple[object, ...], tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{")
    places = {"MODEL": str(checkpoint(MODEL)), "DAMAGED": str(damaged)}
    command = [sys.executable, "-m", "vllm.compressed_linear.commands.cli"]
    command += [places.get(argument, argument) for argument in arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert says(errors[0], *message)


def test_what_nothing_can_run_is_an_error_after_the_rest(
    call: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The named backend declines lm_head, which is not quantized."""
    declared = Fast.capabilities
    monkeypatch.setattr(
        Fast,
        "capabilities",
        type(declared)(devices=declared.devices, integer_bits=declared.integer_bits),
    )
    result = call("tune", str(checkpoint(MODEL)), "--budget", "0", "--backends", "fast")
    assert result.exit_code == 1
    assert "Error: lm_head (512x256, bf16" in " ".join(result.stdout.split())
    (found,) = read(tmp_path / "cache" / "vllm-compressed-linear" / "tune.json").values()
    assert len(found.layers) == 4


# GPUs: the same, but for the clock and for calls that are replayed from a graph.


class Graph:
    """Makes the calls that a CUDA graph would replay."""

    def __init__(self, call: Any, calls: int) -> None:
        self.call, self.calls = call, calls

    def replay(self) -> None:
        for number in range(self.calls):
            self.call(number)


def test_calls_on_a_gpu_are_replayed_from_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "captured", Graph)

    def empty(method: Any, weights: Any) -> dict[str, torch.Tensor]:
        return {"codes": torch.empty(method.descriptor.n, method.descriptor.k, device="meta")}

    def nothing(method: Any, tensors: Any, x: torch.Tensor, bias: Any) -> torch.Tensor:
        assert x.device == tensors["codes"].device
        return x.new_empty(x.shape[0], method.descriptor.n)

    monkeypatch.setattr(ReferenceBackend, "prep_weights_for_execution", empty)
    monkeypatch.setattr(ReferenceBackend, "apply", nothing)
    platform = Platform.parse("cuda:90")
    # Tensors without memory stand for those on a GPU.
    measuring = Measuring(0.0, 1 << 16, lambda: Toy.now, matrix=16, device="meta")
    (layer, *_) = tuned_layers(platform)
    measured = tuning.measure_descriptor(layer, tuning.candidates(layer, platform), measuring)
    assert set(measured) == {"fast", "slow"}
    for m in GPU_MIX:
        seconds = measured["fast"].seconds[m]
        assert seconds == pytest.approx(m * layer.n * Fast.per_row, rel=1e-3)
    assert set(Toy.sizes) == {layer.n}
    found = Measured("", measured["fast"].seconds, {})
    platform = replace(platform, gpu="a GPU")
    key = MachineKey.of(platform)
    assert key is not None
    shown = tuning.TuneResult(key, layers=[_shown(layer, measured, platform)])
    console = Console(width=120)
    with console.capture() as captured:
        print_result(shown, console)
    assert "a GPU, 132 multiprocessors\n" in captured.get()
    assert "M=2048" in captured.get()
    assert "M=512" not in captured.get()
    assert found.expected == pytest.approx(expected_seconds(found.seconds.__getitem__, GPU_MIX))


def _shown(
    layer: CompressedLinearDescriptor, measured: dict[str, Measured], platform: Platform
) -> tuning.LayerResult:
    able = tuple(tuning.candidates(layer, platform))
    return tuning.LayerResult(layer, ("a layer",), measured, able, "fast")


def tuned_layers(platform: Platform) -> list[CompressedLinearDescriptor]:
    found = explain(str(checkpoint(MODEL)), platform=platform)
    return list(tuning.descriptors(found.layers))


def test_a_gpu_has_a_key_and_a_clock_that_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = replace(Platform.parse("cuda:90"), gpu="NVIDIA H100", multiprocessors=132)
    key = MachineKey.of(gpu)
    assert key is not None
    assert (key.cpu, key.threads, key.isa) == ("NVIDIA H100, 132 multiprocessors", 0, "")
    assert MachineKey.of(Platform.parse("cuda:90")) is None
    waited: list[bool] = []
    properties = SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    measuring = Measuring.of(gpu, 1.0)
    assert (measuring.device, measuring.cache_bytes) == ("cuda", 50 << 20)
    assert measuring.now() <= measuring.now()
    assert len(waited) == 2
    assert measuring.repeats(1) > measuring.repeats(2048) > 1
