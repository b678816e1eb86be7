"""Which rows J has, which blocks are solved together, and what the step does with them: against dense computations."""

import copy
import math
from collections import Counter

import dense
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian, jacrev, vmap

from tengrad_triton import Bernoulli, Categorical, Gaussian, TENGraD

TOLERANCE = 1e-9
N, LR, DAMPING = 6, 0.05, 0.03
PLAIN = {"relative_damping": False, "trust_region": None, "nesterov": False}  # as the formulas of the tests have it
LIKELIHOODS = {"categorical": Categorical(), "gaussian": Gaussian(), "bernoulli": Bernoulli()}
LOSSES = {
    "categorical": F.cross_entropy,
    "gaussian": F.mse_loss,
    "bernoulli": F.binary_cross_entropy_with_logits,
}


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)
    ).double()


def batch(step, likelihood="categorical", n=N):
    generator = torch.Generator().manual_seed(10 + step)
    x = torch.randn(n, 1, 6, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (n,), generator=generator)
    return x, labels if likelihood == "categorical" else F.one_hot(labels, 3).double()


def gradients(model, x, y, loss):
    model.zero_grad()
    loss(model(x), y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def gauss_newton_rows(model, x, loss):
    """Return {name: [N C, K]}: rows whose mean square is F, from the outputs' Jacobian and the loss's Hessian."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    outputs = vmap(lambda params, x: functional_call(model, params, (x[None],))[0], in_dims=(None, 0))(params, x)
    jacobian = jacrev(lambda p: functional_call(model, p, (x,)))(params)  # [N, C, *shape]

    def own(output):
        targets = torch.zeros((), dtype=torch.long) if loss is F.cross_entropy else torch.full_like(output, 0.5)
        return loss(output[None], targets[None])

    h_NCC = vmap(hessian(own))(outputs.detach())
    root = torch.linalg.eigh(h_NCC)
    s_NCR = root.eigenvectors * root.eigenvalues.clamp(min=0).sqrt()[:, None]
    classes = s_NCR.shape[-1]
    scale = classes**0.5
    return {
        name: scale * torch.einsum("ncr,nck->nrk", s_NCR, j.flatten(2)).flatten(0, 1) for name, j in jacobian.items()
    }


def drawn_rows(model, x, targets, nll):
    """Return the rows of several draws, one after the other."""
    parts = [dense.sample_gradients(model, x, target, nll) for target in targets]
    return {name: torch.cat([part[name].flatten(1) for part in parts]) for name in parts[0]}


def natural(rows, grads, blocks, damping=DAMPING):
    """Return (F + α I)⁻¹ V for every block, densely."""
    found = {}
    for block in blocks:
        j = torch.cat([rows[name] for name in block], 1)
        v = torch.cat([grads[name].flatten() for name in block])
        fisher = j.mT @ j / len(j)
        solved = torch.linalg.solve(fisher + damping * torch.eye(len(v), dtype=v.dtype), v)
        pieces = solved.split([grads[name].numel() for name in block])
        found |= {name: piece.view_as(grads[name]) for name, piece in zip(block, pieces, strict=True)}
    return found


class Recording:
    """Remembers every draw."""

    def __init__(self, likelihood):
        self.likelihood, self.targets = likelihood, []

    def sample(self, output, generator):
        self.targets.append(self.likelihood.sample(output, generator))
        return self.targets[-1]

    def nll(self, output, target):
        return self.likelihood.nll(output, target)


def one_step(likelihood="categorical", **options):
    """Return the direction that one step took, the oracle's model from before it, the gradients and the optimizer."""
    model = small_model()
    before = copy.deepcopy(model)
    optimizer = TENGraD(model, lr=LR, damping=DAMPING, momentum=0.0, **{"likelihood": likelihood, **PLAIN, **options})
    x, y = batch(0, likelihood if isinstance(likelihood, str) else "categorical")
    loss = LOSSES[likelihood] if isinstance(likelihood, str) else F.cross_entropy
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()
    taken = {
        name: (old - new) / LR for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True)
    }
    return taken, before, gradients(before, x, y, loss), optimizer, x


NETWORK = [["0.weight", "0.bias", "3.weight", "3.bias", "5.weight", "5.bias"]]
LAYERS = [NETWORK[0][:2], NETWORK[0][2:4], NETWORK[0][4:]]
SYSTEMS = {
    "layer": LAYERS,
    "network": NETWORK,
    "lists": [NETWORK[0][:4], NETWORK[0][4:]],
}
CHOICES = {"layer": "layer", "network": "network", "lists": [["0", "3"]]}


@pytest.mark.parametrize("blocks", SYSTEMS)
@pytest.mark.parametrize("representation", ["factored", "per_sample"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_exact_fisher_is_the_dense_gauss_newton_matrix(likelihood, representation, blocks):
    taken, model, grads, optimizer, x = one_step(
        likelihood, fisher="exact", representation=representation, blocks=CHOICES[blocks]
    )
    expected = natural(gauss_newton_rows(model, x, LOSSES[likelihood]), grads, SYSTEMS[blocks])
    assert dense.relative_error(taken, expected) < TOLERANCE
    assert optimizer._curvature.rows == 3 * N


@pytest.mark.parametrize("draws", [1, 3])
def test_every_draw_is_a_row(draws):
    recording = Recording(Categorical())
    taken, model, grads, _, x = one_step(recording, fisher_samples=draws)
    rows = drawn_rows(model, x, recording.targets, recording.nll)
    assert len(rows["0.weight"]) == draws * N
    assert dense.relative_error(taken, natural(rows, grads, LAYERS)) < TOLERANCE


def test_a_loop_does_where_torch_has_no_batched_backward():
    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.tanh()

        @staticmethod
        def backward(ctx, grad):
            return grad * float(grad.abs().sum() > 0)  # reads a number, which a batch of backward passes has not

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.b(Odd.apply(self.a(x)))

    model = Model().double()
    optimizer = TENGraD(model, fisher="exact")
    F.cross_entropy(model(torch.randn(5, 4).double()), torch.zeros(5, dtype=torch.long)).backward()
    optimizer.step()
    assert optimizer._curvature.rows == 10


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_some_rows_are_the_same_of_every_block(fisher):
    """The rows left in a network-wide system are rows of the whole, each once."""
    _, _, _, whole, _ = one_step(fisher=fisher, blocks="network", seed=3, representation="per_sample")
    _, _, _, part, _ = one_step(fisher=fisher, blocks="network", seed=3, representation="per_sample", fisher_rows=4)
    assert part._curvature.rows == 4
    together, few = (
        torch.cat([rows.j_NK for block in o._curvature.jacobians.values() for rows in block.values()], 1)
        for o in (whole, part)
    )
    distances = torch.cdist(few, together)
    assert (distances.amin(1) < 1e-12).all()
    assert len(set(distances.argmin(1).tolist())) == 4


def test_every_row_is_as_likely():
    drawn = Counter()
    model = nn.Linear(4, 3, bias=False).double()
    x = torch.eye(4).double()  # row n of J has its entries in column n only
    for seed in range(300):
        optimizer = TENGraD(model, lr=0.0, fisher_rows=2, seed=seed, representation="per_sample")
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.zeros(4, dtype=torch.long)).backward()
        optimizer.step()
        j_NK = optimizer._curvature.jacobians[""]["weight"].j_NK
        drawn.update(j_NK.view(-1, 3, 4).abs().sum(1).argmax(1).tolist())
    assert set(drawn) == set(range(4))
    assert max(abs(count - 150) for count in drawn.values()) < 5 * (300 * 0.25) ** 0.5


@pytest.mark.parametrize("representation", ["factored", "per_sample"])
@pytest.mark.parametrize("blocks", ["layer", "network"])
def test_history_is_the_mean_over_the_last_refreshes(blocks, representation):
    model, recording, rows = small_model(), Recording(Categorical()), []
    twin = copy.deepcopy(model)
    optimizer = TENGraD(
        model, lr=LR, damping=DAMPING, momentum=0.0, refresh_every=1, history=2, blocks=blocks, likelihood=recording,
        representation=representation, **PLAIN,
    )  # fmt: skip
    for step in range(4):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        grads = gradients(twin, x, y, F.cross_entropy)
        rows = [drawn_rows(twin, x, recording.targets[-1:], recording.nll), *rows][:2]
        optimizer.step()
        joined = {name: torch.cat([part[name] for part in rows]) for name in rows[0]}
        for name, direction in natural(joined, grads, SYSTEMS[blocks]).items():
            twin.get_parameter(name).data.sub_(LR * direction)
        assert dense.relative_error(dict(model.named_parameters()), dict(twin.named_parameters())) < TOLERANCE
        assert optimizer._curvature.rows == N * len(rows)


def test_history_begins_anew_with_another_batch_size():
    model = small_model()
    optimizer = TENGraD(model, refresh_every=1, history=3)
    for step, n in enumerate((6, 6, 4, 4, 4, 4)):
        x, y = batch(step, n=n)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert optimizer._curvature.rows == 12


def test_history_survives_a_checkpoint():
    runs = []
    for resumed in (False, True):
        model = small_model()
        optimizer = TENGraD(model, refresh_every=2, history=3, seed=1, blocks="network")
        for step in range(9):
            if resumed and step == 5:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = TENGraD(model, refresh_every=2, history=3, seed=1, blocks="network")
                optimizer.load_state_dict(state)
            x, y = batch(step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*runs)


def test_fewer_parameters_than_rows_are_solved_in_their_own_space():
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    twin, recording = copy.deepcopy(model), Recording(Categorical())
    optimizer = TENGraD(
        model, lr=1.0, damping=DAMPING, momentum=0.0, likelihood=recording, representation="per_sample", **PLAIN
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (40,), generator=generator)
    grads = gradients(twin, x, y, F.cross_entropy)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    rows = drawn_rows(twin, x, recording.targets, recording.nll)
    expected = natural(rows, grads, [["0.weight", "0.bias"], ["2.weight", "2.bias"]])
    taken = {name: old - new for (name, new), old in zip(model.named_parameters(), twin.parameters(), strict=True)}
    assert dense.relative_error(taken, expected) < TOLERANCE
    assert {stack.inverse_LNN.shape[-1] for stack in optimizer._curvature.inverses} == {8, 9}
    assert "as many rows as parameters" in str(optimizer.summary())


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_a_label_a_token(fisher, ignored):
    """On average over draws, and without them, F is the Gauss-Newton matrix of the loss over the tokens that count."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4, bias=False).double()
    x = torch.randn(5, 7, 3, dtype=torch.float64)
    y = torch.randint(4, (5, 7))
    if ignored:
        y[torch.rand(5, 7) < 0.4] = -100
    likelihood = Categorical(dim=-1)
    likelihood.target = y if ignored else None
    draws = 400 if fisher == "sampled" else 1
    optimizer = TENGraD(
        model, lr=0.0, fisher=fisher, fisher_samples=draws, likelihood=likelihood, representation="per_sample", seed=0
    )
    F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    optimizer.step()
    j_NK = optimizer._curvature.jacobians[""]["weight"].j_NK
    fisher_KK = j_NK.mT @ j_NK / optimizer._curvature.rows
    flat, counts = x.flatten(0, 1), (y.flatten() >= 0).double()
    p = model(flat).softmax(1).detach()
    h = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    expected = torch.einsum("t,tcd,ti,tj->cidj", counts / counts.sum(), h, flat, flat).reshape(12, 12)
    bound = 1e-12 if fisher == "exact" else 5 / math.sqrt(draws * 5)
    assert (fisher_KK - expected).norm() < bound * expected.norm()


def test_a_drawn_label_counts_even_where_its_number_is_ignored():
    """Which tokens count is a matter of the data's labels: padding may well be a class that the model can draw."""
    model = nn.Linear(3, 2).double()
    nn.init.constant_(model.weight, 0.0)
    model.bias.data = torch.tensor([5.0, 0.0]).double()  # nearly every draw is class 0, which is also the padding
    x, y = torch.randn(8, 3).double(), torch.tensor([1, 0] * 4)
    likelihood = Categorical(ignore_index=0)
    likelihood.target = y
    optimizer = TENGraD(model, lr=0.0, likelihood=likelihood, representation="per_sample", seed=0)
    F.cross_entropy(model(x), y, ignore_index=0).backward()
    optimizer.step()
    assert (optimizer._curvature.jacobians[""]["bias"].j_NK.abs().sum(1) > 0).tolist() == (y != 0).tolist()


# Controls


@pytest.mark.parametrize("region", [1e-5, 1e3])
@pytest.mark.parametrize("blocks", ["layer", "network"])
def test_trust_region_bounds_the_fisher_norm_of_the_step(blocks, region):
    recording = Recording(Categorical())
    taken, model, grads, _, x = one_step(recording, trust_region=region, blocks=blocks)
    direction = natural(drawn_rows(model, x, recording.targets, recording.nll), grads, SYSTEMS[blocks])
    quadratic = LR**2 * sum((direction[name] * grads[name]).sum() for name in grads)
    scale = min(1.0, math.sqrt(region / quadratic))
    assert (scale < 1) == (region < 1)
    assert dense.relative_error(taken, {name: scale * d for name, d in direction.items()}) < TOLERANCE


@pytest.mark.parametrize("factor", [1.0, 30.0])  # of the inputs
@pytest.mark.parametrize("blocks", SYSTEMS)
def test_relative_damping_is_in_units_of_the_trace(blocks, factor):
    model, recording = small_model(), Recording(Categorical())
    twin, (x, y) = copy.deepcopy(model), batch(0)
    options = {**PLAIN, "relative_damping": True, "blocks": CHOICES[blocks], "likelihood": recording}
    optimizer = TENGraD(model, lr=LR, damping=DAMPING, momentum=0.0, **options)
    F.cross_entropy(model(factor * x), y).backward()
    optimizer.step()
    rows = drawn_rows(twin, factor * x, recording.targets, recording.nll)
    grads = gradients(twin, factor * x, y, F.cross_entropy)
    traces = [sum(rows[name].square().sum() for name in block).item() / N for block in SYSTEMS[blocks]]
    expected = {}
    for block, trace in zip(SYSTEMS[blocks], traces, strict=True):
        expected |= natural(rows, grads, [block], DAMPING * max(trace, 1.0))
    assert max(traces) > 1
    assert factor > 1 or blocks == "network" or min(traces) < 1
    taken = {name: (p - model.get_parameter(name)) / LR for name, p in twin.named_parameters()}
    assert dense.relative_error(taken, expected) < TOLERANCE


def test_spring_is_the_residual_formulation():
    """φ ← μ φ + (F + α I)⁻¹ (V − μ F φ) (Goldshlager, Abrahamsen, Lin 2024, equation 22), densely."""
    mu, model, recording = 0.8, small_model(), Recording(Categorical())
    twin = copy.deepcopy(model)
    optimizer = TENGraD(
        model, lr=LR, damping=DAMPING, spring=mu, refresh_every=1, blocks="network", likelihood=recording, **PLAIN
    )
    phi = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for step in range(4):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        rows = drawn_rows(twin, x, recording.targets[-1:], recording.nll)
        j = torch.cat([rows[name] for name in NETWORK[0]], 1)
        seen = j.mT @ (j @ torch.cat([phi[name].flatten() for name in NETWORK[0]])) / len(j)
        pieces = seen.split([phi[name].numel() for name in NETWORK[0]])
        grads = gradients(twin, x, y, F.cross_entropy)
        residual = {n: grads[n] - mu * f.view_as(grads[n]) for n, f in zip(NETWORK[0], pieces, strict=True)}
        solved = natural(rows, residual, NETWORK)
        optimizer.step()
        phi = {name: mu * phi[name] + solved[name] for name in phi}
        for name, direction in phi.items():
            twin.get_parameter(name).data.sub_(LR * direction)
        assert dense.relative_error(dict(model.named_parameters()), dict(twin.named_parameters())) < TOLERANCE


def test_maximize_goes_the_other_way():
    down, *_ = one_step(seed=2)
    up, *_ = one_step(seed=2, maximize=True)
    assert dense.relative_error(up, {name: -d for name, d in down.items()}) < TOLERANCE


def closure_of(model, optimizer, x, y, losses):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
        return loss

    return closure


@pytest.mark.parametrize(("lr", "grows"), [(0.05, False), (30.0, True)])
def test_levenberg_marquardt_follows_the_reduction_ratio(lr, grows):
    model, recording, losses = small_model(), Recording(Categorical()), []
    before = copy.deepcopy(model)
    optimizer = TENGraD(model, lr=lr, damping="lm", momentum=0.5, likelihood=recording, refresh_every=2, **PLAIN)
    x, y = batch(0)
    start = optimizer.param_groups[0]["damping"]
    optimizer.step(closure_of(model, optimizer, x, y, losses))
    assert len(losses) == 2  # before and after
    rows = drawn_rows(before, x, recording.targets[:1], recording.nll)
    grads = gradients(before, x, y, F.cross_entropy)
    delta = {
        n: new.detach() - old.detach()
        for (n, new), old in zip(model.named_parameters(), before.parameters(), strict=True)
    }
    linear = sum((grads[name] * delta[name]).sum() for name in grads)
    parts = [sum(rows[name] @ delta[name].flatten() for name in block) for block in LAYERS]
    predicted = linear + sum(part.square().mean() for part in parts) / 2
    ratio = (losses[1] - losses[0]) / predicted.item()
    good = predicted < 0 and ratio > 0.75
    assert good != grows
    assert optimizer.param_groups[0]["damping"] == pytest.approx(start * (1.5 if grows else 2 / 3))
    optimizer.step(closure_of(model, optimizer, x, y, losses))
    assert len(losses) == 3  # a step that reuses the curvature evaluates once


@pytest.mark.parametrize("representation", ["factored", "per_sample", "compressed"])
def test_curvature_along_a_direction_is_that_of_the_rows(representation):
    """δᵀ F δ, which the quadratic model needs, from whatever a block keeps of J."""
    recording = Recording(Categorical())
    _, model, grads, optimizer, x = one_step(recording, representation=representation, tol=1e-6)
    rows = drawn_rows(model, x, recording.targets, recording.nll)
    targets = optimizer._targets()
    actual = optimizer._curvature.curvature_along(targets)
    parts = [sum(rows[name] @ grads[name].flatten() for name in block) for block in LAYERS]
    assert actual.item() == pytest.approx(sum(part.square().mean() for part in parts).item(), rel=1e-4)


def test_levenberg_marquardt_needs_a_closure():
    model = small_model()
    optimizer = TENGraD(model, damping="lm")
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"call step\(closure\)"):
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_paper_settings_are_one_call_away():
    optimizer = TENGraD.paper(small_model(), lr=0.01)
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert (optimizer.param_groups[0]["damping"], optimizer.refresh_every) == (0.1, 100)
    assert not optimizer.param_groups[0]["nesterov"]
    assert (optimizer._options.relative_damping, optimizer._options.trust_region) == (False, None)


BAD = {
    "no such module": (
        {"blocks": [["7"]]},
        ValueError,
        r"blocks names '7', where no block is; there are '0', '3', '5'",
    ),
    "a module twice": ({"blocks": [["0", "3"], ["3"]]}, ValueError, "blocks names '3' more than once"),
    "an empty list": ({"blocks": [[]]}, ValueError, "lists of modules' names"),
    "no draws": ({"fisher_samples": 0}, ValueError, "fisher_samples must be at least 1, got 0"),
    "draws of nothing drawn": ({"fisher_samples": 2, "fisher": "exact"}, ValueError, "use fisher='sampled'"),
    "half a row": ({"fisher_rows": 0.5}, TypeError, "fisher_rows must be a whole number"),
    "no history": ({"history": 0}, ValueError, "history must be at least 1"),
    "compressed history": ({"history": 2, "representation": "compressed"}, ValueError, "choose one of the two"),
    "unclear damping": ({"relative_damping": 1}, TypeError, "relative_damping must be True or False"),
    "no trust": ({"trust_region": 0}, ValueError, "trust_region must be positive"),
    "spring of one": ({"spring": 1.0}, ValueError, r"spring must be in \[0, 1\)"),
    "nesterov and spring": ({"spring": 0.5, "nesterov": True}, ValueError, "no spring"),
    "decay and spring": ({"spring": 0.5, "weight_decay": 0.1}, ValueError, "decoupled_weight_decay=True"),
    "exact without a factor": ({"fisher": "exact", "likelihood": Recording(Categorical())}, TypeError, "factor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings(case):
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        TENGraD(small_model(), **arguments)


def test_exact_rows_beyond_the_memory_are_refused_with_the_numbers():
    model = small_model()
    _optimizer = TENGraD(model, fisher="exact", max_bytes=100)
    with pytest.raises(ValueError, match=r"3 rows for each of 6 samples: .* raise max_bytes"):
        model(batch(0)[0])


def test_a_system_needs_one_damping():
    model = small_model()
    groups = [{"params": model[0].parameters()}, {"params": model[3:].parameters(), "damping": 1.0}]
    with pytest.raises(ValueError, match=r"'network' are solved together and need one damping, got 0.003, 1.0"):
        TENGraD(model, groups, blocks="network")
