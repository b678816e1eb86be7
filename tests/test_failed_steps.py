"""A step that raises leaves parameters and momenta as they were, also where the user's code raises after the update."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tengrad_triton import TENGraD
from tengrad_triton.baselines import EKFAC, KBFGS, KBFGSL, KFAC


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.shift = nn.Parameter(torch.zeros(3))  # no rule covers it

    def forward(self, x):
        return self.net(x) + self.shift


pytestmark = pytest.mark.filterwarnings("ignore:no exact rows")


class FailureError(Exception):
    pass


class Closure:
    """Evaluates the model; raises in one of its evaluations."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer, self.calls, self.fails_at = model, optimizer, 0, None
        self.x, self.y = torch.randn(6, 4), torch.randint(3, (6,))

    def __call__(self):
        self.calls += 1
        if self.calls == self.fails_at:
            raise FailureError
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        return loss


def fail_in_evaluation(number):
    def fail(model, optimizer, closure):
        closure.fails_at = closure.calls + number

    return fail


def fail_in_the_schedule(model, optimizer, closure):
    def damping(step):
        raise FailureError

    optimizer._damping_schedules[0] = damping


def sparse_gradient(model, optimizer, closure):
    def evaluate():
        loss = Closure.__call__(closure)
        model.shift.grad = model.shift.grad.to_sparse()
        return loss

    closure.evaluate = evaluate


LM = {"damping": "lm", "trust_region": None}
# The optimizer, its settings, what goes wrong, and the error.
CASES = {
    "the closure": (TENGraD, {}, fail_in_evaluation(1), FailureError),
    "the second closure, adapted damping": (TENGraD, LM, fail_in_evaluation(2), FailureError),
    "the second closure, adapted damping, SPRING": (
        *(TENGraD, {**LM, "spring": 0.9, "momentum": 0.0}),
        *(fail_in_evaluation(2), FailureError),
    ),
    "the second closure, K-BFGS": (KBFGS, {}, fail_in_evaluation(2), FailureError),
    "the second closure, K-BFGS(L)": (KBFGSL, {}, fail_in_evaluation(2), FailureError),
    "a damping schedule": (TENGraD, {}, fail_in_the_schedule, FailureError),
    "a damping schedule, K-FAC": (KFAC, {}, fail_in_the_schedule, FailureError),
    "a damping schedule, EKFAC": (EKFAC, {}, fail_in_the_schedule, FailureError),
    "a sparse gradient": (TENGraD, {"unsupported": "sgd"}, sparse_gradient, RuntimeError),
    "a sparse gradient, K-FAC": (KFAC, {}, sparse_gradient, RuntimeError),
}


def state_of(model, optimizer):
    momenta = [state["momentum_buffer"].clone() for state in optimizer.state.values()]
    return [*(p.detach().clone() for p in model.parameters()), *momenta]


@pytest.mark.parametrize("case", CASES)
def test_a_step_that_raises_changes_nothing_and_can_be_repeated(case):
    make, settings, spoil, error = CASES[case]
    torch.manual_seed(0)
    model = Scaled()
    optimizer = make(model, refresh_every=1, **settings)
    closure = Closure(model, optimizer)
    for _ in range(3):
        optimizer.step(closure)
    before, schedules = state_of(model, optimizer), copy.copy(optimizer._damping_schedules)
    spoil(model, optimizer, closure)
    with pytest.raises(error):
        optimizer.step(getattr(closure, "evaluate", closure))
    assert all(torch.equal(x, y) for x, y in zip(state_of(model, optimizer), before, strict=True))
    closure.fails_at, optimizer._damping_schedules = None, schedules
    optimizer.step(closure)
    assert not torch.equal(state_of(model, optimizer)[0], before[0])


def raising(step):
    if step == 3:
        raise FailureError
    return 2


# What ``refresh_every`` does at step 3, and the error.
INTERVALS = {
    "raises": (raising, FailureError),
    "is no step": (lambda step: 0 if step == 3 else 2, ValueError),
    "is no number": (lambda step: None if step == 3 else 2, TypeError),
}


@pytest.mark.parametrize("make", [TENGraD, KFAC, EKFAC, KBFGS])
@pytest.mark.parametrize("case", INTERVALS)
def test_an_interval_that_fails_fails_before_its_step(case, make):
    """It is asked for at the end of the step before, which has been taken then and does not raise."""
    every, error = INTERVALS[case]
    torch.manual_seed(0)
    model = Scaled()
    optimizer = make(model, refresh_every=every)
    closure = Closure(model, optimizer)
    for _ in range(3):
        optimizer.step(closure)
    before = state_of(model, optimizer)
    with pytest.raises(error):
        optimizer.step(closure)
    assert all(torch.equal(x, y) for x, y in zip(state_of(model, optimizer), before, strict=True))
