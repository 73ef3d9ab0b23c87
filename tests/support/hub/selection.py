# SPDX-License-Identifier: Apache-2.0
"""Which modules of a published checkpoint are quantized, and how: what its tool would have done.

Read from the configuration and side files by rules of our own, as the tools document them; nothing
of the package is used.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from tests.support.hub import writers as w
from tests.support.hub.writers import Writer

WriterOf = Callable[[str, bool], Writer | None]
"""From the name of a module on disk, and whether it is an embedding table, to its writer."""

_IN_LAYERS = re.compile(r"\.(layers|blocks|h)\.\d+\.")
_OUTSIDE = re.compile(r"visual|vision|audio|projector|mtp|embed_vision|embed_audio")
_ROUTER = re.compile(r"\.(gate|router|shared_expert_gate)(\.|$)")


class NotWrittenError(Exception):
    """This configuration has no writer here; its text says why."""


@dataclass(frozen=True)
class Published:
    """One file of ``hub``: a configuration with what lies next to it."""

    name: str
    architecture: str
    config: dict[str, Any]
    side_files: dict[str, Any]
    tensors: list[dict[str, Any]]

    @property
    def quantization(self) -> dict[str, Any]:
        """The configuration of the quantization, wherever it stands."""
        text = self.config.get("text_config") or {}
        for found in (
            self.config.get("quantization_config"),
            self.config.get("compression_config"),
            text.get("quantization_config"),
        ):
            if found:
                return dict(found)
        for side in self.side_files.values():
            if isinstance(side, dict):
                return dict(side)
        return {}


def writers_of(published: Published) -> WriterOf:
    """Raises ``NotWrittenError``."""
    config = published.quantization
    method = str(config.get("quant_method") or "").lower()
    side = published.side_files.get("hf_quant_config.json")
    if method == "fp8":
        return _fp8(config)
    if method == "fbgemm_fp8":
        writer = Writer(w.fp8(per_channel=True), w.x_fp8(w.per_token))
        return _but(config.get("modules_to_not_convert") or [], writer)
    if method == "compressed-tensors" or "sparsity_config" in config:
        return _compressed_tensors(config)
    if side or "quant_algo" in config or method.startswith("modelopt"):
        return _modelopt(config, (side or {}).get("quantization") or config)
    by_method: dict[str, Callable[[dict[str, Any]], WriterOf]] = {
        "quark": _quark,
        "auto-round": _auto_round,
        "gptq": _gptq,
        "awq": _awq,
        "": _gptq,
    }
    if method not in by_method:
        raise NotWrittenError(f"no tensors are described for {method}")
    if "bits" not in config and method != "quark":
        raise NotWrittenError("the published part of its configuration has no bits")
    return by_method[method](config)


def _fp8(config: dict[str, Any]) -> WriterOf:
    if config.get("weight_block_size"):
        rows, columns = config["weight_block_size"]
        powers = config.get("scale_fmt") == "ue8m0"
        writer = Writer(
            w.fp8_block(rows, columns, "weight_scale_inv", powers_of_two=powers),
            w.x_fp8(w.per_group(columns, powers_of_two=powers)),
        )
    elif config.get("activation_scheme") == "static":
        writer = Writer(w.fp8(input_scale=True), w.x_fp8(w.static))
    else:
        writer = Writer(w.fp8(), w.x_fp8(w.per_token))
    of = _but(config.get("modules_to_not_convert") or [], writer)
    experts = config.get("moe_quant_algo")
    if experts is None:
        return of
    if experts != "NVFP4":
        raise NotWrittenError(f"no writer for moe_quant_algo {experts}")
    of_experts = Writer(w.nvfp4(of_modelopt=True), w.x_nvfp4, takes=lambda n, k: k % 16 == 0)

    def writer_of(module: str, is_table: bool) -> Writer | None:
        found = of(module, is_table)
        return of_experts if found is not None and ".experts." in module else found

    return writer_of


def _but(entries: list[str], writer: Writer) -> WriterOf:
    """All linear layers but heads and the modules that an entry names, or a part of whose names it
    is."""

    def writer_of(module: str, is_table: bool) -> Writer | None:
        if is_table or _ROUTER.search(module) or not _IN_LAYERS.search(module):
            return None
        left = any(e == module or f".{e}." in f".{module}." for e in entries)
        return None if left or _OUTSIDE.search(module) else writer

    return writer_of


def _compressed_tensors(config: dict[str, Any]) -> WriterOf:
    groups = [
        (group["targets"], _group(group, group.get("format") or config.get("format")))
        for group in config.get("config_groups", {}).values()
    ]
    if not groups:
        raise NotWrittenError("the published part of its configuration has no config_groups")
    ignore = config.get("ignore") or []

    def names(entry: str, module: str) -> bool:
        if entry.startswith("re:"):
            return re.match(entry[3:], module) is not None
        return entry == module

    def writer_of(module: str, is_table: bool) -> Writer | None:
        if _ROUTER.search(module) or any(names(entry, module) for entry in ignore):
            return None
        kind = "Embedding" if is_table else "Linear"
        by_name = [g for targets, g in groups if any(names(t, module) for t in targets)]
        by_class = [g for targets, g in groups if kind in targets]
        return (by_name or by_class or [None])[0]

    return writer_of


def _group(group: dict[str, Any], form: str | None) -> Writer:
    weights, x = group["weights"], group.get("input_activations")
    strategy, bits = weights.get("strategy"), weights.get("num_bits")
    static = (w.static_int8, w.static_int8) if x and group.get("output_activations") else ()
    numbers = w.STATIC_INT8 if static else None
    if form == "pack-quantized":
        size = weights["group_size"] if strategy == "group" else -1
        return Writer(
            w.pack_quantized(bits, size, symmetric=weights["symmetric"], numbers=numbers),
            *static,
            takes=lambda n, k: k % (32 if size == -1 else size) == 0 and n % 8 == 0,
        )
    if form == "int-quantized" and strategy == "channel":
        if static:
            return Writer(w.int8_channel(numbers), *static)
        return Writer(w.int8_channel(), w.x_int8_per_token)
    if form == "float-quantized" and strategy == "block":
        rows, columns = weights.get("block_structure") or (128, 128)
        quantized = w.x_fp8(w.per_group(columns)) if x else None
        return Writer(w.fp8_block(rows, columns, "weight_scale"), quantized)
    if form == "float-quantized" and strategy == "channel":
        return Writer(w.fp8(per_channel=True), w.x_fp8(w.per_token) if x else None)
    if form == "float-quantized" and strategy == "tensor":
        return Writer(w.fp8(input_scale=True), w.x_fp8(w.static))
    if form == "nvfp4-pack-quantized":
        return Writer(
            w.nvfp4(of_modelopt=False, inputs=bool(x)),
            w.x_nvfp4 if x else None,
            takes=lambda n, k: k % 16 == 0,
        )
    raise NotWrittenError(f"no writer for {form} with scales per {strategy}")


def _modelopt(config: dict[str, Any], quantization: dict[str, Any]) -> WriterOf:
    excluded = quantization.get("exclude_modules") or config.get("ignore") or ["lm_head"]
    by_algorithm = {
        "FP8": Writer(w.fp8(input_scale=True), w.x_fp8(w.static)),
        "NVFP4": Writer(w.nvfp4(of_modelopt=True), w.x_nvfp4, takes=lambda n, k: k % 16 == 0),
        "W4A16_NVFP4": Writer(
            w.nvfp4(of_modelopt=True, inputs=False), takes=lambda n, k: k % 16 == 0
        ),
    }
    algorithm = quantization.get("quant_algo")
    layers = quantization.get("quantized_layers") or {}
    if algorithm != "MIXED_PRECISION" and algorithm not in by_algorithm:
        raise NotWrittenError(f"no writer for quant_algo {algorithm}")

    def writer_of(module: str, is_table: bool) -> Writer | None:
        if is_table or _ROUTER.search(module):
            return None
        if algorithm == "MIXED_PRECISION":
            of_module = layers.get(module, {}).get("quant_algo")
            return by_algorithm.get(str(of_module))
        if any(fnmatch.fnmatchcase(module, entry) for entry in excluded):
            return None
        if _OUTSIDE.search(module) or not _IN_LAYERS.search(module):
            return None
        return by_algorithm[algorithm]

    return writer_of


def _quark(config: dict[str, Any]) -> WriterOf:
    weight = config["global_quant_config"]["weight"]
    if weight["dtype"] == "fp4":
        writer = Writer(w.mxfp4("weight"), w.x_mxfp4, takes=lambda n, k: k % 32 == 0)
    elif weight["dtype"] == "int4":
        size = weight["group_size"]
        writer = Writer(w.quark_int4(size), takes=lambda n, k: k % size == 0 and n % 8 == 0)
    else:
        raise NotWrittenError(f"no writer for {weight['dtype']}")
    excluded = config.get("exclude") or ["lm_head"]

    def writer_of(module: str, is_table: bool) -> Writer | None:
        left = any(
            re.match(e[3:], module) if e.startswith("re:") else fnmatch.fnmatchcase(module, e)
            for e in excluded
        )
        outside = is_table or _ROUTER.search(module) or not _IN_LAYERS.search(module)
        return None if left or outside else writer

    return writer_of


def _auto_round(config: dict[str, Any]) -> WriterOf:
    form, extra = config["packing_format"], config.get("extra_config") or {}
    if config["data_type"] == "mx_fp":
        writer = Writer(w.mxfp4("weight_packed"), w.x_mxfp4, takes=lambda n, k: k % 32 == 0)
        return _in_layers(lambda module: writer)
    if not form.endswith("auto_gptq"):
        raise NotWrittenError(f"no writer for {form}")

    def of(module: str) -> Writer | None:
        own = config | extra.get(module, {})
        return None if own["bits"] > 8 else _gptq_writer(own["bits"], own["group_size"])

    return _in_layers(of)


def _in_layers(of: Callable[[str], Writer | None]) -> WriterOf:
    def writer_of(module: str, is_table: bool) -> Writer | None:
        if is_table or not _IN_LAYERS.search(module) or _OUTSIDE.search(module):
            return None
        return None if _ROUTER.search(module) else of(module)

    return writer_of


@cache
def _gptq_writer(bits: int, size: int, *, version_2: bool = False) -> Writer:
    return Writer(
        w.gptq(bits, size, version_2=version_2),
        takes=lambda n, k: k % (32 if size == -1 else size) == 0 and n % 32 == 0,
    )


def _gptq(config: dict[str, Any]) -> WriterOf:
    version_2 = config.get("checkpoint_format") == "gptq_v2"
    dynamic = config.get("dynamic") or {}
    kept = [name for names in config.get("modules_in_block_to_quantize") or [] for name in names]

    def of(module: str) -> Writer | None:
        rules = (p for p in dynamic if re.match(re.sub(r"^[-+]:", "", p), module))
        rule = next(rules, "")
        if rule.startswith("-:"):
            return None
        if kept and not any(module.endswith(f".{k}") for k in kept) and ".experts." not in module:
            return None
        own = config | dynamic.get(rule, {})
        return _gptq_writer(own["bits"], own.get("group_size", 128), version_2=version_2)

    inside = _in_layers(of)
    head = bool(config.get("lm_head"))

    def writer_of(module: str, is_table: bool) -> Writer | None:
        return of(module) if head and module == "lm_head" else inside(module, is_table)

    return writer_of


def _awq(config: dict[str, Any]) -> WriterOf:
    size = config["group_size"]
    writer = Writer(w.awq(size), takes=lambda n, k: k % size == 0 and n % 8 == 0)
    left = config.get("modules_to_not_convert") or []

    def of(module: str) -> Writer | None:
        return None if any(e in module for e in left if not e.startswith("re:")) else writer

    return _in_layers(of)
