"""Which rows J has and which blocks are solved together, against dense computations."""

import copy
import math
from collections import Counter

import dense
import pytest
import torch
import torch.nn.functional as F
from one_step import (
    BLOCKS,
    CHOICES,
    DAMPING,
    LAYERS,
    LIKELIHOODS,
    LOSSES,
    LR,
    PLAIN,
    TOLERANCE,
    N,
    Recording,
    batch,
    drawn_rows,
    gauss_newton_rows,
    gradients,
    natural,
    one_step,
    small_model,
)
from torch import nn

from tengrad_triton import Categorical, TENGraD
from tengrad_triton.curvature.jacobians.per_sample import PerSample, reduce_rows


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("representation", ["factored", "per_sample"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_exact_fisher_is_the_dense_gauss_newton_matrix(likelihood, representation, blocks):
    taken, model, grads, optimizer, x = one_step(
        likelihood, fisher="exact", representation=representation, blocks=CHOICES[blocks]
    )
    expected = natural(gauss_newton_rows(model, x, LOSSES[likelihood]), grads, BLOCKS[blocks])
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
        for name, direction in natural(joined, grads, BLOCKS[blocks]).items():
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
    assert {stack.inverse_BNN.shape[-1] for stack in optimizer._curvature.inverses} == {8, 9}
    assert "as many rows as parameters" in str(optimizer.summary())


@pytest.mark.parametrize(("device", "rows", "kept"), [("cpu", 40, 8), ("meta", 40, 40), ("meta", 600, 8)])
def test_blocks_that_share_launches_keep_their_rows(device, rows, kept):
    """A tensor without data stands for one on a GPU."""
    j = {name: PerSample(torch.ones(rows, 4, device=device), None, "samples") for name in ("weight", "bias")}
    reduced = reduce_rows({"norm": j}, ["norm"])["norm"]
    assert [reduced[name].rows for name in j] == [kept, kept]


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
        model, lr=0.0, fisher=fisher, fisher_samples=draws, likelihood=likelihood, representation="per_sample", seed=0,
        scaling="none",
    )  # fmt: skip
    F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    optimizer.step()
    j_NK = optimizer._curvature.jacobians[""]["weight"].j_NK
    fisher_KK = j_NK.mT @ j_NK / optimizer._curvature.rows
    flat, counts = x.flatten(0, 1), (y.flatten() >= 0).double()
    likelihood.target = None  # it belongs to the batch of the step
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
