"""Copies, parameter groups and compiled steps: further runs of `situations.py`."""

import copy
import io
import pickle
import warnings

import torch
import torch.nn.functional as F
from dense import blocks_of
from graph_rows import assert_steps, dense_steps, optimizer_of, rows_of_graph, unseen
from situation_loops import check_step
from situation_models import batches, mlp
from torch import nn

from tengrad_triton import TENGraD, compile_train_step

DATA = batches(8)


def train(model, optimizer, places):
    for place in places:
        optimizer.zero_grad()
        F.cross_entropy(model(DATA[place][0]), DATA[place][1]).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _copied(way):
    def run(fisher):
        torch.manual_seed(0)
        model = mlp().double()
        optimizer = TENGraD(model, fisher=fisher, refresh_every=2, seed=0)
        train(model, optimizer, range(3))
        other = way((model, optimizer))
        assert torch.equal(train(*other, range(3, 7)), train(model, optimizer, range(3, 7)))

    return run


def _saved(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "`copy.deepcopy` of model and optimizer": _copied(copy.deepcopy),
    "`pickle` of both": _copied(lambda pair: pickle.loads(pickle.dumps(pair))),
    "`torch.save` and `torch.load` of both": _copied(_saved),
}


def decay_groups(fisher):
    """Weights with decay, and biases without."""
    torch.manual_seed(0)
    model = mlp().double()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1, "lr": 0.5},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer, drawn = optimizer_of(model, fisher, params=groups)

    def with_decay(name, step, old):
        return 0.5 * (step + 0.1 * old) if name.endswith("weight") else step

    for x, y in DATA[:3]:
        optimizer.zero_grad()
        drawn.targets.clear()
        F.cross_entropy(model(x), y).backward()
        check_step(model, optimizer, drawn, fisher, [(x, y, 0)], taken=with_decay)


def triplets(fisher):
    """One loss of three forwards: the rows are those of all of them, each with the derivative of the whole loss."""
    torch.manual_seed(0)
    model = mlp().double()
    optimizer, _ = optimizer_of(model, fisher)
    xs = [x for x, _ in DATA[:3]]
    for _ in range(3):
        optimizer.zero_grad()
        F.triplet_margin_loss(*(model(x) for x in xs), margin=5.0).backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        old = {name: p.detach().clone() for name, p in model.named_parameters()}
        with unseen(optimizer):
            outputs = [model(x) for x in xs]
            of_outputs = torch.autograd.grad(F.triplet_margin_loss(*outputs, margin=5.0), outputs, retain_graph=True)
            total = sum(len(x) for x in xs)
            parts = [rows_of_graph(model, [o], [[total * g]]) for o, g in zip(outputs, of_outputs, strict=True)]
        rows = {name: torch.cat([part[name] for part in parts]) for name in grads}
        optimizer.step()
        assert_steps(model, old, dense_steps(blocks_of(model), rows, grads), "the step")


def penalty_begins(fisher):
    """A penalty on the derivative by the input begins later: rows stay those of the output, and one warning comes."""
    torch.manual_seed(0)
    model = mlp().double()
    optimizer, drawn = optimizer_of(model, fisher)
    for number, (x, y) in enumerate(DATA[:4]):
        optimizer.zero_grad()
        drawn.targets.clear()
        inputs = x.clone().requires_grad_()
        output = model(inputs)
        loss = F.cross_entropy(output, y)
        if number > 2:
            loss = loss + torch.autograd.grad(output.sum(), inputs, create_graph=True)[0].square().mean()
        loss.backward()
        check_step(model, optimizer, drawn, fisher, [(x, y, 0)])


class OfBatch(nn.Module):
    """Takes a dictionary or a tuple."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, batch):
        x, scale = (batch["x"], batch["scale"]) if isinstance(batch, dict) else batch
        return self.net(x) * scale[:, None]


def _batches_of(pack):
    def run(fisher):
        ends = []
        for compiles in (False, True):
            torch.manual_seed(0)
            model = OfBatch().double()
            optimizer = TENGraD(model, fisher=fisher, refresh_every=2, seed=0)
            step = compile_train_step(model, F.cross_entropy, optimizer, backend="eager")
            for x, y in DATA[:5]:
                batch = pack(x, torch.full((len(x),), 0.5, dtype=torch.float64))
                if compiles:
                    step(batch, y)
                else:
                    optimizer.zero_grad()
                    F.cross_entropy(model(batch), y).backward()
                    optimizer.step()
            ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert torch.allclose(*ends, rtol=1e-8, atol=1e-10)

    return run


def _scheduler(fisher):
    model = mlp().double()
    optimizer = TENGraD(model, fisher=fisher, refresh_every=2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    step, called = compile_train_step(model, F.cross_entropy, optimizer, backend="eager"), []
    optimizer.register_step_post_hook(lambda *_: called.append(True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, y in DATA[:4]:
            step(x, y)
            schedule.step()
    assert len(called) == 4


def _ragged(fisher):
    torch.manual_seed(0)
    model = mlp().double()
    optimizer = TENGraD(model, fisher=fisher, refresh_every=2, seed=0)
    step = compile_train_step(model, F.cross_entropy, optimizer, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(DATA[0][0][:3], DATA[0][1][:3])
        for x, y in DATA[1:5]:
            step(x, y)
    assert step._prepared.keeps_any


def _hooks(register):
    """Steps with hooks on the gradients of a weight are those of the plain loop, and said to be plain."""

    def run(fisher):
        ends, counts = [], []
        for compiles in (False, True):
            torch.manual_seed(0)
            model, calls = mlp().double(), []
            optimizer = TENGraD(model, fisher=fisher, refresh_every=2, seed=0)
            step = compile_train_step(model, F.cross_entropy, optimizer, backend="eager")
            handle = None
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                for number, (x, y) in enumerate(DATA[:7]):
                    if number == 3:  # compiled functions are in use
                        handle = register(model[0].weight, calls)
                    if number == 6:
                        handle.remove()
                    if compiles:
                        step(x, y)
                        assert "hook" in str(step.why_plain) or number not in {3, 4, 5}
                    else:
                        train(model, optimizer, [number])
            if compiles:
                assert step.why_plain is None  # again, without the hook
                [one] = [one for one in said if "hook" in str(one.message)]
                assert str(one.message).startswith("'0.weight' has a hook on its gradient")
            ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
            counts.append(len(calls))
        assert torch.allclose(*ends, rtol=1e-8, atol=1e-10)
        assert counts[0] == counts[1] >= 3

    return run


def _halve(weight, calls):
    return weight.register_hook(lambda grad: calls.append(True) or grad / 2)


def _halve_after(weight, calls):
    def halve(parameter):
        calls.append(True)
        parameter.grad /= 2

    return weight.register_post_accumulate_grad_hook(halve)


COMPILED_STEPS = {
    "batches that are dictionaries": (
        _batches_of(lambda x, scale: {"x": x, "scale": scale}),
        "steps of the plain loop",
    ),
    "batches that are tuples": (_batches_of(lambda x, scale: (x, scale)), "steps of the plain loop"),
    "step hooks and learning rate schedulers": (_scheduler, "called once a step; no false warning"),
    "`register_hook` on a parameter": (_hooks(_halve), "steps of the plain loop, and a warning"),
    "`register_post_accumulate_grad_hook` on a parameter": (
        _hooks(_halve_after),
        "steps of the plain loop, and a warning",
    ),
    "a smaller first batch": (_ragged, "compiled for the size that comes again"),
}
