"""What `tengrad-triton paper` computes: runs of a request, times to accuracies, distances, memory and exponents."""

import pytest
import torch
from dense import sample_gradients
from helpers.image_files import data_of
from torch import nn
from torch.nn.functional import cross_entropy

from tengrad_triton.recipes.measuring.power_law import exponent
from tengrad_triton.recipes.models import image_model
from tengrad_triton.recipes.paper import memory
from tengrad_triton.recipes.paper.measurements import inverses, phases
from tengrad_triton.recipes.paper.published import EXPERIMENTS, choose_experiments
from tengrad_triton.recipes.paper.report.seeds import Finished, by_epoch, levels, times_to
from tengrad_triton.recipes.paper.request import TARGETS, Request, Scale
from tengrad_triton.recipes.paper.runs import runs_of, settings_of
from tengrad_triton.recipes.training.job import Job
from tengrad_triton.recipes.training.settings import Settings

CPU = torch.device("cpu")


CHOICES = {
    ("3c1f",): [0],
    ("WideResNet",): [1, 2],
    ("wideresnet, cifar-10",): [1],
    ("wrn-28-4-cifar10", "3C1F"): [1, 0],
    ("MobileNetV2", "mobilenetv2-cifar10"): [5, 6],
}


@pytest.mark.parametrize("words", CHOICES, ids=str)
def test_experiments_are_chosen_by_their_names_or_by_how_these_begin(words):
    assert choose_experiments(words) == tuple(EXPERIMENTS[index] for index in CHOICES[words])


def test_all_is_every_target_and_the_papers_own_scale_is_the_default():
    runs = runs_of(Request(), TARGETS)
    table2 = [run for run in runs if not run.grid]
    assert len(table2) == len(EXPERIMENTS) * 9 * 5
    first = next(run for run in table2 if run.name == "tengrad_paper").settings
    assert (first.model, first.width, first.epochs, first.batch_size) == ("3c1f", 128, 10, 128)
    own = first.tengrad_paper
    assert (own.lr, own.weight_decay, own.damping) == (0.003, 0.001, 0.1)
    assert len({(run.experiment.key, run.label) for run in runs}) == len(runs)
    grid = [run for run in runs if run.grid and run.experiment is EXPERIMENTS[0] and run.name == "kfac"]
    assert len(grid) == 6 * 6 * 7 * 5


@pytest.mark.parametrize(
    ("index", "epochs", "decay_at", "decay"),
    [(1, None, (10, 20, 30, 40, 50), 0.5), (1, 6, (1, 2, 3, 4, 5), 0.5), (2, None, (30, 45), 0.1), (2, 4, (2, 3), 0.1)],
)
def test_rates_decay_as_in_the_paper_in_proportion_to_the_epochs(index, epochs, decay_at, decay):
    experiment, request = EXPERIMENTS[index], Request(scale=Scale(epochs=epochs))
    settings = settings_of(experiment, "sgd", 0, request, experiment.of("sgd"))
    assert (settings.decay_at, settings.decay) == (decay_at, decay)


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # torch 2.11's own, of every profile
def test_an_optimizer_that_is_made_of_others_is_counted_once():
    job = Job(Settings(model="mlp", width=5, batch_size=6), data_of(torch.zeros(6, 1, 2, 2, dtype=torch.uint8), 3), CPU)
    parts = phases.measure_phases(job, "muon")["reuse"]
    assert parts["forward and backward"] > 0
    assert parts["update"] > 0


def finished(accuracies, seconds, diverged=False):
    epochs = [
        {"test_accuracy": a, "train_seconds": s, "train_loss": 1 - a} for a, s in zip(accuracies, seconds, strict=True)
    ]
    return Finished("sgd", 0, epochs, diverged, {}, "train_seconds")


def test_times_are_to_the_first_epoch_that_reaches_an_accuracy():
    run = finished([0.5, 0.8, 0.7, 0.8], [1.0, 2.0, 3.0, 4.0])
    assert run.top() == (80.0, 3.0)
    assert [run.time_to(level) for level in (50, 50.1, 81)] == [1.0, 3.0, None]
    other = finished([0.5, 0.6], [2.0, 2.0])
    spread, reached = times_to([run, other], 60)
    assert (spread.mean, spread.count, reached) == (3.5, 2, 2)
    assert times_to([run, other], 70)[1] == 1
    assert times_to([other], 70) == (None, 0)


def test_curves_end_where_the_shortest_run_does():
    spreads, seconds = by_epoch([finished([0.5, 0.75], [1, 2]), finished([0.25], [2])], "test_accuracy", 100)
    assert [(s.mean, s.count) for s in spreads] == [(37.5, 2)]
    assert spreads[0].std == pytest.approx(25 / 2**0.5)
    assert seconds == [1.5]


def test_fixed_accuracies_are_those_that_every_run_of_some_optimizer_reaches():
    groups = {"sgd": [finished([0.85], [1]), finished([0.83], [1])], "adamw": [finished([0.95], [1], diverged=True)]}
    assert levels(groups) == [70, 75, 80, 82]


@pytest.mark.parametrize("power", [-1.0, 0.5, 3.0])
def test_the_exponent_of_a_power_law_is_found(power):
    assert exponent([2, 5, 11], [3 * v**power for v in (2, 5, 11)]) == pytest.approx(power)


@pytest.mark.parametrize(("method", "network"), [("exact NGD", True), ("TENGraD", False)])
def test_a_block_of_the_inverse_is_the_dense_one(method, network):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, damping = torch.randn(7, 3, dtype=torch.float64), 0.1
    p_NC = model(x).softmax(1).detach()
    rows = []
    for label in range(3):
        grads = sample_gradients(model, x, torch.full((7,), label), cross_entropy)
        names = grads if network else ["0.weight", "0.bias"]
        rows.append(p_NC[:, label, None].sqrt() * torch.cat([grads[name].flatten(1) for name in names], 1))
    j_RK = torch.cat(rows)
    fisher_KK = j_RK.mT @ j_RK / 7
    dense_KK = torch.linalg.inv(fisher_KK + damping * torch.eye(len(fisher_KK), dtype=torch.float64))
    block = inverses.inverse_block(inverses.METHODS[method], model, 0, (x, torch.arange(7) % 3), damping)
    torch.testing.assert_close(block, damping * dense_KK[:12, :12], rtol=1e-9, atol=1e-12)


def test_distances_are_those_of_the_definitions():
    exact, other = torch.diag(torch.tensor([0.5, 1.0])), torch.diag(torch.tensor([0.5, 0.0]))
    found = inverses.distances({"exact NGD": exact, "other": other, "none": torch.eye(2)})
    assert found["other"] == pytest.approx({"relative": 1 / 1.25**0.5, "of curvature": 2, "cosine": 0.5 / 1.25**0.5})
    assert found["none"] == pytest.approx({"relative": 0.5 / 1.25**0.5, "of curvature": 1, "cosine": None})
    flat = inverses.distances({"exact NGD": torch.eye(2), "other": other})["other"]
    assert (flat["of curvature"], flat["cosine"]) == (None, None)


def test_shown_entries_are_spread_over_the_weight():
    small = inverses.shown_entries(torch.empty(4, 2, 3, 3))
    assert torch.equal(small, torch.arange(72))
    large = inverses.shown_entries(torch.empty(500, 648))
    assert (len(large), large[0].item(), large[-1].item()) == (24 * 24, 0, 500 * 648 - 1)
    assert len(large.unique()) == len(large)


def test_experiments_have_models_and_every_paper_optimizer_is_tuned():
    for experiment in EXPERIMENTS:
        width = 32 if experiment.model == "3c1f" else experiment.width
        assert image_model(experiment.model).width == width
        assert set(experiment.tuned) == set(experiment.reported) == {"sgd", "tengrad_paper", "kfac", "ekfac", "kbfgs"}
        for name, tuned in experiment.tuned.items():
            settings = experiment.of(name)
            assert [settings.lr, settings.weight_decay, *([settings.damping] if len(tuned) > 2 else [])] == list(tuned)
    assert (EXPERIMENTS[0].of("kbfgsl").lr, EXPERIMENTS[0].of("adamw").lr) == (0.03, 1e-3)


@pytest.mark.parametrize("name", ["sgd", "tengrad", "kfac", "ekfac"])
def test_the_least_memory_is_counted_by_hand(name):
    """An mlp of width 5 on 2 x 2 pixels: layers 4 to 5, 5 to 5 and 5 to 3; every layer's output is kept."""
    images = torch.zeros(6, 1, 2, 2, dtype=torch.uint8)
    split = data_of(images, 3)
    job = Job(Settings(model="mlp", width=5, batch_size=6), split, CPU)
    parameters, kept = (4 * 5 + 5) + (5 * 5 + 5) + (5 * 3 + 3), 4 + 5 + 5 + 5 + 5 + 3
    sizes = [(4, 5), (5, 5), (5, 3)]
    factors = sum(i**2 + o**2 for i, o in sizes)
    curvature = {
        "sgd": 0,
        "tengrad": sum(6 * min(i * o, i + o) + 6**2 for i, o in sizes),
        "kfac": factors,
        "ekfac": factors + sum(i * o for i, o in sizes),
    }[name]
    assert memory.needed_bytes(job, name) == 4 * (3 * parameters + 6 * kept + curvature)
