# SPDX-License-Identifier: Apache-2.0
"""Runs a backend over cases and holds it against exact results.

The expected result is computed in float64 from the stored numbers; the allowed error is the
numerical contract's (``backend.contract_bound``), never a tolerance of the kit's own.
"""

from __future__ import annotations

import contextlib
import functools
import math
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

import torch

from vllm.compressed_linear.backends.base import QuantLinearMethod, Verdict
from vllm.compressed_linear.backends.contract import lookup_bound
from vllm.compressed_linear.machine import timing
from vllm.compressed_linear.machine.cost import mix
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import torch_dtype
from vllm.compressed_linear.testing.cases import Case, Problem
from vllm.compressed_linear.testing.report import CaseResult, Failure, Report
from vllm.compressed_linear.testing.suite import conformance_cases

ROWS = (0, 1, 2, 3, 16, 17, 64, 257)
"""Every M that is tried: none, single tokens, odd ones, sizes of tiles and just beyond."""

Tensors = Mapping[str, torch.Tensor]
T = TypeVar("T")


def check_backend(
    backend: type[QuantLinearMethod],
    platform: Platform | None = None,
    cases: Iterable[Case] | None = None,
    *,
    rows: Iterable[int] = ROWS,
    compiled: bool = True,
    device: str | None = None,
) -> Report:
    """Run ``backend`` over ``cases`` (default: all of ``conformance_cases``) on ``platform``.

    ``platform`` is what ``can_implement`` is asked about (default: this machine); the tensors lie
    on its device, or on ``device``, for kernels that are emulated there. ``rows``: the batch sizes
    M. ``compiled``: also run one case of each kind of element under torch.compile. What fails is in
    the report (``Report.raise_if_failed``); only a platform whose device is not there is a
    ``ValueError``.
    """
    platform = platform or Platform.detect()
    rows, results = tuple(rows), []
    traced: set[tuple[str, bool, bool]] = set()
    for case in conformance_cases() if cases is None else cases:
        kind = (case.element.kind, case.bias_dtype is not None, case.activation is not None)
        result = check_case(
            backend,
            case,
            platform,
            rows=rows,
            compiled=compiled and kind not in traced,
            device=device,
        )
        if result.outcome != "declined":
            traced.add(kind)
        results.append(result)
    return Report(getattr(backend, "name", backend.__name__), platform.name, tuple(results))


def check_case(
    backend: type[QuantLinearMethod],
    case: Case,
    platform: Platform | None = None,
    *,
    rows: Iterable[int] = ROWS,
    compiled: bool = False,
    device: str | None = None,
) -> CaseResult:
    """Run ``backend`` over one case; see ``check_backend``."""
    platform = platform or Platform.detect()
    problem = case.build(device or _device(platform))
    descriptor = problem.descriptor
    run = _Run(backend, problem)
    verdict = run.attempt("can_implement", lambda: backend.can_implement(descriptor, platform))
    if not isinstance(verdict, Verdict):
        run.fail("can_implement", f"gave {verdict!r}, expected a Verdict")
        return run.result()
    run.elsewhere()
    if not verdict:
        if not all(isinstance(r, str) and r.strip() for r in verdict.reasons):
            run.fail("can_implement", f"declined without saying why: {verdict.reasons!r}")
        return run.result(declined=tuple(verdict.reasons))
    if backend.can_implement(descriptor, platform) != verdict:
        run.fail("can_implement", "asked twice, gave two answers")
    run.estimates(platform)
    with _poisoned_memory():
        tensors = run.prepare()
        if tensors is not None:
            run.numbers(tensors, tuple(rows))
            run.forms(tensors)
            activation = descriptor.activation
            if activation is None or not activation.mixes_rows:
                run.isolation(tensors)
                if backend.batch_invariant:
                    run.invariance(tensors)
            looks_up = run.lookup(tensors, platform)
            if problem.weight.is_cuda:
                run.captured(tensors)
    if tensors is not None and compiled and not run.failures:
        run.compiled(tensors)
        if looks_up:
            run.compiled_lookup(tensors)
    return run.result()


class _Run:
    """One case on one backend: what was tried and what went wrong."""

    def __init__(self, backend: type[QuantLinearMethod], problem: Problem) -> None:
        self.backend = backend
        self.problem = problem
        # A descriptor that went through JSON is equal but not identical, as one from a cache is.
        self.descriptor = CompressedLinearDescriptor.from_json(problem.descriptor.to_json())
        self.failures: list[Failure] = []
        self.worst = 0.0
        self.checks = 0

    def result(self, declined: tuple[str, ...] = ()) -> CaseResult:
        return CaseResult(
            self.problem.case,
            str(self.problem.descriptor),
            declined,
            tuple(self.failures),
            self.worst,
            0 if declined else self.checks,
        )

    def fail(self, check: str, message: str) -> None:
        self.failures.append(Failure(check, message))

    def attempt(self, check: str, action: Callable[[], T]) -> T | None:
        self.checks += 1
        try:
            return action()
        # A backend may raise anything, and the other checks are still worth running.
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            where = f"{frames[-1].filename}:{frames[-1].lineno}"
            self.fail(check, f"{type(error).__name__}: {error} (at {where})")
            return None

    def elsewhere(self) -> None:
        """Plans are made for machines that are not there, so every platform gets an answer."""
        descriptor = self.problem.descriptor
        for name in ("cpu:generic", "cpu:amx", "cuda:75", "cuda:90"):
            platform = Platform.parse(name)
            verdict = self.attempt(
                f"can_implement on {name}",
                functools.partial(self.backend.can_implement, descriptor, platform),
            )
            if verdict:
                self.estimates(platform)

    def estimates(self, platform: Platform) -> None:
        """Seconds for every M that choosing looks at, and the name of the code path."""
        descriptor = self.problem.descriptor

        def seconds() -> list[float]:
            return [self.backend.seconds(descriptor, platform, m) for m in mix(platform.device)]

        first, second = self.attempt("seconds", seconds), self.attempt("seconds", seconds)
        if first is not None and not all(math.isfinite(s) and s >= 0 for s in first):
            self.fail("seconds", f"are {first}, expected finite numbers of at least 0")
        elif first != second:
            self.fail("seconds", "asked twice, gave two answers")
        variant = self.attempt(
            "variant", lambda: self.backend.variant(self.problem.descriptor, platform)
        )
        if variant is not None and not isinstance(variant, str):
            self.fail("variant", f"is {variant!r}, expected a string")

    def prepare(self) -> dict[str, torch.Tensor] | None:
        """Prepared tensors in new memory; the ones the backend made are overwritten, so what it
        kept of them elsewhere, or did not return, gives wrong numbers."""
        stored = [s.tensors for s in self.problem.weights.shards]
        before = [{name: t.clone() for name, t in tensors.items()} for tensors in stored]
        made = self.attempt(
            "prepare",
            lambda: self.backend(self.problem.descriptor).prep_weights_for_execution(
                self.problem.weights
            ),
        )
        if made is None:
            return None
        if not isinstance(made, dict) or not all(
            isinstance(name, str) and type(tensor) is torch.Tensor for name, tensor in made.items()
        ):
            self.fail("prepare", f"returned {_shape_of(made)}, expected a dict of plain tensors")
            return None
        if any(not name.isidentifier() for name in made):
            self.fail("prepare", f"tensor names {sorted(made)} must be Python identifiers")
        for old, new in zip(before, stored, strict=True):
            for name, tensor in old.items():
                if not _same_bits(tensor, new[name]):
                    self.fail("prepare", f"changed the checkpoint's tensor {name!r}")
        device = self.problem.weight.device
        for name, tensor in made.items():
            if tensor.device != device:
                self.fail("prepare", f"tensor {name!r} is on {tensor.device}, expected {device}")
        promised = self.backend.prepared_bytes(self.problem.descriptor)
        size = sum(tensor.nbytes for tensor in made.values())
        if promised is not None and promised != size:
            self.fail("prepared_bytes", f"says {promised}, the tensors have {size}")
        kept = {name: tensor.clone() for name, tensor in made.items()}
        for tensor in made.values():
            _overwrite(tensor)
        # Repeated preparation (a reload) starts from the same checkpoint.
        for shard, old in zip(self.problem.weights.shards, before, strict=True):
            shard.tensors = old
        return kept

    def apply(
        self, check: str, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Run a fresh instance; validate shape and dtype, and that nothing was changed."""
        held = {**tensors, "x": x} | ({} if bias is None else {"bias": bias})
        before = {name: tensor.clone() for name, tensor in held.items()}
        out = self.attempt(check, lambda: self.backend(self.descriptor).apply(tensors, x, bias))
        if out is None:
            return None
        shape, dtype = (*x.shape[:-1], self.descriptor.n), torch_dtype(self.descriptor.output_dtype)
        if not isinstance(out, torch.Tensor) or out.shape != shape or out.dtype != dtype:
            self.fail(check, f"gave {_shape_of(out)}, expected {dtype} of shape {list(shape)}")
            return None
        for name, tensor in before.items():
            if not _same_bits(tensor, held[name]):
                self.fail(check, f"changed {name!r}")
        return out

    def compare(
        self,
        check: str,
        out: torch.Tensor | None,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        rows: slice = slice(None),
    ) -> None:
        """Hold ``out`` [..., N] against the exact result of x [..., K], in the rows asked for."""
        if out is None or out.numel() == 0:
            return
        x, out = x.reshape(-1, x.shape[-1])[rows], out.reshape(-1, out.shape[-1])[rows]
        expected = self.problem.expected(x, bias)
        self.hold(check, out, expected, self.problem.bound(x, expected, self.backend))

    def hold(
        self, check: str, out: torch.Tensor, expected: torch.Tensor, allowed: torch.Tensor
    ) -> None:
        """Hold ``out`` against the exact result and the largest error, both float64 of its shape
        [rows, columns]."""
        got = out.to(torch.float64)
        largest = torch.finfo(out.dtype).max
        # Where the exact result is at the edge of the output's range, infinity is right too.
        overflows = (expected.abs() + allowed >= largest) & (got == expected.sign() * math.inf)
        error = torch.where(overflows, 0.0, (got - expected).abs())
        fraction = torch.nan_to_num(error / allowed, nan=math.inf, posinf=math.inf)
        worst = int(fraction.argmax())
        self.worst = max(self.worst, float(fraction.flatten()[worst]))
        if float(fraction.flatten()[worst]) > 1:
            row, column = divmod(worst, out.shape[1])
            self.fail(
                check,
                f"{int((fraction > 1).sum())} of {out.numel()} results are too far off; at "
                f"[{row}, {column}] got {float(got[row, column]):.9g}, exact is "
                f"{float(expected[row, column]):.9g}, off by {float(error[row, column]):.3g}, "
                f"allowed {float(allowed[row, column]):.3g} "
                f"({float(fraction[row, column]):.3g} times)",
            )

    def numbers(self, tensors: Tensors, rows: tuple[int, ...]) -> None:
        for count in rows:
            x = self.problem.activations(count)
            out = self.apply(f"M={count}", tensors, x, self.problem.bias)
            self.compare(f"M={count}", out, x, self.problem.bias)
        x = torch.zeros_like(self.problem.activations(5))
        out = self.apply("x of zeros", tensors, x, self.problem.bias)
        self.compare("x of zeros", out, x, self.problem.bias)

    def forms(self, tensors: Tensors) -> None:
        """x in every shape and stride that models pass, and a call without the bias."""
        x, bias = self.problem.activations(6), self.problem.bias
        k = x.shape[1]
        forms = {
            "x [K]": x[0],
            "x [2, 3, K]": x.reshape(2, 3, k),
            "x [2, 0, K]": x.new_empty(2, 0, k),
            "x [1, 1, 6, K]": x.reshape(1, 1, 6, k),
            "x with padded rows": torch.nn.functional.pad(x, (3, 5), value=math.nan)[:, 3 : 3 + k],
            "x with every other row": torch.repeat_interleave(x, 2, 0)[::2],
            "x transposed": x.t().contiguous().t(),
            "x with every other channel": torch.repeat_interleave(x, 2, 1)[:, ::2],
            "x expanded": x[:1].expand(4, k),
            "x [3, 2, K] transposed": x.reshape(3, 2, k).transpose(0, 1),
            "x at an odd address": _shifted(x),
        }
        for check, form in forms.items():
            self.compare(check, self.apply(check, tensors, form, bias), form, bias)
        if bias is not None:
            check = "bias held back"
            self.compare(check, self.apply(check, tensors, x, None), x, None)

    def isolation(self, tensors: Tensors) -> None:
        """A token full of infinities or NaN may spoil only itself."""
        for bad in (math.nan, math.inf):
            check = f"one row of {bad}"
            x = self.problem.activations(17)
            x[0] = bad
            out = self.apply(check, tensors, x, self.problem.bias)
            self.compare(check, out, x, self.problem.bias, slice(1, None))

    def invariance(self, tensors: Tensors) -> None:
        """Claimed: a row's bits do not depend on the rows beside it."""
        x, bias = self.problem.activations(ROWS[-1]), self.problem.bias
        whole = self.apply("batch invariance", tensors, x, bias)
        for count in (1, 2, 3, 16, 17, 64):
            for start in (0, 5, ROWS[-1] - count):
                rows = slice(start, start + count)
                part = self.apply("batch invariance", tensors, x[rows].contiguous(), bias)
                if whole is not None and part is not None and not _same_bits(part, whole[rows]):
                    self.fail("batch invariance", f"rows [{start}, {start + count}) alone differ")

    def lookup(self, tensors: Tensors, platform: Platform) -> bool:
        """Rows by their numbers, if the backend says it looks them up; returns whether it does."""
        asked = replace(self.descriptor, lookup=True)
        check = "can_implement with lookup"
        verdict = self.attempt(check, lambda: self.backend.can_implement(asked, platform))
        if not verdict:
            return False
        if not self.backend.capabilities.lookup:
            self.fail(check, "accepted what its capabilities do not declare")
        n = asked.n
        every = torch.arange(n, device=self.problem.weight.device)
        forms = {
            "ids [N]": every,
            "ids of nothing": every[:0],
            "ids [2, 3]": (torch.arange(6, device=every.device) * 7 % n).reshape(2, 3),
            "one id often": every[-1:].expand(20),
            "every other id": every[::2],
        }
        whole = None
        for check, ids in forms.items():
            rows = self.rows(check, asked, tensors, ids)
            whole = rows if whole is None else whole
            if rows is not None and whole is not None and not _same_bits(rows, whole[ids]):
                self.fail(check, "a row has other bits than beside all others")
        return True

    def rows(
        self,
        check: str,
        descriptor: CompressedLinearDescriptor,
        tensors: Tensors,
        ids: torch.Tensor,
        look_up: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor | None:
        """Look up ``ids`` with a fresh instance (or ``look_up``) and hold the rows against ŵ."""
        call = look_up or functools.partial(self.backend(descriptor).embedding, tensors)
        out = self.attempt(check, lambda: call(ids))
        if out is None:
            return None
        shape = (*ids.shape, descriptor.in_features)
        dtype = torch_dtype(descriptor.output_dtype)
        if not isinstance(out, torch.Tensor) or out.shape != shape or out.dtype != dtype:
            self.fail(check, f"gave {_shape_of(out)}, expected {dtype} of shape {list(shape)}")
            return None
        if out.numel():
            expected = self.problem.weight[ids.flatten()]
            allowed = lookup_bound(
                self.problem.magnitude[ids.flatten()],
                expected,
                descriptor.output_dtype,
                self.backend.contract(descriptor),
            )
            self.hold(check, out.reshape(-1, shape[-1]), expected, allowed)
        return out

    def captured(self, tensors: Tensors) -> None:
        """A CUDA graph of ``apply`` gives new results for a new x, as servers replay it."""
        method, bias = self.backend(self.descriptor), self.problem.bias
        for count in (1, 17, 64):
            check = f"CUDA graph, M={count}"
            x = self.problem.activations(count)
            held = torch.zeros_like(x)
            out: list[torch.Tensor] = []

            def call(_: int, held: torch.Tensor = held, out: list[torch.Tensor] = out) -> None:
                out[:] = [method.apply(tensors, held, bias)]

            graph = self.attempt(check, functools.partial(timing.captured, call, 1))
            if graph is None:
                return
            held.copy_(x)
            # Twice, since what a call leaves behind must not change the next.
            graph.replay()
            once = out[0].clone()
            graph.replay()
            self.compare(check, once, x, bias)
            if not _same_bits(out[0], once):
                self.fail(check, "replayed twice, gave two answers")

    def compiled_lookup(self, tensors: Tensors) -> None:
        """torch.compile traces ``embedding`` in one graph that serves any number of ids."""
        asked = replace(self.descriptor, lookup=True)
        method = self.backend(asked)
        torch.compiler.reset()
        traced = torch.compile(
            lambda ids: method.embedding(tensors, ids), fullgraph=True, backend="eager"
        )
        for count in (5, 2, 64):
            ids = torch.arange(count, device=self.problem.weight.device) % asked.n
            torch._dynamo.mark_dynamic(ids, 0)
            with torch.compiler.set_stance("default" if count == 5 else "fail_on_recompile"):
                self.rows(f"torch.compile, {count} ids", asked, tensors, ids, traced)

    def compiled(self, tensors: Tensors) -> None:
        """torch.compile traces ``apply`` in one graph that serves every M."""
        method, bias = self.backend(self.descriptor), self.problem.bias

        def call(x: torch.Tensor) -> torch.Tensor:
            return method.apply(tensors, x, bias)

        # Limits on recompilation count per code object, and every case traces this one.
        torch.compiler.reset()
        traced = torch.compile(call, fullgraph=True, backend="eager")
        for count in (5, 2, 64, 257):
            x = self.problem.activations(count)
            torch._dynamo.mark_dynamic(x, 0)
            check = f"torch.compile, M={count}"
            stance = "default" if count == 5 else "fail_on_recompile"
            with torch.compiler.set_stance(stance):
                out = self.attempt(check, functools.partial(traced, x))
            self.compare(check, out, x, bias)


def _device(platform: Platform) -> str:
    """The torch device of ``platform``; ``ValueError`` if this machine has none."""
    name = "cuda" if platform.device == "rocm" else platform.device
    if name != "cpu" and not getattr(torch, name).is_available():
        raise ValueError(f"platform {platform.name} cannot be tried here: no {name} device")
    return name


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """``torch.empty`` gives NaN and largest integers, so reading what nobody wrote is seen."""
    mode = torch.get_deterministic_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)


def _shifted(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, beginning one element after an aligned address."""
    memory = x.new_zeros(x.numel() + 1)
    memory[1:] = x.flatten()
    return memory[1:].view(x.shape)


def _overwrite(tensor: torch.Tensor) -> None:
    # Expanded tensors share memory and cannot be written in place.
    if tensor.numel() and 0 not in tensor.stride():
        tensor.view(torch.uint8).fill_(0x7F) if tensor.is_contiguous() else tensor.zero_()


def _same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Equal, with NaN equal to itself and −0 unlike 0."""
    same_kind = one.shape == two.shape and one.dtype == two.dtype
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return same_kind and torch.equal(one.view(words), two.view(words))


def _shape_of(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} of shape {list(value.shape)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {type(v).__name__}" for k, v in value.items()) + "}"
    return type(value).__name__
