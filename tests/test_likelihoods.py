"""The likelihoods: the outer products of drawn rows average to the Gauss-Newton matrix of the likelihood's loss."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from loss_checks import said, why
from torch import nn
from torch.func import grad, hessian, jacrev

from tengrad_triton import TENGraD, compile_train_step
from tengrad_triton.likelihoods import LIKELIHOODS, Bernoulli, Categorical, Gaussian

TOLERANCE = 1e-12  # of numbers near 1 in float64, from a few hundred roundings

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


# Weights and targets: F is the Gauss-Newton matrix of exactly that loss

SAMPLES, CLASSES, TOKENS = 2, 3, 2
CLASS_WEIGHT, POS_WEIGHT = torch.tensor([0.2, 1.7, 3.0]).double(), torch.tensor([0.3, 2.0, 5.0]).double()
OWN = torch.tensor([0.4, 2.5]).double()  # the weights of the samples
LABELS, TOKEN_LABELS = torch.tensor([2, 0]), torch.tensor([[1, 2], [-100, 0]])
YES = torch.tensor([[1.0, 0.0, 0.3], [0.0, 1.0, 1.0]]).double()
VALUES = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.1, -1.0]]).double()


def of_tokens(output, **options):
    """Return the cross entropies of [N, T, C] as rows of T, each divided by what torch's mean divides by."""
    options = {"label_smoothing": 0.0, "weight": None, **options}
    losses = F.cross_entropy(output.movedim(-1, 1), TOKEN_LABELS, reduction="none", **options)
    counts = (TOKEN_LABELS >= 0).double()
    each = counts if options["weight"] is None else options["weight"][TOKEN_LABELS.clamp(min=0)] * counts
    return losses / each.sum()


def ce(labels=LABELS, **options):
    return lambda output: F.cross_entropy(output, labels, **options)


def bce(target=YES, **options):
    return lambda output: F.binary_cross_entropy_with_logits(output, target, **options)


# name: (likelihood, its loss, the shape of the output)
WEIGHTED = {
    "smoothed labels": (Categorical(), ce(label_smoothing=0.3), (SAMPLES, CLASSES)),
    "soft labels": (Categorical(), ce(YES.softmax(1)), (SAMPLES, CLASSES)),
    "class weights": (
        said(Categorical(weight=CLASS_WEIGHT), target=LABELS),
        ce(weight=CLASS_WEIGHT),
        (SAMPLES, CLASSES),
    ),
    "class weights as a list, one label ignored": (
        said(Categorical(weight=CLASS_WEIGHT.tolist(), ignore_index=0), target=LABELS),
        ce(weight=CLASS_WEIGHT.float().double(), ignore_index=0),
        (SAMPLES, CLASSES),
    ),
    "class weights and smoothed labels": (
        said(Categorical(weight=CLASS_WEIGHT, label_smoothing=0.3), target=LABELS),
        ce(weight=CLASS_WEIGHT, label_smoothing=0.3),
        (SAMPLES, CLASSES),
    ),
    "class weights, tokens last": (
        said(Categorical(dim=1, weight=CLASS_WEIGHT), target=TOKEN_LABELS),
        ce(TOKEN_LABELS, weight=CLASS_WEIGHT),
        (SAMPLES, CLASSES, TOKENS),
    ),
    "class weights and smoothed labels of tokens, weights of samples": (
        said(Categorical(-1, weight=CLASS_WEIGHT, label_smoothing=0.3), target=TOKEN_LABELS, sample_weight=OWN),
        lambda output: (of_tokens(output, weight=CLASS_WEIGHT, label_smoothing=0.3) * OWN[:, None]).sum(),
        (SAMPLES, TOKENS, CLASSES),
    ),
    "weights of samples": (
        said(Categorical(), sample_weight=OWN),
        lambda output: (F.cross_entropy(output, LABELS, reduction="none") * OWN).mean(),
        (SAMPLES, CLASSES),
    ),
    "weights of samples, ignored tokens": (
        said(Categorical(-1), target=TOKEN_LABELS, sample_weight=OWN),
        lambda output: (of_tokens(output) * OWN[:, None]).sum(),
        (SAMPLES, TOKENS, CLASSES),
    ),
    "squares, weights of samples": (
        said(Gaussian(), target=VALUES, sample_weight=OWN),
        lambda output: ((output - VALUES).square() * OWN[:, None]).mean(),
        (SAMPLES, 3),
    ),
    "pos_weight": (said(Bernoulli(POS_WEIGHT), target=YES), bce(pos_weight=POS_WEIGHT), (SAMPLES, 3)),
    "one pos_weight": (said(Bernoulli(4.0), target=YES), bce(pos_weight=torch.tensor(4.0)), (SAMPLES, 3)),
    "pos_weight, weights of samples": (
        said(Bernoulli(POS_WEIGHT), target=YES, sample_weight=OWN),
        bce(pos_weight=POS_WEIGHT, weight=OWN[:, None]),
        (SAMPLES, 3),
    ),
    "yes or no, weights of samples": (said(Bernoulli(), sample_weight=OWN), bce(weight=OWN[:, None]), (SAMPLES, 3)),
}


def output_of(shape, seed=0):
    return 1.5 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def own_hessians(loss, output):
    """Return N times the diagonal blocks of the loss's dense Hessian: [N, D, D]."""
    outputs = output[0].numel()
    dense = hessian(lambda flat: loss(flat.view_as(output)))(output.flatten())
    blocks = dense.view(len(output), outputs, len(output), outputs)
    return len(output) * torch.stack([blocks[n, :, n] for n in range(len(output))])


@pytest.mark.parametrize("case", WEIGHTED)
def test_the_factor_is_that_of_the_dense_hessian(case):
    likelihood, loss, shape = WEIGHTED[case]
    output = output_of(shape)
    factor_RND = likelihood.hessian_factor(output).flatten(2)
    actual = torch.einsum("rni,rnj->nij", factor_RND, factor_RND)
    assert (actual - own_hessians(loss, output)).abs().max() < TOLERANCE


def all_targets(likelihood, output):
    """Yield each target that may be drawn, with its probability.

    A row of squares is linear in the noise, so that noise of ±1, with the same mean and covariance, has the same mean
    of products as a normal one.
    """
    if isinstance(likelihood, Categorical):
        log_p = output.movedim(likelihood.dim, -1).log_softmax(-1)
        for labels in itertools.product(range(CLASSES), repeat=log_p[..., 0].numel()):
            target = torch.tensor(labels).view(log_p.shape[:-1])
            yield target, log_p.gather(-1, target[..., None]).sum().exp()
        return
    for bits in itertools.product((0.0, 1.0), repeat=output.numel()):
        target = torch.tensor(bits, dtype=output.dtype).view_as(output)
        if isinstance(likelihood, Gaussian):
            yield likelihood.from_noise(output, 2 * target - 1), 0.5 ** output.numel()
        else:
            yield target, torch.where(target > 0, output.sigmoid(), (-output).sigmoid()).prod()


@pytest.mark.parametrize("case", WEIGHTED)
def test_rows_at_all_labels_average_to_the_dense_hessian(case):
    likelihood, loss, shape = WEIGHTED[case]
    output, mean = output_of(shape), 0
    for target, probability in all_targets(likelihood, output):
        row_ND = grad(likelihood.nll)(output, target).flatten(1)
        mean = mean + probability * row_ND[:, :, None] * row_ND[:, None]
    assert (mean - own_hessians(loss, output)).abs().max() < TOLERANCE


@pytest.mark.parametrize("case", WEIGHTED)
def test_losses_with_what_was_said_are_the_likelihoods(case):
    likelihood, loss, shape = WEIGHTED[case]
    assert why(likelihood, loss, output_of(shape)) is None


# Refusals

REFUSALS = {
    "one class": (Categorical(), (4, 1), r"\(4, 1\), with one class along dimension 1.*likelihood='gaussian'"),
    "one class, last": (Categorical(-1), (4, 6, 1), r"one class along dimension -1.*'bernoulli'"),
    "one class, second": (Categorical(1), (4, 1, 6), r"one class along dimension 1"),
    "no labels": (Categorical(weight=[1, 2, 3]), (4, 3), r"Categorical\(weight=...\) needs the targets.*shape \(4,\)"),
    "no targets": (Bernoulli(2.0), (4, 3), r"Bernoulli\(pos_weight=...\) needs the targets.*shape \(4, 3\)"),
    "old labels": (said(Categorical(), target=torch.zeros(5)), (4, 3), r"target has shape \(5,\).*returned \(4, 3\)"),
    "old tokens": (said(Categorical(-1), target=torch.zeros(4, 7)), (4, 6, 3), r"\(4, 7\).*\(4, 6, 3\)"),
    "old values": (said(Gaussian(), target=torch.zeros(5, 3)), (4, 3), r"\(5, 3\).*\(4, 3\)"),
    "values of [N]": (said(Gaussian(), target=torch.zeros(4)), (4, 1), r"\(4,\).*\(4, 1\)"),
    "old bits": (said(Bernoulli(2.0), target=torch.zeros(5, 3)), (4, 3), r"\(5, 3\).*\(4, 3\)"),
    "weights of another batch": (said(Categorical(), sample_weight=torch.ones(5)), (4, 3), r"\(5,\).*\(4, 3\)"),
    "weights of another batch, gaussian": (said(Gaussian(), sample_weight=torch.ones(5)), (4, 3), r"\(5,\).*\(4, 3\)"),
    "weights of another batch, bits": (said(Bernoulli(), sample_weight=torch.ones(5)), (4, 3), r"\(5,\).*\(4, 3\)"),
    "negative weights": (said(Categorical(), sample_weight=torch.tensor([1.0, -2.0])), (2, 3), "at least 0, got -2.0"),
    "classes without weight": (said(Categorical(weight=[1, 2]), target=torch.zeros(4).long()), (4, 3), "3 classes"),
    "weights of soft labels": (said(Categorical(weight=[1, 2, 3]), target=torch.zeros(4)), (4, 3), "integer labels"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_an_error_by_every_door(case):
    likelihood, shape, message = REFUSALS[case]
    output, generator = torch.randn(shape), torch.Generator()
    doors = {
        "sampled": lambda: likelihood.nll(output, likelihood.sample(output, generator)),
        "exact": lambda: likelihood.hessian_factor(output),
        "check": lambda: likelihood.why_loss_differs(output, torch.ones_like(output)),
    }
    for door in doors.values():
        with pytest.raises(ValueError, match=message):
            door()


@pytest.mark.parametrize("make", [lambda: Categorical(weight=[1.0, -1.0]), lambda: Bernoulli(-2.0)])
def test_negative_weights_are_refused(make):
    with pytest.raises(ValueError, match="at least 0"):
        make()


def test_smoothing_is_a_share():
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 2"):
        Categorical(label_smoothing=2)


# In the optimizer


@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_one_class_is_refused_in_the_forward(fisher):
    model = nn.Linear(4, 1)
    _optimizer = TENGraD(model, fisher=fisher)
    with pytest.raises(ValueError, match="one class along dimension 1"):
        model(torch.randn(6, 4))


def test_what_was_said_reaches_the_fisher_matrix():
    likelihood, loss, (samples, _) = WEIGHTED["class weights"]
    model, x = nn.Linear(4, CLASSES, bias=False).double(), output_of((samples, 4), seed=3)
    blocks = own_hessians(loss, model(x).detach())
    given = {"lr": 0.0, "scaling": "none", "representation": "per_sample"}
    optimizer = TENGraD(model, fisher="exact", likelihood=likelihood, **given)
    loss(model(x)).backward()
    optimizer.step()
    j_NK = optimizer._curvature.jacobians[""]["weight"].j_NK
    expected = torch.einsum("ncd,ni,nj->cidj", blocks, x, x).reshape(12, 12) / samples
    assert (j_NK.mT @ j_NK / optimizer._curvature.rows - expected).abs().max() < TOLERANCE


@pytest.mark.filterwarnings("ignore:the loss is not that of the likelihood")  # which knows weights that it has not
@pytest.mark.parametrize("name", ["target", "sample_weight"])
def test_a_compiled_step_sees_what_is_said_after_it_was_compiled(name):
    """Said, and then taken back: the refresh is the plain one exactly while something is set."""
    likelihood, model, (x, y) = Categorical(), nn.Linear(4, 3), (torch.randn(6, 4), torch.arange(6) % 3)
    optimizer = TENGraD(model, lr=0.0, likelihood=likelihood, refresh_every=1, representation="per_sample")
    step = compile_train_step(model, F.cross_entropy, optimizer, backend="aot_eager")
    step(x, y)
    assert step.why_plain is None
    setattr(likelihood, name, torch.zeros(6).to(torch.long if name == "target" else torch.float))
    assert "one batch" in step.why_plain
    likelihood.ignore_index = 0  # all of the labels that were set
    step(x, y)
    assert not optimizer._curvature.jacobians[""]["weight"].j_NK.any()
    setattr(likelihood, name, None)
    step(x, y)
    assert step.why_plain is None
    assert optimizer._curvature.jacobians[""]["weight"].j_NK.any()
