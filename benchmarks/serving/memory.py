# SPDX-License-Identifier: Apache-2.0
"""Peak memory of processes, by looking now and then."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

INTERVAL_SECONDS = 0.25


def anonymous_bytes(process: psutil.Process) -> int:
    """RssAnon of a process and all that it started: memory that is no file's."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            status = Path(f"/proc/{one.pid}/status").read_text()
            if match := re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE):
                total += int(match[1]) << 10
    return total


class Peak:
    """Largest sum seen so far, in bytes."""

    def __init__(self) -> None:
        self.bytes = 0


@contextlib.contextmanager
def watched_children() -> Iterator[Peak]:
    """Watches everything that this process has started or starts in the ``with`` block."""
    peak, done = Peak(), threading.Event()
    own = psutil.Process()

    def watch() -> None:
        while not done.wait(INTERVAL_SECONDS):
            with contextlib.suppress(psutil.NoSuchProcess):
                total = sum(anonymous_bytes(child) for child in own.children())
                peak.bytes = max(peak.bytes, total)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
