# SPDX-License-Identifier: Apache-2.0
"""The property of every mutant: read right, or refused by one clear error, in bounded time."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.support.fuzzing.decode import Stored, flags, stored_layers, weight
from tests.support.fuzzing.decode_floats import block_of
from tests.support.fuzzing.files import FILE, INDEX, Mutant, Tensor, unmutated
from tests.support.fuzzing.numbers import NoMeaningError
from tests.support.fuzzing.reader import Found, equal
from tests.support.fuzzing.tensors import Draw
from vllm.compressed_linear.checkpoint.shard import CheckpointError
from vllm.compressed_linear.commands.explain.checkpoint import ExplainError
from vllm.compressed_linear.formats.resolution import ConfigError

ERRORS = (CheckpointError, ConfigError, ExplainError)
MAX_MESSAGE = 2000
MAX_SECONDS = 10.0
"""CPU time of one mutant; whole ones take some 0.05."""

Mutators = Sequence[Callable[[Draw, Mutant], None]]
Read = Callable[[Path, Mapping[str, Stored]], Found]


class WrongError(AssertionError):
    """A mutant crashed, was read wrongly, or was refused unclearly."""


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: ``read``, ``refused``, ``left`` (to vLLM) or ``unfilled``; with the
    error's text."""

    kind: str
    error: str = ""


def draw_mutant(draw: Draw, directories: list[Path], groups: Sequence[Mutators]) -> Mutant:
    """One checkpoint with one or two changes, each of one of ``groups``."""
    mutant = unmutated(draw(st.sampled_from(directories)))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        mutate = draw(st.sampled_from(draw(st.sampled_from(groups))))
        mutate(draw, mutant)
    return mutant


def try_mutant(mutant: Mutant, origin: Path, read: Read) -> Outcome:
    """Write, read and judge a mutant of the checkpoint in ``origin``. Raises ``WrongError``."""
    whole = unmutated(origin)
    layers = stored_layers(whole.config, whole.tensors)
    directory = Path(tempfile.mkdtemp(prefix="mutant"))
    what = f"{mutant.name}: {'; '.join(mutant.done)}"
    begun = time.process_time()
    try:
        mutant.write(directory)
        found = read(directory, layers)
    except ERRORS as error:
        judge_error(mutant, layers, str(error), what)
        return Outcome("refused", str(error))
    except Exception as error:
        raise WrongError(f"{what}: {type(error).__name__}: {str(error)[:500]}") from error
    finally:
        shutil.rmtree(directory)
        seconds = time.process_time() - begun
        if seconds > MAX_SECONDS:
            raise WrongError(f"{what}: took {seconds:.1f} s of CPU time")
    _judge_weights(mutant, found, layers, whole, what)
    if found.left:
        return Outcome("left", next(iter(found.left.values())))
    return Outcome("unfilled" if found.unfilled else "read")


def judge_error(mutant: Mutant, layers: Iterable[str], message: str, what: str) -> None:
    """Raise ``WrongError`` unless a refusal is justified and one clear line."""
    if mutant.must_read and len(mutant.done) == 1:
        raise WrongError(f"{what}: refused without need: {message}")
    if "\n" in message or len(message) > MAX_MESSAGE or not message.isprintable():
        raise WrongError(f"{what}: not one clear line: {message[:MAX_MESSAGE]!r}")
    names = [*mutant.about, FILE, INDEX, *mutant.more, *layers]
    if not any(name and name in message for name in names):
        raise WrongError(f"{what}: names none of {sorted(set(names))}: {message}")


def _judge_weights(
    mutant: Mutant, found: Found, layers: Mapping[str, Stored], whole: Mutant, what: str
) -> None:
    mutated = mutant.all_tensors
    for layer, values in found.weights.items():
        allowed = [
            _weight(layer, stored, mutated) for stored in _meanings(mutant, whole, layers[layer])
        ]
        if mutant.harmless:
            allowed.append(_weight(layer, layers[layer], whole.tensors))
        if not any(a is not None and equal(values, a) for a in allowed):
            raise WrongError(f"{what}: {layer} has other weights than its tensors say")


def _meanings(mutant: Mutant, whole: Mutant, stored: Stored) -> list[Stored]:
    """How the layer may be stored according to the mutant's configuration. What only the
    configuration tells, the version of GPTQ's zero points, is another meaning if it says another
    version."""
    config = mutant.config.get("quantization_config")
    original = whole.config["quantization_config"]
    if not isinstance(config, dict) or config == original or stored.family in ("plain", "packed"):
        return [stored]
    if stored.family == "eight":
        divisors = config.get("weight_scale_semantics") == "inverse"
        return [replace(stored, block=block_of(config), inverse=divisors)]
    ordered, symmetric = flags(config)
    stored = replace(stored, ordered=ordered, symmetric=symmetric)
    if "gptq" not in stored.family:
        return [stored]
    stated = str(
        config.get("packing_format") or config.get("checkpoint_format") or config.get("format")
    )
    v2 = stated.lower() in ("gptq_v2", "auto_round", "auto_round:gptqmodel")
    keys = ("packing_format", "checkpoint_format", "format", "quant_method")
    if any(config.get(key) != original.get(key) for key in keys):
        return [stored, replace(stored, family="gptq_v2" if v2 else "gptq")]
    return [stored]


_WEIGHTS: dict[Any, Any] = {}


def _weight(layer: str, stored: Stored, found: Mapping[str, Tensor]) -> Any:
    """The oracle's weight, or None; computed once for the same tensors."""
    own = tuple((last, found.get(f"{layer}.{last}")) for last in stored.shapes)
    meaning = (stored.ordered, stored.symmetric, stored.block, stored.inverse)
    key = (layer, stored.family, meaning, own)
    if key not in _WEIGHTS:
        if len(_WEIGHTS) > 2000:
            _WEIGHTS.clear()
        try:
            _WEIGHTS[key] = weight(layer, stored, found)
        except NoMeaningError:
            _WEIGHTS[key] = None
    return _WEIGHTS[key]
