# SPDX-License-Identifier: Apache-2.0
"""The command ``vllm-compressed-linear``."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from vllm.compressed_linear.machine.platform import Platform

app = typer.Typer(
    name="vllm-compressed-linear",
    help="Compressed linear layers for vLLM: what runs a checkpoint, and why.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Dtype(StrEnum):
    """Dtype of the activations, as vLLM's --dtype."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"vllm-compressed-linear {version('vllm-compressed-linear')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Options of the command itself."""


NOT_EXAMINED = 2
"""Exit status if the weights cannot be examined, although loading them may succeed."""


def _fail(message: object, status: int = 1) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(status)


def _platform(name: str, tp: int = 1, threads: int | None = None) -> Platform:
    """The named machine, or this one as a server with ``tp`` ranks uses it."""
    from vllm.compressed_linear.integration import compat
    from vllm.compressed_linear.integration.preparation import detect_platform
    from vllm.compressed_linear.machine.platform import Platform

    try:
        found = Platform.parse(name) if name else detect_platform()
    except ValueError as error:
        _fail(error)
    if found.device != "cpu" or not found.cpu:
        return found
    return replace(found, threads=threads or compat.serving_threads(tp))


ModelArgument = Annotated[
    str, typer.Argument(help="Directory of a checkpoint, or the id of a downloaded one.")
]
TpOption = Annotated[int, typer.Option("--tp", min=1, help="Tensor-parallel ranks.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Dtype of the activations.")]
PlatformOption = Annotated[
    str,
    typer.Option(
        "--platform", metavar="NAME", help="Another machine, such as cpu:avx2 or cuda:90."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]


@app.command()
def explain(
    model: ModelArgument,
    tp: TpOption = 1,
    platform: PlatformOption = "",
    dtype: DtypeOption = Dtype.AUTO,
    as_json: JsonOption = False,
    read_weights: Annotated[
        bool,
        typer.Option("--read-weights", help="Also read group indices, zero points and scales."),
    ] = False,
) -> None:
    """Show which backend would run each layer of MODEL and why, without loading it.

    The status is 1 if loading would fail: damaged files, a contradictory configuration, or layers
    that no backend can or may run. It is 2 if the weights are pickled and were not examined.
    """
    from rich.console import Console

    from vllm.compressed_linear.checkpoint.shard import CheckpointError
    from vllm.compressed_linear.commands.explain import explain as explaining
    from vllm.compressed_linear.commands.explain.checkpoint import ExplainError, PickledError
    from vllm.compressed_linear.commands.explain.layers import TensorParallelError
    from vllm.compressed_linear.commands.explain.text import print_explanation
    from vllm.compressed_linear.formats.resolution import ConfigError
    from vllm.compressed_linear.settings import Settings

    machine = _platform(platform, tp)
    try:
        found = explaining.explain(
            model,
            platform=machine,
            tp_size=tp,
            dtype=dtype.value,
            read_weights=read_weights,
            settings=Settings.read(),
        )
    except PickledError as error:
        _fail(error, NOT_EXAMINED)
    except (
        ExplainError,
        ConfigError,
        CheckpointError,
        TensorParallelError,
        ValueError,
    ) as error:
        _fail(error)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
    else:
        print_explanation(found, Console())
    if found.errors:
        if as_json:
            for message in found.errors:
                typer.echo(f"error: {message}", err=True)
        raise typer.Exit(1)


@app.command()
def check(
    model: ModelArgument,
    tp: TpOption = 1,
    platform: PlatformOption = "",
    dtype: DtypeOption = Dtype.AUTO,
    as_json: JsonOption = False,
) -> None:
    """Say what is wrong with MODEL, from its configuration and headers, without loading it.

    The status is 1 if loading it must fail, and 2 if its weights are pickled and were not examined.
    """
    from rich.console import Console

    from vllm.compressed_linear.commands import check as checking

    machine = _platform(platform, tp)
    try:
        report = checking.check(model, platform=machine, tp_size=tp, dtype=dtype.value)
    except ValueError as error:  # of the settings
        _fail(error)
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=1))
    else:
        checking.print_report(report, Console())
    if not report.examined:
        raise typer.Exit(NOT_EXAMINED)
    if not report.loads:
        raise typer.Exit(1)


@app.command()
def tune(
    model: ModelArgument,
    tp: TpOption = 1,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads of one rank; by default as many as vLLM uses."),
    ] = None,
    only: Annotated[
        str, typer.Option("--backends", metavar="NAME,…", help="Measure only these backends.")
    ] = "",
    dtype: DtypeOption = Dtype.AUTO,
    output: Annotated[
        Path | None,
        typer.Option(help="Tune file to add results to; by default the one that serving reads."),
    ] = None,
    budget: Annotated[
        float, typer.Option(min=0.0, help="Seconds for each distinct layer and M, at most.")
    ] = 1.0,
) -> None:
    """Measure the backends that can run the layers of MODEL on this machine, for serving.

    The machine should be idle. Results are added to an existing file.
    """
    from rich.console import Console

    from vllm.compressed_linear.checkpoint.shard import CheckpointError
    from vllm.compressed_linear.commands.explain.checkpoint import ExplainError
    from vllm.compressed_linear.commands.explain.layers import TensorParallelError
    from vllm.compressed_linear.commands.tune import tune as tuning
    from vllm.compressed_linear.commands.tune.text import print_result, progress_bar
    from vllm.compressed_linear.formats.resolution import ConfigError
    from vllm.compressed_linear.prepare.self_check import SelfCheckError
    from vllm.compressed_linear.settings import Settings, default_tune_file

    machine = _platform("", tp, threads)
    try:
        file = output or Path(Settings.read().tune_file or default_tune_file())
        with progress_bar() as progress:
            found = tuning.tune(
                model,
                platform=machine,
                output=file,
                measuring=tuning.Measuring.of(machine, budget),
                tp_size=tp,
                dtype=dtype.value,
                only=[name.strip() for name in only.split(",") if name.strip()],
                progress=progress,
            )
    except (
        ExplainError,
        ConfigError,
        CheckpointError,
        TensorParallelError,
        SelfCheckError,
        OSError,
        ValueError,
    ) as error:
        _fail(error)
    print_result(found, Console())
    typer.echo(f"written to {file}")
    if found.failures:
        raise typer.Exit(1)


@app.command()
def backends(platform: PlatformOption = "", as_json: JsonOption = False) -> None:
    """List every registered backend, its declared capabilities, and whether it can run here."""
    from rich.console import Console

    from vllm.compressed_linear.commands.backends import declared, print_declared

    rows = declared(_platform(platform))
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        print_declared(rows, Console())


cache_app = typer.Typer(
    help="List, verify and prune the cache of prepared weights.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(cache_app, name="cache")

DirectoryOption = Annotated[
    str,
    typer.Option("--dir", metavar="DIR", help="The cache; VLLM_COMPRESSED_LINEAR_CACHE if absent."),
]


def _cache_directory(given: str) -> Path:
    from vllm.compressed_linear.settings import CACHE

    named = given or os.environ.get(CACHE, "")
    if not named:
        _fail(f"which directory? Give --dir, or set {CACHE}")
    return Path(named).expanduser()


@cache_app.command("ls")
def cache_ls(directory: DirectoryOption = "", as_json: JsonOption = False) -> None:
    """List the entries: model and layers, backend, bytes, age and last use."""
    from rich.console import Console

    from vllm.compressed_linear.commands.cache import print_cache
    from vllm.compressed_linear.prepare.cache.inventory import read_cache

    try:
        entries = read_cache(_cache_directory(directory))
    except ValueError as error:
        _fail(error)
    if as_json:
        typer.echo(json.dumps([entry.to_json() for entry in entries], indent=1))
    else:
        print_cache(entries, Console())


@cache_app.command("verify")
def cache_verify(directory: DirectoryOption = "") -> None:
    """Read every entry and compare its digest. The status is 1 if one is damaged."""
    from vllm.compressed_linear.prepare.cache.inventory import fault, read_cache

    try:
        entries = read_cache(_cache_directory(directory))
    except ValueError as error:
        _fail(error)
    faults = {entry.path: why for entry in entries if (why := fault(entry))}
    for path, why in faults.items():
        typer.echo(f"error: {path} {why}", err=True)
    typer.echo(f"{len(entries)} entries read, {len(faults)} of them damaged")
    if faults:
        raise typer.Exit(1)


@cache_app.command("prune")
def cache_prune(
    directory: DirectoryOption = "",
    older_than: Annotated[
        str,
        typer.Option("--older-than", metavar="AGE", help="Entries unused for this long: 12h, 30d."),
    ] = "",
    max_bytes: Annotated[
        str,
        typer.Option(
            "--max-bytes", metavar="SIZE", help="Least recently used entries beyond this size: 20G."
        ),
    ] = "",
    foreign: Annotated[
        bool,
        typer.Option("--foreign", help="Entries of other versions, corrupt entries."),
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="Everything.")] = False,
) -> None:
    """Remove the entries that any of the options selects, and unfinished files of killed servers.

    Running servers keep entries that they have mapped; files that are being written stay.
    """
    from vllm.compressed_linear.commands.text import size
    from vllm.compressed_linear.prepare.cache.inventory import (
        PruneRules,
        parse_age,
        parse_bytes,
        prune,
    )

    if not (older_than or max_bytes or foreign or everything):
        _fail("remove what? Give --older-than, --max-bytes, --foreign or --all")
    try:
        rules = PruneRules(
            parse_age(older_than) if older_than else None,
            parse_bytes(max_bytes) if max_bytes else None,
            foreign,
            everything,
        )
        removed = prune(_cache_directory(directory), rules)
    except (ValueError, OSError) as error:
        _fail(error)
    typer.echo(f"{len(removed)} files removed, {size(sum(nbytes for _, nbytes in removed))}")


def main() -> None:
    """Entry point of the console script.

    vLLM's log goes to stderr and has errors only, unless the user chose a level. vLLM reads both
    variables again whenever it makes a config.
    """
    level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    logging.getLogger("vllm").setLevel(level.upper())
    app()


if __name__ == "__main__":
    main()
