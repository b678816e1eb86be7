"""Gauss-Newton steps for a PINA problem.

    solver = GaussNewtonPINN(problem, model, weighting=ScalarWeighting({"boundary": 10.0}))
    Trainer(solver, max_epochs=200, accelerator="cpu").train()

PINA's loss is Σ_c w_c mean(r_c²) with a term for each condition c of the problem, whose residual r_c is what
`condition.evaluate` returns. `GaussNewton` minimizes the same sum, with terms of the same names and weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pina import LabelTensor
from pina.problem import InverseProblem
from pina.solver import PhysicsInformedSingleModelSolver
from pina.weighting import ScalarWeighting
from torch import Tensor, nn
from typing_extensions import override

from tengrad_triton.adapters.trained import Trained
from tengrad_triton.least_squares.gauss_newton import GaussNewton

_STATE = "gauss_newton"


class GaussNewtonPINN(PhysicsInformedSingleModelSolver):  # type: ignore[misc]
    """PINA's PINN solver, which takes one Gauss-Newton step for each batch of its `Trainer`.

    Args:
        problem: the problem. Unknowns of an inverse problem are trained, and clamped to their domain after every step.
        model: the network.
        weighting: a `ScalarWeighting`; every weight is 1 when None.
        settings: keyword settings of `GaussNewton`.

    Attributes:
        gauss_newton: the optimizer, once training has begun.

    Raises:
        TypeError: the weighting changes its weights by the losses, which a step would have to know before.
    """

    def __init__(
        self, problem: Any, model: nn.Module, weighting: ScalarWeighting | None = None, **settings: Any
    ) -> None:
        if weighting is not None and not isinstance(weighting, ScalarWeighting):
            raise TypeError(f"the weighting must be a pina.weighting.ScalarWeighting, got {type(weighting).__name__}")
        super().__init__(problem, model, weighting=weighting)
        self.automatic_optimization = False
        self._settings = settings
        self._labels: dict[str, Sequence[str]] = {}
        self._loaded: dict[str, Any] | None = None
        self.gauss_newton: GaussNewton | None = None

    @override
    def configure_optimizers(self) -> None:
        """Build the optimizer. Lightning gets none, because it would not give one the points."""
        unknowns = self._params if isinstance(self.problem, InverseProblem) else {}
        names = list(self.problem.conditions)
        weights = {name: float(weight) for name, weight in self.weighting.update_weights(dict.fromkeys(names)).items()}
        residuals = {name: self._residual(name) for name in names}
        module = Trained(self.model, unknowns)
        self.gauss_newton = GaussNewton(module, residuals, weights=weights, **self._settings)
        if self._loaded is not None:
            self.gauss_newton.load_state_dict(self._loaded)

    @override
    def training_step(self, batch: Sequence[tuple[str, Mapping[str, Any]]], batch_idx: int) -> Tensor:
        """Take a step, and log the loss before it as ``train_loss``."""
        assert self.gauss_newton is not None  # Lightning has called configure_optimizers
        points = {name: self._points(name, data) for name, data in batch}
        loss = self.gauss_newton.step(**points)
        self._clamp_params()
        size = self.get_batch_size(batch)
        self.log(name="train_loss", value=loss.item(), batch_size=size, **self.trainer.logging_kwargs)
        return loss

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the step, which Lightning does for its own optimizers only; ``max_steps`` counts it."""
        self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed += 1
        super().on_train_batch_end(outputs, batch, batch_idx)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the optimizer's state."""
        if self.gauss_newton is not None:
            checkpoint[_STATE] = self.gauss_newton.state_dict()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the optimizer's state: Lightning builds the optimizer later."""
        self._loaded = checkpoint.get(_STATE)

    def _points(self, name: str, data: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Return the input [N, D] of a condition and its target [N, O], if it has one, as tensors without labels."""
        self._labels[name] = data["input"].labels
        found = [data[key] for key in ("input", "target") if key in data]
        return tuple(tensor.as_subclass(Tensor) for tensor in found)

    def _residual(self, name: str) -> Callable[..., Tensor]:
        condition = self.problem.conditions[name]

        def residual(*tensors: Tensor) -> Tensor:
            points: Any = tensors[0].detach().as_subclass(LabelTensor)
            points.labels = self._labels[name]
            data = dict(zip(("input", "target"), (points, *tensors[1:]), strict=False))
            return condition.evaluate(data, self).as_subclass(Tensor)

        return residual
