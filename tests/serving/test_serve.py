# SPDX-License-Identifier: Apache-2.0
"""A live ``vllm serve`` on loopback, asked by two streams at once."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.checkpoints import checkpoint
from tests.support.model_loading import free_port
from vllm.compressed_linear import settings

pytestmark = pytest.mark.e2e

START_SECONDS = 240


@contextmanager
def server(model: Path, log: Path, plan: Path) -> Iterator[str]:
    """Address of a server that has answered /health; Ctrl-C must end it."""
    port = free_port()
    command = [
        str(Path(sys.executable).parent / "vllm"),
        "serve",
        str(model),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"),
        *("--max-model-len", "512", "--enforce-eager", "--gpu-memory-utilization", "0.3"),
    ]
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            # Where there is AMX, one line more would say that vLLM alone rounds x.
            env=os.environ | {settings.PLAN_FILE: str(plan), "VLLM_CPU_INT4_W4A8": "0"},
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < deadline, log.read_text()[-4000:]
                time.sleep(0.5)
        yield f"127.0.0.1:{port}"
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


Events = list[tuple[float, str]]
"""When the request was sent (without text), then when each piece of text came."""


def send(address: str, prompt: list[int], events: Events) -> http.client.HTTPConnection:
    """Ask for a streamed completion; the answer is read by ``receive``."""
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": 400,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    connection = http.client.HTTPConnection(address, timeout=120)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    events.append((time.monotonic(), ""))
    return connection


def receive(connection: http.client.HTTPConnection, events: Events) -> None:
    for line in connection.getresponse():
        text = line.decode().strip().removeprefix("data: ")
        if text and text != "[DONE]":
            events.append((time.monotonic(), json.loads(text)["choices"][0]["text"]))
    connection.close()


@pytest.mark.parametrize(
    "name",
    [
        "gptqmodel-gptq-w4-g32-asym-descact",
        "autoawq-awq-gemm-g64-asym-skip-v",
        "llmcompressor-w4a16-sym-g128-lmhead",
    ],
)
def test_two_streams_at_once(name: str, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    with server(checkpoint(name), tmp_path / "server.log", plan) as address:
        prompts = [[5, 6, 7, 8, 9], [40, 41, 42]]
        alone: list[Events] = [[], []]
        for prompt, events in zip(prompts, alone, strict=True):
            receive(send(address, prompt, events), events)
        together: list[Events] = [[], []]
        # Both are sent before either is read: the server keeps every core busy from then on.
        connections = [
            send(address, prompt, events) for prompt, events in zip(prompts, together, strict=True)
        ]
        threads = [
            threading.Thread(target=receive, args=pair)
            for pair in zip(connections, together, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Read before Ctrl-C, at which vLLM's front end logs that its engine has gone.
        log = (tmp_path / "server.log").read_text()
    first, second = together
    # Each was sent before the other had ended.
    assert max(first[0][0], second[0][0]) < min(first[-1][0], second[-1][0])
    for one, two in zip(alone, together, strict=True):
        assert len(one) >= 200
        assert _text(one)[:200] == _text(two)[:200]
    layers = json.loads(plan.read_text())["layers"]
    assert {layer["backend"] for layer in layers} == {"cpu"}
    assert log.count("compressed_linear: ") == 1
    assert "Traceback" not in log


def _text(events: Events) -> str:
    return "".join(text for _, text in events)
