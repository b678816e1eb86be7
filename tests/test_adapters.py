"""Problems of PINA: their loss is that of GaussNewton, and a step is that of the equation by hand."""

import copy
import sys

import pytest
import torch
from by_hand import PLAIN, agree, by_hand, flat, mlp, slopes, source

pytestmark = [
    pytest.mark.filterwarnings("default"),  # what other libraries warn of is theirs
    pytest.mark.usefixtures("float64"),
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def pina():
    for part in ("optim", "problem.zoo", "solver", "weighting"):
        pytest.importorskip(f"pina.{part}")
    return sys.modules["pina"]


def poisson_with_data(pina):
    """A problem with conditions of equations and one of data, and its points by condition."""
    problem = pina.problem.zoo.Poisson2DSquareProblem()
    x = pina.LabelTensor(torch.rand(4, 2), ["x", "y"])
    y = pina.LabelTensor(torch.rand(4, 1), ["u"])
    problem.conditions = {**problem.conditions, "data": pina.Condition(input=x, target=y)}
    problem.discretise_domain(n=7, mode="random", domains="D")
    problem.discretise_domain(n=8, mode="random", domains="boundary")
    inside, boundary = (problem.discretised_domains[name].as_subclass(torch.Tensor) for name in ("D", "boundary"))
    return problem, {"D": (inside,), "boundary": (boundary,), "data": (torch.Tensor(x), torch.Tensor(y))}


def trainer_of(pina, solver, epochs=1):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    return pina.Trainer(solver, max_epochs=epochs, accelerator="cpu", **quiet)


@pytest.mark.parametrize("weights", [{}, {"D": 0.5, "boundary": 10.0}])
def test_an_epoch_of_pina_is_the_step_by_hand_on_pinas_loss(pina, weights):
    from tengrad_triton.adapters.pina import GaussNewtonPINN

    problem, points = poisson_with_data(pina)
    u = mlp()
    twin, first = copy.deepcopy(u), flat(u.parameters())
    still = pina.solver.PhysicsInformedSingleModelSolver(
        problem,
        twin,
        weighting=pina.weighting.ScalarWeighting(weights),
        optimizer=pina.optim.TorchOptimizer(torch.optim.SGD, lr=0.0),
    )
    trainer_of(pina, still).train()
    terms = {
        "boundary": u,
        "D": lambda x: slopes(u, x)[2].sum(1, keepdim=True) - source(x),
        "data": lambda x, y: u(x) - y,
    }
    loss, step = by_hand(u, terms, weights, points)
    solver = GaussNewtonPINN(problem, u, weighting=pina.weighting.ScalarWeighting(weights), **PLAIN)
    trainer = trainer_of(pina, solver)
    trainer.train()
    assert solver.trainer.logged_metrics["train_loss"].item() == pytest.approx(loss.item(), rel=1e-6)  # kept in float32
    assert still.trainer.logged_metrics["train_loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    assert solver.gauss_newton.stats.loss == pytest.approx(loss.item(), rel=1e-12)
    assert trainer.global_step == 1
    assert solver.gauss_newton.stats.attempts == 1
    assert agree(first - flat(u.parameters()), step)


def test_the_unknowns_of_pinas_inverse_problem_are_trained_within_their_domain(pina):
    from tengrad_triton.adapters.pina import GaussNewtonPINN

    problem = pina.problem.zoo.InversePoisson2DSquareProblem(load=False)
    problem.discretise_domain(n=12, mode="random", domains="D")
    problem.discretise_domain(n=8, mode="random", domains="boundary")
    solver = GaussNewtonPINN(problem, mlp(), damping=1e-6)
    trainer = trainer_of(pina, solver, epochs=3)
    before = {name: p.item() for name, p in problem.unknown_parameters.items()}
    trainer.train()
    low_high = problem.unknown_parameter_domain.range
    for name, p in problem.unknown_parameters.items():
        assert p.item() != before[name]
        assert low_high[name][0] <= p.item() <= low_high[name][1]


def test_a_checkpoint_of_pina_goes_on_as_one_run(pina, tmp_path):
    from tengrad_triton.adapters.pina import GaussNewtonPINN

    problem, _ = poisson_with_data(pina)
    u = mlp()
    twin, again = copy.deepcopy(u), copy.deepcopy(u)
    trainer_of(pina, GaussNewtonPINN(problem, u), epochs=4).train()
    first = trainer_of(pina, GaussNewtonPINN(problem, twin), epochs=2)
    first.train()
    first.save_checkpoint(tmp_path / "half.ckpt")
    trainer_of(pina, GaussNewtonPINN(problem, again), epochs=4).train(ckpt_path=tmp_path / "half.ckpt")
    assert agree(flat(again.parameters()), flat(u.parameters()))


def test_weights_that_follow_the_losses_are_refused(pina):
    from tengrad_triton.adapters.pina import GaussNewtonPINN

    with pytest.raises(TypeError, match=r"ScalarWeighting, got SelfAdaptiveWeighting"):
        GaussNewtonPINN(poisson_with_data(pina)[0], mlp(), weighting=pina.weighting.SelfAdaptiveWeighting())
