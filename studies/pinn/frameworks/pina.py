"""PINA: a `Trainer` of its `PINN` solver on the problem's points, with Adam or L-BFGS.

Key: N points, D coordinates.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar

import torch
from lightning.pytorch.callbacks import Callback
from pina import Condition, LabelTensor, Trainer
from pina.domain import CartesianDomain
from pina.equation import Equation
from pina.operator import grad
from pina.optim import TorchOptimizer
from pina.problem import SpatialProblem
from pina.solver import PhysicsInformedSingleModelSolver
from pina.weighting import ScalarWeighting
from torch import Tensor, nn
from typing_extensions import override

from studies.pinn.frameworks.equations import EQUATION, Statement
from studies.pinn.frameworks.lbfgs import pause_in

FOREVER = -1  # epochs
LBFGS = {"max_iter": 1000, "tolerance_grad": 0.0, "tolerance_change": 0.0, "line_search_fn": "strong_wolfe"}
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}


class Solution:
    """u and its derivatives; the gradient is taken once for both, as PINA's own Burgers equation does."""

    def __init__(self, points: LabelTensor, u: LabelTensor) -> None:
        self._points, self._u = points, u
        self.x_ND, self.u_N1 = points.as_subclass(Tensor), u.as_subclass(Tensor)

    @cached_property
    def _gradient(self) -> LabelTensor:
        return grad(self._u, self._points)

    def first(self, coordinate: int) -> Tensor:
        """Return ∂u/∂x_d [N, 1]."""
        return self._gradient.extract([f"dudx{coordinate}"]).as_subclass(Tensor)

    def second(self, coordinate: int) -> Tensor:
        """Return ∂²u/∂x_d² [N, 1]."""
        second = grad(self._gradient, self._points, components=[f"dudx{coordinate}"], d=[f"x{coordinate}"])
        return second.as_subclass(Tensor)


def labelled(x_ND: Tensor) -> LabelTensor:
    """Return points with the names of their coordinates, in the network's order, which is that of the names, too."""
    return LabelTensor(x_ND, [f"x{d}" for d in range(x_ND.shape[1])])


def equal_halves(_: LabelTensor, u: LabelTensor) -> Tensor:
    """Return u in the first half of the points less u in the second."""
    first_N1, second_N1 = u.as_subclass(Tensor).chunk(2)
    return first_N1 - second_N1


def problem_of(statement: Statement) -> SpatialProblem:
    """Return PINA's problem, whose conditions have the names of our terms."""
    inside_ND = statement.inside_ND
    equation = Equation(lambda points, u: statement.equation(Solution(points, u)))
    box = zip(inside_ND.amin(0).tolist(), inside_ND.amax(0).tolist(), strict=True)  # all points are given
    given: dict[str, Any] = {EQUATION: Condition(input=labelled(inside_ND), equation=equation)}
    for name, (x_ND, u_N1) in statement.values.items():
        given[name] = Condition(input=labelled(x_ND), target=LabelTensor(u_N1, ["u"]))
    for name, pair in statement.periodic.items():
        given[name] = Condition(input=labelled(torch.cat(pair)), equation=Equation(equal_halves))

    class Stated(SpatialProblem):  # type: ignore[misc]
        """The problem; time is one of its coordinates."""

        output_variables: ClassVar = ["u"]
        spatial_domain = CartesianDomain({f"x{d}": list(ends) for d, ends in enumerate(box)})
        conditions: ClassVar = given

    return Stated()


def solver_of(statement: Statement, model: nn.Module, optimizer: TorchOptimizer) -> PhysicsInformedSingleModelSolver:
    """Return PINA's solver of a problem, which its documentation calls `PINN`.

    An unknown coefficient is one of the model's parameters: L-BFGS refuses PINA's `InverseProblem`, whose unknowns are
    a second group of parameters.
    """
    weighting = ScalarWeighting(dict(statement.weights))
    return PhysicsInformedSingleModelSolver(problem_of(statement), model, optimizer=optimizer, weighting=weighting)


class Pausing(Callback):
    """Pauses when the weights are new, and ends training if the pause says so."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self.is_over = is_over

    @override
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Have L-BFGS pause in its steps."""
        for optimizer in trainer.optimizers:
            pause_in(optimizer, self.is_over)

    @override
    def on_train_batch_end(self, trainer: Trainer, *others: Any) -> None:
        """Pause."""
        trainer.should_stop = self.is_over()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning from telling at each training which devices there are and what it does not find."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def train(solver: PhysicsInformedSingleModelSolver, is_over: Callable[[], bool]) -> Trainer:
    """Train until ``is_over``, which is asked when the weights are new, returns true; return the trainer.

    The points keep their order, by which the pairs of a periodic condition are found.
    """
    with quiet():
        trainer = Trainer(solver, max_epochs=FOREVER, shuffle=False, callbacks=[Pausing(is_over)], **QUIET)
        trainer.train()
    return trainer


class Training:
    """A problem of PINA, whose model is trained by one solver after another."""

    def __init__(self, statement: Statement, model: nn.Module) -> None:
        self.statement, self.model = statement, model

    def adam(self, lr: float, is_over: Callable[[], bool]) -> None:
        """Train with Adam until ``is_over``, which is asked after each iteration, returns true."""
        train(solver_of(self.statement, self.model, TorchOptimizer(torch.optim.Adam, lr=lr)), is_over)

    def lbfgs(self, is_over: Callable[[], bool]) -> None:
        """Train with L-BFGS until ``is_over``, which is asked after each iteration, returns true or raises an error."""
        train(solver_of(self.statement, self.model, TorchOptimizer(torch.optim.LBFGS, **LBFGS)), is_over)
