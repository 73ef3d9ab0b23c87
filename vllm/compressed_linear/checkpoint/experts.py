# SPDX-License-Identifier: Apache-2.0
"""Experts of a mixture in the headers of its files, compared with each other.

A mixture may have hundreds of thousands of tensors. If the experts of a layer are alike, one of
them says all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vllm.compressed_linear.checkpoint.file_header import TensorHeader

_EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")


@dataclass(frozen=True)
class Experts:
    """The experts of one layer. ``prefix``: of their names, up to the number. ``numbers``: those of
    which the files have tensors. ``missing``: tensors that most experts have, but not all.
    ``unlike``: tensors whose dtype or shape is not that of most experts."""

    prefix: str
    numbers: tuple[int, ...]
    missing: tuple[str, ...]
    unlike: tuple[str, ...]


def is_of_one(name: str) -> bool:
    """Whether ``name`` is that of a tensor of one expert."""
    return _EXPERT.fullmatch(name) is not None


def one_of_each(names: Iterable[str]) -> list[str]:
    """``names`` with the tensors of the first expert of each layer only."""
    first: dict[str, str] = {}
    kept = []
    for name in names:
        found = _EXPERT.fullmatch(name)
        if found is None or first.setdefault(found[1], found[2]) == found[2]:
            kept.append(name)
    return kept


def experts_of(headers: Mapping[str, TensorHeader]) -> list[Experts]:
    """The experts of each layer of which every one has its own tensors."""
    layers: dict[str, dict[str, dict[int, tuple[str, tuple[int, ...]]]]] = {}
    for name, header in headers.items():
        if found := _EXPERT.fullmatch(name):
            prefix, number, suffix = found.groups()
            tensors = layers.setdefault(prefix, {}).setdefault(suffix, {})
            tensors[int(number)] = (header.dtype, header.shape)
    return [_compared(prefix, tensors) for prefix, tensors in layers.items()]


def _compared(
    prefix: str, tensors: Mapping[str, Mapping[int, tuple[str, tuple[int, ...]]]]
) -> Experts:
    numbers = sorted(set().union(*tensors.values()))
    missing: list[str] = []
    unlike: list[str] = []
    for suffix, have in tensors.items():
        if 2 * len(have) > len(numbers):
            missing += [f"{prefix}{n}{suffix}" for n in numbers if n not in have]
        described = list(have.values())
        usual = max(dict.fromkeys(described), key=described.count)
        unlike += [f"{prefix}{n}{suffix}" for n, found in have.items() if found != usual]
    return Experts(prefix, tuple(numbers), tuple(missing), tuple(unlike))
