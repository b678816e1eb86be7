"""Gauss-Newton steps for a `deepxde.Model` of a differential equation, with backend PyTorch.

    model = dde.Model(data, net)
    compile_least_squares(model, loss_weights=[1, 10])
    model.train(iterations=200)

DeepXDE's loss is Σ_t w_t mean(r_t²) with a term t for each residual that the equation returns, and then one for each
boundary or initial condition. `GaussNewton` minimizes the same sum: its term "pde" has all residuals of the equation
side by side, and "bc_0", "bc_1", … have `bc.error` of each condition.

Dimensions: N points, D coordinates, M residuals of the equation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import deepxde as dde
import numpy as np
import torch
from deepxde.utils import get_num_args
from torch import Tensor
from typing_extensions import override

from tengrad_triton.adapters.trained import Trained
from tengrad_triton.least_squares.gauss_newton import GaussNewton

_PAIRED = (dde.icbc.PeriodicBC, dde.icbc.Interface2DBC)  # the first half of their points belongs to the second


def compile_least_squares(
    model: dde.Model,
    *,
    loss_weights: Sequence[float] | None = None,
    external_trainable_variables: Sequence[Tensor] = (),
    metrics: Sequence[Any] | None = None,
    **settings: Any,
) -> GaussNewton:
    """Compile a model so that every iteration of ``model.train`` is one Gauss-Newton step.

    Args:
        model: its data are a `deepxde.data.PDE` or `TimePDE`. Every iteration takes the points of ``model.data``,
            which `deepxde.callbacks.PDEPointResampler` may change.
        loss_weights: one weight for each residual of the equation, then one for each condition, as in
            ``model.compile``; 1 each when None.
        external_trainable_variables: each `deepxde.Variable` of the equation that is trained, too.
        metrics: as in ``model.compile``.
        settings: keyword settings of `GaussNewton`.

    Returns:
        The optimizer, for its ``stats``.

    Raises:
        TypeError: the data are not those of a differential equation.
        ValueError: the backend is not PyTorch, a regularizer or an auxiliary function is set, derivatives are in
            forward mode, a condition has no points, or there is another number of weights than of terms.
    """
    terms = _Terms(model, loss_weights)
    unknowns = {f"unknown_{index}": variable for index, variable in enumerate(external_trainable_variables)}
    gauss_newton = GaussNewton(Trained(model.net, unknowns), terms.residuals, weights=terms.weights, **settings)
    stepping = _Stepping(gauss_newton, terms.points)
    model.compile(stepping, loss="MSE", loss_weights=loss_weights, metrics=metrics, verbose=0)
    return gauss_newton


class _Terms:
    """The residual functions, weights and points of a model's loss; arguments and errors of `compile_least_squares`."""

    def __init__(self, model: dde.Model, loss_weights: Sequence[float] | None) -> None:
        _check(model)
        self._net, self._data = model.net, model.data
        self._kept: list[np.ndarray[Any, Any]] = []
        self._rows: dict[str, np.ndarray[Any, Any]] = {}
        self._tensors: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
        self._seen: np.ndarray[Any, Any] | None = None
        self._equation_weights: list[float] = []
        self.residuals: dict[str, Callable[..., Tensor]] = {}
        self.points()
        equations = 0 if self._data.pde is None else len(self._equation(self._tensors["pde"]))
        count = equations + len(self._data.bcs)
        given = [1.0] * count if loss_weights is None else [float(weight) for weight in loss_weights]
        if len(given) != count:
            raise ValueError(
                f"loss_weights has {len(given)} entries for {equations} equations and {count - equations} conditions"
            )
        self._equation_weights = given[:equations]
        if equations:
            self.residuals["pde"] = self._side_by_side
        self.residuals |= {f"bc_{i}": self._condition(i, bc) for i, bc in enumerate(self._data.bcs)}
        self.weights = {f"bc_{i}": weight for i, weight in enumerate(given[equations:])}

    def points(self) -> Mapping[str, Tensor | tuple[Tensor, Tensor]]:
        """Return the current points of each term: [N, D], or two of these for a condition on pairs of points."""
        if self._data.train_x is not self._seen:
            self._seen = self._data.train_x
            self._split(self._seen)
        return self._tensors

    def _split(self, x_ND: np.ndarray[Any, Any]) -> None:
        """Keep the points of each term; DeepXDE's batch has those of every condition, then those of the equation."""
        # DeepXDE remembers a condition's values by the id of its points, and an id that is free is used again.
        self._kept.append(x_ND)
        ends = np.cumsum([0, *self._data.num_bcs])
        for i, bc in enumerate(self._data.bcs):
            rows_ND = x_ND[ends[i] : ends[i + 1]]
            if not len(rows_ND):
                raise ValueError(f"condition {i}, a {type(bc).__name__}, has no points; DeepXDE's loss would be nan")
            self._kept.append(rows_ND)
            self._rows[f"bc_{i}"] = rows_ND
            x = torch.as_tensor(rows_ND)
            self._tensors[f"bc_{i}"] = x.unflatten(0, (2, -1)).unbind() if isinstance(bc, _PAIRED) else x
        if self._data.pde is not None:
            self._tensors["pde"] = torch.as_tensor(x_ND[ends[-1] :])

    def _equation(self, x_ND: Any) -> list[Tensor]:
        """Return the residuals that the equation returns."""
        try:
            x_ND = x_ND.detach().requires_grad_()
            found = self._data.pde(x_ND, self._net(x_ND))
        finally:
            dde.grad.clear()
        return list(found) if isinstance(found, (list, tuple)) else [found]

    def _side_by_side(self, x_ND: Tensor) -> Tensor:
        """Return r_NM whose mean square is Σ_k w_k mean(r_k²) over the equation's residuals r_k."""
        parts = [part.flatten(1) if part.dim() > 1 else part[:, None] for part in self._equation(x_ND)]
        width = sum(part.shape[1] for part in parts)
        pairs = zip(self._equation_weights, parts, strict=True)
        return torch.cat([(weight * width / part.shape[1]) ** 0.5 * part for weight, part in pairs], 1)

    def _condition(self, index: int, bc: Any) -> Callable[..., Tensor]:
        name = f"bc_{index}"

        def error(*points: Tensor) -> Tensor:
            rows_ND = self._rows[name]
            try:
                x_ND = torch.cat(points).detach().requires_grad_()
                return bc.error(rows_ND, x_ND, self._net(x_ND), 0, len(rows_ND))
            finally:
                dde.grad.clear()

        return error


class _Stepping(torch.optim.Optimizer):
    """What ``model.compile`` takes for an optimizer; a step asks for the points and ignores DeepXDE's closure."""

    def __init__(self, gauss_newton: GaussNewton, points: Callable[[], Mapping[str, Any]]) -> None:
        self._gauss_newton, self._points = gauss_newton, points
        super().__init__([p for group in gauss_newton.param_groups for p in group["params"]], {})

    @override
    def step(self, closure: Any = None) -> Any:
        return self._gauss_newton.step(**self._points())

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._gauss_newton.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._gauss_newton.load_state_dict(state_dict)


def _check(model: dde.Model) -> None:
    """Raise what `compile_least_squares` raises."""
    data = model.data
    if dde.backend.backend_name != "pytorch":
        raise ValueError(f"the backend of DeepXDE is {dde.backend.backend_name}; set DDE_BACKEND=pytorch")
    if type(data) not in (dde.data.PDE, dde.data.TimePDE):
        raise TypeError(f"the data must be a deepxde.data.PDE or TimePDE, got {type(data).__name__}")
    if model.net.regularizer is not None:
        raise ValueError("a regularizer is no residual; take it off the network, or give its residual as a term")
    if dde.config.autodiff != "reverse":
        raise ValueError("derivatives must be in reverse mode: dde.config.set_default_autodiff('reverse')")
    if data.auxiliary_var_fn is not None or (data.pde is not None and get_num_args(data.pde) != 2):
        raise ValueError("an equation with auxiliary variables is not supported")
