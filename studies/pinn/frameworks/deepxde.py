"""DeepXDE: `Model.compile` and `Model.train` on the problem's points, with Adam or L-BFGS.

The module imports DeepXDE, whose backend must be PyTorch.

Key: N points, D coordinates.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout

import deepxde as dde
import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from studies.pinn.frameworks.equations import Statement
from studies.pinn.frameworks.lbfgs import pause_in
from tengrad_triton.recipes.errors import UsageError

NEVER = 1 << 60  # iterations

if dde.backend.backend_name != "pytorch":
    raise UsageError(f"DeepXDE runs on {dde.backend.backend_name}: set DDE_BACKEND=pytorch")


class Solution:
    """u and its derivatives; DeepXDE remembers those that it has taken."""

    def __init__(self, x_ND: Tensor, u_N1: Tensor) -> None:
        self.x_ND, self.u_N1 = x_ND, u_N1

    def first(self, coordinate: int) -> Tensor:
        """Return ∂u/∂x_d [N, 1]."""
        return dde.grad.jacobian(self.u_N1, self.x_ND, i=0, j=coordinate)

    def second(self, coordinate: int) -> Tensor:
        """Return ∂²u/∂x_d² [N, 1]."""
        return dde.grad.hessian(self.u_N1, self.x_ND, i=coordinate, j=coordinate)


class Network(dde.nn.NN):  # type: ignore[misc]
    """The problem's model as a network of DeepXDE. An unknown coefficient is one of its parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @override
    def forward(self, x_ND: Tensor) -> Tensor:
        """Return u [N, 1]."""
        return self.model(x_ND)


class PeriodicAt(dde.icbc.PeriodicBC):  # type: ignore[misc]
    """DeepXDE's periodic condition, at given pairs of points: its own are where the equation holds, too."""

    def __init__(self, geometry: dde.geometry.Geometry, first_ND: Tensor, second_ND: Tensor) -> None:
        super().__init__(geometry, 0, lambda _, on_boundary: on_boundary)
        self.pairs = np.vstack([first_ND.numpy(), second_ND.numpy()])

    @override
    def collocation_points(self, X: object) -> np.ndarray:
        """Return the first points of all pairs, then the second ones."""
        return self.pairs


class Pausing(dde.callbacks.Callback):  # type: ignore[misc]
    """Pauses when the weights are new, and ends training if the pause says so."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        super().__init__()
        self.is_over = is_over

    @override
    def on_train_begin(self) -> None:
        """Have L-BFGS pause in its steps, which are of a thousand iterations."""
        pause_in(self.model.opt, self.is_over)

    @override
    def on_batch_end(self) -> None:
        """Pause."""
        self.model.stop_training = self.model.stop_training or self.is_over()


@contextmanager
def float64() -> Iterator[None]:
    """Have DeepXDE and torch compute in double precision, and then as before."""
    before, of_torch = dde.config.default_float(), torch.get_default_dtype()
    with redirect_stdout(io.StringIO()):  # it says so at each call
        dde.config.set_default_float("float64")
    try:
        yield
    finally:
        with redirect_stdout(io.StringIO()):
            dde.config.set_default_float(before)
        torch.set_default_dtype(of_torch)


class Training:
    """A model of DeepXDE, which is trained by one optimizer after another."""

    def __init__(self, statement: Statement, model: nn.Module) -> None:
        with float64():
            inside = statement.inside_ND.numpy()
            box = dde.geometry.Hypercube(inside.min(0), inside.max(0))  # not used: all points are given
            conditions = [dde.icbc.PointSetBC(x.numpy(), u.numpy()) for x, u in statement.values.values()]
            conditions += [PeriodicAt(box, *pair) for pair in statement.periodic.values()]
            data = dde.data.PDE(box, lambda x, u: statement.equation(Solution(x, u)), conditions, anchors=inside)
            self.model = dde.Model(data, Network(model))
        weights = list(statement.weights.values())
        self.weights = weights if any(weight != 1 for weight in weights) else None

    def adam(self, lr: float, is_over: Callable[[], bool]) -> None:
        """Train with Adam until ``is_over``, which is asked after each iteration, returns true."""
        with float64():
            self.model.compile("adam", lr=lr, loss_weights=self.weights, verbose=0)
            self._train(is_over, iterations=NEVER)

    def lbfgs(self, is_over: Callable[[], bool]) -> None:
        """Train with L-BFGS until it converges, or ``is_over``, which is asked after each iteration, returns true."""
        with float64():
            self.model.compile("L-BFGS", loss_weights=self.weights, verbose=0)
            self._train(is_over)

    def _train(self, is_over: Callable[[], bool], **settings: int) -> None:
        self.model.train(callbacks=[Pausing(is_over)], display_every=NEVER, verbose=0, **settings)
