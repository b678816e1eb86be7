"""The study of the defaults runs end to end on a small problem, resumes, and its page says what was measured."""

import sys
from dataclasses import replace

import pytest
import torch

from studies import comparison, defaults, optimizers, page, results, runs, stages, timing
from studies.problems import PROBLEMS
from studies.problems.poisson import Poisson
from studies.results import Curve, Target
from tengrad_triton.recipes.measuring.machine import describe

MACHINE = {**describe(torch.device("cpu")), "commit": "0" * 40}


pytest.importorskip("pytorch_optimizer", reason="the rivals need pip install '.[rivals]'")


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setitem(PROBLEMS, "pinn", replace(PROBLEMS["pinn"], build=lambda: Poisson(4), steps=8))
    monkeypatch.setattr(timing, "TURNS", 1)
    monkeypatch.setattr(runs, "SEEDS", (0,))
    monkeypatch.setattr(stages, "SEEDS", (0,))
    monkeypatch.setattr(stages, "LADDER", (0.1, *stages.GRID, 30))
    return runs.Store(tmp_path / "results")


def measure(store, *names):
    defaults._measure(store, store.folder, ("pinn",), names or optimizers.NAMES, MACHINE["commit"])


def made_up(case, *losses, **more):
    """Return a run with eight evaluations whose losses are given, the last of them repeated."""
    loss = (*losses, *losses[-1:] * (runs.POINTS - len(losses)))
    steps = tuple(range(1, runs.POINTS + 1))
    return replace(runs.Run(case, case.lr, steps, loss, loss, loss, diverged=False, commit="1" * 40), **more)


def test_a_study_is_measured_once_and_written(store, tmp_path, monkeypatch):
    measure(store)
    defaults._time(store, tmp_path, ("pinn",), MACHINE)
    monkeypatch.setattr(runs, "train", None)  # a second run would call it
    monkeypatch.setattr(timing, "step_seconds", None)
    measure(store)
    defaults._time(store, tmp_path, ("pinn",), MACHINE)
    defaults.write(store, tmp_path)
    text = (tmp_path / "defaults.md").read_text()
    assert "| pinn | choose |" in text
    assert "0" * 40 in text
    for change in runs.ABLATIONS:
        assert f"| {change} |" in text
    assert (tmp_path / "figures" / "defaults-pinn.png").exists()
    found = results.Results(store)
    assert found.problems == ["pinn"]
    assert set(found.tuned("pinn")) == set(optimizers.RIVALS)


def test_only_the_optimizers_asked_for_are_trained(store):
    measure(store, "adamw", "soap")
    assert {run.case.optimizer for run in results.Results(store).runs} == {"adamw", "soap"}


def test_a_run_with_other_settings_than_todays_is_no_run(store, monkeypatch):
    measure(store, "tengrad", "adamw")
    ours, adamw = (runs.Case("pinn", name, 1, 0) for name in ("tengrad", "adamw"))
    today = optimizers.defaults()
    monkeypatch.setattr(optimizers, "defaults", lambda: {**today, "damping": 0.5})
    assert store.run(ours) is None
    assert store.run(adamw) is not None
    assert next(stages.missing("pinn", ("tengrad",), store)).optimizer == "tengrad"
    assert results.Results(store).ours("pinn") is None
    monkeypatch.setitem(PROBLEMS, "pinn", replace(PROBLEMS["pinn"], steps=16))
    assert store.run(adamw) is None


def test_times_of_other_settings_are_no_times(store, monkeypatch):
    defaults._time(store, store.folder, ("pinn",), MACHINE)
    assert set(results.Results(store).seconds("pinn")) == set(optimizers.NAMES)
    today = optimizers.defaults()
    monkeypatch.setattr(optimizers, "defaults", lambda: {**today, "damping": 0.5})
    assert set(results.Results(store).seconds("pinn")) == set(optimizers.RIVALS)


def test_a_run_that_is_not_finite_has_failed(store, monkeypatch):
    monkeypatch.setattr(runs, "step", lambda *_: float("nan"))
    run = runs.train(runs.Case("pinn", "adamw", 1, 0), store.folder, "")
    assert run.failure == "not finite"
    store.keep(run)
    assert store.run(run.case) == run
    assert page._ending(run) == "not finite"


def test_a_run_whose_optimizer_raises_is_kept_with_its_error(store, monkeypatch):
    def raising(model, **settings):
        optimizer = torch.optim.SGD(model.parameters(), lr=settings["lr"])
        optimizer.register_step_post_hook(lambda *_: 1 / 0)
        return optimizer

    monkeypatch.setitem(optimizers.RIVALS, "soap", replace(optimizers.RIVALS["soap"], build=raising))
    case = runs.Case("pinn", "soap", 1, 0)
    run = runs.train(case, store.folder, "")
    assert (run.failure, run.steps) == ("crashed: ZeroDivisionError: division by zero", ())
    monkeypatch.setitem(optimizers.RIVALS, "soap", replace(optimizers.RIVALS["soap"], build=lambda *_, **__: 1 / 0))
    assert runs.train(case, store.folder, "").failure == run.failure


def test_a_missing_package_is_no_result(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ImportError, match="pytorch_optimizer"):
        runs.train(runs.Case("pinn", "soap", 1, 0), store.folder, "")


def test_a_run_above_its_start_has_failed(store, monkeypatch):
    losses = iter(range(1, 9))
    monkeypatch.setattr(runs, "step", lambda *_: float(next(losses)))
    assert runs.train(runs.Case("pinn", "adamw", 1, 0), store.folder, "").failure == "above its start"


def test_the_page_shows_runs_that_failed(store, tmp_path):
    measure(store, "adamw", "soap")
    defaults._time(store, tmp_path, ("pinn",), MACHINE)
    store.keep(made_up(runs.Case("pinn", "sgd", 10, 0), 1.0, diverged=True))
    store.keep(made_up(runs.Case("pinn", "muon", 10, 0), 1.0, diverged=True, error="RuntimeError: no luck | at all"))
    cut = dict.fromkeys(("steps", "loss", "quality", "train_loss"), ())
    store.keep(made_up(runs.Case("pinn", "tengrad", 1, 0), 1.0, diverged=True, **cut))
    defaults.write(store, tmp_path)
    text = (tmp_path / "defaults.md").read_text()
    assert "| pinn | sgd | above its start | 1 | 1 |" in text
    assert r"| pinn | muon | crashed: RuntimeError: no luck \| at all | 0.01 | 1 |" in text
    assert "| pinn | tengrad | not finite | 0.01 | 1 |" in text
    assert "not reached (1 failed)" in text
    assert "| pinn | - | - | - | 1 of 1 |" in text


@pytest.mark.parametrize("best", [0.1, 1, 10, 30, 300])
def test_the_grid_grows_until_its_best_is_inside(store, monkeypatch, best):
    monkeypatch.setattr(stages, "LADDER", (0.03, 0.1, *stages.GRID, 30, 100, 300, 1000))
    seen = []
    for case in stages.missing("pinn", ("sgd",), store):
        seen.append(case.factor)
        store.keep(made_up(case, 1 + abs(torch.tensor(case.factor / best).log().item())))
    assert stages.tuned("pinn", "sgd", store) == best
    grid = stages.grid("pinn", "sgd", store)
    assert grid[0] < best < grid[-1]
    assert set(stages.GRID) <= set(grid) == set(seen)


def test_the_grid_goes_down_while_all_diverge_and_ends(store):
    for case in stages.missing("pinn", ("sgd",), store):
        store.keep(made_up(case, 1.0, diverged=True))
    assert stages.grid("pinn", "sgd", store)[0] == stages.LADDER[0]


def curve_of(optimizer, losses, seconds, failures=()):
    case = runs.Case("pinn", optimizer, 1, 0)
    steps = (2, 4, 10, 20)
    run = runs.Run(case, case.lr, steps, losses, losses, losses, diverged=False, commit="")
    return Curve(optimizer, False, (run,), seconds, failures)


def test_times_count_the_refreshes_that_there_were():
    curve = curve_of("tengrad", (8.0, 4.0, 2.0, 1.0), {"refresh": 3.0, "reuse": 1.0})
    refreshed = [sum(step < n for step in results.refreshes(20)) for n in (2, 4, 10, 20)]
    assert curve.times == [n + 2 * r for n, r in zip((2, 4, 10, 20), refreshed, strict=True)]
    plain = curve_of("adamw", (8.0, 4.0, 2.0, 1.0), {"refresh": 1.0, "reuse": 1.0})
    assert plain.loss_at(7.0) == pytest.approx(3.0)
    assert plain.seconds_to(3.0) == pytest.approx(7.0)
    assert (plain.loss_at(1.0), plain.seconds_to(0.5)) == (None, None)


def test_the_ratio_is_of_times_to_the_rivals_last_loss():
    once = {"refresh": 1.0, "reuse": 1.0}
    ours = curve_of("tengrad", (8.0, 4.0, 2.0, 1.0), once)
    assert results.ratio(ours, curve_of("adamw", (9.0, 9.0, 9.0, 3.0), once)) == pytest.approx(7 / 20)
    assert results.ratio(ours, curve_of("adamw", (9.0, 9.0, 9.0, 0.5), once)) == "not reached"
    assert results.ratio(ours, replace(ours, runs=(), failures=("not finite",))) == "no end"
    failed = replace(ours, failures=("not finite",))
    assert results.ratio(failed, curve_of("adamw", (9.0, 9.0, 9.0, 3.0), once)) == "not reached"
    assert results.ratio(None, ours) == "not measured"


def test_a_target_counts_what_was_not_reached(monkeypatch, store):
    ratios = iter([0.5, 0.7, 0.75, "not reached", 1.2, "not measured"])
    names = ["photograph", "recurrent", "gpt", "finetuning", "unet", "graph"]
    monkeypatch.setattr(results.Results, "problems", names)
    monkeypatch.setattr(results.Results, "ours", lambda *_: None)
    monkeypatch.setattr(results.Results, "rival", lambda *_: None)
    monkeypatch.setattr(results, "ratio", lambda *_: next(ratios))
    score = results.Results(store).score(Target("adamw", 0.75, (1, 2), 1.1), "judge")
    assert (score.met, score.of, score.behind, score.is_met) == (3, 5, ("unet", "finetuning"), False)
    assert comparison._counted(score)[1:] == ("3 of 5", "unet, finetuning", "no")
    assert replace(score, behind=()).is_met
    assert not replace(score, behind=(), met=2).is_met


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path, capsys):
    for option, known in (("--only", "autoencoder"), ("--only-optimizer", "soap")):
        with pytest.raises(SystemExit):
            defaults.app(["--data", str(tmp_path), option, known, "nothing"])
        printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert "nothing: expected some of" in printed
        assert known in printed
