# SPDX-License-Identifier: Apache-2.0
"""The diagram of ``architecture.md``: the folders of the package and the imports between them.

The rows are the layers that ``.importlinter`` states, the arrows are the ``import`` statements of
the files. The ground is white, as in the plots; the site's style sheet inverts it on dark pages.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Sequence
from configparser import ConfigParser
from html import escape
from pathlib import Path

PACKAGE = "vllm.compressed_linear"
VLLM = "vLLM"

BOX_WIDTH, BOX_HEIGHT = 172, 30
STEP, ROW, MARGIN = 50, 42, 12
HEAD = 12
"""Distance from the right edge of a box to the arrow that ends at its top."""
STYLE = """\
text { font: 13px system-ui, sans-serif; fill: #222 }
.count { font-size: 11px; fill: #555; text-anchor: end }
.layer { fill: #f2f4f8 }
.box { fill: #dce6f5; stroke: #0072b2 }
.outside { fill: #fff; stroke: #555; stroke-dasharray: 4 3 }
.arrow { fill: none; stroke: #555; stroke-width: 1.2 }
.dot, .head { fill: #555 }"""


def layers(root: Path) -> list[list[str]]:
    """The rows of ``.importlinter``, the highest first; members of a row are independent."""
    parser = ConfigParser()
    parser.read_string((root / ".importlinter").read_text())
    rows = parser["importlinter:contract:layers"]["layers"].strip().splitlines()
    return [[name.strip() for name in row.split("|")] for row in rows]


def imports(root: Path) -> tuple[Counter[str], set[tuple[str, str]]]:
    """Modules of each folder (or file) of the package's root, and who imports whom.

    The package's own ``__init__.py`` has names of all folders and is left out."""
    package = root / PACKAGE.replace(".", "/")
    modules: Counter[str] = Counter()
    found: set[tuple[str, str]] = set()
    for path in package.rglob("*.py"):
        folder = path.relative_to(package).parts[0].removesuffix(".py")
        if folder == "__init__":
            continue
        modules[folder] += path.name != "__init__.py"
        for name in _imported(path):
            target = _folder(name)
            if target is not None and target != folder:
                found.add((folder, target))
    return modules, found


def _imported(path: Path) -> Iterator[str]:
    """Names of all modules that a file may import: ``from a import b`` gives ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}:{node.lineno}: relative import")
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _folder(name: str) -> str | None:
    """The folder of the package in which a module is, ``VLLM``, or None for everything else."""
    if name.startswith(PACKAGE + "."):
        return name.removeprefix(PACKAGE + ".").split(".")[0]
    return VLLM if name.split(".")[0] == "vllm" else None


def svg(root: Path) -> str:
    """The diagram: boxes in the order of the layers, arrows from importing to imported ones."""
    modules, found = imports(root)
    rows = [*layers(root), [VLLM]]
    order = [name for row in rows for name in row]
    unknown = {name for pair in found for name in pair} - set(order)
    if unknown:
        raise ValueError(f".importlinter has no layer for {sorted(unknown)}")
    width = 2 * MARGIN + STEP * (len(order) - 1) + BOX_WIDTH
    height = 2 * MARGIN + ROW * len(order)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        "<title>Folders of the package and the imports between them</title>",
        f"<style>\n{STYLE}\n</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        *_bands(rows, width),
    ]
    parts += _arrows(order, found)
    parts += [line for name in order for line in _box(name, order, modules)]
    return "\n".join([*parts, "</svg>", ""])


def _bands(rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    """The ground of every layer."""
    top = MARGIN
    for row in rows:
        extent = ROW * len(row)
        if row != [VLLM]:
            yield (
                f'<rect class="layer" x="{MARGIN // 2}" y="{top + 2}" width="{width - MARGIN}" '
                f'height="{extent - 4}" rx="4"/>'
            )
        top += extent


def _position(name: str, order: Sequence[str]) -> tuple[int, int]:
    """The left upper corner of a box."""
    place = order.index(name)
    return MARGIN + STEP * place, MARGIN + ROW * place + (ROW - BOX_HEIGHT) // 2


def _arrows(order: Sequence[str], found: set[tuple[str, str]]) -> Iterator[str]:
    """A line to the right of each importing box, one down to each imported box, a dot where an
    import connects the two."""
    for name in order:
        targets = [_lane(target, order) for source, target in found if source == name]
        if targets:
            left, _ = _position(name, order)
            yield _line(f"M{left + BOX_WIDTH} {_level(name, order)}H{max(targets)}")
    for name in order:
        importers = [_level(source, order) for source, target in found if target == name]
        if importers:
            x, (_, top) = _lane(name, order), _position(name, order)
            yield _line(f"M{x} {min(importers)}V{top - 4}")
            yield f'<path class="head" d="M{x - 4} {top - 7}h8l-4 7z"/>'
    places = sorted((_lane(target, order), _level(source, order)) for source, target in found)
    for x, y in places:
        yield f'<circle class="dot" cx="{x}" cy="{y}" r="3"/>'


def _line(path: str) -> str:
    return f'<path class="arrow" d="{path}"/>'


def _lane(name: str, order: Sequence[str]) -> int:
    """The x of the line down to a box, right of all boxes above it."""
    return _position(name, order)[0] + BOX_WIDTH - HEAD


def _level(name: str, order: Sequence[str]) -> int:
    """The y of the line that begins at a box."""
    return _position(name, order)[1] + BOX_HEIGHT // 2


def _box(name: str, order: Sequence[str], modules: Counter[str]) -> Iterator[str]:
    left, top = _position(name, order)
    kind = "outside" if name == VLLM else "box"
    yield (
        f'<rect class="{kind}" x="{left}" y="{top}" width="{BOX_WIDTH}" '
        f'height="{BOX_HEIGHT}" rx="4"/>'
    )
    is_file = modules[name] == 1 and name != VLLM
    title = f"{name}.py" if is_file else name if name == VLLM else f"{name}/"
    yield f'<text x="{left + 9}" y="{top + 20}">{escape(title)}</text>'
    if modules[name] > 1:
        count = f"{modules[name]} modules"
        yield f'<text class="count" x="{left + BOX_WIDTH - 9}" y="{top + 20}">{count}</text>'
