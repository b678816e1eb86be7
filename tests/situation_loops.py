"""Training loops as people write them, and what has to come out: the other runs of `situations.py`."""

import contextlib
import copy
import warnings

import torch
import torch.nn.functional as F
from dense import blocks_of
from graph_rows import assert_steps, cotangents_of, dense_steps, optimizer_of, rows_of_graph, unseen
from situation_models import Calls, Gate, batches, derivative_of, mlp, two_heads
from torch import nn
from torch.utils.checkpoint import checkpoint

from tengrad_triton import Gaussian, OuterProducts, PerSampleGrads, TENGraD, canonical
from tengrad_triton.likelihoods import likelihood_of

DATA = batches(16)


def check_loop(run, fisher, make=mlp, steps=3):
    """Take steps whose gradients ``run`` computes; each equals the dense solve with rows of the forwards that count.

    ``run(model, optimizer, number)`` returns, for each of these forwards, (x, y, its place among all of the step).
    """
    torch.manual_seed(0)
    model = make().double()
    optimizer, drawn = optimizer_of(model, fisher)
    for number in range(steps):
        drawn.targets.clear()
        counted = run(model, optimizer, number)
        check_step(model, optimizer, drawn, fisher, counted)


def check_step(model, optimizer, drawn, fisher, counted, grads=None, taken=lambda name, step, old: step):
    """Take a step with the present gradients; it equals the dense solve with the rows of the forwards in ``counted``.

    ``grads`` are those of the loss, where the parameters hold others. ``taken`` returns a parameter's step, from
    its name, the dense solution and its old value, both flat.
    """
    grads = grads or {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    parts = []
    with unseen(optimizer):
        for x, y, place in counted:
            seen = model(x)
            target = drawn.targets[place] if drawn.targets else None
            cotangents = cotangents_of(
                fisher, [seen], F.cross_entropy(seen, y), likelihood_of("categorical"), target, len(seen)
            )
            parts.append(rows_of_graph(model, [seen], cotangents))
    rows = {name: torch.cat([part[name] for part in parts]) for name in grads}
    optimizer.step()
    steps = dense_steps(blocks_of(model), rows, grads)
    assert_steps(model, old, {name: taken(name, d, old[name].flatten()) for name, d in steps.items()}, "the step")


def backward(model, place):
    x, y = DATA[place]
    F.cross_entropy(model(x), y).backward()
    return x, y


def _derivative_first(model, optimizer, number, create_graph=False):
    x, y = DATA[number]
    x = x.clone().requires_grad_()
    output = model(x)
    torch.autograd.grad(output.sum(), x, retain_graph=True, create_graph=create_graph)
    optimizer.zero_grad()
    F.cross_entropy(output, y).backward()
    return [(x.detach(), y, 0)]


def _cleared(clear):
    def run(model, optimizer, number):
        backward(model, number)  # of a step that is skipped
        clear(model)
        x, y = backward(model, number + 3)
        return [(x, y, 1)]

    def once_cleared(model, optimizer, number):
        clear(model)
        return run(model, optimizer, number)

    return once_cleared


def _set_none(model):
    for p in model.parameters():
        p.grad = None


def _zero_in_place(model):
    for p in model.parameters():
        if p.grad is not None:
            p.grad.zero_()


def _accumulate(model, optimizer, number, clip=False):
    optimizer.zero_grad()
    for k in range(3):
        x, y = DATA[3 * number + k]
        (F.cross_entropy(model(x), y) / 3).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    return [(*DATA[3 * number + k], k) for k in range(3)]


def _one_backward(model, optimizer, number):
    optimizer.zero_grad()
    picked = [DATA[2 * number + k] for k in range(2)]
    (sum(F.cross_entropy(model(x), y) for x, y in picked) / 2).backward()
    return [(x, y, k) for k, (x, y) in enumerate(picked)]


def two_backwards(model, optimizer, number):
    optimizer.zero_grad()
    x, y = DATA[number]
    output = model(x)
    (0.3 * F.cross_entropy(output, y)).backward(retain_graph=True)
    (0.7 * F.cross_entropy(output, y)).backward()
    return [(x, y, 0)]


def scaled():
    return Calls(lambda model, x: model.scale * model.net(x), net=mlp(), scale=nn.Parameter(torch.tensor(0.7)))


def _inputs_only(model, optimizer, number):
    optimizer.zero_grad()
    x, y = DATA[number]
    x = x.clone().requires_grad_()
    output = model(x)
    F.cross_entropy(output, y).backward(inputs=[x], retain_graph=True)
    F.cross_entropy(model(x.detach()), y).backward()
    return [(x.detach(), y, 1)]


def _sharpness(model, optimizer, number):
    x, y = DATA[number]
    F.cross_entropy(model(x), y).backward()
    moved = [0.05 * p.grad for p in model.parameters()]
    with torch.no_grad():
        for p, e in zip(model.parameters(), moved, strict=True):
            p.add_(e)
    _set_none(model)
    F.cross_entropy(model(x), y).backward()  # its rows, too, are at the moved weights: the step is compared there
    return [(x, y, 1)]


def _other_forward(model, optimizer, number):
    optimizer.zero_grad()
    model(DATA[number + 5][0])
    return [(*backward(model, number), 1)]


def _diagnosis(model, optimizer, number):
    optimizer.zero_grad()
    x, y = DATA[number]
    loss = F.cross_entropy(model(x), y)
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    loss.backward()
    return [(x, y, 0)]


LOOPS = {
    "two backward passes through one forward": two_backwards,
    "a derivative by the input, then `zero_grad`, then the backward": _derivative_first,
    "the same with `create_graph=True`": lambda *args: _derivative_first(*args, create_graph=True),
    "a step skipped, and `model.zero_grad()`": _cleared(lambda model: model.zero_grad()),
    "a step skipped, and `p.grad = None`": _cleared(_set_none),
    "a step skipped, and `p.grad.zero_()`": _cleared(_zero_in_place),
    "gradients of three micro-batches": _accumulate,
    "the same, clipped after each": lambda *args: _accumulate(*args, clip=True),
    "two forwards, and one backward of the mean of their losses": _one_backward,
    "a backward with `inputs=` of something else": _inputs_only,
    "two passes, of which the wrapper clears the first (SAM)": _sharpness,
    "a forward whose loss is never used": _other_forward,
    "gradients of the loss by `autograd.grad`, to look at": _diagnosis,
}


# Losses that are not the mean of the rows' losses


def _steps(make, loss_of, fisher, steps=2, **options):
    torch.manual_seed(0)
    model = make().double()
    optimizer = TENGraD(model, fisher=fisher, **options)
    for number in range(steps):
        optimizer.zero_grad()
        loss_of(model, *DATA[number]).backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def _gradient_penalty(model, x, y):
    x = x.clone().requires_grad_()
    output = model(x)
    return F.cross_entropy(output, y) + derivative_of(output, x).square().mean()


def _beside(model, x, y):
    return F.cross_entropy(model(x), y) + model[0](x).square().mean()


def _squares(model, x, y):
    return F.cross_entropy(model(x), y) + 0.1 * sum(p.square().sum() for p in model.parameters())


def _gated(model, x, y):
    return F.cross_entropy(model(x), y) + 0.5 * model[1].penalty


def gated():
    return nn.Sequential(nn.Linear(4, 4), Gate(), nn.Linear(4, 3))


def _two_outputs(kind):
    def make():
        def function(model, x):
            h = model.body(x).tanh()
            return {"main": model.a(h), "second": h if kind == "samples first" else h.mT[None]}

        return Calls(function, body=nn.Linear(4, 6), a=nn.Linear(6, 3))

    def loss(model, x, y):
        output = model(x)
        return F.cross_entropy(output["main"], y) + output["second"].square().mean()

    return lambda fisher: _steps(make, loss, fisher, output="main")


BESIDE = {
    "an output that `output=` did not choose": _two_outputs("samples first"),
    "the same, with other sizes": _two_outputs("layers first"),
    "a penalty on the derivative by the input": lambda fisher: _steps(mlp, _gradient_penalty, fisher),
    "a layer called beside the model": lambda fisher: _steps(mlp, _beside, fisher),
    "the weights' squares added to the loss": lambda fisher: _steps(mlp, _squares, fisher),
    "a loss term that a layer keeps as an attribute": lambda fisher: _steps(gated, _gated, fisher),
}
WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)


def _other_loss(loss):
    return lambda fisher: _steps(mlp, lambda model, x, y: loss(model(x), y), fisher)


OTHER_LOSSES = {
    "class weights that the likelihood does not know": _other_loss(lambda o, y: F.cross_entropy(o, y, WEIGHTS)),
    "the loss times 100": _other_loss(lambda o, y: 100 * F.cross_entropy(o, y)),
    "twice a cross entropy in float32 of a model in float64": _other_loss(
        lambda o, y: 2 * F.cross_entropy(o.float(), y)
    ),
    "a sum instead of a mean": _other_loss(lambda o, y: F.cross_entropy(o, y, reduction="sum")),
    "a squared error under the default likelihood": _other_loss(lambda o, y: F.mse_loss(o, F.one_hot(y, 3).double())),
    "a binary cross entropy under it": _other_loss(
        lambda o, y: F.binary_cross_entropy_with_logits(o, F.one_hot(y, 3).double())
    ),
    "the sum of the means of two forwards": lambda fisher: _steps(
        mlp, lambda model, x, y: F.cross_entropy(model(x), y) + F.cross_entropy(model(x + 1), y), fisher
    ),
    "a sum of binary cross entropies, `bernoulli`": lambda fisher: _steps(
        mlp,
        lambda model, x, y: F.binary_cross_entropy_with_logits(model(x), F.one_hot(y, 3).double(), reduction="sum"),
        fisher,
        likelihood="bernoulli",
    ),
    "a sum of squares, `Gaussian` with `.target`": lambda fisher: _squares_summed(fisher, has_target=True),
}


def _squares_summed(fisher, has_target):
    likelihood = Gaussian()

    def loss(model, x, y):
        target = F.one_hot(y, 3).double()
        likelihood.target = target if has_target else None
        return F.mse_loss(model(x), target, reduction="sum")

    _steps(mlp, loss, fisher, likelihood=likelihood)


# pytest turns a warning into an error
OWN_LOSSES = {
    "a cross entropy in float32 of a model in float64": _other_loss(lambda o, y: F.cross_entropy(o.float(), y)),
}
NOT_COMPARED = {"a sum of squares, `gaussian` without `.target`": lambda fisher: _squares_summed(fisher, False)}


# The user's own code, compiled models, transforms


def _counting_hook(fisher):
    counts = {}
    for kind in ("ours", "sgd"):
        torch.manual_seed(0)
        model, seen = gated(), []
        for layer in model:
            layer.register_forward_hook(lambda module, args, y, seen=seen: seen.append(type(module)))
        optimizer = TENGraD(model, fisher=fisher) if kind == "ours" else torch.optim.SGD(model.parameters())
        for number in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(DATA[number][0].float()), DATA[number][1]).backward()
            optimizer.step()
        counts[kind] = seen
    assert counts["ours"] == counts["sgd"]


def _attributes(fisher):
    grads = {}
    for kind in ("ours", "sgd"):
        torch.manual_seed(0)
        model = gated().double()
        optimizer = TENGraD(model, fisher=fisher) if kind == "ours" else torch.optim.SGD(model.parameters())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="a part of the gradient")
            _gated(model, *DATA[0]).backward()
            grads[kind] = [p.grad.clone() for p in model.parameters()]
            optimizer.step()
        assert len(model[1].seen) == 1
        model[1].penalty.item()
    assert all(torch.equal(a, b) for a, b in zip(*grads.values(), strict=True))


def _retained(fisher):
    """The gradients that activations retain are those of the caller's loss alone."""
    norms = {}
    for kind in ("ours", "sgd"):
        torch.manual_seed(0)
        model, seen = mlp().double(), []

        def keep(module, args, y, seen=seen):
            y.retain_grad()
            seen.append(y)

        model[1].register_forward_hook(keep)
        _optimizer = TENGraD(model, fisher=fisher) if kind == "ours" else None
        output = model(DATA[0][0])
        seen[0].retain_grad()
        F.cross_entropy(output, DATA[0][1]).backward()
        norms[kind] = seen[0].grad
    assert torch.equal(norms["ours"], norms["sgd"])


OWN_CODE = {
    "forward hooks on layers with and without a rule": _counting_hook,
    "attributes written in the forward: a loss term, a list of features": _attributes,
    "`retain_grad()` on activations": _retained,
}


def _conv_with_norms():
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 2, -1)), nn.Conv2d(1, 4, 2, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3)),
    )


def _compiled(way, make=mlp):
    def run(fisher):
        ends = []
        for compiles in (False, True):
            torch._dynamo.reset()
            torch.manual_seed(0)
            model = make().double()
            model(DATA[0][0])  # sizes lazy layers
            optimizer = TENGraD(model, fisher=fisher, refresh_every=3, seed=0)
            call = way(model) if compiles else model
            for x, y in DATA[:7]:
                optimizer.zero_grad()
                F.cross_entropy((call or model)(x), y).backward()
                optimizer.step()
            ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert torch.allclose(*ends, rtol=1e-9, atol=1e-9)

    return run


def _keeping_buffers(run):
    return torch._functorch.config.patch(donated_buffer=False)(run)


def _compile_layer(model):
    model[0] = torch.compile(model[0], backend="aot_eager")


COMPILED = {
    "`torch.compile(model)` after the optimizer was made": _compiled(lambda m: torch.compile(m, backend="aot_eager")),
    "the same, batch norms between convolutions, `torch._functorch.config.donated_buffer = False`": _keeping_buffers(
        _compiled(lambda m: torch.compile(m, backend="aot_eager"), _conv_with_norms)
    ),
    "`model.compile()` after it": _compiled(lambda m: m.compile(backend="aot_eager")),
    "a layer's `compile()`": _compiled(lambda m: m[0].compile(backend="aot_eager")),
    "a layer replaced by a compiled one": _compiled(_compile_layer),
}


def _unseen(look):
    def run(fisher):
        def loop(model, optimizer, number):
            optimizer.zero_grad()
            expected = look(copy.deepcopy(model), DATA[number][0])
            actual = look(model, DATA[number][0])
            if isinstance(expected, torch.Tensor):
                assert torch.allclose(actual, expected)
            return [(*backward(model, number), 0)]

        check_loop(loop, fisher)

    return run


def _per_sample(model, x):
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params, one):
        return torch.func.functional_call(model, params, one[None]).square().sum()

    return torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)["0.weight"]


def _forward_mode(model, x):
    return torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]


UNSEEN = {
    "`jacrev` of the model": _unseen(lambda model, x: torch.func.jacrev(model)(x)),
    "gradients of each sample by `vmap(grad)`": _unseen(_per_sample),
    "`hessian`": _unseen(lambda model, x: torch.func.hessian(lambda t: model(t).sum())(x)),
    "`jvp`": _unseen(_forward_mode),
    "`torch.export.export`": _unseen(lambda model, x: torch.export.export(model, (x,)) and None),
    "`torch.jit.trace`": _unseen(lambda model, x: torch.jit.trace(model, x, check_trace=False) and None),
    "a forward of a deep copy": _unseen(lambda model, x: copy.deepcopy(model)(x).detach()),
}


def reentrant(fisher):
    def make():
        def function(model, x):
            return model.head(checkpoint(model.body, x, use_reentrant=True))

        return Calls(function, body=nn.Linear(4, 6), head=nn.Linear(6, 3))

    _steps(make, lambda model, x, y: F.cross_entropy(model(x.requires_grad_()), y), fisher)


def whole_model_again(fisher):
    _steps(
        mlp, lambda model, x, y: F.cross_entropy(checkpoint(model, x.requires_grad_(), use_reentrant=False), y), fisher
    )


# Warnings that are true


def heads_in_turn(fisher, refresh_every):
    torch.manual_seed(0)
    model = two_heads(nn.LayerNorm(6))
    model.b = nn.Linear(6, 3)
    model.function = lambda m, x: (m.a if m.turn == 0 else m.b)(m.body(x).tanh())
    model.norm = nn.Identity()
    model = model.double()
    model.turn = 0
    optimizer, _ = optimizer_of(model, fisher, refresh_every=refresh_every)
    said = []
    for number in range(4):
        model.turn = number % 2
        optimizer.zero_grad()
        F.cross_entropy(model(DATA[number][0]), DATA[number][1]).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        said.append([str(one.message) for one in caught])
    return said


def _idle(fisher):
    assert heads_in_turn(fisher, 1) == [[]] * 4


def _not_covered(fisher):
    said = heads_in_turn(fisher, 4)
    assert said[0] == said[2] == said[3] == []
    assert len(said[1]) == 1
    assert said[1][0].startswith("no rule gave rows of b at the last refresh")


def _thawed(fisher):
    torch.manual_seed(0)
    model = mlp().double()
    model[0].requires_grad_(False)
    optimizer, _ = optimizer_of(model, fisher, refresh_every=4)
    said = []
    for number in range(4):
        model[0].requires_grad_(number > 1)
        optimizer.zero_grad()
        backward(model, number)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        said.append(len(caught))
    assert said == [0, 0, 1, 0]


WARNINGS = {
    "two heads in turn, each refresh sees one": (_idle, "no warning: the other one is not called"),
    "a head that the last refresh has not seen": (_not_covered, "SGD step, and one warning"),
    "a layer thawed between two refreshes": (_thawed, "SGD step until the next refresh, and one warning"),
}


# Rules of one's own


class Doubled(nn.Linear):
    """Its rule is wrong by a factor of two."""


class Flat(nn.Module):
    """A weight and a bias, with the rule of the guide applied to inputs without positions."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(5, 4) / 2), nn.Parameter(torch.zeros(5))

    def forward(self, x):
        return x @ self.w.mT + self.b


class OtherSample(Flat):
    """Its rule gives each sample the rows of the next one."""


def _doubled_rule(layer, x, grad_y):
    return {"weight": OuterProducts(2 * x[:, None, None], grad_y[:, None, None]), "bias": PerSampleGrads(grad_y)}


def _flat_rule(layer, x, grad_y):
    return {"w": OuterProducts(x[:, None], grad_y[:, None]), "b": PerSampleGrads(grad_y)}


def _other_rule(layer, x, grad_y):
    return {"w": OuterProducts(x[:, None], grad_y[:, None].roll(1, 0)), "b": PerSampleGrads(grad_y)}


@contextlib.contextmanager
def registered(kind, rule):
    """Register a rule, and take it back at the end."""
    canonical.register(kind)(rule)
    try:
        yield
    finally:
        canonical.register(kind)(canonical.dispatch(nn.Linear if issubclass(kind, nn.Linear) else object))


def _with_rule(kind, make, rule):
    def run(fisher):
        with registered(kind, rule):
            check_loop(
                lambda model, optimizer, number: (optimizer.zero_grad(), [(*backward(model, number), 0)])[1],
                fisher,
                lambda: nn.Sequential(make(), nn.Tanh(), nn.Linear(5, 3)),
            )

    return run


RULES = {
    "a rule that is wrong by a factor of two": _with_rule(Doubled, lambda: Doubled(4, 5), _doubled_rule),
    "a rule with the rows of other samples": _with_rule(OtherSample, OtherSample, _other_rule),
    "the guide's rule on inputs without positions": _with_rule(Flat, Flat, _flat_rule),
}


def _scaled(fisher):
    torch.manual_seed(0)
    model = mlp().double()
    optimizer, drawn = optimizer_of(model, fisher)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number in range(3):
        optimizer.zero_grad()
        drawn.targets.clear()
        x, y = DATA[number]
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        grads = {name: p.grad / 1024.0 for name, p in model.named_parameters()}
        proxy = _StepOf(scaler, optimizer)
        check_step(model, proxy, drawn, fisher, [(x, y, 0)], grads)
        scaler.update()


class _StepOf:
    """An optimizer whose step a scaler takes."""

    def __init__(self, scaler, optimizer):
        self.scaler, self.optimizer, self._capture = scaler, optimizer, optimizer._capture

    def step(self):
        self.scaler.step(self.optimizer)


def _infinite(fisher):
    torch.manual_seed(0)
    model = mlp().double()
    optimizer, drawn = optimizer_of(model, fisher)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for number in range(4):
        model.zero_grad()
        drawn.targets.clear()
        x, y = DATA[number]
        scaler.scale(F.cross_entropy(model(x), y) * (float("inf") if number == 1 else 1.0)).backward()
        if number == 1:
            before = copy.deepcopy(model.state_dict())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scaler.step(optimizer)
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        else:
            grads = {name: p.grad / scaler.get_scale() for name, p in model.named_parameters()}
            check_step(model, _StepOf(scaler, optimizer), drawn, fisher, [(x, y, 0)], grads)
        scaler.update()


def _unscaled(fisher):
    torch.manual_seed(0)
    model = mlp().double()
    optimizer, drawn = optimizer_of(model, fisher)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    for number in range(3):
        optimizer.zero_grad()
        drawn.targets.clear()
        x, y = DATA[number]
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        check_step(model, _StepOf(scaler, optimizer), drawn, fisher, [(x, y, 0)], grads)
        scaler.update()


MIXED_PRECISION = {
    "`GradScaler`": (_scaled, "exact"),
    "a step that it skips for infinite gradients": (_infinite, "nothing of that batch is left; exact afterwards"),
    "`scaler.unscale_` before the step, and clipped gradients": (_unscaled, "exact"),
}
