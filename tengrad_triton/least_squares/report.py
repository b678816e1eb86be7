"""What `GaussNewton` reports: the numbers of its last step, and what its rows are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from tengrad_triton.least_squares.systems import System
from tengrad_triton.residuals.terms import Points, Terms
from tengrad_triton.tables import Column, table

_COLUMNS = [
    Column("term"),
    Column("weight", right=True),
    Column("points", right=True),
    Column("residuals", right=True),
    Column("share of the loss", right=True),
    Column("rows", wraps=True),
]
_WIDTH = 100
_FEW_RESIDUALS = (
    "fewer residuals than parameters: all of them can vanish at points that stay the same, whatever the",
    "solution is in between; draw new points at every step",
)
WAYS = {
    "by layer": "by the inputs and output gradients of linear layers",
    "batched": "by torch.func, all points in one pass",
    "captured": "by torch.func, with parameters that the residual holds itself",
    "expanded": "by one backward pass, with a copy of the weights for each point",
    "backward": "by one backward pass for each residual, which is slow",
}


@dataclass(frozen=True)
class TermStats:
    """What one term was at the last step.

    Attributes:
        name: of the term.
        weight: w.
        points: N.
        residuals: N M.
        loss: w mean(r²), before the step.
        way: how its rows were found.
    """

    name: str
    weight: float
    points: int
    residuals: int
    loss: float
    way: str


@dataclass(frozen=True)
class LeastSquaresSummary:
    """What the last step was made of; `print` it.

    Attributes:
        terms: in their order; none before the first step.
        parameters: K, the entries of the trained parameters.
        rows: the rows of J̃ that made the matrix.
        side: of the largest matrix that is factored.
    """

    terms: Sequence[TermStats]
    parameters: int
    rows: int
    side: int

    def __str__(self) -> str:
        """Return a table of the terms."""
        if not self.terms:
            return f"{self.parameters} parameters; no step was taken yet"
        total = sum(term.loss for term in self.terms) or 1.0
        cells = [
            (t.name, f"{t.weight:g}", str(t.points), str(t.residuals), f"{t.loss / total:.1%}", WAYS.get(t.way, t.way))
            for t in self.terms
        ]
        count = sum(term.residuals for term in self.terms)
        drawn = "" if self.rows == count else f" of {count} residuals, drawn at random"
        rows = f"{self.rows} rows{drawn}"
        matrix = f"the matrix that is factored is {self.side} × {self.side}"
        end = [f"{rows}, {self.parameters} parameters: {matrix}", *(_FEW_RESIDUALS if count < self.parameters else ())]
        return "\n".join([*table(_COLUMNS, cells, _WIDTH), "", *end])


@dataclass(frozen=True)
class StepStats:
    """Numbers of a `GaussNewton`'s last step.

    Attributes:
        step: the number of steps before it.
        loss: before the step, at its points.
        loss_after: after it, at the same points; the same number if the step was taken back.
        accepted: whether a step was taken.
        attempts: how many were tried, each with more damping than the one before.
        damping: α of the last attempt.
        length: the step length η that was taken; 0 if none was.
        ratio: the decrease of the loss over what the linear model predicted; 0 if no step was taken.
        rows: the rows of J̃.
    """

    step: int
    loss: float
    loss_after: float
    accepted: bool
    attempts: int
    damping: float
    length: float
    ratio: float
    rows: int


def summarized(
    terms: Terms, ways: Mapping[str, str], points: Points, r_R: Tensor, system: System, parameters: int
) -> LeastSquaresSummary:
    """Return what a step was made of.

    Args:
        terms: of the loss.
        ways: how the rows of each term were found, by its name.
        points: of each term.
        r_R: r̃ [R] before the step.
        system: of the step.
        parameters: K.
    """
    found = [
        TermStats(
            term.name, term.weight, len(points[term.name][0]), len(part), float(part.square().sum()), ways[term.name]
        )
        for term, part in zip(terms.terms, terms.split(r_R, points), strict=True)
    ]  # fmt: skip
    return LeastSquaresSummary(found, parameters, system.rows, system.side)
