# SPDX-License-Identifier: Apache-2.0
"""The file of a cache entry: whatever happens to it is noticed before a tensor is used."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from tests.support.messages import saying
from vllm.compressed_linear.prepare.cache import digest as digest_module
from vllm.compressed_linear.prepare.cache.digest import (
    DIGEST_BYTES,
    PieceDigest,
    digest_file,
    digest_memory,
)
from vllm.compressed_linear.prepare.cache.entry import (
    ALIGNMENT,
    MAGIC,
    EntryError,
    Label,
    map_entry,
    read_entry,
    verify_entry,
    write_entry,
)

KEY = {"backend": "cpu", "shards": [{"n": 3}]}
LABEL = Label("model", "model.layers.0.mlp.down_proj", "3x5, uint4b8", 1.5)
TENSORS = {
    "packed": torch.arange(200, dtype=torch.uint8).view(10, 20),
    "scale": torch.randn(3, 5).to(torch.bfloat16),
    "zero": torch.randn(3, 5).to(torch.float8_e4m3fn),
    "empty": torch.empty(0, 4, dtype=torch.float16),
    "number": torch.tensor(7, dtype=torch.int32),
    "last": torch.arange(3.0),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("entry") / "entry"
    with path.open("wb") as stream:
        write_entry(stream, KEY, LABEL, TENSORS)
    return path


def read(path: Path) -> dict[str, torch.Tensor]:
    with path.open("rb") as stream:
        entry = read_entry(stream)
        verify_entry(stream, entry)
        return map_entry(stream, entry)


def test_what_was_written_is_read(written: Path) -> None:
    with written.open("rb") as stream:
        entry = read_entry(stream)
    assert (entry.key, entry.label, entry.size) == (KEY, LABEL, written.stat().st_size)
    found = read(written)
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        raw = (t.reshape(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(*raw)
        assert found[name].data_ptr() % ALIGNMENT == 0


def test_tensors_can_be_saved(written: Path, tmp_path: Path) -> None:
    torch.save(read(written), tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt")
    assert all(torch.equal(saved[name].float(), TENSORS[name].float()) for name in TENSORS)


@given(data=st.data())
def test_no_changed_byte_goes_unnoticed(data: st.DataObject, written: Path) -> None:
    good = written.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[at] ^= data.draw(st.integers(1, 255))
    path = written.with_name("bad")
    path.write_bytes(bad)
    with pytest.raises(EntryError):
        read(path)


REGIONS = {
    "magic": (0, b"X", (MAGIC,)),
    "length of the header": (8, b"\0", ("header",)),
    "huge length of the header": (15, b"\x7f", ("header",)),
    "header": (16, b"!", ("header",)),
    "key": (30, b"Z", (re.compile("damaged|header"),)),
    "first tensor": (-32 - 64 * 5, b"\xa5", ("damaged", "digest")),
    "between tensors": (-32 - 1, b"\xa5", ("damaged", "digest")),
    "digest": (-1, b"\xa5", ("damaged", "digest")),
}


@pytest.mark.parametrize("region", REGIONS)
def test_damage_is_named(region: str, written: Path) -> None:
    at, value, message = REGIONS[region]
    bad = bytearray(written.read_bytes())
    assert bad[at : at + 1] != value
    bad[at % len(bad)] = value[0]
    path = written.with_name("bad")
    path.write_bytes(bad)
    with pytest.raises(EntryError, match=saying(*message)):
        read(path)


def test_every_truncation_is_noticed(written: Path) -> None:
    good = written.read_bytes()
    path = written.with_name("bad")
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(EntryError, match=f"truncated|{re.escape(repr(MAGIC))}"):
            read(path)


@pytest.mark.parametrize("more", [b"\0", b"\0" * 4096, b"VCLPREP1"])
def test_an_entry_that_goes_on_is_noticed(more: bytes, written: Path) -> None:
    path = written.with_name("bad")
    size = written.stat().st_size
    path.write_bytes(written.read_bytes() + more)
    with pytest.raises(EntryError, match=saying(size + len(more), size)):
        read(path)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 100, MAGIC, MAGIC + b"\0" * 8, MAGIC + b"\xff" * 100, b"{}" * 100]
)
def test_files_of_others_are_no_entries(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(EntryError):
        read(tmp_path / "file")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(4, 6).t(), "strides"),
        (torch.zeros(2, device="meta"), "meta"),
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
    ],
)
def test_tensors_that_would_not_come_back_alike_are_refused(
    tensor: torch.Tensor, message: str, tmp_path: Path
) -> None:
    with (tmp_path / "file").open("wb") as stream, pytest.raises(ValueError, match=message):
        write_entry(stream, KEY, LABEL, {"x": tensor})


# Digests.


def expected_digest(content: bytes, piece: int) -> bytes:
    pieces = [content[at : at + piece] for at in range(0, len(content), piece)]
    return blake3(b"".join(blake3(part).digest() for part in pieces)).digest()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 640, 1000])
def test_a_digest_does_not_depend_on_how_it_was_made(
    length: int, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_module, "PIECE", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    content = torch.randint(0, 256, (length,), dtype=torch.uint8).numpy().tobytes()
    expected = expected_digest(content, 64)
    assert digest_memory(memoryview(content)) == expected
    for step in (1, 7, 64, 1000):
        digest = PieceDigest()
        for at in range(0, length, step):
            digest.update(content[at : at + step])
        assert digest.digest() == expected
    (tmp_path / "file").write_bytes(content + b"more")
    with (tmp_path / "file").open("rb") as stream:
        assert digest_file(stream.fileno(), length) == expected
        with pytest.raises(EOFError, match=saying(length + 4, length + 5)):
            digest_file(stream.fileno(), length + 5)


def test_threads_of_a_bound_process_use_all_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a worker whose OpenMP threads have a core each."""
    masks = {0: {3}, 11: {3}, 12: {5}, 13: {6}, 14: set(range(64))}
    monkeypatch.setattr(digest_module.os, "sched_getaffinity", masks.__getitem__)
    monkeypatch.setattr(Path, "iterdir", lambda self: [self / str(t) for t in (11, 12, 13, 14)])
    assert digest_module._cores() == {3, 5, 6}
    masks[0] = {3, 4}
    assert digest_module._cores() == {3, 4}


def test_a_digest_is_of_256_bits() -> None:
    assert len(digest_memory(memoryview(b"x"))) == DIGEST_BYTES
