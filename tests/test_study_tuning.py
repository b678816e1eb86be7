"""The study of the settings runs and resumes; its page says what was measured, and its code and its advice hold."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from studies.problems import PROBLEMS  # noqa: E402
from studies.problems.poisson import Poisson  # noqa: E402
from studies.runs import Store as DefaultStore  # noqa: E402
from studies.tuning import __main__ as study  # noqa: E402
from studies.tuning import grid, losses, page, runs  # noqa: E402

PAGE = ROOT / "docs" / "tuning.md"
DEFAULTS = DefaultStore(ROOT / "studies" / "results")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(PROBLEMS, "pinn", replace(PROBLEMS["pinn"], build=lambda: Poisson(4), steps=32))


def made_up(case, *losses, **more):
    """Return a run whose losses are given."""
    defaults = {"train_loss": 1.0, "failure": "", "warning": "", "clipped": (), "region": (), "damping": 10.0}
    settings = {**defaults, "quality": losses, "commit": "1" * 40, **more}
    return runs.Run(case.problem, case.setting.key, case.seed, loss=losses, **settings)


TRIED = [setting for setting in grid.SETTINGS if grid.is_tried(setting, "pinn")]
KINDS = {s.section: s for s in TRIED} | {s.key: s for s in TRIED if s.likelihood or s.sums or s.name == "adapted"}


@pytest.mark.parametrize("setting", KINDS.values(), ids=lambda setting: setting.key)
def test_each_setting_trains_and_is_kept(tiny, tmp_path, setting):
    case, store = runs.Case("pinn", setting, 0), runs.Store(tmp_path)
    run = runs.train(case, tmp_path, "0" * 40)
    store.keep(case, run)
    assert store.run(case) == run
    assert store.run(replace(case, seed=1)) is None
    if setting.likelihood == "categorical":
        assert run.failure.startswith("refused: likelihood='categorical' expects logits")
        return
    assert len(run.loss) == runs.POINTS
    assert bool(run.warning) == (setting.likelihood == "bernoulli")
    assert bool(run.region) == (setting.method == "unscaled" and setting.change["trust_region"] is not None)
    assert bool(run.clipped) == (setting.method == "tengrad" and setting.change.get("clip_threshold", 1.0) is not None)


def test_what_is_kept_is_not_run_again_and_other_settings_are(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "SETTINGS", (grid.BASE,))
    monkeypatch.setattr(study, "PROBLEMS", ("pinn",))
    store = runs.Store(tmp_path)
    study.measure(store, tmp_path)
    assert study.missing(store) == []
    monkeypatch.setattr(runs, "train", None)  # a second run would call it
    study.measure(store, tmp_path)
    for change in ({"factor": 2.0}, {"change": {"damping": 1.0}}, {"clip_grad": 1.0}):
        assert store.run(runs.Case("pinn", replace(grid.BASE, **change), 0)) is None
    monkeypatch.setitem(PROBLEMS, "pinn", replace(PROBLEMS["pinn"], steps=64))
    assert len(study.missing(store)) == len(grid.BASE.seeds)


def test_names_and_rates():
    assert len({setting.key for setting in grid.SETTINGS}) == len(grid.SETTINGS)
    assert grid.BASE in grid.SETTINGS
    assert set(grid.ONLY) <= {setting.key for setting in grid.SETTINGS}
    rates = {
        name: [grid.Setting("", "", schedule=name).rate(step, 10) for step in (0, 5, 8)] for name in grid.SCHEDULES
    }
    assert rates["constant"] == [1, 1, 1]
    assert rates["linear"] == pytest.approx([1, 0.5, 0.2])
    assert rates["cosine"] == pytest.approx([1, 0.5, 0.0954915])
    assert rates["cooldown"] == pytest.approx([1, 1, 2 / 3])
    assert grid.Setting("", "", warmup=0.2).rate(0, 10) == pytest.approx(0.5)


# (the losses of a setting, those of the base, the verdict, the effect)
VERDICTS = [
    ((1.0, 1.1), (2.0, 2.1), "↓", "× 0.51"),
    ((3.0, 4.0), (2.0, 1.0), "↑", "× 2.33"),
    ((100.0, 101.0), (2.0, 1.0), "↑", "× 67"),
    ((1.0, 3.0), (2.0, 2.1), "", "level"),
    ((1.0, 9.0), (2.0, 2.1), "", "undecided"),
    ((1.999, 1.998), (2.0, 2.001), "↓", "× 1.00"),
    ((1.0,), (2.0, 2.1), "", "undecided"),
    (("not finite", 1.0), (2.0, 2.1), "", "not finite"),
]


@pytest.mark.parametrize(("own", "base", "verdict", "effect"), VERDICTS)
def test_verdicts_are_those_of_all_seeds(tmp_path, own, base, verdict, effect):
    store, setting = runs.Store(tmp_path), next(s for s in grid.SETTINGS if s.key == "damping: 3")
    for one, values in ((setting, own), (grid.BASE, base)):
        for seed, value in enumerate(values):
            case = runs.Case("mlp", one, seed)
            failed = {"failure": value} if isinstance(value, str) else {}
            store.keep(case, made_up(case, 9.0 if failed else value, **failed))
    results = page.Results(store, DEFAULTS)
    assert results.verdict(setting.key, grid.BASE.key, "mlp") == verdict
    assert page.effect(results, setting.key) == f"mlp {effect}, 3c1f -, pinn -"
    shown = " / ".join(value if isinstance(value, str) else f"{value:.3g}" for value in own)
    assert page.cell(results, setting.key, "mlp") == f"{shown} {verdict}".strip()


def test_a_page_without_the_name_of_a_run_is_an_error(tmp_path):
    results = page.Results(runs.Store(tmp_path), DEFAULTS)
    for words in ("cells no: run", "nothing"):
        with pytest.raises(KeyError):
            page.markdown(results, f"{{{{{words}}}}}")


def test_figures_of_few_runs_are_drawn(tmp_path):
    store = runs.Store(tmp_path / "results")
    for setting in grid.SETTINGS[:10]:
        case = runs.Case("mlp", setting, 0)
        store.keep(case, made_up(case, 0.5, region=(0.5,) * runs.LAST))
    study.figures.draw(page.Results(store, DEFAULTS), tmp_path)
    assert all((tmp_path / f"tuning-{name}.png").stat().st_size > 10_000 for name in ("rate", "region"))


@pytest.mark.parametrize("loss", losses.LOSSES, ids=lambda loss: loss.title[:30])
def test_the_advice_for_a_loss_is_silent(loss):
    said = loss.said({})
    assert not said or said.startswith(("error: likelihood", "the loss is not that of the likelihood"))
    if loss.settings is None:
        assert said
    else:
        assert loss.said(loss.settings()) == ""


# (the end of the title, what the default does: an output without classes is refused, and others are compared)
SHAPES = [("logits [N, C, T]", "refuses"), ("[N]", "refuses"), ("[N, 1]", "refuses"), ("[N, C]", "warns")]


@pytest.mark.parametrize(("shape", "word"), SHAPES)
def test_the_default_refuses_an_output_without_classes(shape, word):
    of_this_shape = [loss for loss in losses.LOSSES if loss.title.endswith(shape)]
    assert of_this_shape
    assert {loss.default() for loss in of_this_shape} == {word}


def test_nothing_is_missing_and_the_page_is_that_of_the_kept_runs(tmp_path):
    store = runs.Store(ROOT / "studies" / "tuning" / "results")
    assert study.missing(store) == []
    study.app(["--report-only", "--out", str(tmp_path)], result_action="return_value")
    assert (tmp_path / "tuning.md").read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {"tuning-rate.png", "tuning-region.png"}
    for name in re.findall(r"\]\((figures/.+?)\)", PAGE.read_text(encoding="utf-8")):
        assert (ROOT / "docs" / name).exists()


ALL = ("mlp", "3c1f", "pinn")
# What the page says in words: (setting, compared with, problems, what all seeds say)
CLAIMS = [
    ("constant: tengrad 1", None, ("mlp",), "↑"),
    ("tengrad: linear 1", None, ("pinn",), "↑"),
    ("tengrad: linear 10", None, ALL, "↑"),
    ("batch: four times", None, ALL, "↑"),
    ("batch: four times, twice the rate", "batch: four times", ("pinn",), "↑"),
    ("batch: quarter, half the rate", "batch: quarter", ALL, "↓"),
    ("damping: 1", None, ("pinn",), "↑"),
    ("damping: 3", None, ("pinn",), "↑"),
    ("damping: 30", None, ALL, ""),
    ("damping: adapted", None, ("pinn",), "↑"),
    ("rows: 16", None, ("pinn",), "↑"),
    ("loss: bernoulli", None, ("pinn",), "↑"),
    ("loss: sum", None, ("3c1f", "pinn"), "↑"),
    ("momentum: 0", None, ("pinn",), "↑"),
    ("momentum: no look-ahead", None, ("pinn",), "↑"),
    ("gradients: clipped", None, ("pinn",), "↓"),
    ("interval: 1", None, ("mlp", "pinn"), "↑"),
    ("warm-up: a tenth", None, ("pinn",), "↑"),
    ("adamw: linear 3", None, ("mlp",), ""),
    ("unscaled: linear 0.003", "unscaled: linear 0.0003", ALL, ""),
    ("unscaled: constant 0.003", "unscaled: constant 0.0003", ("mlp", "3c1f"), "↑"),
]


@pytest.fixture(scope="module")
def kept():
    return page.Results(runs.Store(ROOT / "studies" / "tuning" / "results"), DEFAULTS)


@pytest.mark.parametrize(("key", "base", "problems", "verdict"), CLAIMS)
def test_what_the_page_says_in_words_is_what_all_seeds_say(kept, key, base, problems, verdict):
    assert {kept.verdict(key, base or grid.BASE.key, problem) for problem in problems} == {verdict}


def test_no_other_rate_or_schedule_ends_lower(kept):
    others = [s.key for s in grid.SETTINGS if s.section in ("tengrad", "warm-up")]
    for key in (*others, "constant: tengrad 0.333", "constant: tengrad 1", "constant: tengrad 3"):
        assert "↓" not in {kept.verdict(key, grid.BASE.key, problem) for problem in ALL}


def test_the_code_of_the_page_runs(capsys):
    names = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for text in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            exec(compile(text, "tuning.md", "exec"), names)
    said = capsys.readouterr().out
    assert "refreshed at step" in said
    assert "SGD step []" in said
    assert isinstance(names["model"], nn.Module)


def test_data_are_asked_for(tmp_path):
    with pytest.raises((ValueError, SystemExit)):
        study.app(["--results", str(tmp_path), "--out", str(tmp_path)])
