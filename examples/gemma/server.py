# SPDX-License-Identifier: Apache-2.0
"""Runs `vllm serve` on loopback for as long as a `with` block lasts."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

HOST = "127.0.0.1"
START_SECONDS = 600
STOP_SECONDS = 30
#: Compiling takes longer than answering all that a demo asks.
OPTIONS = ("--max-model-len", "2048", "--max-num-seqs", "4", "--enforce-eager")


@contextlib.contextmanager
def serving(
    model: Path,
    name: str,
    log: Path,
    environment: dict[str, str],
    options: Sequence[str] = OPTIONS,
) -> Iterator[str]:
    """Serves the checkpoint in `model` as `name`; yields the base URL of its OpenAI API.

    Raises RuntimeError with the end of the log if the server does not come up.
    """
    port = _free_port()
    command = [
        *(str(Path(sys.executable).parent / "vllm"), "serve", str(model)),
        *("--host", HOST, "--port", str(port), "--served-model-name", name),
        *("--shutdown-timeout", "10", *options),
    ]
    with log.open("w") as output:
        # A session of its own, so that Ctrl-C reaches this process alone, which then stops it.
        server = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait(server, f"http://{HOST}:{port}/health", log)
        yield f"http://{HOST}:{port}/v1"
    finally:
        _stop(server)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        time.sleep(0.2)
    ended = "is not up in time" if server.poll() is None else f"ended with {server.returncode}"
    raise RuntimeError("\n".join([f"the server {ended}; from {log}:", *_causes(log)]))


def _causes(log: Path) -> list[str]:
    """The errors in `log`, the first of which is the cause of the others; else its last lines."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [
        match[0] for line in lines if (match := re.search(r"\b\w+(Error|Exception): .*", line))
    ]
    return list(dict.fromkeys(errors))[:5] or lines[-20:]


def _stop(server: subprocess.Popen[bytes]) -> None:
    """Asks the server to end, then ends it and whatever processes it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(server.pid).children(recursive=True)
        server.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOP_SECONDS)
        _, alive = psutil.wait_procs(children, timeout=5)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    if server.poll() is None:
        server.kill()
    server.wait()
