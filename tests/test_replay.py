"""``mode="reduce-overhead"`` on a stand-in for CUDA graphs: nothing may live in what a replay overwrites."""

import copy

import pytest
import torch
import torch.nn.functional as F
from replay import Replays
from train_step_cases import MODELS, OPTIONS, batches, plain_steps, prepared

from tengrad_triton import compile_train_step

STEPS = 24
# What happens at a step, of which every fourth refreshes: these are steps of both kinds.
EVENTS = {5: "plain", 6: "plain", 8: "plain", 10: "small", 12: "small", 15: "load", 16: "load", 18: "load"}
SCHEDULES = "nesterov, decay, schedules"
# Slow are models whose tensors others have too: activations in place, calls of one layer, factors.
SLOW = {"in-place activations", "a shared module", "tokens"}
CASES = [
    *(
        pytest.param(model, SCHEDULES, marks=[pytest.mark.slow] if model in SLOW else [])
        for model in MODELS
        if model != "convolution, batch norm, dropout"
    ),
    ("tokens", "empirical"),
]


@pytest.mark.filterwarnings("ignore:compiled for")
@pytest.mark.parametrize(("model", "options"), CASES)
def test_replayed_equals_plain(model, options):
    """One graph for all steps that reuse the curvature, between plain ones, smaller batches and loaded states."""
    torch.compiler.reset()
    backend, loops = Replays(), [prepared(model, **OPTIONS[options]) for _ in range(2)]
    (net, _), (twin, optimizer) = loops
    step = compile_train_step(twin, F.cross_entropy, optimizer, mode="reduce-overhead", backend=backend)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(one, 0.97) for _, one in loops]
    returned, wanted = [], []
    for at, (x, y) in enumerate(batches(STEPS)):
        event = EVENTS.get(at)
        if event == "load":
            for stateful in (part for loop in loops for part in loop):
                stateful.load_state_dict(copy.deepcopy(stateful.state_dict()))
        batch = (x[:3], y[:3]) if event == "small" else (x, y)
        torch.manual_seed(at)  # dropout's
        expected = plain_steps(*loops[0], [batch])
        torch.manual_seed(at)
        returned += plain_steps(twin, optimizer, [batch]) if event == "plain" else [step(*batch)]
        wanted += expected
        assert float(returned[-1]) == pytest.approx(wanted[-1], rel=1e-5), at
        for schedule in schedules:
            schedule.step()
    assert [float(loss) for loss in returned] == pytest.approx(wanted, rel=1e-5), "a later replay overwrote a loss"
    for (name, p), q in zip(net.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.allclose(p.double(), q.double(), rtol=1e-5, atol=1e-5 * p.double().abs().max().item()), name
    (graph,) = backend.graphs
    assert graph.calls >= STEPS // 2
    assert len(graph.copied) == 2, "only the batch is copied"
