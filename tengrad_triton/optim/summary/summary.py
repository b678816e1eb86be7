"""The summary of an optimizer: its parameters layer by layer, and the totals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from tengrad_triton.curvature.geometry import Spending
from tengrad_triton.optim.summary.entries import Others, ParameterSummary
from tengrad_triton.optim.summary.names import fold
from tengrad_triton.tables import Column, table, wrapped

if TYPE_CHECKING:
    from pandas import DataFrame

WIDTH = 100
"""The most characters in a line of the text."""
COLUMNS = (
    Column("parameter", wraps=True),
    Column("shape", wraps=True),
    Column("representation", wraps=True),
    Column("kernels"),
    Column("bytes", right=True),
)


class Section(NamedTuple):
    """A layer, or layers that are alike: a heading, and the cells of each parameter."""

    heading: str
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Summary:
    """One entry for each parameter. ``print`` and notebooks show them by layer, and layers that are alike once.

    Attributes:
        parameters: the entries, in the order of the layers.
        failures: how many factorizations of Fisher blocks have failed so far.
        others: how many parameters of the model the optimizer was not given.
        spending: the rows and the costs of the last refresh; None before the first, and for baselines.
    """

    parameters: tuple[ParameterSummary, ...]
    failures: int
    others: Others
    spending: Spending | None = None

    def __str__(self) -> str:
        """Return a table of at most 100 columns."""
        rows: list[Sequence[str] | str] = []
        for heading, own in self._sections():
            rows += [heading, *(("  " + name, *cells) for name, *cells in own)]
        return "\n".join([*table(COLUMNS, rows, WIDTH), "", *(part for line in self._totals() for part in _line(line))])

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        lines = ["<table><thead><tr>", *(f"<th>{escape(column.title)}</th>" for column in COLUMNS), "</tr></thead>"]
        for heading, rows in self._sections():
            left = ' style="text-align: left"'
            lines.append(f'<tbody><tr><th colspan="{len(COLUMNS)}"{left}>{escape(heading)}</th></tr>')
            for row in rows:
                lines.append("<tr>")
                for column, cell in zip(COLUMNS, row, strict=True):
                    lines.append(f"<td{'' if column.right else left}>{escape(cell)}</td>")
                lines.append("</tr>")
            lines.append("</tbody>")
        return "\n".join([*lines, "</table>", *(f"<div>{escape(line)}</div>" for line in self._totals())])

    def to_frame(self) -> DataFrame:
        """Return a pandas data frame: a row for each parameter, a column for each field of `ParameterSummary`.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            from pandas import DataFrame  # noqa: PLC0415
        except ImportError as error:
            raise ImportError("to_frame needs pandas, which is not installed: pip install pandas") from error
        return DataFrame(map(asdict, self.parameters), columns=[field.name for field in fields(ParameterSummary)])

    def _sections(self) -> list[Section]:
        """Return a section for each layer, or for several that are alike."""
        layers: dict[str, list[ParameterSummary]] = {}
        for entry in self.parameters:
            layers.setdefault(entry.layer, []).append(entry)
        names, entries = list(layers), list(layers.values())
        numbers = _kernel_numbers(self.parameters)
        return [
            Section(
                _heading(str(one), entries[one.places[0]], len(one.places)),
                [_cells(entry, numbers, len(one.places)) for entry in entries[one.places[0]]],
            )
            for one in fold(names, [tuple(map(_without_name, layer)) for layer in entries])
        ]

    def _totals(self) -> list[str]:
        """Return the lines below the table."""
        steps = Counter(entry.step for entry in self.parameters)
        of_block: dict[str, set[str]] = {}
        for entry in self.parameters:
            of_block.setdefault(entry.block, set()).add(entry.layer)
        of_block.pop("-", None)
        each = ", a layer each" if all(len(layers) == 1 for layers in of_block.values()) else ""
        parts = (
            f"{steps['preconditioned']} preconditioned, in {_number(len(of_block), 'block')}{each}",
            f"{steps['SGD']} taking the SGD step" if steps["SGD"] else "",
            f"{steps['frozen']} frozen" if steps["frozen"] else "",
        )
        total = readable(sum(entry.bytes for entry in self.parameters))
        lines = [f"{name}: {kernels}" for kernels, name in _kernel_numbers(self.parameters).items()]
        lines.append(f"{_number(len(self.parameters), 'parameter')}: {'; '.join(filter(None, parts))}")
        if self.others.parameters:
            lines.append(
                f"not given to this optimizer: {_number(self.others.parameters, 'parameter')} of the model, "
                f"{self.others.frozen} of them frozen"
            )
        lines.append(f"{total} kept between refreshes")
        if self.spending is not None:
            lines.append(str(self.spending))
        if self.failures:
            lines.append(f"{self.failures} factorizations failed: the damping of those blocks was raised")
        return lines


def readable(size: int) -> str:
    """Return a number of bytes in the largest unit that it has at least one of."""
    for unit, bytes_of in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= bytes_of:
            return f"{size / bytes_of:.1f} {unit}"
    return f"{size} B"


def _line(text: str) -> list[str]:
    return wrapped(text, WIDTH, indent="    ")


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _kernel_numbers(entries: Sequence[ParameterSummary]) -> dict[str, str]:
    """Return a short name for each set of kernels, which is written out once below the table."""
    distinct = dict.fromkeys(entry.kernels for entry in entries if entry.kernels != "-")
    return {kernels: f"k{number}" for number, kernels in enumerate(distinct, 1)}


def _without_name(entry: ParameterSummary) -> ParameterSummary:
    """Return what two layers that are alike have in common."""
    block = "" if entry.block == entry.layer else entry.block
    return replace(entry, parameter=entry.name, layer="", block=block)


def _heading(name: str, entries: Sequence[ParameterSummary], alike: int) -> str:
    """Return the layer's name, how many layers are alike, and their block where it is not the layer itself."""
    block = next((entry.block for entry in entries if entry.block != "-"), "-")
    notes = (
        f"{alike} layers alike" if alike > 1 else "",
        "" if block in ("-", ".", entries[0].layer) else f"in block {block}",
    )
    return ", ".join([name or "the model itself", *filter(None, notes)])


def _cells(entry: ParameterSummary, numbers: dict[str, str], alike: int) -> tuple[str, ...]:
    times = f"{alike} × " if alike > 1 and entry.bytes else ""
    kernels = numbers.get(entry.kernels, "-")
    return entry.name, str(entry.shape), entry.representation, kernels, times + readable(entry.bytes)
