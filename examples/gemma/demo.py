# SPDX-License-Identifier: Apache-2.0
"""The whole way of a model: fetched, quantized, served, asked; and what ran it.

Run by `make demo`. Everything is kept in build/demo, so the second run starts with serving.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from openai import OpenAI
from rich.console import Console

import plan
from fetch import fetch
from server import serving

WORK = Path(__file__).resolve().parents[2] / "build" / "demo"
NAME = "gemma-3-270m-w4a16"
MAX_TOKENS = 64


def make(target: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` make `target` unless it is there; what a broken run left is never taken."""
    if target.exists():
        return
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write(partial)
    partial.rename(target)


def checkpoint(console: Console, head_bits: int = 16) -> Path:
    """The quantized checkpoint, made from what is already there.

    `head_bits`: 8 or 16, of the embedding table that is the head as well.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    gguf = WORK / "gemma-3-270m-q4_k_m.gguf"
    bf16 = WORK / "gemma-3-270m-bf16"
    quantized = WORK / ("gemma-3-270m-w4a16-g128" + ("-head8" if head_bits == 8 else ""))
    if quantized.exists():
        return quantized
    if not gguf.exists():
        console.print("Fetching Gemma 3 270M ...")
        fetch(gguf)
    console.print("Writing it as a bf16 checkpoint and checking what it says ...")
    from convert import convert, verify  # torch and transformers, not needed the second time
    from quantize import quantize

    def write_bf16(directory: Path) -> None:
        convert(gguf, directory)
        verify(directory)

    make(bf16, write_bf16)
    table = ", the embedding table to 8" if head_bits == 8 else ""
    console.print(f"Quantizing it to 4 bits, groups of 128{table} ...")
    make(quantized, lambda directory: quantize(bf16, directory, table=head_bits == 8))
    return quantized


def ask(url: str, prompt: str, console: Console) -> str:
    """Streams one completion to the console; returns a line that says how fast it came."""
    client = OpenAI(base_url=url, api_key="none")
    console.print(f"\n[bold]{prompt}[/bold]", end="")
    tokens = 0
    times = [time.perf_counter()]
    for chunk in client.completions.create(
        model=NAME,
        prompt=prompt,
        max_tokens=MAX_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ):
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        if chunk.choices and chunk.choices[0].text:
            times.append(time.perf_counter())
            console.out(chunk.choices[0].text, end="", highlight=False)
    console.print("\n")
    if tokens == 0 or len(times) == 1:
        raise RuntimeError(f"the server answered with no text, expected {MAX_TOKENS} tokens")
    # The prompt's time is counted: chunks may arrive in bursts, so later intervals prove nothing.
    first, total = times[1] - times[0], times[-1] - times[0]
    speed = tokens / total
    return f"{tokens} tokens in {total:.2f} s, first after {first:.2f} s: {speed:.1f} tokens/s"


def main() -> int:
    """Runs the demo; the exit status is 0 only if every step succeeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument(
        "--head-bits",
        type=int,
        choices=(8, 16),
        default=16,
        help="bits of the embedding table, which is the head as well: it is most of what the model "
        "reads for a token",
    )
    arguments = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped, too
    console = Console()
    try:
        model = checkpoint(console, arguments.head_bits)
        written = WORK / "plan.json"
        written.unlink(missing_ok=True)
        console.print("Starting vllm serve ...")
        environment = {
            "VLLM_COMPRESSED_LINEAR_PLAN_FILE": str(written),
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
        started = time.perf_counter()
        with serving(model, NAME, WORK / "server.log", environment) as url:
            console.print(f"Up after {time.perf_counter() - started:.0f} s at {url}")
            speed = ask(url, arguments.prompt, console)
        plan.show(plan.read(written), console)
        console.print(speed, highlight=False)
    except Exception as error:
        # One line instead of a trace: each step says in its error what failed and where.
        print(f"demo failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
