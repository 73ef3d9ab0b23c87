# SPDX-License-Identifier: Apache-2.0
"""Reading safetensors headers, whole and damaged ones."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import TensorInfo
from safetensors.torch import save_file

from tests.support.checkpoints import Entry, checkpoint, checkpoint_tensors, checkpoints
from tests.support.messages import saying
from vllm.compressed_linear.checkpoint.headers import Headers, headers_of, read_headers
from vllm.compressed_linear.checkpoint.shard import CheckpointError

TENSORS = {
    "a.q_proj.qweight": torch.zeros(4, 8, dtype=torch.int32),
    "a.q_proj.scales": torch.zeros(1, 8, dtype=torch.float16),
    "b.weight": torch.zeros(2, 3, dtype=torch.bfloat16),
    "lonely": torch.zeros((), dtype=torch.int64),
}


def written(directory: Path) -> Path:
    file = directory / "model.safetensors"
    save_file(TENSORS, file, metadata={"format": "pt"})
    return file


def with_header(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the header of ``file``: what ``change`` returns, or its argument."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    changed = json.dumps(change(header) or header).encode()
    file.write_bytes(struct.pack("<Q", len(changed)) + changed + raw[8 + length :])


def test_names_dtypes_shapes_and_bytes(tmp_path: Path) -> None:
    file = written(tmp_path)
    headers = read_headers(tmp_path)
    assert headers is not None
    assert set(headers) == set(TENSORS)
    assert len(headers) == len(TENSORS)
    for name, tensor in TENSORS.items():
        found = headers[name]
        assert found.dtype == str(tensor.dtype).removeprefix("torch.")
        assert found.shape == tuple(tensor.shape)
        assert found.nbytes == tensor.nbytes
        assert found.file == str(file)
    assert headers.modules["a.q_proj"] == {"qweight", "scales"}
    assert headers.modules[""] == {"lonely"}


def test_renaming_regroups_modules(tmp_path: Path) -> None:
    written(tmp_path)
    headers = read_headers(tmp_path)
    assert headers is not None
    renamed = headers.renamed({"a.q_proj.qweight": "x.a.q_proj.qweight"})
    assert renamed.modules["x.a.q_proj"] == {"qweight"}
    assert renamed.modules["a.q_proj"] == {"scales"}
    assert renamed["b.weight"] == headers["b.weight"]


def is_4_bit_gptq_or_3_bit_packed(entry: Entry) -> bool:
    return (entry.quant_method, entry.bits) in (("gptq", 4), ("compressed-tensors", 3))


@pytest.mark.parametrize("name", checkpoints(is_4_bit_gptq_or_3_bit_packed))
def test_checkpoints_of_real_tools(name: str) -> None:
    headers = read_headers(checkpoint(name))
    assert headers is not None
    tensors = checkpoint_tensors(name)
    assert {k: (h.dtype, h.shape) for k, h in headers.items()} == {
        k: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for k, t in tensors.items()
    }


def test_entries_that_somebody_else_read() -> None:
    entry = asdict(TensorInfo(dtype="I32", shape=[2, 4], data_offsets=(8, 40)))
    headers = headers_of({"a.qweight": entry}, "organisation/model")
    assert (headers["a.qweight"].dtype, headers["a.qweight"].nbytes) == ("int32", 32)
    assert headers["a.qweight"].file == "organisation/model"
    with pytest.raises(CheckpointError, match=saying("organisation/model", "tensor b")):
        headers_of({"b": {}}, "organisation/model")


def test_nothing_to_read(tmp_path: Path) -> None:
    assert read_headers(tmp_path) is None
    assert read_headers("organisation/model") is None
    save_file({}, tmp_path / "model.safetensors")
    assert read_headers(tmp_path) == Headers({})


def test_an_index_says_which_files_count(tmp_path: Path) -> None:
    file = written(tmp_path).rename(tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "consolidated.safetensors").write_bytes(b"not read")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, file.name)}))
    headers = read_headers(tmp_path)
    assert headers is not None
    assert set(headers) == set(TENSORS)


def test_a_missing_shard_is_named_with_a_tensor_it_should_hold(tmp_path: Path) -> None:
    file = written(tmp_path)
    weight_map = {**dict.fromkeys(TENSORS, file.name), "c.qweight": "more.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(
        CheckpointError, match=saying(tmp_path / "more.safetensors", "missing", "c.qweight")
    ):
        read_headers(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(text: str, tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=saying("index.json")):
        read_headers(tmp_path)


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def with_text(file: Path, text: bytes) -> None:
    file.write_bytes(struct.pack("<Q", len(text)) + text)


def renamed(file: Path, name: str, new: str) -> None:
    with_header(file, lambda header: {new if k == name else k: v for k, v in header.items()})


def moved(file: Path, name: str, by: int, more: int = 0) -> None:
    """Move a tensor by some bytes; ``more`` are added to the file."""

    def change(header: dict[str, Any]) -> None:
        header[name]["data_offsets"] = [at + by for at in header[name]["data_offsets"]]

    with_header(file, change)
    file.write_bytes(file.read_bytes() + bytes(more))


def described_twice(file: Path) -> None:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = raw[8 : 8 + length].rstrip()
    entry = json.dumps(json.loads(header)["b.weight"]).encode()
    again = header[:-1] + b', "b.weight": ' + entry + b"}"
    file.write_bytes(struct.pack("<Q", len(again)) + again + raw[8 + length :])


def linked(file: Path, name: str) -> None:
    """Move the file out of the checkpoint under another name, and link to it."""
    outside = file.parent.parent / name
    file.rename(outside)
    file.symlink_to(outside)


def entry(name: str, **changes: Any) -> Callable[[Path], None]:
    return lambda file: with_header(file, lambda header: header[name].update(changes))


DAMAGES: list[tuple[str, Callable[[Path], object], tuple[object, ...]]] = [
    ("empty", lambda f: cut(f, 0), (0, 8)),
    ("cut in the header", lambda f: cut(f, 40), ("header", 40)),
    (
        "cut in the data",
        lambda f: cut(f, f.stat().st_size - 4),
        ("truncated",),
    ),
    ("a pointer file", lambda f: f.write_text("version https://git-lfs/v1\n"), ("safetensors",)),
    (
        "no JSON",
        lambda f: f.write_bytes(struct.pack("<Q", 4) + b"{ab}"),
        ("header", "JSON"),
    ),
    (
        "no text",
        lambda f: f.write_bytes(struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc"),
        ("header", "JSON"),
    ),
    ("no map", lambda f: with_header(f, lambda header: [1]), ("header", "list")),
    (
        "no offsets",
        lambda f: with_header(f, lambda h: h["b.weight"].pop("data_offsets") and None),
        ("b.weight",),
    ),
    ("a text as shape", entry("b.weight", shape="2x3"), ("b.weight",)),
    (
        "another shape",
        entry("b.weight", shape=[2, 4]),
        ("b.weight", 12, 16, "bfloat16", [2, 4]),
    ),
    ("another dtype", entry("a.q_proj.scales", dtype="F32"), ("a.q_proj.scales", 16)),
    ("a negative length", entry("b.weight", shape=[-2, -3]), ("b.weight", "-2")),
    ("a fraction as length", entry("b.weight", shape=[2.0, 3]), ("b.weight", "2.0")),
    ("true as length", entry("a.q_proj.scales", shape=[True, 8]), ("a.q_proj.scales", "True")),
    ("offsets as text", entry("b.weight", data_offsets=["0", "12"]), ("b.weight",)),
    ("lengths beyond 64 bits", entry("b.weight", shape=[2**64, 0]), ("b.weight",)),
    ("a million dimensions", entry("b.weight", shape=[2**62] * 10**6), ("b.weight", 10**6, 64)),
    ("2 EiB in 12 bytes", entry("b.weight", shape=[2**60, 1]), ("b.weight", 12, 2**61)),
    ("an unknown dtype", entry("b.weight", dtype="Q9"), ("b.weight", "'Q9'", "BF16")),
    ("a null", lambda f: with_header(f, lambda h: h | {"b.weight": None}), ("b.weight", "None")),
    (
        "a name with an escape",
        lambda f: renamed(f, "b.weight", "\x1b[2Jb"),
        ("x1b[2Jb", "printable"),
    ),
    (
        "a name without UTF-8",
        lambda f: renamed(f, "b.weight", "\ud800"),
        ("ud800", "printable"),
    ),
    (
        "metadata of numbers",
        lambda f: with_header(f, lambda h: h | {"__metadata__": {"a": 1}}),
        (1,),
    ),
    ("overlapping tensors", lambda f: moved(f, "b.weight", -4), ("overlaps", "offset")),
    ("a gap between tensors", lambda f: moved(f, "lonely", 4, more=4), ("gap",)),
    ("bytes after the last tensor", lambda f: f.write_bytes(f.read_bytes() + b"1234"), (4, "end")),
    ("a tensor described twice", lambda f: described_twice(f), ("'b.weight'", "twice")),
    ("a header of 8 EiB", lambda f: f.write_bytes(struct.pack("<Q", 2**63) + b"{}"), (2**63, 10)),
    ("deep nesting", lambda f: with_text(f, b"[" * 10**6), ("nested",)),
    ("UTF-16", lambda f: with_text(f, "{}".encode("utf-16")), ("header", "JSON")),
    ("NaN", lambda f: with_text(f, b'{"a": NaN}'), ("header", "NaN")),
    ("a directory", lambda f: (f.unlink(), f.mkdir()), ("directory", "regular file")),
    ("a pipe without a writer", lambda f: (f.unlink(), os.mkfifo(f)), ("pipe", "regular file")),
    ("a device", lambda f: (f.unlink(), f.symlink_to("/dev/zero")), ("/dev/zero",)),
    ("a loop of links", lambda f: (f.unlink(), f.symlink_to(f.name)), ()),
    (
        "a link that leads nowhere",
        lambda f: (f.unlink(), f.symlink_to("x.safetensors")),
        ("No such",),
    ),
    ("a link to another kind of file", lambda f: linked(f, "passwd"), ("link", "passwd")),
]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [pytest.param(damage, complaint, id=name) for name, damage, complaint in DAMAGES],
)
def test_damage_is_one_clear_error_that_names_the_file(
    damage: Callable[[Path], object], complaint: tuple[object, ...], tmp_path: Path
) -> None:
    file = written(tmp_path)
    damage(file)
    with pytest.raises(CheckpointError, match=saying(file, *complaint)):
        read_headers(tmp_path)


@pytest.mark.parametrize("place", ["blobs/0123abc", "../../other/model.safetensors"])
def test_links_of_caches_and_of_users_are_followed(place: str, tmp_path: Path) -> None:
    """Hugging Face's cache links to blobs without a suffix, outside of the snapshot."""
    repository = tmp_path / "models--organisation--model"
    snapshot = repository / "snapshots" / "1"
    target = (repository / place).resolve()
    snapshot.mkdir(parents=True)
    target.parent.mkdir(parents=True)
    written(snapshot).rename(target)
    (snapshot / "model.safetensors").symlink_to(os.path.relpath(target, snapshot))
    headers = read_headers(snapshot)
    assert headers is not None
    assert set(headers) == set(TENSORS)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "/model.safetensors",
        "./model.safetensors",
        "sub/model.safetensors",
        "model\0.safetensors",
        "model.bin",
        ".",
        "",
        None,
        3,
        ["model.safetensors"],
    ],
)
def test_an_index_names_files_of_its_own_directory_only(name: Any, tmp_path: Path) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    written(inside)
    written(tmp_path)
    index = inside / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {**dict.fromkeys(TENSORS, name)}}))
    with pytest.raises(CheckpointError, match=saying(index, repr(name), "same directory")):
        read_headers(inside)
