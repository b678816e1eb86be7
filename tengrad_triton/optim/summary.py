"""What an optimizer does with every parameter, as rows and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields

from tengrad_triton.capture.blocks import LayerParams, full_name
from tengrad_triton.curvature.choices import FACTORED_KERNELS, Choice, implementation_names
from tengrad_triton.curvature.jacobian import Jacobian, PerSample
from tengrad_triton.curvature.products import Grouped
from tengrad_triton.curvature.woodbury import Curvature
from tengrad_triton.layers import summary_note


@dataclass(frozen=True)
class Row:
    """One parameter: who preconditions it, and what is kept for that."""

    parameter: str
    shape: tuple[int, ...]
    block: str
    representation: str
    kernels: str
    bytes: int


@dataclass(frozen=True)
class Summary:
    """A row for every parameter; ``failures`` counts the factorizations that failed. ``print`` shows a table."""

    rows: tuple[Row, ...]
    failures: int

    def __str__(self) -> str:
        titles = tuple(field.name for field in fields(Row))
        cells = [titles, *(tuple(str(cell) for cell in astuple(row)) for row in self.rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(titles))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
        ]
        total = sum(row.bytes for row in self.rows)
        lines.append(f"{len(self.rows)} parameters, {total / 2**20:.1f} MiB kept between refreshes")
        if self.failures:
            lines.append(f"{self.failures} factorizations failed: those blocks' damping was raised")
        return "\n".join(lines)


def summarize(blocks: Sequence[LayerParams], curvature: Curvature | None) -> Summary:
    """Return the summary of ``blocks`` under the present curvature, if there is one yet."""
    rows = tuple(_row(block, label, curvature) for block in blocks for label in block.parameters)
    return Summary(rows, 0 if curvature is None else int(curvature.failures_L.sum()))


def choices_of(curvature: Curvature | None) -> dict[str, Choice]:
    """Return how J of every preconditioned parameter is stored, by the parameter's name."""
    blocks = {} if curvature is None else curvature.blocks
    return {
        full_name(name, label): Choice(rows.representation, rows.ops.kernel_overrides)
        for name, block in blocks.items()
        for label, rows in block.items()
    }


def _row(block: LayerParams, label: str, curvature: Curvature | None) -> Row:
    name, shape = block.label(label), tuple(block.parameters[label].shape)
    if block.why_sgd is not None:
        return Row(name, shape, "-", f"sgd ({block.why_sgd})", "update_", 0)
    if curvature is None or curvature.is_released:
        return Row(name, shape, block.name or ".", "chosen at the next refresh", "-", 0)
    rows = curvature.blocks.get(block.name, {}).get(label)
    if rows is None:
        return Row(name, shape, "-", "sgd (not part of the last refresh)", "update_", 0)
    system = next(system for system, names in curvature.systems.items() if block.name in names)
    reduced = isinstance(rows, PerSample) and rows.form == "parameters"
    notes = (summary_note(block.layer), "as many rows as parameters" if reduced else "")
    chosen = ", ".join(filter(None, (rows.representation, *notes)))
    return Row(name, shape, system or ".", chosen, ", ".join(_kernels(rows)), rows.nbytes)


def _kernels(rows: Jacobian) -> Iterable[str]:
    """Return the kernels of a parameter's products and others that a plan chose, with who serves those."""
    products = rows.kernels if isinstance(rows, Grouped) else FACTORED_KERNELS
    return ({name: name for name, *_ in products.values()} | implementation_names(rows.ops.kernel_overrides)).values()
