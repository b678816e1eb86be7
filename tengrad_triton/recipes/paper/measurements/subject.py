"""What the measurements are of: 3C1F on Fashion-MNIST, the first row of table 2."""

from dataclasses import replace

from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.optimizers.registry import OPTIMIZERS
from tengrad_triton.recipes.optimizers.settings import OptimizerName
from tengrad_triton.recipes.paper.published import EXPERIMENTS
from tengrad_triton.recipes.paper.request import INVERSES, Request
from tengrad_triton.recipes.paper.runs import settings_of
from tengrad_triton.recipes.paper.shared import Shared
from tengrad_triton.recipes.training.job import Job
from tengrad_triton.recipes.training.settings import Settings

EXPERIMENT = EXPERIMENTS[0]
DAMPING = EXPERIMENT.tuned["tengrad_paper"][-1]


def settings_for(request: Request, name: OptimizerName, epochs: int | None = None) -> Settings:
    """Return the settings of an optimizer at the scale of the request, for fewer epochs if given."""
    settings = settings_of(EXPERIMENT, name, 0, request, EXPERIMENT.of(name))
    return settings if epochs is None else replace(settings, epochs=epochs)


def job_for(shared: Shared, name: OptimizerName, epochs: int | None = None) -> Job:
    """Return the job of `settings_for`."""
    return shared.job(settings_for(shared.request, name, epochs))


def names_of(target: str, request: Request) -> list[OptimizerName]:
    """Return the optimizers that a target measures: for table 1 and the phases, those with a fixed interval.

    Raises `UsageError` if none of those that are asked for is among them.
    """
    if target in INVERSES:
        return ["sgd"]
    names = list(filter(_MEASURED.get(target, _any), request.optimizer))
    if not names:
        raise UsageError(
            f"--optimizer {' '.join(request.optimizer)}: {target} measures optimizers that refresh their curvature at "
            f"a fixed interval, such as tengrad_paper or kfac: add one, or leave out {target}"
        )
    return names


def _any(_: OptimizerName) -> bool:
    return True


def _has_interval(name: OptimizerName) -> bool:
    return OPTIMIZERS[name]().interval is not None


def _has_no_varying_interval(name: OptimizerName) -> bool:
    """Return whether the first steps of an optimizer are of all its kinds, in proportion."""
    return _has_interval(name) or not OPTIMIZERS[name]().refreshes(1)


_MEASURED = {"table1": _has_interval, "phases": _has_no_varying_interval}


def reads_data(target: str, request: Request) -> bool:
    """Return whether a target reads data: table 1 does not, but --data is checked if it is given."""
    return target != "table1" or request.data is not None
