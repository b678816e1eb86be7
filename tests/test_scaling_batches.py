"""Scaled damping of many parameters at once: D, D⁻¹ and the rows are those of each parameter alone."""

import io
import math

import pytest
import torch
import torch.nn.functional as F
from scaled import KEEP
from torch import nn

from tengrad_triton import TENGraD, kernels
from tengrad_triton.curvature.contributions import Contributions, gather
from tengrad_triton.curvature.jacobians.per_sample import PerSample
from tengrad_triton.curvature.moments import scales_of, updated_moments
from tengrad_triton.curvature.scaling import Multiplier, Scale
from tengrad_triton.curvature.sides import sides_of
from tengrad_triton.kernels.conv_geometry import ConvGeometry
from tengrad_triton.layers import ConvInput, OuterProducts, PerSampleGrads, tensors_in

DOUBLE = torch.float64
EXACT = {"rtol": 1e-11, "atol": 1e-13}


class Shapes(nn.Module):
    """Has parameters of many forms, several of each size, and one layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.embedding, self.position = nn.Embedding(5, 8), nn.Embedding(6, 8)
        self.twice, self.first, self.second = (nn.Linear(8, 8) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv1d(8, 8, 3, padding=1, groups=2) for _ in range(2))
        self.wide, self.head = nn.Linear(8, 130), nn.Linear(130, 3)

    def forward(self, ids):
        h = self.norms[0](self.embedding(ids) + self.position.weight)
        h = self.norms[1](h + self.second(self.twice(self.first(self.twice(h)).tanh())))
        for conv in self.convs:
            h = h + conv(h.mT).mT
        return self.head(self.wide(self.norms[2](h)).tanh().mean(1))


def refreshed(scaling="kronecker"):
    """Return a model's optimizer, and what two batches contribute, with their gradients."""
    torch.manual_seed(0)
    model = Shapes().to(DOUBLE)
    optimizer = TENGraD(model, scaling=scaling, fisher="empirical", refresh_every=1)
    seen = []
    for micro_batches in (1, 2):
        optimizer.zero_grad()
        for _ in range(micro_batches):
            F.cross_entropy(model(torch.randint(5, (40, 6))), torch.randint(3, (40,))).backward()
        contributions, missing = gather(optimizer._layers, optimizer._capture, release_calls=False)
        assert not missing
        grads = {(one.name, name): p.grad.clone() for one in optimizer._layers for name, p in one.parameters.items()}
        seen.append((contributions, grads))
        optimizer._capture.forget()
    return optimizer, seen


def alone(contributions, grads, layer, name):
    """Return what concerns one parameter."""
    batches = contributions.by_layer[layer][name]
    return Contributions({layer: {name: batches}}), {(layer, name): grads[layer, name]}


@pytest.mark.parametrize("scaling", ["kronecker", "diagonal"])
def test_many_parameters_have_the_d_of_each_alone(scaling):
    optimizer, seen = refreshed(scaling)
    together, one_by_one = {}, {}
    for contributions, grads in seen:
        together = updated_moments(together, contributions, optimizer._layers, grads, scaling)
        for layer in optimizer._layers:
            for name in layer.parameters:
                own = alone(contributions, grads, layer.name, name)
                before = one_by_one.get((layer.name, name), {})
                after = updated_moments(before, own[0], optimizer._layers, own[1], scaling)
                one_by_one[layer.name, name] = after
    scales = scales_of(together, optimizer._layers)
    assert sum(map(len, scales.values())) == len(list(optimizer._module.parameters()))
    matrices = 0
    for (layer, name), moments in one_by_one.items():
        torch.testing.assert_close(together[layer][name], moments[layer][name], **EXACT)
        ours, theirs = scales[layer][name], scales_of(moments, optimizer._layers)[layer][name]
        for a, b in zip(ours.itself(), theirs.itself(), strict=True):
            torch.testing.assert_close(a, b, **EXACT)
        for inverse, side in zip(ours.inverse, ours.itself(), strict=True):
            product = inverse @ side if side.dim() == 3 else (inverse * side).diag_embed()
            torch.testing.assert_close(product, torch.eye(side.shape[1], dtype=DOUBLE).expand_as(product), **EXACT)
            matrices += side.dim() == 3
    assert (matrices > 8) == (scaling == "kronecker")


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_one_parameter_keeps_its_d_while_others_of_its_size_move_on(bad):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4))).to(DOUBLE)
    optimizer = TENGraD(model, scaling="kronecker")
    F.cross_entropy(model(torch.randn(9, 6, dtype=DOUBLE)), torch.zeros(9, dtype=torch.long)).backward()
    optimizer.step()
    known = optimizer._curvature.moments
    spoiled = {("0", "weight"): "gradient", ("1", "weight"): "rows", ("2", "bias"): "one entry", ("3", "weight"): "a"}
    rows, grads = {}, {}
    for layer in optimizer._layers:
        for name, p in layer.parameters.items():
            what, j_NK = spoiled.get((layer.name, name)), torch.ones(3, *p.shape, dtype=DOUBLE)
            grads[layer.name, name] = torch.full_like(p, bad if what == "gradient" else 1.0)
            j_NK[{"rows": slice(None), "one entry": (1, 0)}.get(what, slice(0))] = bad
            one = PerSampleGrads(j_NK)
            if what == "a":
                one = OuterProducts(*(torch.ones(3, 1, 2, 6, dtype=DOUBLE) for _ in range(2)))
                one.a[1, 0, 1, 2] = bad
            rows.setdefault(layer.name, {})[name] = [[one]]
    after = updated_moments(known, Contributions(rows), optimizer._layers, grads, "kronecker")
    for layer in optimizer._layers:
        for name in layer.parameters:
            ours, before = after[layer.name][name], known[layer.name][name]
            if (layer.name, name) in spoiled:
                torch.testing.assert_close(ours, before, rtol=0, atol=0)
            else:
                assert ours.weight.item() == pytest.approx(1 - KEEP**2)
                assert all(x.isfinite().all() for x in ours)


def sides(groups, outputs, inputs, left, right):
    """Return a random multiplier, with matrices where ``left`` and ``right`` say so."""
    sizes = [(groups, n, n) if full else (groups, n) for n, full in ((outputs, left), (inputs, right))]
    return Multiplier(*(torch.randn(size, dtype=DOUBLE) for size in sizes))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("positions", [1, 4, 40])
@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_explicit_rows_are_multiplied_before_or_after(kind, positions, groups, left, right):
    """L J M is the same from factors, from rows, and where each side takes what has fewer entries."""
    torch.manual_seed(0)
    n, outputs, inputs = 5, 3, 6
    g = torch.randn(n, groups, positions, outputs, dtype=DOUBLE)
    if kind == "dense":
        a = torch.randn(n, groups, positions, inputs, dtype=DOUBLE)
    else:
        x = torch.randn(n, groups * inputs, 1, positions, dtype=DOUBLE)
        a = ConvInput(x, [1, 3], ConvGeometry((1, 1), (0, 1), (1, 1), groups))
    outer, by = OuterProducts(a, g), sides(groups, outputs, inputs, left, right)
    expected = by.of_outer_products(outer).sample_grads(kernels)
    torch.testing.assert_close(by.of_rows(outer.sample_grads(kernels)), expected, **EXACT)
    torch.testing.assert_close(by.explicit_rows(outer, kernels), expected, **EXACT)


def test_k_from_factors_is_that_of_the_rows():
    torch.manual_seed(0)
    moments = [x @ x.mT for x in torch.randn(2, 1, 6, 9, dtype=DOUBLE)]
    scale = Scale(*sides_of([torch.linalg.eigh(moment) for moment in moments]))
    outer = OuterProducts(*(torch.randn(7, 1, 2, 6, dtype=DOUBLE) for _ in range(2)))
    assert scale.inverse.prefers_factors(outer)
    j_NK = scale.inverse.explicit_rows(outer, kernels)
    from_rows, from_factors = (PerSample(j_NK, kernels, "samples", scale, one).for_gram() for one in (None, outer))
    torch.testing.assert_close(from_rows.gram(), from_factors.gram(), **EXACT)
    assert not scale.inverse.prefers_factors(OuterProducts(*(torch.ones(7, 1, 12, 6) for _ in range(2))))


def test_a_state_holds_no_memory_that_it_does_not_need():
    """Tensors that were computed together are stored once, and what a refresh leaves as it is has its own memory."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(8)))
    optimizer = TENGraD(model, scaling="kronecker", refresh_every=1, representation="per_sample")
    for number in range(3):
        model[0].requires_grad_(number == 0)
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(64, 16)), torch.zeros(64, dtype=torch.long)).backward()
        optimizer.step()
    state, file = optimizer.state_dict(), io.BytesIO()
    torch.save(state, file)
    tensors = {x.data_ptr(): x.nbytes for x in tensors_in(state)}
    assert file.tell() < 1.2 * sum(tensors.values()) + 2**16
    kept = optimizer._curvature.moments["0"]["weight"]
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in kept)
    jacobians = [one for layer in optimizer._curvature.jacobians.values() for one in layer.values()]
    assert all(one.factors is None for one in jacobians if isinstance(one, PerSample))


@pytest.mark.parametrize("scaling", ["kronecker", "diagonal"])
def test_explicit_rows_in_micro_batches_give_the_d_of_one_batch(scaling):
    """One of the micro-batches has zero rows, as of a forward that did not use the parameter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = TENGraD(model)
    j_NK = {name: torch.randn(9, *p.shape, dtype=DOUBLE) for name, p in model[0].named_parameters()}
    grads = {("0", name): rows.mean(0) for name, rows in j_NK.items()}
    for rows in j_NK.values():
        rows[:2] *= 0.1
        rows[5:] = 0.0
    found = [
        updated_moments(
            {},
            Contributions({"0": {n: [[PerSampleGrads(part)] for part in x.split(sizes)] for n, x in j_NK.items()}}),
            optimizer._layers,
            grads,
            scaling,
        )
        for sizes in ([9], [2, 3, 4])
    ]
    torch.testing.assert_close(*({n: tuple(own) for n, own in one["0"].items()} for one in found), **EXACT)
