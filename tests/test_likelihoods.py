"""The likelihoods: the outer products of drawn rows average to the Gauss-Newton matrix of the likelihood's loss."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jacrev

from tengrad_triton.likelihoods import LIKELIHOODS

LOSSES = {
    "categorical": lambda output: F.cross_entropy(output, torch.zeros(len(output), dtype=torch.long)),
    "gaussian": lambda output: F.mse_loss(output, torch.zeros_like(output)),
    "bernoulli": lambda output: F.binary_cross_entropy_with_logits(output, torch.zeros_like(output)),
}
DRAWS = 40_000


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_rows_average_to_the_gauss_newton_matrix_of_the_loss(name):
    """The Hessian of these losses with respect to the output does not depend on the target, so any target will do.

    An average of DRAWS products is within 5 standard errors of its mean with probability 1 - 6e-7 for each entry.
    """
    likelihood = LIKELIHOODS[name]
    output = torch.tensor([[0.3, -1.2, 0.8]], dtype=torch.float64)
    many = output.expand(DRAWS, -1).clone().requires_grad_()
    target = likelihood.sample(many.detach(), torch.Generator().manual_seed(0))
    (g_DC,) = torch.autograd.grad(likelihood.nll(many, target), many)
    products = g_DC[:, :, None] * g_DC[:, None, :]
    expected = jacrev(grad(LOSSES[name]))(output).reshape(3, 3)
    standard_error = products.std(0) / DRAWS**0.5
    assert ((products.mean(0) - expected).abs() <= 5 * standard_error + 1e-12).all()


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_draws_are_the_generators(name):
    output = torch.randn(7, 3)
    draws = [LIKELIHOODS[name].sample(output, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
