"""The BFGS formula, its limited-memory form and the double damping, in float64."""

import pytest
import torch

from tengrad_triton.baselines.bfgs import DenseInverse, LimitedMemoryInverse, double_damping

pytestmark = pytest.mark.usefixtures("float64")


def pairs(seed, count, groups=2, entries=5):
    """Return pairs of a positive definite Hessian, s by s."""
    torch.manual_seed(seed)
    root = torch.randn(groups, entries, entries)
    hessian = root @ root.mT + torch.eye(entries)
    return [(s, (hessian @ s[..., None])[..., 0]) for s in torch.randn(count, groups, entries)]


@pytest.mark.parametrize("kept", [1, 3, 9])
def test_limited_memory_is_the_formula_on_the_last_pairs(kept):
    all_pairs = pairs(0, 6)
    all_pairs[4][1][1] *= -1  # one group without curvature: its pair changes nothing there
    memory = LimitedMemoryInverse.identity(torch.zeros(2, 5), kept)
    for s, y in all_pairs:
        memory = memory.updated(s, y)
    dense = DenseInverse(torch.eye(5).repeat(2, 1, 1))
    for s, y in all_pairs[-kept:]:
        dense = dense.updated(s, y)
    v_GOI = torch.randn(2, 5, 3)
    assert torch.allclose(memory.apply(v_GOI), dense.apply(v_GOI), rtol=1e-9, atol=1e-9)
    assert torch.allclose(memory.apply(all_pairs[-1][1][..., None])[..., 0], all_pairs[-1][0])  # the secant equation


def test_bfgs_is_the_formula():
    (s, y), h = pairs(1, 1)[0], pairs(2, 1)[0]
    h_GOO = torch.eye(5) + h[0][:, :, None] * h[0][:, None, :]
    after = DenseInverse(h_GOO).updated(s, y).h_GOO
    for group in range(2):
        rho = 1 / (s[group] @ y[group])
        left = torch.eye(5) - rho * torch.outer(s[group], y[group])
        expected = left @ h_GOO[group] @ left.mT + rho * torch.outer(s[group], s[group])
        assert torch.allclose(after[group], expected, rtol=1e-10, atol=1e-12)
        assert torch.allclose(after[group] @ y[group], s[group], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("least", [0.1, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_double_damping_leaves_a_pair_with_enough_curvature(seed, least):
    torch.manual_seed(seed)
    s, y = torch.randn(2, 6, 5)
    inverse = LimitedMemoryInverse.identity(s, 9)
    for pair in pairs(seed, 3, groups=6):
        inverse = inverse.updated(*pair)
    new_s, new_y = double_damping(inverse, s, y, 0.2, least)
    hy = inverse.apply(y[..., None])[..., 0]
    assert ((new_s * y).sum(1) >= 0.2 * (y * hy).sum(1) * (1 - 1e-12)).all()
    assert ((new_s * new_y).sum(1) >= least * new_s.square().sum(1) * (1 - 1e-12)).all()
    fine = double_damping(inverse, hy, y, 0.2, 1e-9)  # nothing to do where s is H y
    assert all(torch.equal(one, other) for one, other in zip(fine, (hy, y), strict=True))
