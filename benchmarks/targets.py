# SPDX-License-Identifier: Apache-2.0
"""The project's targets, each with how its figure follows from the records of a family."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.family_records import Figure, Records, ms_of, ratios
from benchmarks.markdown import Report
from benchmarks.table import ours_of, product_limit, read_share, row, share_of_limit

INTEGERS = ("w1", "w2", "w3", "w4", "w5", "w6", "w7", "w8", "mxfp4", "nvfp4")


def _reading(records: Records) -> Figure | None:
    if (report := records.linear("w4")) is None:
        return None
    share = read_share(report, ours_of(report)[0])
    assert share is not None
    rate = report["limits"]["read_gb_per_s"]
    return Figure(f"{share:.0%} of {rate:.1f} GB/s", share >= 0.9)


def _one_token(records: Records) -> Figure | None:
    names = ("w2", "w3", "w4", "w5", "w6", "w7", "w8", "mxfp4", "nvfp4", "fp8")
    shares = {}
    for report in records.linears(*names):
        share = share_of_limit(report, ours_of(report)[0], 1)
        assert share is not None
        shares[report["scheme"]] = share
    return _least(shares, 0.85, "{:.0%}")


def _decoding(records: Records) -> Figure | None:
    wanted = {"w8": 1.5, "fp8": 1.5, "mxfp4": 1.2, **{f"w{bits}": 1.2 for bits in range(3, 8)}}
    found = {}
    for report in records.linears(*wanted):
        key = ours_of(report)[0]["id"].removeprefix("ours/")
        if (rate := report["limits"]["cached_gb_per_s"].get(key)) is not None:
            multiple = rate / report["limits"]["read_gb_per_s"]
            found[report["scheme"]] = multiple / wanted[report["scheme"]]
    return _least(found, 1.0, "{:.2f} of what is wanted")


def _narrow(records: Records) -> Figure | None:
    times = {r["scheme"]: ms_of(r, 1) for r in records.linears("w1", "w2", "w4")}
    known = {scheme: ms for scheme, ms in times.items() if ms is not None}
    if len(known) < 3:
        return None
    text = ", ".join(f"{scheme} {ms:.2f} ms" for scheme, ms in known.items())
    return Figure(text, max(known["w1"], known["w2"]) < known["w4"])


def _least(found: dict[str, float], target: float, form: str) -> Figure | None:
    if not found:
        return None
    missed = sorted((name for name in found if found[name] < target), key=found.__getitem__)
    least = min(found, key=found.__getitem__)
    text = f"least: {least} " + form.format(found[least])
    text += f"; median {form.format(statistics.median(found.values()))}"
    if missed:
        text += f"; {len(missed)} of {len(found)} below: {', '.join(missed)}"
    return Figure(text, not missed)


def _some_rows(records: Records) -> Figure | None:
    return _gains(records.forced("w4", "avx512", "before"), records.linear("w4"), (4, 16), 2.0)


def _avx2(records: Records) -> Figure | None:
    before, now = (records.forced("w4", "avx2", when) for when in ("before", "linear"))
    return _gains(before, now, (1,), 1.8)


def _gains(
    before: Report | None, now: Report | None, ms: tuple[int, ...], target: float
) -> Figure | None:
    if before is None or now is None:
        return None
    found = {}
    for m in ms:
        old, new = ms_of(before, m), ms_of(now, m)
        if old is not None and new is not None:
            found[m] = old / new
    return _times(found, target)


def _times(found: dict[int, float], target: float) -> Figure | None:
    if not found:
        return None
    text = ", ".join(f"M={m} ×{ratio:.2f}" for m, ratio in found.items())
    return Figure(text, all(ratio >= target for ratio in found.values()))


def _flat(records: Records) -> Figure | None:
    report = records.linear("w4")
    if report is None:
        return None
    one, sixteen = ms_of(report, 1), ms_of(report, 16)
    if one is None or sixteen is None:
        return None
    return Figure(f"×{sixteen / one:.2f} of M=1", sixteen <= 1.5 * one)


def _many_rows(records: Records) -> Figure | None:
    shares = {}
    for report in records.linears(*INTEGERS):
        for m in (64, 256):
            share = share_of_limit(report, ours_of(report)[0], m)
            if share is not None:
                shares[f"{report['scheme']} M={m}"] = share
    return _least(shares, 0.85, "{:.0%}")


def _tiles(records: Records) -> Figure | None:
    report, bf16 = records.linear("w4"), records.linear("bf16")
    if report is None or bf16 is None:
        return None
    mine, dense = ms_of(report, 64), ms_of(bf16, 64, "vllm")
    found = row(ours_of(report)[0], 256)
    if mine is None or dense is None or found is None:
        return None
    rate = found["gflop_per_s"]
    limit = product_limit(report)[1]
    text = f"M=64 ×{dense / mine:.2f}; M=256 {rate:.0f} GFLOP/s of {limit:.0f}"
    return Figure(text, dense >= 1.5 * mine and rate >= 1000)


def _groups_of_32(records: Records) -> Figure | None:
    report, bf16 = records.linear("mxfp4"), records.linear("bf16")
    if report is None or bf16 is None:
        return None
    found = {}
    for m in (64, 256):
        mine, dense = ms_of(report, m), ms_of(bf16, m, "vllm")
        if mine is not None and dense is not None:
            found[m] = dense / mine
    return _times(found, 1.2)


def _never_slower(records: Records) -> Figure | None:
    report = records.other("never-slower")
    if report is None:
        return None
    layers = [layer for layer in report["layers"] if not layer["contract"].startswith("x rounded")]
    cells = [cell for layer in layers for cell in layer["cells"]]
    slower = sum(cell["slower"] for cell in cells)
    worst = max(cells, key=lambda cell: cell["ratio"])
    text = f"{slower} of {len(cells)} cells slower; the worst takes ×{worst['ratio']:.2f}"
    return Figure(text, slower == 0)


def _dense_reading(records: Records) -> Figure | None:
    shares = {}
    for report in records.linears("bf16", "w8a8"):
        share = read_share(report, ours_of(report)[0])
        assert share is not None
        shares[report["scheme"]] = share
    return _least(shares, 0.9, "{:.0%}")


def _fast(records: Records) -> Figure | None:
    if (report := records.linear("w4")) is None:
        return None
    found: dict[int, float] = {}
    for rival in ("vllm-default", "zentorch"):
        for m, ratio in ratios(report, (64, 256), rival, ours="ours/cpu_int8_fast").items():
            found[m] = min(ratio, found.get(m, ratio))
    return _times(found, 1.0)


def _served(
    records: Records, model: str, ours: tuple[str, ...], rival: str, wanted: dict[str, float]
) -> Figure | None:
    """How many times as fast a model is served as by ``rival``; ``ours``: engines, the first that
    was measured counts. ``wanted``: ratios by number of streams, and of prefill."""
    report = records.other(f"serve/{model}")
    engines = {k: e for k, e in (report or {"engines": {}})["engines"].items() if "error" not in e}
    mine = next((engines[key] for key in ours if key in engines), None)
    if mine is None or rival not in engines:
        return None
    found = {}
    for name in wanted:
        rates = [
            engine["prefill_tokens_per_s"]
            if name == "prefill"
            else engine["decode_tokens_per_s"][name.split()[0]]
            for engine in (mine, engines[rival])
        ]
        found[name] = rates[0] / rates[1]
    text = ", ".join(f"{name} ×{ratio:.2f}" for name, ratio in found.items())
    return Figure(text, all(found[name] >= least for name, least in wanted.items()))


GEMMA = ("ours-head8-alone", "ours-alone")


def _llama(records: Records) -> Figure | None:
    wanted = {"1 stream": 1.3, "16 streams": 2.4, "prefill": 2.0}
    return _served(records, "gemma-3-270m", GEMMA, "llama", wanted)


def _stock_model(records: Records) -> Figure | None:
    wanted = {"1 stream": 2.5, "16 streams": 1.2, "prefill": 1.2}
    return _served(records, "gemma-3-270m", GEMMA, "vllm-alone", wanted)


def _large_model(records: Records) -> Figure | None:
    wanted = {"1 stream": 1.0, "4 streams": 1.0, "16 streams": 1.0, "prefill": 1.0}
    rivals = ("llama", "vllm-gptq-alone")
    found = [
        _served(records, "llama-3-8b", ("ours-gptq-alone",), rival, wanted) for rival in rivals
    ]
    return (
        None
        if None in found
        else Figure(
            "; ".join(f"{rival}: {f.text}" for rival, f in zip(rivals, found, strict=True) if f),
            all(f.met for f in found if f),
        )
    )


@dataclass(frozen=True)
class Target:
    """One row of the table. ``figure``: None where the records do not have it. ``tiles``: only for
    processors that multiply tiles, or only for others; None: for all."""

    key: str
    title: str
    wanted: str
    figure: Callable[[Records], Figure | None]
    tiles: bool | None = None


TARGETS = (
    Target("reading", "4 bits g128, M=1", "≥ 90 % of raw reading", _reading),
    Target(
        "one-token",
        "W2…W8, MXFP4, NVFP4, fp8, M=1",
        "≥ 85 % of min(raw reading, decoding from the cache)",
        _one_token,
    ),
    Target(
        "decoding",
        "decoding from the cache",
        "W8, fp8 ≥ 1.5× reading; W3…W7, MXFP4 ≥ 1.2×",
        _decoding,
    ),
    Target("narrow", "W1, W2, M=1", "less time than W4", _narrow),
    Target("some-rows", "4 bits g128, M=4, 16", "≥ 2× the `avx512` kernels before", _some_rows),
    Target("flat", "4 bits g128 with AMX, M=16", "≤ 1.5× the time of M=1", _flat, True),
    Target(
        "many-rows",
        "integer weights without AMX, M ≥ 64",
        "≥ 85 % of the best product",
        _many_rows,
        tiles=False,
    ),
    Target(
        "tiles",
        "4 bits g128 with AMX",
        "M=64 ≥ 1.5× oneDNN's bf16; M=256 ≥ 1000 GFLOP/s",
        _tiles,
        tiles=True,
    ),
    Target(
        "groups-of-32",
        "groups of 32 (MXFP4) with AMX, M ≥ 64",
        "≥ 1.2× oneDNN's bf16",
        _groups_of_32,
        tiles=True,
    ),
    Target("never-slower", "every layer against vLLM alone", "no cell > 3 % slower", _never_slower),
    Target("dense-reading", "bf16, W8A8, M=1", "≥ 90 % of raw reading", _dense_reading),
    Target("fast", "`cpu_int8_fast`, M ≥ 64", "faster than W4A8 of vLLM and zentorch", _fast),
    Target("avx2", "AVX2 without VNNI, 4 bits, M=1", "≥ 1.8× before", _avx2),
    Target(
        "llama",
        "Gemma 3 270M against llama.cpp Q4_K_M",
        "1 stream ≥ 1.3×, 16 ≥ 2.4×, prefill ≥ 2×",
        _llama,
    ),
    Target(
        "gemma-amx",
        "Gemma 3 270M with AMX against vLLM alone",
        "prefill, 16 streams ≥ 1.2×, 1 stream ≥ 2.5×",
        _stock_model,
        tiles=True,
    ),
    Target(
        "llama-8b",
        "Llama 3 8B shape",
        "prefill and 1, 4, 16 streams ahead of llama.cpp and vLLM",
        _large_model,
    ),
)
