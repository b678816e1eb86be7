"""Every problem of the study builds and trains with every optimizer, on batches that depend on the seed alone."""

import math
from itertools import islice

import pytest
import torch

from studies import optimizers, runs
from studies.problems import PROBLEMS, base, finetuning, text
from studies.problems.poisson import Poisson, exact_solution, source_term
from tengrad_triton.recipes.data.images import Data, Normalizer, Split

SAMPLES = 4  # of each batch

pytest.importorskip("pytorch_optimizer", reason="the rivals need pip install '.[rivals]'")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder that stands for data sets of a few hundred random images."""

    def load(name, *_):
        generator = torch.Generator().manual_seed(0)
        shape = (1, 28, 28) if name == "fashion-mnist" else (3, 32, 32)
        images = torch.randint(256, (300, *shape), generator=generator, dtype=torch.uint8)
        split = Split(images, torch.arange(300) % 10)
        return Data(split, Split(images[:20], split.labels[:20]), Normalizer.of(split), 10)

    monkeypatch.setattr(base.registry, "load", load)
    monkeypatch.setattr(finetuning, "PRETRAINING_STEPS", 1)
    return tmp_path


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_takes_steps_with_every_optimizer(name, folder):
    problem = PROBLEMS[name]
    task = problem.task(folder)
    x, y = next(task.batches(0))
    assert problem.steps % runs.POINTS == 0
    for optimizer_name in optimizers.NAMES:
        case = runs.Case(name, optimizer_name, 1e-2, 0)
        model, optimizer = runs.start(case, task)
        for _ in range(2):
            assert math.isfinite(runs.step(model, optimizer, task, (x[:SAMPLES], y[:SAMPLES])))
        optimizers.close(optimizer)


@pytest.mark.parametrize("name", PROBLEMS)
def test_an_evaluation_is_finite_and_the_same_again(name, folder):
    problem = PROBLEMS[name]
    task = problem.task(folder)
    model = problem.build()
    found = task.evaluate(model)
    assert all(map(math.isfinite, found.values()))
    assert found == task.evaluate(model)
    assert model.training


@pytest.mark.parametrize("name", PROBLEMS)
def test_batches_depend_on_the_seed_alone(name, folder):
    task = PROBLEMS[name].task(folder)
    first, again, other = ([x for x, _ in islice(task.batches(seed), 2)] for seed in (1, 1, 2))
    for x, same, changed in zip(first, again, other, strict=True):
        assert torch.equal(x, same)
        assert not torch.equal(x, changed)


def test_the_two_halves_are_even_and_both_have_several_kinds():
    kinds = {role: [p.likelihood for p in PROBLEMS.values() if p.role == role] for role in ("choose", "judge")}
    assert len(PROBLEMS) >= 12
    assert abs(len(kinds["choose"]) - len(kinds["judge"])) <= 1
    assert set(kinds["choose"]) == {"categorical", "gaussian", "bernoulli"}
    assert set(kinds["judge"]) == {"categorical", "gaussian", "tokens"}


@pytest.mark.parametrize("name", ["gpt", "unet"])
def test_a_label_for_each_token(name, folder):
    x, y_NT = next(PROBLEMS[name].task(folder).batches(0))
    output_NCT = PROBLEMS[name].build()(x)
    assert output_NCT.shape == (len(x), output_NCT.shape[1], y_NT.shape[1])
    assert 0 <= y_NT.min() <= y_NT.max() < output_NCT.shape[1]


def test_the_gpt_predicts_the_next_character_and_sees_no_later_one():
    ids_NT, next_NT = next(text.text().batches(0))
    assert torch.equal(ids_NT[:, 1:], next_NT[:, :-1])
    model = text.Gpt()
    before = model(ids_NT)
    ids_NT[:, 40:] = 1
    torch.testing.assert_close(model(ids_NT)[..., :40], before[..., :40])


def test_a_pixel_of_a_canvas_has_the_label_of_its_garment(folder):
    x_NCHW, y_NT = next(PROBLEMS["unet"].task(folder).batches(0))
    assert torch.equal(x_NCHW.flatten(1) > 0, y_NT > 0)


def test_fine_tuning_begins_with_the_same_body_and_a_random_head(folder):
    task = PROBLEMS["finetuning"].task(folder)
    first, second = (runs.start(runs.Case("finetuning", "sgd", 1, seed), task)[0] for seed in (0, 1))
    for trained, same in zip(first.body.parameters(), second.body.parameters(), strict=True):
        assert torch.equal(trained, same)
    assert not torch.equal(first.head.weight, second.head.weight)
    assert next(task.batches(0))[1].unique().tolist() == list(range(finetuning.CLASSES))


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
