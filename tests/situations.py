"""What people bring, and what happens then: the table that `test_situations.py` runs and docs/compatibility.md shows.

`python tests/situations.py` writes the page. To cover another situation, add a row.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import situation_loops as loops
import situation_steps as further
import torch
import torch.nn.functional as F
from graph_rows import check_steps
from situation_models import (
    Calls,
    Mixing,
    Named,
    NormAct,
    Plain,
    Result,
    batches,
    by_func,
    checkpointed,
    contrasted,
    forces,
    laplacian,
    mlp,
    mse,
    of_heads,
    pooled,
    residual,
    two_heads,
)
from situation_models import (
    field as field_of,
)
from torch import nn
from torch.nn.utils import parametrize, prune

PAGE = Path(__file__).parent.parent / "docs" / "compatibility.md"
FISHERS = ("sampled", "empirical", "exact")


@dataclass(frozen=True)
class Situation:
    """One row.

    Attributes:
        title: what somebody does.
        run: does it with a Fisher; raises if what happens is not what ``outcome`` says.
        outcome: what happens.
        fishers: for which rows.
        since: the first version of which this is true.
    """

    title: str
    run: Callable[[str], None]
    outcome: str = "exact"
    fishers: Sequence[str] = FISHERS
    since: str = "0.1.0"


def exact(make, data=None, **options):
    """Return a run in which every step equals the dense solve with rows through the graph."""
    return lambda fisher: check_steps(make, data or batches(), fisher, **options)


def changing(change, make=mlp, steps=5):
    """Return a run with ``change(model, number)`` before each forward."""
    return lambda fisher: check_steps(
        make, batches(steps), fisher, before=lambda model, _, number: change(model, number)
    )


def said(message, run):
    """Return a run that has to warn of ``message``."""

    def check(fisher):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(fisher)
        assert any(message in str(one.message) for one in caught), [str(one.message) for one in caught]

    return check


def refused(error, message, run):
    """Return a run that has to raise ``error`` with ``message``."""

    def check(fisher):
        with pytest.raises(error, match=re.escape(message)):
            run(fisher)

    return check


def _put_on(model, number):
    if number == 1:
        parametrize.register_parametrization(model[0], "weight", _Tanh())
    if number == 3:
        parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=False)


class _Tanh(nn.Module):
    def forward(self, w):
        return w.tanh()


def _prune(model, number):
    if number == 1:
        prune.l1_unstructured(model[0], "weight", 0.4)
    if number == 3:
        prune.remove(model[0], "weight")


def _hook(model, number):
    if number == 2:
        model[0].register_forward_hook(lambda module, args, y: y * y)


def _mask(model, number):
    if number == 1:
        mask = torch.arange(model[0].weight.numel()).view_as(model[0].weight) % 3 > 0
        model[0].weight.register_hook(lambda grad: grad * mask)


def _forward(model, number):
    if number == 2:
        model[0].forward = lambda x: F.linear(x, model[0].weight, model[0].bias).square()


def _column_major(model, number):
    if number == 1:
        model[0].weight.data = model[0].weight.data.t().contiguous().t()


def _share(model, number):
    model.share = 0.0 if number == 0 else 0.4


def _weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has a newer form
        return nn.utils.weight_norm(nn.Linear(4, 5))


def _norm_act():
    return nn.Sequential(nn.Linear(4, 6), NormAct(6), nn.Linear(6, 3))


def _with_matrix():
    return Calls(
        lambda m, x: m.last(m.matrix @ m.first(x).tanh()),
        first=nn.Linear(4, 5),
        last=nn.Linear(5, 3),
        matrix=torch.eye(5, dtype=torch.float64),
    )


def _matrix(model, number):
    if number == 3:
        model.matrix = model.matrix.roll(1, 0) + 0.3


def _of_field(function, inputs, norm=False):
    return lambda: Calls(function, net=field_of(inputs, norm))


def _wrapped(make_output):
    return lambda: Calls(lambda model, x: make_output(model.net(x)), net=mlp())


def _images():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    return net.to(memory_format=torch.channels_last)


SITUATIONS: dict[str, list[Situation]] = {
    "Derivatives inside the forward": [
        Situation(
            f"{title}, one block {scope}",
            exact(
                _of_field(function, inputs, norm), batches(2, (inputs,)), loss=mse, likelihood="gaussian", blocks=blocks
            ),
        )
        for title, function, inputs, norm in (
            ("u' + u by `autograd.grad(create_graph=True)`", residual, 1, False),
            ("forces, the negative gradient of an energy", forces, 3, False),
            ("a Laplacian, with a LayerNorm in the network", laplacian, 2, True),
            ("`torch.func.grad` under `vmap`", by_func, 2, False),
        )
        for blocks, scope in (("layer", "a layer"), ("network", "for the network"))
    ],
    "When a forward counts": [
        Situation(title, lambda fisher, run=run: loops.check_loop(run, fisher, steps=4))
        for title, run in loops.LOOPS.items()
    ]
    + [
        Situation(
            "two backward passes, with a parameter of the model itself",
            lambda fisher: loops.check_loop(
                loops.LOOPS["two backward passes through one forward"], fisher, loops.scaled, 4
            ),
        )
    ],
    "Losses of several samples": [
        Situation(
            "similarities [N, N] of a contrastive loss, with a temperature",
            exact(
                lambda: Calls(contrasted, a=nn.Linear(4, 3), b=nn.Linear(4, 3), scale=nn.Parameter(torch.tensor(1.0))),
                [(x, torch.arange(5)) for x, _ in batches(3, (2, 4))],
            ),
        ),
        Situation("triplets by three forwards", further.triplets, fishers=("empirical",)),
        Situation(
            "the same samples in one forward, with a loss of their differences",
            exact(mlp, batches(3, samples=6), loss=lambda o, y: (o[:3] - o[3:]).square().mean()),
            fishers=("empirical",),
        ),
    ],
    "Losses with a second part": [
        Situation(
            title, said("does not come through the output that has rows", run), "warned of: F has no rows of that part"
        )
        for title, run in loops.BESIDE.items()
    ],
    "Losses that change": [
        Situation(
            "a penalty on the derivative by the input begins at a later step",
            said("does not come through the output that has rows", further.penalty_begins),
            "rows of the output, and a warning",
        ),
    ],
    "The loss and the likelihood": [
        Situation(title, said("the loss is not that of the likelihood", run), "warned of", ("sampled", "exact"))
        for title, run in loops.OTHER_LOSSES.items()
    ]
    + [
        Situation(title, run, "not compared: no warning", ("sampled", "exact"))
        for title, run in loops.NOT_COMPARED.items()
    ]
    + [
        Situation(title, run, "no warning: it is the likelihood's", ("sampled", "exact"))
        for title, run in loops.OWN_LOSSES.items()
    ],
    "What the model returns": [
        Situation(
            "a dataclass with a loss first",
            exact(
                _wrapped(lambda z: Result(z.square().mean(), z)),
                loss=lambda o, y: F.cross_entropy(o.logits, y),
                see=lambda o: o.logits,
            ),
            fishers=("empirical", "exact"),
        ),
        Situation(
            "a dictionary with a loss first",
            exact(
                _wrapped(lambda z: {"loss": z.square().mean(), "logits": z}),
                loss=lambda o, y: F.cross_entropy(o["logits"], y),
                see=lambda o: o["logits"],
            ),
            fishers=("empirical",),
        ),
        Situation(
            "an object of a class of one's own, with `output=`",
            exact(
                _wrapped(Plain),
                output="prediction",
                loss=lambda o, y: F.cross_entropy(o.prediction, y),
                see=lambda o: o.prediction,
            ),
        ),
        Situation(
            "a subclass of a dictionary, with logits",
            exact(
                _wrapped(lambda z: Named(loss=z.square().mean(), logits=z)),
                loss=lambda o, y: F.cross_entropy(o["logits"], y),
                see=lambda o: o["logits"],
            ),
            fishers=("empirical", "exact"),
        ),
        Situation(
            "a dictionary, with `output=`",
            exact(
                _wrapped(lambda z: {"aux": 2 * z, "main": z}),
                output="main",
                loss=lambda o, y: F.cross_entropy(o["main"], y),
                see=lambda o: o["main"],
            ),
        ),
        Situation(
            "the batch second, with `output=` a function",
            exact(
                lambda: Calls(lambda model, x: model.net(x).transpose(0, 1), net=mlp()),
                loss=lambda o, y: F.cross_entropy(o.transpose(0, 1), y),
                see=lambda o: o.transpose(0, 1),
                output=lambda o: o.transpose(0, 1),
            ),
        ),
        Situation(
            "tokens flattened to [N·T, C]: each is a sample",
            exact(
                lambda: Calls(lambda model, x: model.net(x).flatten(0, 1), net=mlp()),
                [(torch.randn(3, 2, 4, dtype=torch.float64), torch.randint(3, (6,))) for _ in range(2)],
            ),
        ),
        Situation(
            "fewer outputs than inputs, as for graphs with several nodes",
            exact(
                lambda: Calls(pooled, net=nn.Linear(4, 5), head=nn.Linear(5, 3)),
                [(x, y[:3]) for x, y in batches(2, samples=6)],
            ),
        ),
        Situation(
            "two heads and both losses",
            exact(lambda: two_heads(nn.LayerNorm(6)), loss=of_heads),
            fishers=("empirical",),
        ),
        Situation(
            "two heads and a batch norm",
            exact(lambda: two_heads(nn.BatchNorm1d(6)), loss=of_heads),
            fishers=("empirical",),
        ),
        Situation(
            "the loss uses the second of two outputs",
            exact(lambda: two_heads(nn.LayerNorm(6)), loss=lambda o, y: mse(o[1], y)),
            fishers=("empirical",),
        ),
        Situation(
            "the model returns a scalar",
            refused(ValueError, "pass output=", exact(_wrapped(lambda z: z.square().mean()), loss=lambda o, y: o)),
            "refused",
        ),
    ],
    "The user's own code": [
        Situation(title, run, "as with `torch.optim`: once a forward, and nothing changed")
        for title, run in loops.OWN_CODE.items()
    ],
    "Compiled models": [
        Situation(title, run, "steps of the plain loop", ("sampled", "empirical"))
        for title, run in loops.COMPILED.items()
    ],
    "`torch.func` and copies of the model between steps": [
        Situation(title, run, "passes unseen") for title, run in loops.UNSEEN.items()
    ],
    "Models that change": [
        Situation("a parametrization is put on, and taken off", changing(_put_on)),
        Situation("a layer is pruned, and the pruning made permanent", changing(_prune)),
        Situation("a forward hook that changes the output", changing(_hook)),
        Situation("a hook masks a weight's gradient, and so its rows", changing(_mask)),
        Situation("a layer gets another forward", changing(_forward)),
        Situation("a layer is frozen and thawed", changing(lambda model, number: model[0].requires_grad_(number != 1))),
        Situation(
            "an activation is replaced", changing(lambda model, n: model.__setitem__(1, nn.ReLU()) if n == 2 else None)
        ),
        Situation("weights become column-major", changing(_column_major)),
        Situation(
            "channels-last images and weights",
            exact(_images, [(x.to(memory_format=torch.channels_last), y) for x, y in batches(3, (2, 4, 4))]),
        ),
        Situation(
            "0-dim parameters",
            exact(lambda: Calls(lambda m, x: m.scale * m.net(x), net=mlp(), scale=nn.Parameter(torch.tensor(0.7)))),
        ),
        Situation(
            "all parameters in a `ParameterList`",
            exact(
                lambda: Calls(
                    lambda m, x: m.p[2] * (x @ m.p[0]) + m.p[1],
                    p=nn.ParameterList([torch.randn(4, 3), torch.randn(3), torch.tensor(0.5)]),
                )
            ),
        ),
        Situation(
            "weight norm in its old form", exact(lambda: nn.Sequential(_weight_norm(), nn.Tanh(), nn.Linear(5, 3)))
        ),
        Situation("a subclass of a batch norm, in training", exact(_norm_act, mixes=True)),
        Situation(
            "samples begin to be mixed by an index", changing(_share, lambda: Mixing(lambda h: h[[2, 0, 1, 4, 3]]), 3)
        ),
        Situation("samples begin to be mixed by a roll", changing(_share, lambda: Mixing(lambda h: h.roll(1, 0)), 3)),
        Situation("samples begin to be mixed by their mean", changing(_share, lambda: Mixing(lambda h: h.mean(0)), 4)),
        Situation(
            "samples begin to be mixed by a softmax", changing(_share, lambda: Mixing(lambda h: h.softmax(0)), 4)
        ),
        Situation("a matrix from the left is the identity at first", changing(_matrix, _with_matrix, 5)),
    ],
    "Activation checkpointing": [
        Situation(f"`use_reentrant=False`, with {name}", exact(lambda norm=norm: checkpointed(norm())))
        for name, norm in (
            ("no norm", nn.Identity),
            ("LayerNorm", lambda: nn.LayerNorm(6)),
            ("BatchNorm", lambda: nn.BatchNorm1d(6)),
        )
    ]
    + [
        Situation("`use_reentrant=True`", refused(ValueError, "use_reentrant=False", loops.reentrant), "refused"),
        Situation(
            "the call of the whole model, `use_reentrant=False`",
            refused(ValueError, "checkpoint parts of the model", loops.whole_model_again),
            "refused",
        ),
    ],
    "Copies": [Situation(title, run, "the copy trains on, bit for bit") for title, run in further.COPIES.items()],
    "Parameter groups": [Situation("weights with decay, biases without, in one layer", further.decay_groups)],
    "`compile_train_step`": [
        Situation(title, run, outcome, ("sampled", "empirical"))
        for title, (run, outcome) in further.COMPILED_STEPS.items()
    ],
    "Warnings": [Situation(title, run, outcome) for title, (run, outcome) in loops.WARNINGS.items()],
    "Rules of one's own": [Situation(title, run) for title, run in loops.RULES.items()],
    "Mixed precision": [Situation(title, run, outcome) for title, (run, outcome) in loops.MIXED_PRECISION.items()],
}


def page():
    """Return the page that shows the table."""
    lines = [
        "<!-- Written by `python tests/situations.py`: changes by hand are lost. -->",
        "",
        "# What people bring",
        "",
        'Each line is tested (`tests/test_situations.py`). "Exact" means that a step is within 1e-9 of a dense solve',
        "in float64, with a row of J from one backward pass for each sample through autograd's graph.",
        "The warnings of a loss that is not the likelihood's hold for `categorical`, the default, and `bernoulli`.",
        "Without targets any derivative is that of some squared error: `Gaussian` sees a sum, a factor or another term",
        "only where you set its `.target`.",
    ]
    for kind, rows in SITUATIONS.items():
        lines += ["", f"## {kind}", "", "| situation | what happens | Fisher | since |", "|---|---|---|---|"]
        for row in rows:
            fishers = "all" if set(row.fishers) == set(FISHERS) else ", ".join(row.fishers)
            lines.append(f"| {row.title} | {row.outcome} | {fishers} | {row.since} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
