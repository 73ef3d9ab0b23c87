# SPDX-License-Identifier: Apache-2.0
"""The prepared-weights cache: what is reused, what makes another entry and what is not kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.cached_layers import QUANT, K, N, prepared, shard, what_the_cache_did
from tests.support.messages import says
from tests.support.stored_entries import entries, equal
from tests.support.synthetic import Quant
from vllm.compressed_linear.backends.base import QuantLinearMethod
from vllm.compressed_linear.backends.cpu.weight_only import CpuBackend
from vllm.compressed_linear.backends.registry import register_backend
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.shard import LoadedShard
from vllm.compressed_linear.machine import native
from vllm.compressed_linear.prepare.cache import store as cache_module
from vllm.compressed_linear.prepare.cache.store import PreparedCache
from vllm.compressed_linear.settings import BackendRules, Settings

FLOAT32 = LayerContext("float32", "float32")


def packing_calls() -> int:
    return sum(n for name, n in native.call_counts().items() if "pack" in name.split("/")[0])


# Reuse.


def test_the_second_time_nothing_is_prepared(tmp_path: Path, warnings: list[str]) -> None:
    first = prepared(PreparedCache(tmp_path))
    assert what_the_cache_did() == "miss"
    native.reset_call_counts()
    second = prepared(PreparedCache(tmp_path))
    assert what_the_cache_did() == "hit"
    assert packing_calls() == 0
    assert equal(first.tensors, second.tensors)
    x = torch.randn(3, K)
    assert torch.equal(first.method.apply(first.tensors, x), second.method.apply(second.tensors, x))
    assert len(entries(tmp_path)) == 1
    assert warnings == []


def test_tensors_are_aligned_and_writing_to_them_leaves_the_file_alone(tmp_path: Path) -> None:
    prepared(PreparedCache(tmp_path))
    (file,) = entries(tmp_path)
    before = file.read_bytes()
    mapped = prepared(PreparedCache(tmp_path)).tensors
    assert {tensor.data_ptr() % 64 for tensor in mapped.values()} == {0}
    mapped["packed"].fill_(255)
    assert file.read_bytes() == before
    assert not equal(mapped, prepared(PreparedCache(tmp_path)).tensors)


def mapped_bytes(file: Path, field: str) -> int:
    """Sum of a field of /proc/self/smaps over the mappings of ``file``."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith(f"{field}:"):
            total += int(line.split()[1]) * 1024
    return total


def test_pages_are_those_of_the_file(tmp_path: Path) -> None:
    """None of them is this process's own, so all that map the file share them."""
    prepared(PreparedCache(tmp_path), shard(n=1024, k=1024))
    (file,) = entries(tmp_path)
    executor = prepared(PreparedCache(tmp_path), shard(n=1024, k=1024))
    executor.method.apply(executor.tensors, torch.randn(1, 1024))
    assert mapped_bytes(file, "Rss") > 0.9 * file.stat().st_size
    assert mapped_bytes(file, "Anonymous") == 0


def test_a_mapped_entry_outlives_its_file(tmp_path: Path) -> None:
    expected = prepared(None).tensors
    prepared(PreparedCache(tmp_path))
    mapped = prepared(PreparedCache(tmp_path)).tensors
    for file in entries(tmp_path):
        file.unlink()
    assert equal(mapped, expected)


# What makes another entry.


def with_tensor(change: Callable[[torch.Tensor], torch.Tensor], name: str) -> LoadedShard:
    found = shard()
    return replace(found, tensors={**found.tensors, name: change(found.tensors[name])})


def one_bit(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(torch.uint8).view(-1)[-1] ^= 1
    return changed


def with_source(**changes: Any) -> LoadedShard:
    found = shard()
    return replace(found, source=replace(found.source, **changes))


def last_rows() -> LoadedShard:
    """The same bytes, said to be the second half of a larger weight."""
    return with_source(full_n=2 * N, n_start=N)


OTHERS: dict[str, dict[str, Any]] = {
    "a bit of the codes": {"shards": [with_tensor(one_bit, "qweight")]},
    "a bit of the scales": {"shards": [with_tensor(one_bit, "scales")]},
    "a bit of the zero points": {"shards": [with_tensor(one_bit, "qzeros")]},
    "another order": {"shards": [with_tensor(lambda t: t.flip(0), "g_idx")]},
    "other rows of the weight": {"shards": [last_rows()]},
    "rows of padding": {"shards": [with_source(padding=16)]},
    "one shard more": {"shards": [shard(), shard()]},
    "dtype of activations": {"context": replace(FLOAT32, input_dtype="bfloat16")},
    "dtype of the output": {"context": replace(FLOAT32, output_dtype="float16")},
    "a bias": {"context": replace(FLOAT32, bias_dtype="float32")},
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_preparation_depends_on_makes_another_entry(what: str, tmp_path: Path) -> None:
    prepared(PreparedCache(tmp_path))
    for expected in ("miss", "hit"):
        options = dict(OTHERS[what])
        prepared(PreparedCache(tmp_path), *options.pop("shards", []), **options)
        assert what_the_cache_did() == expected
    assert len(entries(tmp_path)) == 2


def test_the_same_bytes_in_another_packing_make_another_entry(tmp_path: Path) -> None:
    """GPTQ's two versions differ by what a zero point of the file means."""
    from vllm.compressed_linear.formats.gptq import gptq_scheme

    found = shard()
    old = replace(found.source, scheme=gptq_scheme(4, QUANT.group_size, version="gptq"))
    for source in (found.source, old):
        prepared(PreparedCache(tmp_path), replace(found, source=source))
        assert what_the_cache_did() == "miss"


@pytest.mark.parametrize(
    ("target", "name", "value"),
    [
        (cache_module, "installation", lambda: "0.0.1+0"),
        (native, "layout_id", lambda layout="planes": "tile17"),
        (CpuBackend, "prepared_variant", classmethod(lambda cls, d, platform: "other")),
    ],
    ids=["package", "layout", "variant"],
)
def test_another_version_reads_nothing_of_this_one(
    target: Any, name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(PreparedCache(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(target, name, value)
        prepared(PreparedCache(tmp_path))
        assert what_the_cache_did() == "miss"
    prepared(PreparedCache(tmp_path))
    assert what_the_cache_did() == "hit"


def test_other_paths_read_what_these_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All instruction sets have one layout, and another start may measure other rates."""
    prepared(PreparedCache(tmp_path))
    monkeypatch.setattr(CpuBackend, "variant", classmethod(lambda cls, d, platform: "other"))
    prepared(PreparedCache(tmp_path))
    assert what_the_cache_did() == "hit"


def test_any_change_of_the_code_is_another_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "prepare" / "cache" / "store.py"
    files = [store, tmp_path / "backends" / "cpu.py", tmp_path / "library.so"]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("before")
    monkeypatch.setattr(cache_module, "__file__", str(files[0]))

    def installation() -> str:
        cache_module.installation.cache_clear()
        return cache_module.installation()

    try:
        seen = {installation()}
        for file in files:
            file.write_text("after")
            seen.add(installation())
        files[2].rename(tmp_path / "other.so")
        seen.add(installation())
        assert len(seen) == 5
    finally:
        cache_module.installation.cache_clear()


def test_like_weights_share_an_entry_whatever_they_are_called(tmp_path: Path) -> None:
    prepared(PreparedCache(tmp_path, "one"), name="model.layers.0.layer")
    prepared(PreparedCache(tmp_path, "other"), name="model.layers.7.layer")
    assert what_the_cache_did("model.layers.7.layer") == "hit"


# What is never kept.


def test_a_reload_goes_past_the_cache(tmp_path: Path) -> None:
    cache = PreparedCache(tmp_path)
    first = prepared(cache)
    assert len(entries(tmp_path)) == 1
    again = prepared(cache, shard(1), pinned=[first.executor])
    assert what_the_cache_did() == ""
    assert len(entries(tmp_path)) == 1
    assert not equal(first.tensors, again.tensors)


@pytest.mark.usefixtures("clean_registry")
def test_a_backend_that_names_no_layout_is_not_kept(tmp_path: Path) -> None:
    class Nameless(CpuBackend):
        name = "nameless"
        layout_version = QuantLinearMethod.layout_version

    register_backend(Nameless)
    prepared(PreparedCache(tmp_path), settings=Settings(BackendRules.parse("nameless")))
    assert what_the_cache_did() == "not kept"
    assert entries(tmp_path) == []


@pytest.mark.usefixtures("clean_registry")
def test_tensors_that_cannot_be_written_as_they_are_are_not_kept(
    tmp_path: Path, warnings: list[str]
) -> None:
    class Strided(CpuBackend):
        name = "strided"

        def prep_weights_for_execution(self, weights: Any) -> dict[str, torch.Tensor]:
            tensors = super().prep_weights_for_execution(weights)
            return tensors | {"more": torch.zeros(4, 6).t()}

    register_backend(Strided)
    executor = prepared(PreparedCache(tmp_path), settings=Settings(BackendRules.parse("strided")))
    assert executor.tensors["more"].shape == (6, 4)
    assert list(tmp_path.iterdir()) == []
    assert len(warnings) == 1
    assert says(warnings[0], "more", "cpu", "(1, 6)", "(6, 4)", "contiguous")


def test_unquantized_weights_are_kept_too(tmp_path: Path) -> None:
    from vllm.compressed_linear.checkpoint.shard import dense_shard

    weight = torch.randn(N, K, dtype=torch.bfloat16)
    context = LayerContext("bfloat16", "bfloat16")
    for expected in ("miss", "hit"):
        prepared(PreparedCache(tmp_path), dense_shard("lm_head", weight), context=context)
        assert what_the_cache_did() == expected


@pytest.mark.parametrize("backend", ["cpu_int8", "cpu_int8_fast"])
def test_weights_of_integer_kernels_are_kept_apart(backend: str, tmp_path: Path) -> None:
    from vllm.compressed_linear.spec.descriptor import ActivationSpec
    from vllm.compressed_linear.spec.elements import uint

    found = shard(quant=Quant("ct", bits=4))
    rules = BackendRules.parse(backend)
    if backend == "cpu_int8":
        activation = ActivationSpec(uint(8, 128), True, "token")
        scheme = replace(found.source.scheme, activation=activation)
        found = replace(found, source=replace(found.source, scheme=scheme))
    else:
        prepared(PreparedCache(tmp_path), found)
    expected = prepared(None, found, settings=Settings(rules)).tensors
    for did in ("miss", "hit"):
        executor = prepared(PreparedCache(tmp_path), found, settings=Settings(rules))
        assert what_the_cache_did() == did
        assert executor.method.name == backend
        assert equal(executor.tensors, expected)


@pytest.mark.parametrize("bits", [3, 8])
def test_other_elements_are_kept_as_they_are(bits: int, tmp_path: Path) -> None:
    quant = Quant("ct", bits=bits, group_size=-1)
    expected = prepared(PreparedCache(tmp_path), shard(quant=quant)).tensors
    assert equal(prepared(PreparedCache(tmp_path), shard(quant=quant)).tensors, expected)
    assert what_the_cache_did() == "hit"
