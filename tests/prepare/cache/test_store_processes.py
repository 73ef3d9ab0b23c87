# SPDX-License-Identifier: Apache-2.0
"""The prepared-weights cache between several processes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.cached_layers import prepared, shard, what_the_cache_did
from tests.support.repository import environment
from tests.support.stored_entries import entries, equal
from vllm.compressed_linear.prepare.cache.store import UNFINISHED, PreparedCache


def start(directory: Path, out: Path, seeds: list[int]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.cached_layers", directory, out, *map(str, seeds)],
        env=environment(),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.needs_vllm
def test_servers_that_start_at_once_agree(tmp_path: Path) -> None:
    """They write the same entries in the same order, while half of them are damaged."""
    directory, seeds = tmp_path / "cache", list(range(6))
    for seed in seeds[::2]:
        prepared(PreparedCache(directory), shard(seed))
    for file in entries(directory):
        file.chmod(0o644)
        file.write_bytes(file.read_bytes()[:-1])
    outs = [tmp_path / f"{i}.pt" for i in range(2)]
    processes = [start(directory, out, seeds) for out in outs]
    for process in processes:
        assert process.stdout is not None
        assert any("ready" in line for line in process.stdout)
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    for out in outs:
        result = torch.load(out)
        for seed, (_, tensors) in zip(seeds, result["layers"], strict=True):
            assert equal(tensors, prepared(None, shard(seed)).tensors)
        assert all("truncated" in line for line in result["warnings"])
    assert len(list(directory.iterdir())) == len(seeds)
    cache = PreparedCache(directory)
    for seed in seeds:
        prepared(cache, shard(seed))
        assert what_the_cache_did() == "hit"


@pytest.mark.needs_vllm
def test_a_server_that_is_killed_while_it_writes_leaves_no_entry(tmp_path: Path) -> None:
    program = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from tests.support.cached_layers import prepared\n"
        "from vllm.compressed_linear.prepare.cache.store import PreparedCache\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"prepared(PreparedCache(Path({str(tmp_path)!r})))\n"
    )
    process = subprocess.run([sys.executable, "-c", program], env=environment(), timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert entries(tmp_path) == []
    assert len(list(tmp_path.glob(f".*{UNFINISHED}"))) == 1
    prepared(PreparedCache(tmp_path))
    assert what_the_cache_did() == "miss"
    assert len(entries(tmp_path)) == 1
