"""The page about the architecture: a drawing of the packages and their imports, and a sentence about each."""

from __future__ import annotations

import ast
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from website.imports import FILES, ORDER, PACKAGE, graph, part_of, without_detours

WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 220, 54, 50, 46, 8

INTRODUCTION = """
# Architecture

The packages of `tengrad_triton` stand in an order: each imports only packages above it. `tests/test_layering.py` checks
that, and this page is drawn from the imports at every build. An arrow leads from a package to one that it imports. An
import that a chain of arrows leads to as well has no arrow of its own; the table has all of them.
"""
STEP = """
## A step, from the model to the update

`capture` records the calls of the layers in the forward, and the output gradients in the backward. The rules of
`layers` turn each call into contributions to the rows of J. `curvature` makes J and the factored Fisher blocks from
them, in the representation that `tuning` chooses, and takes the step, with the operations of `kernels`. `optim` decides
when, and holds the settings and the state. [Contributing](../CONTRIBUTING.md) leads through the eleven modules of such
a step.
"""


def page() -> str:
    """Return the page in Markdown."""
    direct = graph()
    parts = [INTRODUCTION.strip(), svg(without_detours(direct)), STEP.strip()]
    rows = [(f"`{part}`", _sentence(part), _size(part), _names(direct[part])) for part in ORDER]
    parts += ["## The packages", _table(("package", "its job", "size", "imports"), rows)]
    folders = sorted(path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.glob("*/**/__init__.py"))
    inner = [(f"`{name}`", _sentence(name)) for name in folders if "/" in name]
    parts += ["## Folders within packages", _table(("folder", "its job"), inner)]
    return "\n\n".join(parts) + "\n"


def svg(imports: Mapping[str, set[str]]) -> str:
    """Return the drawing as an element of the page, in the colours of its theme."""
    places = _places(imports)
    width = max(x for x, _ in places.values()) + WIDTH + MARGIN
    height = max(y for _, y in places.values()) + HEIGHT + MARGIN
    label = "The packages from top to bottom, with arrows to what they import: " + ", ".join(ORDER)
    arrows = [_arrow(places[part], places[other]) for part, below in imports.items() for other in sorted(below)]
    boxes = [_box(part, *place) for part, place in places.items()]
    head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    return "\n".join(
        [
            f'<svg class="architecture" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">',
            f'<defs>{head}<path d="M0 0 8 4 0 8z"/></marker></defs>',
            *arrows,
            *boxes,
            "</svg>",
        ]
    )


def _places(imports: Mapping[str, set[str]]) -> dict[str, tuple[float, float]]:
    """Return the left upper corner of each box, below all that it imports, in as many columns as a row needs."""
    levels: dict[str, int] = {}
    for part in (part for part in ORDER if imports[part]):
        levels[part] = max((levels[other] + 1 for other in imports[part] if imports[other]), default=1)
    for part in (part for part in ORDER if not imports[part]):  # these stand just above the first that imports them
        levels[part] = min((levels[other] - 1 for other in levels if part in imports[other]), default=0)
    places: dict[str, tuple[float, float]] = {}
    for level in set(levels.values()):
        row = [part for part in levels if levels[part] == level]  # those that import something come first
        for column, part in enumerate(row):
            places[part] = (MARGIN + column * (WIDTH + GAP_X), MARGIN + level * (HEIGHT + GAP_Y))
    return places


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    x0, y0, x1, y1 = start[0] + WIDTH / 2, start[1], end[0] + WIDTH / 2, end[1] + HEIGHT
    middle = (y0 + y1) / 2
    curve = f"M{x0:g} {y0:g}C{x0:g} {middle:g} {x1:g} {middle:g} {x1:g} {y1 + 1:g}"
    return f'<path class="arrow" d="{curve}" marker-end="url(#head)"/>'


def _box(part: str, x: float, y: float) -> str:
    middle = x + WIDTH / 2
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
        f'<text class="name" x="{middle:g}" y="{y + 24:g}">{part}</text>'
        f'<text x="{middle:g}" y="{y + 42:g}">{html.escape(_size(part))}</text>'
    )


def _size(part: str) -> str:
    files = [path for path in FILES if part_of(path) == part]
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    return f"{len(files)} module{'s' if len(files) > 1 else ''}, {lines} lines"


def _sentence(name: str) -> str:
    """Return the first sentences of a package's docstring, up to the first empty line."""
    folder = PACKAGE / name
    path: Path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    return " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())


def _names(parts: set[str]) -> str:
    return ", ".join(f"`{part}`" for part in ORDER if part in parts) or "none"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
