"""The study of the defaults runs end to end on a small problem, resumes, and its page says what was measured."""

from dataclasses import replace

import pytest
import torch

from studies import defaults, page, results, runs, timing
from studies.problems import PROBLEMS, Poisson, exact_solution, source_term
from studies.results import Curve
from tengrad_triton.recipes.measuring.machine import describe


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setitem(PROBLEMS, "pinn", replace(PROBLEMS["pinn"], build=lambda: Poisson(4), steps=8))
    monkeypatch.setattr(timing, "TURNS", 1)
    monkeypatch.setattr(runs, "SEEDS", (0,))
    monkeypatch.setattr(defaults, "describe", lambda device: {**describe(device), "commit": "0" * 40})
    kept = runs.Store(tmp_path / "results")
    defaults._measure(kept, tmp_path, ("pinn",))
    return kept


def test_a_study_is_measured_once_and_written(store, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "train", None)  # a second run would call it
    monkeypatch.setattr(timing, "step_seconds", None)
    defaults._measure(store, tmp_path, ("pinn",))
    defaults.write(store, tmp_path)
    text = (tmp_path / "defaults.md").read_text()
    assert "| pinn |" in text
    assert "0" * 40 in text
    for change in runs.ABLATIONS:
        assert f"| {change} |" in text
    assert (tmp_path / "figures" / "defaults-pinn.png").exists()
    assert results.Results(store).problems == ["pinn"]


def test_a_run_that_is_not_finite_has_diverged(store, monkeypatch):
    monkeypatch.setattr(runs, "step", lambda *_: float("nan"))
    run = runs.train(runs.Case("pinn", "adamw", 1, 0), store.folder, "")
    assert run.diverged
    store.keep(run)
    assert store.run(run.case) == run
    assert runs.tuned("pinn", "adamw", store) != 1
    assert page._ending(run) == "diverged"


def test_times_count_the_refreshes_that_there_were():
    steps = (2, 4, 10, 20)
    run = runs.Run(runs.Case("pinn", "tengrad", 1, 0), 0.03, steps, (8.0, 4.0, 2.0, 1.0), steps, steps, False, "")
    curve = Curve("tengrad", False, (run,), {"refresh": 3.0, "reuse": 1.0})
    refreshes = (2, 4, 7, 9)  # of the steps 0, 1, 2, 3, 4, 5, 7 | 10, 14
    assert curve.times == [n + 2 * r for n, r in zip(steps, refreshes, strict=True)]
    assert curve.loss_at(9.0) == pytest.approx(6.0)
    assert curve.seconds_to(3.0) == pytest.approx(12 + 6)
    assert (curve.loss_at(1.0), curve.seconds_to(0.5)) == (None, None)


def test_the_solution_solves_the_equation():
    """The residual of the network's PDE at u = x(1−x)y(1−y): −Δu = 2 (x(1−x) + y(1−y)); and f is −Δ of the solution."""
    model = Poisson(4)
    for p in model.parameters():
        p.data.zero_()
    model.network[-1].bias.data.fill_(1 / 16)
    x_N2 = torch.rand(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    torch.testing.assert_close(model(x_N2), 2 * (x_N2 * (1 - x_N2)).sum(1), rtol=1e-7, atol=1e-8)
    hessian = torch.func.vmap(torch.func.hessian(lambda x: exact_solution(x[None])[0]))(x_N2)
    torch.testing.assert_close(source_term(x_N2), -hessian.diagonal(dim1=1, dim2=2).sum(1))
