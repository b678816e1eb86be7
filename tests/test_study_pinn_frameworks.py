"""PINA and DeepXDE in the study: their losses are ours, they keep to its clock, and nobody has to have them."""

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from studies.pinn import __main__ as study  # noqa: E402
from studies.pinn import command, registry, runs, timing  # noqa: E402
from studies.pinn.entrants import TimeIsUp  # noqa: E402
from studies.pinn.frameworks import build  # noqa: E402
from studies.pinn.frameworks.equations import state  # noqa: E402
from studies.pinn.problems import PROBLEMS  # noqa: E402
from studies.pinn.problems.base import loss, start  # noqa: E402
from studies.pinn.problems.sampling import generator  # noqa: E402
from tengrad_triton.recipes.errors import UsageError  # noqa: E402

MACHINE = {"device": "some processor", "python": "3", "torch": "2", "commit": "0" * 40}
FEW = 40  # points of the first term; the others have one more each, for a mean over all would be wrong

pytestmark = pytest.mark.filterwarnings("default")  # what other libraries warn of is theirs


@pytest.fixture(params=build.FRAMEWORKS)
def framework(request):
    if build.is_missing(request.param):
        pytest.skip(f"{request.param} is not installed")
    return request.param


def first(points, count):
    return tuple(x[:count] for x in points) if isinstance(points, tuple) else points[:count]


def small(problem):
    """The model of a problem, a few of its points, and its loss there as a function without arguments."""
    model, given = start(problem, 0), problem.points(generator(0))
    points = {name: first(x, FEW + place) for place, (name, x) in enumerate(given.items())}
    terms = problem.terms(model)
    return model, points, lambda: loss(problem, terms, points)


def gradient(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_the_loss_and_the_gradient_are_ours(framework, problem, monkeypatch):
    losses = []

    def evaluate(optimizer, closure):
        with torch.enable_grad():
            losses.append(closure().item())

    monkeypatch.setattr(torch.optim.Adam, "step", evaluate)
    model, points, own_loss = small(problem)
    own = own_loss()
    own.backward()
    expected = gradient(model)
    model.zero_grad()
    build.load(framework)(state(problem, model, points), model).adam(1e-3, lambda: True)
    assert losses == [pytest.approx(own.item(), rel=1e-10)]
    assert (gradient(model) - expected).norm() <= 1e-10 * expected.norm()


def test_lbfgs_pauses_at_weights_that_it_has_accepted(framework):
    problem = PROBLEMS["heat1d"]
    model, points, own_loss = small(problem)
    seen = []

    def pause():
        seen.append(own_loss().item())
        if len(seen) == 30:
            raise TimeIsUp

    with pytest.raises(TimeIsUp):
        build.load(framework)(state(problem, model, points), model).lbfgs(pause)
    assert all(after < before for before, after in pairwise(seen))


@pytest.mark.parametrize("name", ["poisson2d", "convection", "inverse"])
def test_a_run_keeps_to_its_time_and_lowers_the_loss(framework, name, monkeypatch):
    problem, models = PROBLEMS[name], []
    watched = replace(problem, measure=lambda _, model: models.append(model) or problem.measure(problem, model))
    monkeypatch.setitem(PROBLEMS, name, watched)
    run = runs.train(runs.Case(name, framework, "lr-0.001-adam-0.1", 1.0, 0), MACHINE)
    points = problem.points(generator(runs.POINTS_SEED))
    before, after = (loss(problem, problem.terms(model), points).item() for model in (start(problem, 0), models[-1]))
    assert "Error" not in run.failure
    assert 1.0 <= run.points[-1].seconds < 1.2
    assert after < before
    assert run.end < run.points[0].error or name != "poisson2d"
    assert f"version {build.version(build.FRAMEWORKS[framework].package)}" in run.setting


def test_a_run_leaves_the_settings_of_torch_as_they_were(framework):
    def settings():
        return torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()

    random, before = torch.get_rng_state(), settings()
    runs.train(runs.Case("heat1d", framework, next(iter(registry.FAMILIES[framework])), 0.3, 0), MACHINE)
    assert settings() == before
    assert torch.equal(torch.get_rng_state(), random)


@pytest.fixture
def missing(monkeypatch):
    monkeypatch.setattr(build, "is_installed", lambda package: False)


def test_a_framework_that_is_missing_is_left_out_unless_it_is_asked_for(missing, monkeypatch, tmp_path, capsys):
    measured = []
    monkeypatch.setattr(study, "measure", lambda store, problems, families, seconds, seeds: measured.extend(families))
    folders = ["--results", str(tmp_path / "results"), "--out", str(tmp_path / "docs")]
    assert command.main(study.app, folders) == 0
    assert "pina and deepxde are left out" in capsys.readouterr().err
    assert set(registry.FAMILIES) - set(measured) == set(build.FRAMEWORKS)
    for app in (study.app, timing.app):
        assert command.main(app, ["--entrant", "adam", "pina", "--results", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert "--entrant pina: not installed: pip install" in error
        assert error.count("\n") == 1
    with pytest.raises(UsageError, match="needs the package pina-mathlab"):
        runs.train(runs.Case("heat1d", "pina", next(iter(registry.FAMILIES["pina"])), 0.1, 0), MACHINE)


def test_kept_runs_are_on_the_page_where_the_framework_is_missing(missing, tmp_path):
    store, seen = runs.Store(tmp_path / "results"), (runs.Point(0, 0.0, 1.0), runs.Point(9, 1.0, 0.125))
    for variant in registry.FAMILIES["pina"]:
        case = runs.Case("heat1d", "pina", variant, 1.0, 0)
        store.keep(runs.Run(case, "PINA", "version 7", seen, "", 1.0, (0.0, 0.0), MACHINE))
    folders = ["--results", str(tmp_path / "results"), "--out", str(tmp_path)]
    assert command.main(study.app, ["--report-only", *folders]) == 0
    text = (tmp_path / "pinn.md").read_text(encoding="utf-8")
    assert all(words in text for words in ("| PINA | **1.2e-01** |", "- PINA: version 7", "as their users do"))


def test_an_equation_that_is_not_written_is_refused():
    problem = replace(PROBLEMS["heat1d"], name="waves")
    for name in build.FRAMEWORKS:
        with pytest.raises(ValueError, match="the equation of waves is not written"):
            build.build(name, 1e-3, 0.5, problem, start(problem, 0))
