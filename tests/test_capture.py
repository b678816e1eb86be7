"""The hooks: what happens between two steps changes no step, and nothing outlives its use."""

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from small_mlp import backward, batch, small_model
from torch import nn

from tengrad_triton import TENGraD


def hooks_on(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in model.modules()
    )


def parameters_after(model, prepare, steps=3, **options):
    """Return the parameters after some steps with ``prepare(model)`` before each forward."""
    optimizer = TENGraD(model, seed=0, refresh_every=2, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        prepare(model)
        backward(model)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def eval_forward(model):
    model.eval()
    with torch.no_grad():
        model(batch()[0])
    model.train()


def backward_of_copy(model):
    twin = copy.deepcopy(model)
    backward(twin, samples=3)
    assert hooks_on(twin) == hooks_on(model)


# What a user may do between two steps without changing them.
DETOURS = {
    "a forward without gradients": lambda model: model(batch()[0]) if torch.is_grad_enabled() else None,
    "a forward in inference mode": lambda model: torch.inference_mode()(model)(batch()[0]),
    "an evaluation": eval_forward,
    "a deep copy, called": lambda model: copy.deepcopy(model)(batch()[0]),
    "a pickled copy, called": lambda model: pickle.loads(pickle.dumps(model))(batch()[0]),
    "a smaller batch, never stepped": backward_of_copy,
}


@pytest.mark.parametrize("detour", DETOURS)
def test_detours_do_not_change_the_steps(detour):
    plain = parameters_after(small_model(), lambda model: None, fisher="empirical")
    assert torch.equal(parameters_after(small_model(), DETOURS[detour], fisher="empirical"), plain)


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_a_forward_without_backward_leaves_nothing_behind(fisher):
    model = small_model()
    optimizer = TENGraD(model, fisher=fisher)
    model(batch()[0])
    gc.collect()
    assert optimizer._capture.records == []
    backward(model)
    assert len(optimizer._capture.records) == 1


def test_hooks_stand_only_where_a_refresh_is_due():
    model = small_model()
    optimizer = TENGraD(model, refresh_every=3)
    standing = []
    for _ in range(6):
        standing.append(hooks_on(model) > 0)
        backward(model)
        optimizer.step()
    assert standing == [True, False, False, True, False, False]
    optimizer.close()
    assert hooks_on(model) == 0


def test_close_removes_the_hooks_and_a_due_step_says_so():
    model = small_model()
    optimizer = TENGraD(model)
    optimizer.close()
    assert hooks_on(model) == 0
    backward(model)
    with pytest.raises(RuntimeError, match="call model\\(inputs\\) itself"):
        optimizer.step()


def test_a_dead_optimizer_costs_nothing():
    model = small_model()
    optimizer = TENGraD(model, fisher="empirical")
    capture = optimizer._capture
    del optimizer
    gc.collect()
    backward(model)
    assert len(capture.records) == 1  # still alive through this name
    del capture
    gc.collect()
    backward(model)


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_gradients_are_those_without_the_optimizer(fisher):
    bare, hooked = small_model(), small_model()
    optimizer = TENGraD(hooked, fisher=fisher)
    backward(bare)
    backward(hooked)
    assert optimizer._capture.records
    for ours, theirs in zip(hooked.parameters(), bare.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_micro_batches_are_one_batch(fisher):
    """Gradients accumulated over equal parts are those of the whole batch, and so are the rows of J."""
    whole, parts = small_model().double(), small_model().double()
    x, y = batch()
    x = x.double()
    steps = {}
    for name, model, pieces in (("whole", whole, 1), ("parts", parts, 2)):
        optimizer = TENGraD(model, fisher=fisher, likelihood=Certain(y), refresh_every=1)
        for _ in range(2):
            optimizer.zero_grad()
            for k, (xs, ys) in enumerate(zip(x.chunk(pieces), y.chunk(pieces), strict=True)):
                Certain.offset = k * len(xs)
                (F.cross_entropy(model(xs), ys) / pieces).backward()
            optimizer.step()
        steps[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.allclose(steps["whole"], steps["parts"], rtol=1e-12, atol=1e-12)


class Certain:
    """A likelihood that always draws the labels it was given."""

    offset = 0

    def __init__(self, labels):
        self.labels = labels

    def sample(self, output, generator):
        return self.labels[self.offset : self.offset + len(output)]

    def nll(self, output, target):
        return F.cross_entropy(output, target, reduction="sum")


def test_zero_grad_forgets_the_batch_but_not_one_on_its_way():
    model = small_model()
    optimizer = TENGraD(model)
    backward(model)
    optimizer.zero_grad()
    assert optimizer._capture.records == []
    x, y = batch()
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()  # a common order: forward, zero_grad, backward
    loss.backward()
    optimizer.step()
    assert optimizer._steps == 1


class DropsOut(nn.Linear):
    """A layer that no rule covers, and that cannot be run again: it is random."""

    def forward(self, x):
        return F.dropout(super().forward(x).square(), 0.5)


@pytest.mark.parametrize("draws", [1, 3])
def test_every_draw_has_the_rows_of_a_random_layer_without_a_rule(draws):
    torch.manual_seed(0)
    model = nn.Sequential(DropsOut(4, 5), nn.Linear(5, 3))
    optimizer = TENGraD(model, fisher_samples=draws)
    backward(model)
    optimizer.step()
    assert optimizer._curvature.rows == 6 * draws
    assert all(one.block != "-" for one in optimizer.summary().parameters)
