# SPDX-License-Identifier: Apache-2.0
"""Reading safetensors headers, whole and damaged ones."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
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
    entry = {"dtype": "I32", "shape": [2, 4], "data_offsets": [8, 40], "parameter_count": 8}
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
