# SPDX-License-Identifier: Apache-2.0
"""Mutators of containers: bytes and headers of safetensors files, indexes, paths."""

from __future__ import annotations

import copy
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.support.fuzzing.files import FILE, INDEX, Mutant
from tests.support.fuzzing.tensors import Draw

NUMBERS = (0, 1, -1, 7, 2**31, 2**32, 2**50, 2**63 - 1, 2**63, 2**64, 1.5, True, None, "4", "", [])
VALUES = (*NUMBERS, {}, {"a": 1}, [1, 2, 3], "F32", "I32", "Q4", "../x", 1e308)
DEEP = 100_000


def header_field(draw: Draw, mutant: Mutant) -> None:
    """Another value in an entry of the header: dtype, a length, an offset, or the entry itself."""
    name = draw(st.sampled_from(sorted(mutant.tensors)))
    where = draw(st.sampled_from(["entry", "dtype", "shape", "data_offsets", "length", "offset"]))
    value = copy.deepcopy(draw(st.sampled_from(VALUES)))
    at = draw(st.integers(0, 1))

    def change(header: dict[str, Any]) -> None:
        if where == "entry":
            header[name] = value
        elif where in ("length", "offset"):
            numbers = header[name]["shape" if where == "length" else "data_offsets"]
            if at < len(numbers):
                numbers[at] = value
        else:
            header[name][where] = value

    _with_header(mutant, change, f"header: {where} {at} of {name} = {value!r}")


def header_offsets(draw: Draw, mutant: Mutant) -> None:
    """Two tensors at each other's place, one moved, one removed, one at the other's offsets."""
    one, two = draw(st.lists(st.sampled_from(sorted(mutant.tensors)), min_size=2, max_size=2))
    how = draw(st.sampled_from(["swap", "move", "remove", "same"]))
    by = draw(st.sampled_from([-8, -1, 1, 8, 2**40]))

    def change(header: dict[str, Any]) -> None:
        first, second = header[one], header[two]
        if how == "swap":
            first["data_offsets"], second["data_offsets"] = (
                second["data_offsets"],
                first["data_offsets"],
            )
        elif how == "same":
            second["data_offsets"] = first["data_offsets"]
        elif how == "move":
            first["data_offsets"] = [at + by for at in first["data_offsets"]]
        else:
            del header[one]

    _with_header(mutant, change, f"header: {how} {one}, {two} by {by}")
    mutant.harmless = one == two
    if how == "swap":
        # Two tensors of equal size at each other's place are a valid file with other contents.
        a, b = mutant.tensors[one], mutant.tensors[two]
        if len(a.data) == len(b.data):
            mutant.tensors[one] = type(a)(a.dtype, a.shape, b.data)
            mutant.tensors[two] = type(b)(b.dtype, b.shape, a.data)
            mutant.edits.pop()


def header_text(draw: Draw, mutant: Mutant) -> None:
    """The text of the header: cut, damaged, not UTF-8, repeated keys, deeply nested."""
    how = draw(
        st.sampled_from(["cut", "byte", "utf-16", "latin-1", "deep", "twice", "nan", "tail"])
    )
    at = draw(st.integers(0, 4000))
    byte = draw(st.integers(0, 255))

    def change(text: bytes) -> bytes:
        at_ = at % len(text)
        if how == "cut":
            return text[:at_]
        if how == "byte":
            return text[:at_] + bytes([byte]) + text[at_ + 1 :]
        if how == "utf-16":
            return text.decode().encode("utf-16")
        if how == "latin-1":
            return b'{"\xff": 1, ' + text[1:]
        if how == "deep":
            return text.rstrip()[:-1] + b', "x": ' + b"[" * DEEP + b"]" * DEEP + b"}"
        if how == "twice":
            try:
                name, entry = next(iter(json.loads(text).items()))
            except RecursionError:  # it is nested too deeply by now
                return text
            return text.rstrip()[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}".encode()
        if how == "nan":
            return text.rstrip()[:-1] + b', "x": NaN}'
        return text + b"}"

    def edit(directory: Path) -> None:
        if not (directory / FILE).is_file():
            return
        raw = (directory / FILE).read_bytes()
        try:
            (length,) = struct.unpack("<Q", raw[:8])
            text = change(raw[8 : 8 + length])
        except (struct.error, ValueError, LookupError, ZeroDivisionError):
            return  # an earlier change left no such header
        (directory / FILE).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    mutant.edits.append(edit)
    mutant.about.append(FILE)
    # One byte may change a name, a length or nothing.
    mutant.harmless = how == "byte"
    mutant.done.append(f"header text: {how} at {at}, {byte}")


def header_length(draw: Draw, mutant: Mutant) -> None:
    length = draw(st.sampled_from([0, 1, 2**10, 2**31, 2**32, 2**50, 2**63, 2**64 - 1]))

    def edit(directory: Path) -> None:
        if not (directory / FILE).is_file():
            return
        raw = (directory / FILE).read_bytes()
        (directory / FILE).write_bytes(struct.pack("<Q", length) + raw[8:])

    mutant.edits.append(edit)
    mutant.about.append(FILE)
    mutant.done.append(f"header of {length} bytes")


def cut_file(draw: Draw, mutant: Mutant) -> None:
    part = draw(st.sampled_from([0.0, 1e-6, 1e-4, 0.01, 0.5, 0.999, 1.001]))

    def edit(directory: Path) -> None:
        if not (directory / FILE).is_file():
            return
        raw = (directory / FILE).read_bytes()
        size = int(len(raw) * part)
        (directory / FILE).write_bytes(raw[:size] + bytes(max(size - len(raw), 0)))

    mutant.edits.append(edit)
    mutant.about.append(FILE)
    mutant.done.append(f"{part} of the file")


def special_file(draw: Draw, mutant: Mutant) -> None:
    """The file, the index or config.json is a directory, a pipe, a device, a link."""
    name = draw(st.sampled_from([FILE, INDEX, "config.json"]))
    how = draw(
        st.sampled_from(["directory", "pipe", "/dev/zero", "/etc/passwd", "loop", "nowhere"])
    )

    def edit(directory: Path) -> None:
        path = directory / name
        if path.is_dir():
            return
        path.unlink(missing_ok=True)
        if how == "directory":
            path.mkdir()
        elif how == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to({"loop": name, "nowhere": "missing.safetensors"}.get(how, how))

    mutant.edits.append(edit)
    mutant.about += [name, "config.json", ".safetensors"]
    # An index that cannot be followed does not count.
    mutant.harmless = name == INDEX
    mutant.done.append(f"{name} is {how}")


def split_with_index(draw: Draw, mutant: Mutant) -> None:
    """Two files and a right index."""
    if mutant.more:
        return
    names = sorted(mutant.tensors)
    moved = [name for at, name in enumerate(names) if at % 2]
    other = "model-00002-of-00002.safetensors"
    mutant.index = {"weight_map": {n: other if n in moved else FILE for n in names}}
    mutant.more[other] = {name: mutant.tensors.pop(name) for name in moved}
    mutant.must_read = True
    mutant.done.append("two files with an index")


def wrong_index(draw: Draw, mutant: Mutant) -> None:
    split_with_index(draw, mutant)
    mutant.done.append("and then")
    if not isinstance(mutant.index, dict):
        return
    weight_map = mutant.index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        return
    name = draw(st.sampled_from(sorted(weight_map)))
    how = draw(st.sampled_from(["path", "value", "drop", "swap", "whole"]))
    bad = [
        "../x.safetensors",
        "/etc/passwd",
        "/dev/zero",
        "a/b.safetensors",
        ".",
        "",
        "x\0.safetensors",
    ]
    bad += ["missing.safetensors", "config.json", "é.safetensors", "\ud800.safetensors", "x" * 300]
    value: Any = None
    if how == "path":
        value = weight_map[name] = draw(st.sampled_from(bad))
    elif how == "value":
        value = weight_map[name] = copy.deepcopy(draw(st.sampled_from(VALUES)))
    elif how == "drop":
        del weight_map[name]
    elif how == "swap":
        files = sorted({FILE, *mutant.more})
        weight_map[name] = next(f for f in files if f != weight_map[name])
    else:
        value = copy.deepcopy(draw(st.sampled_from(VALUES)))
        mutant.index = draw(st.sampled_from([value, {"weight_map": value}]))
    mutant.about += [INDEX, name, name.rpartition(".")[0]]
    mutant.harmless = True
    mutant.done.append(f"index: {how} {name} = {value!r}")


def duplicate(draw: Draw, mutant: Mutant) -> None:
    """A second file has a tensor of the same name with other numbers."""
    name = draw(st.sampled_from(sorted(mutant.tensors)))
    tensor = mutant.tensors[name]
    other = type(tensor)(tensor.dtype, tensor.shape, bytes(len(tensor.data)))
    file = draw(st.sampled_from(["a.safetensors", "z.safetensors"]))
    mutant.more.setdefault(file, {})[name] = other
    indexed = draw(st.booleans())
    if indexed and mutant.index is None:
        mutant.index = {"weight_map": dict.fromkeys(mutant.tensors, FILE)}
        if draw(st.booleans()):
            mutant.index["weight_map"]["extra"] = file
            mutant.more[file]["extra"] = other
    mutant.about += [file, name]
    mutant.harmless = True
    mutant.done.append(f"{name} also in {file}, index: {indexed}")


def _with_header(mutant: Mutant, change: Callable[[dict[str, Any]], None], what: str) -> None:
    def edit(directory: Path) -> None:
        if not (directory / FILE).is_file():
            return
        raw = (directory / FILE).read_bytes()
        try:
            (length,) = struct.unpack("<Q", raw[:8])
            header = json.loads(raw[8 : 8 + length])
            change(header)
        except (struct.error, ValueError, LookupError, TypeError, RecursionError):
            return  # an earlier change left no such header
        text = json.dumps(header).encode()
        (directory / FILE).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    mutant.edits.append(edit)
    mutant.about.append(FILE)
    mutant.done.append(what)


MUTATORS = (
    header_field,
    header_field,
    header_offsets,
    header_text,
    header_length,
    cut_file,
    special_file,
    split_with_index,
    wrong_index,
    duplicate,
)
