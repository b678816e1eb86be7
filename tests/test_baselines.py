"""The steps of the baselines against dense computations in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from dense import relative_error, sample_gradients
from torch import nn

from tengrad_triton.baselines import EKFAC, KBFGS, KBFGSL, KFAC
from tengrad_triton.baselines.bfgs import DenseInverse
from tengrad_triton.baselines.linalg import eigenbasis, inverse

pytestmark = pytest.mark.usefixtures("float64")

N = 7
PLAIN = {"lr": 1.0, "momentum": 0.0, "fisher": "empirical", "kl_clip": None}


class Twice(nn.Module):
    """A layer that is called twice in one forward: twice the positions."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return torch.stack([self.layer(x), self.layer(x.flip(1))], 1)


# Layers, and the shape of a sample's input.
LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), (4,)),
    "linear on tokens": (lambda: nn.Linear(4, 3), (5, 4)),
    "linear, called twice": (Twice, (4,)),
    "convolution": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 4, 5)),
    "convolution, strided, dilated": (lambda: nn.Conv2d(2, 3, (2, 3), stride=2, dilation=(1, 2)), (2, 7, 6)),
    "grouped convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 4, 3)),
    "depthwise convolution": (lambda: nn.Conv2d(3, 3, 3, groups=3, bias=False), (3, 5, 4)),
}


def single(case):
    """Return a model of one layer, a batch, and derivatives of each sample's own loss with respect to the output."""
    make, shape = LAYERS[case]
    torch.manual_seed(1)
    model = make()
    x = torch.randn(N, *shape)
    return model, x, torch.randn_like(model(x))


def unfolded(model, x, c):
    """Return a_GNPI with the homogeneous coordinate and g_GNPO, in the weights' own order."""
    layer = model.layer if isinstance(model, Twice) else model
    if isinstance(layer, nn.Conv2d):
        windows = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        a = windows.view(N, layer.groups, -1, windows.shape[-1]).permute(1, 0, 3, 2)
        g = c.flatten(2).view(N, layer.groups, -1, windows.shape[-1]).permute(1, 0, 3, 2)
    else:
        a = torch.stack([x, x.flip(1)], 1)[None] if isinstance(model, Twice) else x.view(1, N, -1, 4)
        g = c.reshape(1, N, -1, 3)
    if layer.bias is not None:
        a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
    return a, g


def step_along(optimizer, model, x, c):
    """Take one step on the mean of ⟨c_n, model(x_n)⟩; return what was subtracted, and the gradient, as v_GOI."""
    layer = model.layer if isinstance(model, Twice) else model
    groups = getattr(layer, "groups", 1)

    def matrices(tensors):
        return torch.cat([t.reshape(groups, len(t) // groups, -1) for t in tensors], 2)

    before = copy.deepcopy(list(layer.parameters()))
    (model(x) * c).flatten(1).sum(1).mean().backward()
    optimizer.step()
    moved = [old.detach() - new.detach() for old, new in zip(before, layer.parameters(), strict=True)]
    return matrices(moved), matrices([p.grad for p in layer.parameters()])


def solved_densely(blocks, v_GOI):
    """Return (F + …)⁻¹ V with one dense matrix a group over the entries (o, i)."""
    return torch.stack([torch.linalg.solve(f, v.flatten()).view_as(v) for f, v in zip(blocks, v_GOI, strict=True)])


@pytest.mark.parametrize("case", LAYERS)
def test_kfac_is_the_damped_kronecker_product(case):
    model, x, c = single(case)
    damping = 0.3
    moved, v_GOI = step_along(KFAC(model, damping=damping, **PLAIN), model, x, c)
    blocks = []
    for a, g in zip(*unfolded(model, x, c), strict=True):
        a_II = torch.einsum("npi,npj->ij", a, a) / N
        g_OO = torch.einsum("npo,npq->oq", g, g) / (N * g.shape[1])
        pi = ((a_II.trace() / len(a_II)) / (g_OO.trace() / len(g_OO))).sqrt()
        root = damping**0.5
        blocks.append(torch.kron(g_OO + root / pi * torch.eye(len(g_OO)), a_II + root * pi * torch.eye(len(a_II))))
    assert torch.allclose(moved, solved_densely(blocks, v_GOI), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", LAYERS)
def test_ekfac_is_the_diagonal_of_the_fisher_matrix_in_kfacs_eigenbasis(case):
    model, x, c = single(case)
    damping = 0.3
    moved, v_GOI = step_along(EKFAC(model, damping=damping, **PLAIN), model, x, c)
    blocks = []
    for a, g in zip(*unfolded(model, x, c), strict=True):
        u_a, u_g = (torch.linalg.eigh(torch.einsum("npi,npj->ij", t, t)).eigenvectors for t in (a, g))
        basis = torch.kron(u_g, u_a)
        j_NK = torch.einsum("npo,npi->noi", g, a).flatten(1)
        scale = (j_NK @ basis).square().mean(0)
        blocks.append(basis @ torch.diag(scale + damping) @ basis.mT)
    assert torch.allclose(moved, solved_densely(blocks, v_GOI), rtol=1e-9, atol=1e-12)


def test_kfac_is_the_exact_fisher_block_where_inputs_and_derivatives_are_independent():
    """One position, and every input with every derivative: E[a aᵀ ⊗ g gᵀ] = E[a aᵀ] ⊗ E[g gᵀ]."""
    torch.manual_seed(0)
    inputs, derivatives, damping = torch.randn(6, 3), torch.randn(4, 2), 1e-16
    x, c = inputs.repeat_interleave(4, 0), derivatives.repeat(6, 1)
    model = nn.Linear(3, 2)
    optimizer = KFAC(model, damping=damping, **PLAIN)
    moved, v_GOI = step_along(optimizer, model, x, c)
    j_NK = torch.einsum("no,ni->noi", c, F.pad(x, (0, 1), value=1.0)).flatten(1)
    fisher = j_NK.mT @ j_NK / len(j_NK)
    (state,) = optimizer._curvature.layers.values()
    assert torch.allclose(torch.kron(state.g_GOO[0], state.a_GII[0]), fisher, rtol=1e-12, atol=1e-14)
    # Each damped factor's inverse is off by at most its shift over its smallest eigenvalue, relatively.
    exact = solved_densely([fisher], v_GOI)
    shifts = [m.trace() / len(m) for m in (state.a_GII[0], state.g_GOO[0])]
    pi = (shifts[0] / shifts[1]).sqrt()
    least = [torch.linalg.eigvalsh(m)[0] for m in (state.a_GII[0], state.g_GOO[0])]
    bound = damping**0.5 * (pi / least[0] + 1 / pi / least[1])
    condition = torch.linalg.cond(fisher)
    assert (moved - exact).norm() <= 2 * (bound + condition * torch.finfo(torch.float64).eps) * exact.norm()


@pytest.mark.parametrize("seed", range(5))
def test_ekfac_is_at_least_as_near_to_the_fisher_matrix_as_kfac(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 5, bias=seed % 2 == 0), nn.Tanh(), nn.Linear(5, 3)
    )
    x, y = torch.randn(9, 1, 4, 4), torch.randint(3, (9,))
    grads = sample_gradients(model, x, y, lambda out, target: F.cross_entropy(out, target, reduction="sum"))
    states = {}
    for make in (KFAC, EKFAC):
        twin = copy.deepcopy(model)
        optimizer = make(twin, **{**PLAIN, "lr": 0.0})
        F.cross_entropy(twin(x), y).backward()
        optimizer.step()
        states[make] = optimizer._curvature.layers
    for layer, kfac in states[KFAC].items():
        ekfac = states[EKFAC][layer]
        # The convolution has one input channel: its canonical order is the weight's own.
        names = [f"{layer.module}.{name}" for name in layer.param_names]
        j_NK = torch.cat([grads[name].reshape(9, kfac.g_GOO.shape[1], -1) for name in names], 2).flatten(1)
        fisher = j_NK.mT @ j_NK / 9
        basis = torch.kron(ekfac.basis_g_GOO[0], ekfac.basis_a_GII[0])
        far = (torch.kron(kfac.g_GOO[0], kfac.a_GII[0]) - fisher).norm()
        near = (basis @ torch.diag(ekfac.scale_GOI[0].flatten()) @ basis.mT - fisher).norm()
        assert near <= far * (1 + 1e-12)
        assert far > 1e-3 * fisher.norm()  # the case is not one where both are exact


def test_exact_rows_make_the_output_factor_the_likelihoods_hessian():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(N, 4), torch.randint(3, (N,))
    p_NC = model(x).softmax(1).detach()
    optimizer = KFAC(model, **{**PLAIN, "fisher": "exact"})
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    (state,) = optimizer._curvature.layers.values()
    hessian_CC = (torch.diag_embed(p_NC) - p_NC[:, :, None] * p_NC[:, None]).mean(0)
    assert torch.allclose(state.g_GOO[0], hessian_CC, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("make", [KFAC, EKFAC])
def test_micro_batches_are_one_batch(make):
    model, x, c = single("convolution")
    twin = copy.deepcopy(model)
    whole, parts = make(model, **PLAIN), make(twin, **PLAIN)
    step_along(whole, model, x, c)
    for part in (slice(0, 3), slice(3, N)):
        ((twin(x[part]) * c[part]).sum() / N).backward()
    parts.step()
    ours, theirs = dict(twin.named_parameters()), dict(model.named_parameters())
    assert relative_error(ours, theirs) < 1e-12


@pytest.mark.parametrize("make", [KFAC, EKFAC])
def test_kl_clip_shortens_the_step_to_its_bound(make):
    model, x, c = single("linear")
    twin = copy.deepcopy(model)
    free, v_GOI = step_along(make(model, **PLAIN), model, x, c)
    bound = 0.01 * (free * v_GOI).sum()
    clipped, _ = step_along(make(twin, **{**PLAIN, "kl_clip": bound.item()}), twin, x, c)
    assert torch.allclose((clipped * free).sum(), clipped.norm() * free.norm())  # the same direction
    assert torch.allclose((clipped * v_GOI).sum().square() / (free * v_GOI).sum(), bound)


def test_factors_that_cannot_be_factored_leave_the_others_alone():
    torch.manual_seed(0)
    root_BII = torch.randn(3, 4, 4)
    good_BII = root_BII @ root_BII.mT
    bad_BII = good_BII.clone()
    bad_BII[1] -= 10 * torch.eye(4)
    inverse_BII, failed_B = inverse(bad_BII)
    assert failed_B.tolist() == [False, True, False]
    assert torch.allclose(inverse_BII[::2] @ good_BII[::2], torch.eye(4).expand(2, 4, 4), rtol=1e-8, atol=1e-8)
    assert torch.allclose(inverse_BII[1], torch.eye(4) / bad_BII[1].trace())
    bad_BII[1] = torch.nan
    basis_BII, failed_B = eigenbasis(bad_BII)
    assert failed_B.tolist() == [False, True, False]
    assert torch.equal(basis_BII[1], torch.eye(4))


@pytest.mark.parametrize("seed", range(3))
def test_a_factor_of_units_that_are_mostly_dead_has_an_eigenbasis(seed):
    """LAPACK's single-precision solver raises on such a matrix, or returns NaN."""
    generator = torch.Generator().manual_seed(seed)
    x_NI = 0.5 + 0.1 * torch.rand(64, 16, generator=generator, dtype=torch.float32)
    weight_IO = torch.randn(16, 500, generator=generator, dtype=torch.float32) / 16
    hidden_NO = (x_NI @ weight_IO - 0.1).relu()
    a_BOO = (hidden_NO.mT @ hidden_NO / 64)[None]
    basis_BOO, failed_B = eigenbasis(a_BOO)
    assert not failed_B.any()
    rotated_BOO = basis_BOO.mT @ a_BOO @ basis_BOO
    off = rotated_BOO - torch.diag_embed(rotated_BOO.diagonal(dim1=1, dim2=2))
    assert off.norm() <= 500 * torch.finfo(torch.float32).eps * a_BOO.norm()


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("make", [KBFGS, KBFGSL])
def test_kbfgs_satisfies_its_secant_equations(make, case):
    """On ½ ⟨z, h z⟩ the mean derivative moves by h times what the mean output does, with nothing to damp."""
    model, x, _ = single(case)
    damping, before = 0.04, {}
    optimizer = make(model, lr=0.01, momentum=0.0, damping=damping, stat_decay=0.0)
    shape = model(x).shape
    channels = 1 if case.endswith("convolution") or "strided" in case else len(shape) - 1
    curvature = torch.linspace(0.5, 2.0, shape[channels])
    h = curvature.view([-1 if d == channels else 1 for d in range(len(shape))])

    def closure():
        optimizer.zero_grad()
        output = model(x)
        before.setdefault("z", output.detach())
        loss = (h * output.square()).flatten(1).sum(1).mean() / 2
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    (state,) = optimizer._curvature.layers.values()
    others = [d for d in range(len(shape)) if d != channels]
    s_GO = (model(x).detach() - before["z"]).mean(others).view_as(state.s_GO)
    y_GO = curvature.view_as(s_GO) * s_GO
    assert torch.allclose(state.s_GO, s_GO, rtol=1e-9, atol=1e-13)
    assert torch.allclose(state.y_GO, y_GO, rtol=1e-9, atol=1e-13)
    assert torch.allclose(state.output_side.apply(y_GO[..., None])[..., 0], s_GO, rtol=1e-9, atol=1e-13)
    a_GII = torch.stack([m.mT @ m / N for m in inputs_of_groups(model, x)])
    mean_a_GI = torch.stack([m.mean(0) for m in inputs_of_groups(model, x)])
    shifted = a_GII + damping**0.5 * torch.eye(a_GII.shape[1])
    s_GI = torch.linalg.solve(shifted, mean_a_GI)
    updated = DenseInverse(torch.linalg.inv(shifted)).updated(s_GI, (shifted @ s_GI[..., None])[..., 0])
    assert torch.allclose(sorted_spectrum(state.input_side.h_GOO), sorted_spectrum(updated.h_GOO), rtol=1e-8)


def inputs_of_groups(model, x):
    """Return a_RI of every group."""
    a, _ = unfolded(model, x, torch.zeros_like(model(x)))
    return a.flatten(1, 2)


def sorted_spectrum(h_GII):
    """Return the eigenvalues, which the order of the inputs does not change."""
    return torch.linalg.eigvalsh(h_GII)
