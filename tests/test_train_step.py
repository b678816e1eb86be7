"""The compiled step is the plain loop: the same parameters after twenty steps, without a graph break or a recompile."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves
from train_step_cases import MODELS, OPTIONS, REFRESH, STEPS, batches, compare, compiled_steps, plain_steps, prepared

from tengrad_triton import TENGraD, compile_train_step
from tengrad_triton.curvature.checkpoint import pack_curvature

# The models that show what an option changes; with the others it is slow. Every model samples here or in test_replay.
SHOWN_BY = {
    "sampled": {*MODELS} - {"convolution, dropout", "loose parameters"},
    "empirical": {"convolution, batch norm"},  # derivatives of the loss itself; test_replay has tokens
    "nesterov, decay, schedules": {"in-place activations", "loose parameters"},  # the update; test_replay has others
}
ROWS = [
    pytest.param(model, options, marks=[] if model in SHOWN_BY[options] else [pytest.mark.slow])
    for model in MODELS
    for options in OPTIONS
]


@pytest.mark.parametrize(("model", "options"), ROWS)
def test_compiled_equals_plain(model, options):
    """aot_eager runs the same kernels in the same order: only the order of additions may differ.

    Two graphs, reuse and refresh, and no recompile; a refresh that would drop out other units takes the plain step.
    """
    graphs = 1 if model == "convolution, batch norm, dropout" else 2
    assert compare(model, OPTIONS[options], "aot_eager") == graphs


def test_a_replayed_graph_finds_its_curvature_where_it_was():
    """Refreshes write J and the factors in place under ``reduce-overhead``; the steps are the plain loop's."""
    torch.compiler.reset()
    (net, plain), (twin, optimizer) = (prepared("tokens") for _ in range(2))
    step = compile_train_step(twin, F.cross_entropy, optimizer, mode="reduce-overhead", backend="aot_eager")
    places = set()
    for at, (x, y) in enumerate(batches(3 * REFRESH)):
        (before,) = plain_steps(net, plain, [(x, y)])
        assert step(x, y).item() == pytest.approx(before, rel=1e-5)
        if at:  # the first step is a plain one
            held = [t for t in tree_leaves(pack_curvature(optimizer._curvature)) if torch.is_tensor(t)]
            places.add(tuple(t.data_ptr() for t in held))
            assert all(t._dynamo_static_input_type for t in held)
    assert len(places) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inductor's own
@pytest.mark.parametrize("model", ["convolution, batch norm", "convolution, dropout", "a shared module"])
def test_compiled_equals_plain_under_inductor(model):
    with torch._inductor.config.patch(fallback_random=True):  # dropout's numbers are then eager's
        assert compare(model, {}, "inductor") == 2


def test_plain_and_compiled_steps_follow_each_other():
    (net, plain), (twin, optimizer) = prepared("in-place activations"), prepared("in-place activations")
    plain_steps(net, plain, batches(STEPS))
    step = compile_train_step(twin, F.cross_entropy, optimizer, backend="aot_eager")
    for k, one in enumerate(batches(STEPS)):
        compiled_steps(step, [one]) if k % 5 < 3 else plain_steps(twin, optimizer, [one])
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-8, atol=1e-8)


def test_state_is_ordinary_and_resumes_into_a_compiled_step():
    net, optimizer = prepared("in-place activations")
    step = compile_train_step(net, F.cross_entropy, optimizer, backend="aot_eager")
    data = list(batches(10))
    compiled_steps(step, data[:6])
    twin, resumed = prepared("in-place activations")
    twin.load_state_dict(copy.deepcopy(net.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    compiled_steps(step, data[6:])
    compiled_steps(compile_train_step(twin, F.cross_entropy, resumed, backend="aot_eager"), data[6:])
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("at", [5, 4])  # a step that reuses, a step that refreshes
def test_a_smaller_batch_takes_the_plain_step_and_says_so_once(at):
    (net, plain), (twin, optimizer) = prepared("in-place activations"), prepared("in-place activations")
    data = list(batches(12))
    data[at] = tuple(part[:3] for part in data[at])
    data[9] = tuple(part[:3] for part in data[9])
    plain_steps(net, plain, data)
    step = compile_train_step(twin, F.cross_entropy, optimizer, backend="aot_eager")
    compiled_steps(step, data[:at])
    with pytest.warns(UserWarning, match="takes the plain step"):
        compiled_steps(step, data[at : at + 1])
    compiled_steps(step, data[at + 1 :])
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-8, atol=1e-8)


# A loss, and what its refusal says.
BAD_LOSSES = {
    "a vector": (lambda o, y: F.cross_entropy(o, y, reduction="none"), r"must return a scalar mean.*shape \(8,\)"),
    "a sum": (lambda o, y: F.cross_entropy(o, y, reduction="sum"), "must return a mean over the samples"),
}


@pytest.mark.parametrize("case", BAD_LOSSES)
def test_a_loss_that_is_no_scalar_mean_is_refused_before_anything_changes(case):
    loss, message = BAD_LOSSES[case]
    net, optimizer = prepared("in-place activations")
    before = copy.deepcopy(net.state_dict())
    step = compile_train_step(net, loss, optimizer, backend="aot_eager")
    with pytest.raises(ValueError, match=message):
        step(*next(batches(1)))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        y = self.fc(x)
        return y if y.sum().item() > 0 else y * 2


def test_a_model_that_cannot_be_one_graph_names_the_plain_loop():
    torch.manual_seed(0)
    net = Untraceable().double()
    optimizer = TENGraD(net, refresh_every=REFRESH)
    step = compile_train_step(net, F.cross_entropy, optimizer, backend="aot_eager")
    data = list(batches(3))
    compiled_steps(step, data[:1])
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match=r"(?s)cannot be traced in one graph.*The plain loop"):
        step(*data[1])
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    plain_steps(net, optimizer, data[1:])


def test_another_models_optimizer_and_an_unknown_mode_are_refused():
    net, optimizer = prepared("in-place activations")
    with pytest.raises(ValueError, match="belongs to another model"):
        compile_train_step(copy.deepcopy(net), F.cross_entropy, optimizer)
    with pytest.raises(ValueError, match=r"mode must be one of 'default', .*'reduce-overhead', .*, got 'fast'"):
        compile_train_step(net, F.cross_entropy, optimizer, mode="fast")


@pytest.mark.parametrize(("model", "options"), ROWS)
def test_a_model_wrapped_in_torch_compile_works_in_the_plain_loop(model, options):
    torch.compiler.reset()
    net, plain = prepared(model, **OPTIONS[options])
    torch.manual_seed(0)
    twin = MODELS[model]().double()
    wrapped = torch.compile(twin, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if model == "loose parameters" else "error")
        unsupported = "sgd" if model == "loose parameters" else "explicit"  # as `prepared` has it
        settings = {"refresh_every": REFRESH, "seed": 0, "unsupported": unsupported, **OPTIONS[options]}
        optimizer = TENGraD(wrapped, **settings)
    counters.clear()
    for steps in ((net, plain), (wrapped, optimizer)):
        torch.manual_seed(7)
        plain_steps(*steps, batches(STEPS))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-8, atol=1e-8)
    assert counters["stats"]["unique_graphs"] == 1
