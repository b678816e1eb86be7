"""Which packages of tengrad_triton import which, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tengrad_triton"

# Each imports what stands before it, and itself.
ORDER = [
    *("kernels", "likelihoods", "profiling", "files", "tables", "misspellings", "sharding", "jets", "layers"),
    *("capture", "residuals", "curvature", "distributed", "tuning", "inspection", "optim", "least_squares"),
    *("adapters", "integrations", "compiled", "baselines", "recipes"),
]
# Python's ** enters links or not, by version; kernels is a link.
FILES = sorted({*PACKAGE.glob("**/*.py"), *PACKAGE.glob("kernels/*.py")} - {PACKAGE / "__init__.py"})


def part_of(path: Path) -> str:
    """Return the package of a file, or the file itself where it stands alone."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports, relative ones resolved."""
    package = ("tengrad_triton", *path.relative_to(PACKAGE).parts[:-1]) if PACKAGE in path.parents else ()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = [*base, *(node.module or "").split(".")] if node.module else base
            yield from (".".join((*module, alias.name)) for alias in node.names)


def parts_imported(path: Path) -> set[str]:
    """Return the packages that a file imports, its own among them."""
    names = (name.split(".") for name in imported(path))
    found = {name[1] for name in names if name[0] == "tengrad_triton" and len(name) > 1}
    return found - {"__version__"}


def graph() -> dict[str, set[str]]:
    """Return for each package, in their order, the others that it imports."""
    found: dict[str, set[str]] = {part: set() for part in ORDER}
    for path in FILES:
        found[part_of(path)] |= parts_imported(path) - {part_of(path)}
    return found


def without_detours(imports: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Return the imports, without those of packages that another import reaches anyway."""

    def reached(part: str) -> set[str]:
        return imports[part].union(*map(reached, imports[part]))

    return {part: direct - set().union(*map(reached, direct)) for part, direct in imports.items()}
