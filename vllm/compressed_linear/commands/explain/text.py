# SPDX-License-Identifier: Apache-2.0
"""An ``Explanation`` as a table for people; plain text when it is not written to a terminal."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vllm.compressed_linear.backends.registry import REFERENCE
from vllm.compressed_linear.checkpoint.completeness import Severity
from vllm.compressed_linear.commands.explain.explanation import (
    Explanation,
    LayerPlan,
    PartPlan,
    Possibility,
)
from vllm.compressed_linear.commands.explain.left import LeftToVllm
from vllm.compressed_linear.commands.text import (
    UNTESTED,
    alike,
    compress_names,
    ranges,
    size,
    without_numbers,
)
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor


@dataclass(frozen=True)
class LayerGroup:
    """Layers that differ by name only. ``layers`` in the model's order."""

    title: str
    layers: tuple[LayerPlan, ...]

    @property
    def plan(self) -> LayerPlan:
        return self.layers[0]


def group_layers(layers: Sequence[LayerPlan]) -> list[LayerGroup]:
    """Like layers together, in the order of the first of each. Reasons and notes may differ in the
    layer that they name."""
    groups: dict[Any, list[LayerPlan]] = {}
    for layer in layers:
        groups.setdefault((without_numbers(layer.name), _without_name(layer)), []).append(layer)
    return [
        LayerGroup(compress_names([layer.name for layer in same]), tuple(same))
        for same in groups.values()
    ]


def _without_name(layer: LayerPlan) -> LayerPlan:
    """What like layers have in common."""
    return replace(
        layer,
        name="",
        unquantized=_reasons(layer),
        note=without_numbers(layer.note),
        cases=tuple(map(_case_without_name, layer.cases)),
        other_ranks=tuple(
            (rank, tuple(map(_case_without_name, cases))) for rank, cases in layer.other_ranks
        ),
    )


def _reasons(layer: LayerPlan) -> tuple[str, ...]:
    """Why its shards are not quantized, without their names where the reason is the same."""
    found = [re.sub(r"\b(plain) \S+\.weight$", r"\1 weight", text) for text in layer.unquantized]
    return tuple(dict.fromkeys(without_numbers(text) for text in found))


def _case_without_name(case: Possibility) -> Possibility:
    if not any(part.error for part in case.parts):
        return case
    parts = (replace(part, error=without_numbers(part.error)) for part in case.parts)
    return replace(case, parts=tuple(parts))


def in_words(d: CompressedLinearDescriptor, dtype: str = "") -> str:
    """One line: shape, what the weight is, and what x is unless that is plain ``dtype``."""
    return f"{d.n} x {d.in_features}, {_weight_in_words(d, dtype)}"


def _weight_in_words(d: CompressedLinearDescriptor, dtype: str) -> str:
    w = d.weight
    if w.element.kind == "integer":
        middle = 1 << (w.element.bits - 1)
        symmetric = w.zero is None and w.element.bias == middle
        parts = [f"{w.element.bits}-bit{' symmetric' if symmetric else ''}"]
        if w.element.bias and not symmetric:
            parts[0] += f" less {w.element.bias}"
    else:
        parts = [w.element.name]
    if w.scale is not None:
        per = {
            "tensor": "one scale",
            "channel": "a scale per channel",
            "group": f"groups of {d.group_size}",
            "block": f"blocks of {w.scale.block_rows}x{w.scale.group_size}",
        }[w.scale.granularity]
        parts.append(f"{per} ({w.scale.dtype})")
    if w.zero is not None:
        parts.append(f"{w.zero.kind} zero points")
    if w.row_scale is not None:
        parts.append(f"second-level scales ({w.row_scale})")
    if d.channel_order is not None:
        filled = f", filled up to K={d.k}" if d.channel_order.padded else ""
        parts.append(f"channels reordered{filled}")
    if d.activation is not None:
        a = d.activation
        limit = f" (|x| up to {a.limit:g})" if a.limit else ""
        kind = "dynamic" if a.dynamic else "static"
        parts.append(f"x as {kind} {a.element} per {a.granularity}{limit}")
    if d.transform is not None:
        parts.append(f"{d.transform.kind} of x")
    if (o := d.output_activation) is not None:
        parts.append(f"y as static {o.element} per {o.granularity}")
    if d.lookup:
        parts.append("looked up")
    if d.bias_dtype is not None:
        parts.append("bias")
    if d.input_dtype != d.output_dtype:
        parts.append(f"{d.input_dtype} to {d.output_dtype}")
    elif d.input_dtype != dtype:
        parts.append(f"{d.input_dtype} activations")
    return ", ".join(parts)


def print_explanation(explanation: Explanation, console: Console) -> None:
    """Write everything that people want to see to ``console``."""
    groups = group_layers(explanation.layers)
    _print_head(explanation, console)
    if groups:
        console.print()
        console.print(_table(groups, explanation.dtype, console.width))
        _print_facts(groups, explanation.dtype, console)
        _print_ranks(groups, explanation.dtype, console)
        _print_rejected(groups, console)
    _print_left(explanation, console)
    console.print()
    console.print(Text(_totals(explanation), style="bold"))
    for error in alike(explanation.errors):
        console.print(Text(f"Error: {error}", style="bold red"))


def _print_head(e: Explanation, console: Console) -> None:
    what = e.architecture if e.model_class in ("", e.architecture) else e.model_class
    console.print(Text(e.model, style="bold"))
    activations = f", {e.dtype} activations" if e.dtype else ""
    console.print(Text(f"{what}, quantization {e.quant_method}{activations}"))
    rank = f", rank 0 of {e.tp_size}" if e.tp_size > 1 else ""
    read = "codes not read" if e.weights_read else "no weights read"
    rates = f" ({e.rates})" if e.rates else ""
    console.print(Text(f"on {e.platform}{rates}{rank}; {read}"))
    for finding in e.findings:
        if finding.severity is not Severity.ERROR:
            style = "yellow" if finding.severity is Severity.WARNING else ""
            console.print(Text(f"{finding.severity.capitalize()}: {finding.message}", style=style))


def _table(groups: Sequence[LayerGroup], dtype: str, width: int) -> Table:
    """A heading and one row for each part of each group of layers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("#", no_wrap=True)
    table.add_column("Layers and their weights", overflow="fold")
    # The name of the code path goes below that of the backend, where both are long or the terminal
    # is narrow.
    table.add_column("Runs on", overflow="fold", max_width=16 if width >= 100 else 13)
    table.add_column("Disk", justify="right", no_wrap=True)
    table.add_column("Memory", justify="right", no_wrap=True)
    for number, group in enumerate(groups, 1):
        plan, count = group.plan, len(group.layers)
        title = Text(group.title, style="bold")
        title.append(f"  x{count}" if count > 1 else "", style="not bold")
        table.add_row(f"{number}{'*' if len(plan.cases) > 1 else ''}", title, "", "", "")
        for part in plan.likely.parts:
            words = in_words(part.descriptor, dtype)
            if plan.likely.from_sample:
                words += " (by the order)"
            if len(plan.likely.parts) > 1:
                words = f"{' + '.join(part.shards)}: {words}"
            prepared = None if part.bytes_prepared is None else part.bytes_prepared * count
            disk = size(part.bytes_checkpoint * count)
            table.add_row("", words, _runs(part, "\n"), disk, size(prepared))
            for note in part.notes:
                table.add_row("", Text(note, style="dim"), "", "", "")
        for reason in _reasons(plan):
            table.add_row("", Text(f"not quantized: {reason}", style="dim"), "", "", "")
        if plan.note:
            note = compress_names([layer.note for layer in group.layers])
            table.add_row("", Text(note, style="dim"), "", "", "")
    return table


def _runs(part: PartPlan, separator: str = ", ") -> Text:
    """What runs ``part``; ``separator``: before the mark of what has never run on hardware."""
    if part.error:
        return Text("nothing", style="bold red")
    style = "yellow" if part.backend == REFERENCE else "green"
    why = f" ({part.chosen_by})" if part.chosen_by in ("asked for", "tuned") else ""
    text = Text(part.runs + why, style=style)
    if part.backend in part.untested_on_hardware:
        text.append(separator + UNTESTED, style="yellow")
    return text


def _print_facts(groups: Sequence[LayerGroup], dtype: str, console: Console) -> None:
    """Where every case runs on the same backend, one line; elsewhere each case in which all shards
    agree, and how many others there are. Groups of which the same is to be said together."""
    found: dict[tuple[str, ...], list[int]] = {}
    lines: dict[tuple[str, ...], list[Text]] = {}
    for number, group in enumerate(groups, 1):
        if len(group.plan.cases) > 1:
            texts = _facts_of(group.plan.cases, dtype)
            key = tuple(text.plain for text in texts)
            found.setdefault(key, []).append(number)
            lines[key] = texts
    if not found:
        return
    _print_title("* What only the data decides (--read-weights looks)", console)
    for key, numbers in found.items():
        head = Text(f"{_numbers(numbers)} ", style="cyan")
        if len(lines[key]) == 1:
            console.print(head.append_text(lines[key][0]))
            continue
        console.print(head)
        for line in lines[key]:
            _print_line(line, console)


def _facts_of(cases: Sequence[Possibility], dtype: str) -> list[Text]:
    everywhere = {part.runs for case in cases for part in case.parts}
    likely = [case for case in cases if case.likely] or list(cases[:1])
    if len(everywhere) == 1:
        return [Text(f"likely {_fact(likely[0])}; all cases run alike")]
    others = [case for case in cases if not case.uniform and not case.likely]
    texts = [_case_text(case, dtype) for case in cases if case not in others]
    if others:
        runs = ", ".join(sorted({part.runs for case in others for part in case.parts}))
        texts.append(Text(f"{len(others)} mixtures of these among the shards → parts on {runs}"))
    return texts


def _fact(case: Possibility) -> str:
    return case.facts[0] if case.facts else "otherwise"


def _case_text(case: Possibility, dtype: str) -> Text:
    text = Text(f"{_fact(case)}{' (likely)' if case.likely else ''} → ")
    about = " (K by the order)" if case.from_sample else ""
    for index, part in enumerate(case.parts):
        shards = f"{' + '.join(part.shards)} " if len(case.parts) > 1 else ""
        words = _weight_in_words(part.descriptor, dtype)
        text.append(f"{'; ' if index else ''}{shards}{words}{about} on ")
        text.append_text(_runs(part))
    return text


def _print_ranks(groups: Sequence[LayerGroup], dtype: str, console: Console) -> None:
    differing = [(n, g) for n, g in enumerate(groups, 1) if g.plan.other_ranks]
    if not differing:
        return
    _print_title("Ranks that differ from rank 0", console)
    for number, group in differing:
        for rank, cases in group.plan.other_ranks:
            text = Text(f"#{number} rank {rank}: ")
            for index, part in enumerate(cases[0].parts):
                text.append(f"{'; ' if index else ''}{in_words(part.descriptor, dtype)} on ")
                text.append_text(_runs(part))
            console.print(text)


def _print_rejected(groups: Sequence[LayerGroup], console: Console) -> None:
    """Each reason of a backend once, with the numbers of the groups it is about if they are not all
    that the backend cannot run. What is made for another device has no other reason."""
    reasons: dict[str, dict[str, list[int]]] = {}
    able: dict[str, list[int]] = {}
    untested: set[str] = set()
    for number, group in enumerate(groups, 1):
        for part in group.plan.likely.parts:
            untested.update(part.untested_on_hardware)
            for rejection in part.rejected:
                if not rejection.reasons:
                    _note(able.setdefault(rejection.backend, []), number)
                device = [r for r in rejection.reasons if r.startswith("device ")]
                for reason in device or rejection.reasons:
                    of_backend = reasons.setdefault(rejection.backend, {})
                    _note(of_backend.setdefault(reason, []), number)
    if not reasons and not able:
        return
    _print_title("Not taken", console)
    for backend, numbers in sorted(able.items()):
        mark = f" ({UNTESTED})" if backend in untested else ""
        text = f"{backend}{mark} could run {_numbers(numbers)}, but ranks lower"
        console.print(Text(text, style="cyan"))
    equal: dict[Any, list[str]] = {}
    for backend, found in sorted(reasons.items()):
        equal.setdefault(tuple((r, tuple(n)) for r, n in found.items()), []).append(backend)
    for lines, backends in equal.items():
        every = sorted({number for _, numbers in lines for number in numbers})
        head = f"{', '.join(backends)} cannot run {_numbers(every)}:"
        if len(lines) == 1 and len(head) + len(lines[0][0]) < console.width:
            console.print(Text(f"{head} ", style="cyan").append(lines[0][0], style="not cyan"))
            continue
        console.print(Text(head, style="cyan"))
        for reason, numbers in lines:
            which = "" if list(numbers) == every else f" ({_numbers(numbers)})"
            _print_line(Text(reason + which), console)


def _note(numbers: list[int], number: int) -> None:
    if number not in numbers:
        numbers.append(number)


def _numbers(numbers: Sequence[int]) -> str:
    """``#1-4 #6``."""
    return " ".join(f"#{part}" for part in ranges(sorted(numbers)))


def _print_title(title: str, console: Console) -> None:
    console.print()
    console.print(Text(title, style="bold"))


def _print_line(text: Text, console: Console) -> None:
    console.print(Padding(text, (0, 0, 0, 3), expand=False))


def _print_left(e: Explanation, console: Console) -> None:
    if not e.left and not e.others:
        return
    _print_title("Left to vLLM", console)
    same: dict[Any, list[LeftToVllm]] = {}
    for layer in e.left:
        key = (layer.name, layer.method or layer.kind, layer.reason, layer.refusal)
        same.setdefault(tuple(map(without_numbers, key)), []).append(layer)
    for like in same.values():
        first, nbytes = like[0], sum(layer.nbytes for layer in like)
        reason = compress_names([layer.reason for layer in like])
        held = f", {size(nbytes)}" if nbytes else ""
        by = f" ({first.method})" if first.method else ""
        console.print(Text(f"{compress_names([layer.name for layer in like])}{by}: {reason}{held}"))
        if first.refusal:
            _print_line(Text(f"which refuses it here: {first.refusal}", style="red"), console)
    if e.others:
        kinds = Counter(layer.kind for layer in e.others)
        what = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4))
        more = f" and {len(kinds) - 4} other kinds" if len(kinds) > 4 else ""
        held = size(sum(layer.nbytes for layer in e.others))
        console.print(Text(f"not linear ({what}{more}), {held}"))


def _totals(e: Explanation) -> str:
    if not e.layers:
        return f"The files hold {size(e.file_bytes)} of tensors"
    rank = " on this rank" if e.tp_size > 1 else ""
    return (
        f"{len(e.layers)} layers{rank}: {size(e.bytes_checkpoint())} of weights become "
        f"{size(e.bytes_prepared())} in memory; the files hold {size(e.file_bytes)} of tensors "
        "in all"
    )
