"""The study of differential equations: its clock counts steps, its runs are kept, and its page is that of the runs."""

import json
import math
import re
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from studies.pinn import __main__ as study  # noqa: E402
from studies.pinn import command, page, registry, robustness, runs, timing  # noqa: E402
from studies.pinn.entrants import Entrant, TimeIsUp  # noqa: E402
from studies.pinn.problems import PROBLEMS, sampling  # noqa: E402
from studies.pinn.problems.base import mlp  # noqa: E402
from tengrad_triton.recipes.reports.styles import style_at  # noqa: E402

PAGE = ROOT / "docs" / "pinn.md"
COLUMNS = {
    "Poisson 2d": "poisson2d",
    "heat 1+1d": "heat1d",
    "Poisson 5d": "poisson5d",
    "heat 4+1d": "heat4d",
    "Burgers": "burgers",
    "convection": "convection-fresh",
}  # of README's table: problems
MACHINE = {"device": "some processor", "python": "3", "torch": "2", "commit": "0" * 40}


def test_the_schedule_ends_with_the_time():
    assert runs.schedule(3) == [pytest.approx(at) for at in (0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3)]
    assert runs.schedule(0.01) == [0.01]


def busy(seconds):
    since = time.process_time()
    while time.process_time() - since < seconds:
        pass


def test_the_clock_counts_steps_alone():
    clock = runs.Clock(0.05, lambda: busy(0.2) or 1.0)
    for _ in range(3):
        clock.go()
        with pytest.raises(TimeIsUp) if clock.steps == 2 else nullcontext():
            busy(0.02)
            clock.pause()
    assert [point.step for point in clock.points] == [0, 3]
    assert 0.06 <= clock.points[-1].seconds < 0.2


@pytest.fixture
def tiny(monkeypatch):
    """Poisson's equation with few points and weights, and families of few settings."""
    problem = PROBLEMS["poisson2d"]
    small = replace(
        problem,
        build=lambda: mlp(2, 6, 1),
        points=lambda generator: {
            "interior": sampling.cube(20, 2, generator),
            "boundary": sampling.sides(8, 2, generator),
        },
        fresh_every=2,
    )
    monkeypatch.setitem(PROBLEMS, "poisson2d", small)
    few = {name: {key: family[key] for key in list(family)[:2]} for name, family in registry.FAMILIES.items()}
    few = {name: few[name] for name in ("adam", "lbfgs", "least-squares")}
    kept = dict(registry.FAMILIES)
    registry.FAMILIES.clear()
    registry.FAMILIES.update(few)
    runs.description.cache_clear()
    yield small
    registry.FAMILIES.clear()
    registry.FAMILIES.update(kept)
    runs.description.cache_clear()


@pytest.mark.parametrize("case", [("adam", 0), ("adam", 1), ("lbfgs", 0), ("least-squares", 0)], ids=str)
def test_an_entrant_lowers_the_error_and_is_kept(tiny, tmp_path, case):
    family, which = case
    store, own = runs.Store(tmp_path), runs.Case("poisson2d", family, list(registry.FAMILIES[family])[which], 0.3, 1)
    run = runs.train(own, MACHINE)
    store.keep(run)
    assert store.run(own) == run
    assert store.run(replace(own, seed=0)) is None
    assert "Error" not in run.failure
    assert run.points[0].seconds == 0
    assert run.points[-1].seconds >= 0.3
    assert run.error_at(0.001) == run.points[0].error


def test_points_are_new_only_where_they_shall_be(tiny):
    def drawn(is_fixed):
        return [points["interior"] for points, _ in zip(runs.draws(tiny, is_fixed, 0), range(4), strict=False)]

    fresh, fixed = drawn(False), drawn(True)
    assert fresh[0] is fresh[1]
    assert not torch.equal(fresh[1], fresh[2])
    assert all(points is fixed[0] for points in fixed)


def failing(kind):
    """Return a builder of an entrant that fails in some way."""

    def build(problem, model):
        def step(points):
            if kind == "raises":
                raise RuntimeError("singular\nmatrix")
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_({"nan": math.nan, "rises": 100.0}.get(kind, 0.0))
            busy(0.11)

        if kind == "refuses":
            raise ValueError("not for this problem")
        return Entrant("a failure", "some setting", step)

    return build


# (how it fails, what is kept)
FAILURES = {
    "raises": "RuntimeError: singular",
    "nan": "FloatingPointError: the error is not finite after 1 steps",
    "refuses": "ValueError: not for this problem",
    "rises": "above its start",
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_is_kept_and_never_the_best(tiny, tmp_path, kind):
    registry.FAMILIES["lbfgs"] = {"bad": failing(kind), **registry.FAMILIES["lbfgs"]}
    store = runs.Store(tmp_path)
    for variant in registry.FAMILIES["lbfgs"]:
        store.keep(runs.train(runs.Case("poisson2d", "lbfgs", variant, 0.3, 0), MACHINE))
    bad = store.run(runs.Case("poisson2d", "lbfgs", "bad", 0.3, 0))
    assert bad.failure == FAILURES[kind]
    assert bad.end == math.inf
    assert bad.error_at(0.3) > bad.points[0].error
    assert math.isfinite(bad.error_at(0.3)) == (kind == "rises")
    assert runs.best(store, "poisson2d", "lbfgs", 0.3, 0) != "bad"
    text = page.markdown(page.Results(store))
    assert "| bad | failed |" in text


def run_study(tmp_path, *arguments):
    folders = ["--results", str(tmp_path / "results"), "--out", str(tmp_path / "docs")]
    return command.main(study.app, [*arguments, *folders])


def test_the_study_runs_resumes_and_writes_its_page(tiny, tmp_path, monkeypatch):
    arguments = ["--problem", "poisson2d", "--seconds", "0.2", "--seeds", "0", "1"]
    assert run_study(tmp_path, *arguments) == 0
    files = {file: file.read_text() for file in (tmp_path / "results").glob("*.json")}
    assert len(files) == 2 + 1 + 1 + 1 + 1 + 1
    text = (tmp_path / "docs" / "pinn.md").read_text(encoding="utf-8")
    adam = page.Results(runs.Store(tmp_path / "results")).lines("poisson2d")[0]
    raced = re.search(r"CPU seconds to the error that Adam ends with.*\| L-BFGS \| [^|]+ \|", text, re.DOTALL)
    assert (raced is not None) == (not adam.failures)  # in 0.2 s its error may rise
    assert all(word in text for word in ("| Adam |", "| L-BFGS |", "| scipy's least_squares |", "0 of 2", "## Where"))
    assert (tmp_path / "docs" / "figures" / "pinn-poisson2d.png").stat().st_size > 10_000
    monkeypatch.setattr(runs, "train", None)  # a second run would call it
    assert run_study(tmp_path, *arguments) == 0
    assert {file: file.read_text() for file in files} == files
    assert run_study(tmp_path, "--report-only") == 0
    assert (tmp_path / "docs" / "pinn.md").read_text(encoding="utf-8") == text


def test_the_page_is_that_of_the_kept_runs(tmp_path):
    kept = ROOT / "studies" / "pinn" / "results"
    assert PAGE.exists() == kept.exists()
    assert command.main(study.app, ["--report-only", "--results", str(kept), "--out", str(tmp_path)]) == 0
    written = (tmp_path / "pinn.md").read_text(encoding="utf-8")
    assert written == PAGE.read_text(encoding="utf-8") if kept.exists() else "Nothing was run yet." in written


def test_every_entrant_has_its_own_style():
    styles = [style_at(place) for place in range(len(registry.FAMILIES))]
    assert len(set(styles)) == len(styles)


def first_table(text):
    """Return the first table of a text, by row and column, without marks of bold type and code."""
    lines = text[text.index("\n|") :].split("\n\n")[0].strip().splitlines()
    head, _, *rows = ([cell.replace("`", "").strip("* ") for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def test_the_readme_has_numbers_of_the_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Differential equations")[1]
    shown, page_has = first_table(readme), first_table(PAGE.read_text(encoding="utf-8"))
    assert {"GaussNewton", "ENGD", "SPRING", "PINA", "DeepXDE", "L-BFGS"} <= shown.keys()
    for name, cells in shown.items():
        for title, cell in cells.items():
            expected = page_has[name][COLUMNS[title]]
            assert cell == expected or float(cell) == float(expected), f"{name}, {title}"


def test_another_problem_or_setting_makes_a_run_invalid(tiny, tmp_path, monkeypatch):
    store, case = runs.Store(tmp_path), runs.Case("poisson2d", "lbfgs", "history-150", 0.1, 0)
    run = runs.train(case, MACHINE)
    store.keep(replace(run, setting="another"))
    study.measure(store, ["poisson2d"], ["lbfgs"], 0.1, (0,))
    assert store.run(case).setting == run.setting
    monkeypatch.setitem(PROBLEMS, "poisson2d", replace(tiny, weights={"boundary": 3.0}))
    runs.description.cache_clear()
    assert store.run(case) is None


def test_steps_are_timed_in_turn(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "REFERENCE", "lbfgs")
    arguments = ["--problem", "poisson2d", "--rounds", "3", "--results", str(tmp_path)]
    assert command.main(timing.app, arguments) == 0
    kept = json.loads((tmp_path / "timing" / "poisson2d.json").read_text())
    assert (kept["rounds"], kept["rows"], kept["ratio"]["lbfgs"]) == (3, 28, 1)
    assert set(kept["seconds"]) == {"adam", "lbfgs"}
    assert "ratio 1.00" in "\n".join(timing.sections(runs.Store(tmp_path)))


def test_an_optimizer_whose_step_fails_has_no_time(tiny, capsys):
    def fails(points):
        raise ArithmeticError("no factor")

    registry.FAMILIES["failing"] = {"only": lambda problem, model: Entrant("Failing", "", fails)}
    assert set(timing.timed("poisson2d", ["adam", "failing"], 2)) == {"adam"}
    assert "poisson2d, failing, left out: no factor" in capsys.readouterr().err


def test_robustness_counts_what_diverges(tiny, tmp_path, monkeypatch, capsys):
    assert command.main(robustness.app, ["--entrant", "none-such"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(robustness, "DAMPED", {})
    assert command.main(robustness.app, []) == 2
    assert "nothing to run" in capsys.readouterr().err
    by_damping = {1e-4: failing("not at all"), 1e-5: failing("nan"), 1e-6: failing("rises"), 1e-7: failing("raises")}
    monkeypatch.setattr(robustness, "DAMPED", {"ours": by_damping.__getitem__})
    monkeypatch.setattr(robustness, "DAMPINGS", tuple(by_damping))
    arguments = ["--problem", "poisson2d", "--steps", "2", "--seeds", "2", "--results", str(tmp_path)]
    assert command.main(robustness.app, arguments) == 0
    text = "\n".join(robustness.sections(runs.Store(tmp_path)))
    assert "| 0.0001 | 0 of 2" in text
    assert all(f"| {damping:g} | 2 of 2 (failed" in text for damping in (1e-5, 1e-6, 1e-7))
    monkeypatch.setattr(robustness, "run", None)  # a second run would call it
    assert command.main(robustness.app, arguments) == 0


# Arguments, and what the one line says.
MISTAKES = {
    "problem": (["--problem", "x"], "there are poisson2d"),
    "entrant": (["--entrant", "x"], "there are gauss-newton, "),
    "time": (["--seconds", "0"], "above 0"),
    "seed": (["--seeds", "a"], "seeds"),
    "flag": (["--nothing"], "--nothing"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_get_one_line(case, tmp_path, capsys):
    arguments, message = MISTAKES[case]
    assert run_study(tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
