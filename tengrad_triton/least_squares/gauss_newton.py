"""The optimizer `GaussNewton`: damped Gauss-Newton steps on named residuals.

Dimensions: R residuals of all terms, K entries of the trained parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from tengrad_triton.capture.blocks import BlocksChoice
from tengrad_triton.curvature.choices import ops_for
from tengrad_triton.least_squares.attempts import Attempts, Momentum, Outcome
from tengrad_triton.least_squares.damping import AdaptiveDamping, GainRatio, damping_rule
from tengrad_triton.least_squares.evaluations import Evaluations, flatten, write_
from tengrad_triton.least_squares.jacobian import JacobianFinder
from tengrad_triton.least_squares.report import LeastSquaresSummary, StepStats, summarized
from tengrad_triton.least_squares.search import LineSearch
from tengrad_triton.least_squares.settings import (
    Settings,
    check_are_the_models,
    check_saved,
    check_steps,
    checked_parameters,
    columns_of,
)
from tengrad_triton.least_squares.slopes import warn_of_missing_slopes
from tengrad_triton.optim.validation import seed_of
from tengrad_triton.profiling import phase
from tengrad_triton.residuals.rows import RowFinder
from tengrad_triton.residuals.terms import Points, Residual, Terms

MAX_BYTES = 4 * 2**30
STATE_KEY = "gauss_newton"
"""The key of what `GaussNewton.state_dict` has beside torch's entries."""


class GaussNewton(torch.optim.Optimizer):
    """Damped Gauss-Newton steps on a sum of mean squares of residuals, as for a physics-informed network.

    With residuals r_t(θ) of term t at N_t points, M_t at each, the loss is L = Σ_t w_t mean(r_t²) = ‖r̃‖², where r̃ has
    all √(w_t / (N_t M_t)) r_t. J̃ is the Jacobian of r̃ with respect to the trained parameters. A step is

        (J̃ᵀ J̃ + α I) δ = J̃ᵀ r̃;    (J̃ᵀ J̃ + α I) q = ½ J̃ᵀ r̃''(δ, δ);    θ ← θ − η δ − η² q

    q is the geodesic acceleration of Transtrum and Sethna (2012): it follows the curved valleys of such losses, where
    steps along δ alone have to be short. The rows of J̃ are exact, however the residual functions take their derivatives
    (docs/math.md, M20). A step that does not lower the loss at its own points is taken back and repeated with more
    damping.

    Args:
        model: the module whose parameters are trained: all that require a gradient.
        residuals: for each term, by a name of yours, a function of a batch of points that returns their residuals [N]
            or [N, …]: a closure over the model, or a module.
        weights: w_t of the terms whose weight is not 1.
        lr: η, the length of a step; 1 is the Gauss-Newton step.
        damping: α > 0 in the units of J̃ᵀ J̃ = ½ of the loss's Gauss-Newton matrix: a number, a function of the step
            (such as `Exponential`), or a rule that adapts it: `GainRatio` (the default), `EffectiveDimension`. A number
            or function is multiplied by 4 after an attempt that was not taken; the factor halves at each step that is.
        acceleration: whether to add q. It costs one evaluation of the residuals, and a second solve.
        spring: μ of SPRING (Goldshlager, Abrahamsen, Lin 2024) in [0, 1): keeps μ times the part of the last direction
            that is orthogonal to the present rows, with the bias correction of Guzmán-Cordero et al. (2025). By default
            0.7, and 0 with ``max_rows``.
        line_search: None; ``"grid"``, the best of 12 step lengths, evaluated in one batch; or ``"armijo"``, the first
            of η, η / 2, … that lowers the loss enough.
        blocks: ``"network"``, one system for all parameters, or ``"layer"``, or lists of modules' names: each block is
            solved alone, as in `TENGraD`. A layer that no list names is a block of its own.
        max_rows: the most residuals whose rows make J̃ᵀ J̃, drawn at random at every step; the gradient has all.
        sketch: the rank of a randomized Nyström approximation of J̃ J̃ᵀ, for more residuals than a factorization of
            J̃ J̃ᵀ pays for.
        compiled: whether `torch.compile` compiles rows and evaluations of the terms whose rows are found by layer or
            by torch.func (`summary`), which takes some seconds for each term at the first steps. What draws random
            numbers is not compiled; where compilation fails, a warning says why. A number that changes from step to
            step, such as a weight within a residual, should be in a tensor: torch compiles others anew.
        max_bytes: the most memory that J̃ and the matrix may take. Rows are computed in chunks where J̃ would exceed it
            and the matrix of parameters does not; otherwise a step raises before it has computed any.
        seed: of the generator that draws rows and sketches; torch's initial seed by default.

    Raises:
        ValueError: a setting is out of range or unknown.
        TypeError: a setting has the wrong type.
    """

    def __init__(
        self, model: nn.Module, residuals: Mapping[str, Residual], *, weights: Mapping[str, float] | None = None,
        lr: float = 1.0, damping: float | Callable[[int], float] | AdaptiveDamping = GainRatio(),  # noqa: B008
        acceleration: bool = True, spring: float | None = None, line_search: LineSearch | None = None,
        blocks: BlocksChoice = "network", max_rows: int | None = None, sketch: int | None = None,
        compiled: bool = False, max_bytes: int = MAX_BYTES, seed: int | None = None,
    ) -> None:  # fmt: skip
        parameters = checked_parameters(model)
        self._settings = Settings(acceleration, line_search, blocks, max_rows, sketch, compiled, max_bytes)
        self._settings.check()
        spring = (0.0 if max_rows else 0.7) if spring is None else spring
        check_steps(lr, spring, self._settings)
        self._rule, start = damping_rule(damping)
        self.model, self._terms = model, Terms(model, residuals, weights)
        columns_of(model, blocks, parameters)  # raises for unknown modules
        self._steps = 0
        self.stats: StepStats | None = None
        self._summary: LeastSquaresSummary | None = None
        self._generator = torch.Generator(parameters[0].device)
        self._generator.manual_seed(seed_of(seed))
        super().__init__(parameters, {"lr": lr, "damping": start, "spring": spring})
        self._prepare()

    def _prepare(self) -> None:
        """Make what finds the rows of J̃."""
        self._rows = RowFinder(self._terms, self._settings.compiled)
        ops = ops_for("torch" if self._generator.device.type == "cpu" else "auto")
        self._jacobian = JacobianFinder(self._terms, self._rows, self._settings, ops, self._generator)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the group of all trained parameters, the only one.

        Raises:
            ValueError: there is one already.
        """
        if self.param_groups:
            raise ValueError(
                "GaussNewton has one parameter group, of all parameters that the model trains: make a new GaussNewton "
                "of a model that contains the others"
            )
        super().add_param_group(param_group)

    @property
    def _parameters(self) -> list[Tensor]:
        return [p for p in self.param_groups[0]["params"] if p.requires_grad]

    @property
    def stopped(self) -> bool:
        """Whether the last step found no damping at which the loss of its points falls."""
        return self.stats is not None and not self.stats.accepted and self.stats.attempts > 0

    def summary(self) -> LeastSquaresSummary:
        """Return each term's points, residuals, share of the loss and way of rows at the last step; print it."""
        return self._summary or LeastSquaresSummary([], self._entries, 0, 0)

    def loss(self, **points: Any) -> Tensor:
        """Return the loss at points, without a step and without a graph; arguments and errors as for `step`."""
        return self._terms.values(self._terms.points_of(points)).square().sum()

    @torch.no_grad()
    @override
    def step(self, *positional: Any, **points: Any) -> Tensor:  # type: ignore[override]
        """Take one step; return the loss before it, a 0-dim tensor without a graph.

        Args:
            positional: none: points have names.
            points: for each term, by its name, the points [N, …] at which its residual function is called, or a tuple
                of tensors, its arguments. They may be others at every step.

        Raises:
            TypeError: a term is missing or unknown, or a residual function returned no tensor of real numbers.
            ValueError: points or residuals are not finite, or there are none; a residual function returned no batch, or
                does not depend on the parameters; the model has other parameters now; or J̃ does not fit into
                ``max_bytes``. After any error, parameters, state, buffers and random numbers have the values that they
                had before.
            RuntimeError: it is called in inference mode.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("a step differentiates, which inference mode prevents: call it outside of it")
        if positional:
            example = ", ".join(f"{term.name}=points" for term in self._terms.terms)
            raise TypeError(
                f"step takes the points of each residual by its name, step({example}), got "
                f"{', '.join(type(x).__name__ for x in positional)} without one"
            )
        group, named = self.param_groups[0], self._terms.points_of(points)
        check_steps(group["lr"], group["spring"], self._settings)
        parameters = self._parameters
        if not parameters:
            raise ValueError("every parameter of the optimizer is frozen now: nothing to train")
        check_are_the_models(parameters, self.model)
        evaluations = Evaluations(self._terms, self.model, parameters, named)
        before, drawn = dict(group), self._generator.get_state()
        try:
            loss = self._attempted(evaluations, named, parameters)
        except BaseException:
            evaluations.undo()
            self._restore(before)
            self._generator.set_state(drawn)
            raise
        if self.stopped:
            self._restore(before)  # other rows are drawn for the next step
        return loss

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return torch's entries, and under ``"gauss_newton"`` steps, the generator's state and the ways of rows."""
        own = {"steps": self._steps, "generator": self._generator.get_state(), "ways": dict(self._rows.ways)}
        return {**super().state_dict(), STATE_KEY: own}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the step at which `state_dict` was called. Settings that are no group's stay this optimizer's.

        Raises:
            ValueError: the state belongs to another model or another optimizer; nothing has changed then.
        """
        if STATE_KEY not in state_dict:
            raise ValueError(
                f"expected a state_dict of GaussNewton, with the key {STATE_KEY!r}; got {sorted(state_dict)}"
            )
        check_saved(state_dict, self.param_groups[0]["params"])
        own = state_dict[STATE_KEY]
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self._generator.set_state(own["generator"].cpu())
        self._rows.resume(own["ways"])
        self._steps, self.stats, self._summary = own["steps"], None, None

    @override
    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy takes over, its model and residual functions included."""
        made_anew = {"_rows", "_jacobian", "_generator", "step"}  # schedulers put a `step` on the object
        kept = {
            name: x for name, x in vars(self).items() if name not in made_anew and not name.startswith("_optimizer_")
        }
        generator = str(self._generator.device), self._generator.get_state()
        return {**kept, "_copied": (generator, dict(self._rows.ways))}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become the copy that `__getstate__` described; torch's `load_state_dict` gives only groups and momenta."""
        super().__setstate__(state)
        if "_copied" not in state:
            return
        (device, generator), ways = vars(self).pop("_copied")
        self._generator = torch.Generator(device)
        self._generator.set_state(generator.cpu())
        self._prepare()
        self._rows.resume(ways)

    def _restore(self, settings: dict[str, Any]) -> None:
        """Give the group, with its damping, the values that it had before a step that was not taken."""
        self.param_groups[0].clear()
        self.param_groups[0].update(settings)

    def _attempted(self, evaluations: Evaluations, points: Points, parameters: list[Tensor]) -> Tensor:
        group = self.param_groups[0]
        with phase("capture"):
            r_R, system = self._jacobian.system(parameters, points)
        loss = r_R.square().sum()
        with phase("curvature"):
            self._rule.begin(group, self._steps, system)
        momentum = self._momentum(parameters, group["spring"])
        attempts = Attempts(
            evaluations, system, r_R, momentum, self._settings.accelerates, self._settings.line_search
        )  # fmt: skip
        with phase("solve"), evaluations.kept_if_taken() as taken:
            outcome = attempts.run(self._rule, group, group["lr"])
            if outcome.proposal is not None:
                taken.append(True)
                write_(parameters, outcome.proposal.at(evaluations.start_K, outcome.length))
            elif not self.stopped:  # the step before was taken
                warn_of_missing_slopes(self._terms, evaluations, points, parameters)
        self._remember(outcome, parameters, loss, system.rows)
        self._summary = summarized(self._terms, self._rows.ways, points, r_R, system, self._entries)
        return loss

    @property
    def _entries(self) -> int:
        return sum(p.numel() for p in self._parameters)

    def _momentum(self, parameters: list[Tensor], mu: float) -> Momentum:
        """Return SPRING's memory."""
        states = [self.state.get(p, {}) for p in parameters]
        known = all("direction" in state for state in states)
        last_K = flatten([state["direction"] for state in states]).to(parameters[0].dtype) if known and mu else None
        count = max(state.get("directions", 0) for state in states)
        return Momentum(last_K, mu, count if last_K is not None else 0)

    def _remember(self, outcome: Outcome, parameters: list[Tensor], loss: Tensor, rows: int) -> None:
        """Keep the numbers of a step, and its direction for SPRING."""
        group, taken = self.param_groups[0], outcome.proposal
        self.stats = StepStats(
            self._steps, float(loss), outcome.loss, taken is not None, outcome.attempts, outcome.damping,
            outcome.length, outcome.ratio, rows,
        )  # fmt: skip
        self._steps += 1
        if taken is None or not group["spring"]:
            return
        for p in parameters:
            self.state[p].setdefault("direction", torch.zeros_like(p))
            self.state[p]["directions"] = taken.count
        write_([self.state[p]["direction"] for p in parameters], taken.own_K)
