"""Which losses are seen to be another one than the likelihood's, from their derivative with respect to the output."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from loss_checks import said, why

from tengrad_triton.likelihoods import Bernoulli, Categorical, Gaussian, contract


def ce(labels, **options):
    return lambda output: F.cross_entropy(output, labels, **options)


def bce(target, **options):
    return lambda output: F.binary_cross_entropy_with_logits(output, target, **options)


N, C = 48, 5
LABELS_N, WEIGHT_C = torch.arange(N) % C, torch.tensor([0.2, 0.5, 1.0, 1.5, 3.0])
SOFT_NC = torch.rand(N, C, generator=torch.Generator().manual_seed(1)).mul(4).softmax(1)
HOT_NC, BITS_NC = F.one_hot(LABELS_N, C).float(), (SOFT_NC > 0.2).float()
BELOW_1 = torch.linspace(0.1, 0.9, N)
VALUES_NC = torch.randn(N, C, generator=torch.Generator().manual_seed(2))
MASKED_NT = torch.where(torch.arange(4 * N).view(N, 4) % 7 == 0, -100, torch.arange(4 * N).view(N, 4) % C)
EXTREME = 40.0  # in float32 and below, p is 0 or 1 for nearly all samples


def entropies(output, **options):
    return F.cross_entropy(output, LABELS_N, reduction="none", **options)


def focal(output):
    losses = entropies(output)
    return ((1 - (-losses).exp()) ** 2 * losses).mean()


def mixed(output):
    return 0.7 * F.cross_entropy(output, LABELS_N) + 0.3 * F.cross_entropy(output, LABELS_N.flip(0))


def mixed_two(output):
    return 0.7 * F.cross_entropy(output, YN) + 0.3 * F.cross_entropy(output, 1 - YN)


def right_already(output):
    return F.cross_entropy(output, output.argmax(1))


def tokens(dim, **options):
    return lambda output: F.cross_entropy(output.movedim(dim, 1), MASKED_NT.clamp(min=0), **options)


def masked(dim):
    return lambda output: F.cross_entropy(output.movedim(dim, 1), MASKED_NT)


def in_float32(loss):
    return lambda output: loss(output.float())


NLL, MEANS, BITS = Categorical(), Gaussian(), Bernoulli()
HALF, BF16 = {"dtype": torch.float16}, {"dtype": torch.bfloat16}
LAST, SECOND = {"shape": (N, 4, C)}, {"shape": (N, C, 4)}
TWO, ONE = {"shape": (N, 2)}, {"shape": (1, C)}
YN = torch.arange(N) % 2

# (name, likelihood, loss, of the output: shape, dtype, scale, first_two; a part of the sentence or None)
LOSSES_SEEN = [
    ("labels", NLL, ce(LABELS_N), {}, None),
    ("smoothed", NLL, ce(LABELS_N, label_smoothing=0.1), {}, None),
    ("smoothed by little", NLL, ce(LABELS_N, label_smoothing=1e-4), {}, None),
    ("smoothed, at equal logits", NLL, ce(LABELS_N, label_smoothing=0.1), {"scale": 0.0}, None),
    ("labels, at equal logits", NLL, ce(LABELS_N), {"scale": 0.0}, None),
    ("a teacher's labels", NLL, ce(SOFT_NC), {}, None),
    ("mixed", NLL, mixed, {}, None),
    ("mixed, all other classes out of question", NLL, mixed_two, {"first_two": 20.0}, None),
    ("two classes", NLL, ce(YN), TWO, None),
    ("two classes, smoothed", NLL, ce(YN, label_smoothing=0.2), TWO, None),
    ("one sample", NLL, ce(LABELS_N[:1]), ONE, None),
    ("one sample, smoothed", NLL, ce(LABELS_N[:1], label_smoothing=0.2), ONE, None),
    ("extreme", NLL, ce(LABELS_N), {"scale": EXTREME}, None),
    ("saturated", NLL, right_already, {"scale": EXTREME}, None),
    ("saturated in half", NLL, right_already, {"scale": EXTREME, **HALF}, None),
    ("half", NLL, ce(LABELS_N), HALF, None),
    ("half, loss in float32", NLL, in_float32(ce(LABELS_N)), HALF, None),
    ("bfloat16", NLL, ce(LABELS_N), BF16, None),
    ("bfloat16, loss in float32", NLL, in_float32(ce(LABELS_N, label_smoothing=0.1)), BF16, None),
    ("many classes", NLL, ce(LABELS_N), {"shape": (N, 10_000)}, None),
    ("many classes, smoothed", NLL, ce(LABELS_N, label_smoothing=0.1), {"shape": (N, 10_000)}, None),
    ("tokens last", Categorical(1), tokens(1), SECOND, None),
    ("classes last", Categorical(-1), tokens(-1), LAST, None),
    ("ignored", said(Categorical(-1), target=MASKED_NT), masked(-1), LAST, None),
    ("ignored, tokens last", said(Categorical(1), target=MASKED_NT), masked(1), SECOND, None),
    ("times 100", NLL, lambda o: 100 * F.cross_entropy(o, LABELS_N), {}, "is 100 times"),
    ("times 100 in half", NLL, lambda o: 100 * F.cross_entropy(o, LABELS_N), HALF, "is 100 times"),
    ("times 0.5", NLL, lambda o: 0.5 * F.cross_entropy(o, LABELS_N), {}, "is 0.5 times"),
    ("times 0.5, one sample", NLL, lambda o: 0.5 * F.cross_entropy(o, LABELS_N[:1]), ONE, "is 0.5 times"),
    ("times 0.5, two classes", NLL, lambda o: 0.5 * F.cross_entropy(o, YN), TWO, "is 0.5 times"),
    ("smoothed, times 0.5", NLL, lambda o: ce(LABELS_N, label_smoothing=0.1)(o) / 2, {}, "is 0.5 times"),
    ("teacher, times 100", NLL, lambda o: 100 * F.cross_entropy(o, SOFT_NC), {}, "no targets fit"),
    ("sum", NLL, ce(LABELS_N, reduction="sum"), {}, "a sum over the 48 samples"),
    ("sum, many classes", NLL, ce(LABELS_N, reduction="sum"), {"shape": (N, 10_000)}, "a sum over the 48 samples"),
    ("sum over tokens", Categorical(-1), lambda o: 4 * tokens(-1)(o), LAST, "is 4 times"),
    ("class weights", NLL, ce(LABELS_N, weight=WEIGHT_C), {}, "for some labels the derivative is 0.167 to 2.5 times"),
    ("class weights, bfloat16", NLL, in_float32(ce(LABELS_N, weight=WEIGHT_C)), BF16, "weights"),
    ("class weights, two classes", NLL, ce(YN, weight=WEIGHT_C[3:]), TWO, "0.667 to 1.33 times"),
    ("sample weights", NLL, lambda o: (entropies(o) * BELOW_1).mean(), {}, "0.1 to 0.9 times"),
    ("sample weights, 3 classes", NLL, lambda o: (F.cross_entropy(o, LABELS_N % 3, reduction="none") * BELOW_1).mean(),
     {"shape": (N, 3)}, "0.1 to 0.9 times"),
    ("sample weights of 0", NLL, lambda o: (entropies(o) * (BELOW_1 > 0.5)).mean(), {}, "24 of 48 labels have no"),
    ("other sample weights", said(Categorical(), sample_weight=BELOW_1 + 1), ce(LABELS_N), {}, "sample_weight"),
    ("other class weights", said(Categorical(weight=WEIGHT_C), target=LABELS_N), ce(LABELS_N), {}, "0.399 to 5.99"),
    ("class weights times 3", said(Categorical(weight=WEIGHT_C), target=LABELS_N),
     lambda o: 3 * ce(LABELS_N, weight=WEIGHT_C)(o), {}, "is 3 times"),
    ("class weights, other labels", said(Categorical(weight=WEIGHT_C), target=LABELS_N.flip(0)),
     ce(LABELS_N, weight=WEIGHT_C), {}, "differs from that of the weighted cross entropy"),
    ("focal", NLL, focal, {}, "focal"),
    ("ignored, but nothing said", Categorical(-1), masked(-1), LAST, "set likelihood.target"),
    ("ignored, other labels said", said(Categorical(-1), target=MASKED_NT.flip(0)), masked(-1), LAST, "do not count"),
    ("squares", NLL, lambda o: F.mse_loss(o, HOT_NC), {}, "not a cross entropy of these logits"),
    ("yes or no", NLL, bce(HOT_NC), {}, "not a cross entropy of these logits"),
    ("regularized logits", NLL, lambda o: F.cross_entropy(o, LABELS_N) + 0.1 * o.square().mean(), {}, "sums to"),
    ("squares, gaussian", MEANS, lambda o: F.mse_loss(o, VALUES_NC), {}, None),
    ("squares, equal outputs", MEANS, lambda o: F.mse_loss(o, HOT_NC), {"scale": 0.0}, None),
    ("squares times 100, gaussian", MEANS, lambda o: 100 * F.mse_loss(o, VALUES_NC), {}, None),  # other targets fit
    ("squares times 100 of targets", said(Gaussian(), target=VALUES_NC), lambda o: 100 * F.mse_loss(o, VALUES_NC), {},
     "is 100 times"),
    ("squares of targets", said(Gaussian(), target=VALUES_NC), lambda o: F.mse_loss(o, VALUES_NC), {}, None),
    ("squares of targets in half", said(Gaussian(), target=VALUES_NC.half()),
     lambda o: F.mse_loss(o, VALUES_NC.half()), HALF, None),
    ("weighted squares of targets", said(Gaussian(), target=VALUES_NC),
     lambda o: ((o - VALUES_NC).square() * BELOW_1[:, None]).mean(), {}, "0.1 to 0.9 times"),
    ("Huber of targets", said(Gaussian(), target=VALUES_NC), lambda o: F.huber_loss(o, VALUES_NC), {}, "differs"),
    ("Huber", MEANS, lambda o: F.huber_loss(o, VALUES_NC), {}, "Huber"),
    ("absolute", MEANS, lambda o: F.l1_loss(o, VALUES_NC), {}, "absolute"),
    ("labels, gaussian", MEANS, ce(LABELS_N), {}, "use likelihood='categorical'"),
    ("bits", BITS, bce(BITS_NC), {}, None),
    ("soft bits", BITS, bce(SOFT_NC), {}, None),
    ("smoothed bits", BITS, bce(0.9 * BITS_NC + 0.05), {}, None),
    ("smoothed bits, at 0", BITS, bce(0.9 * BITS_NC + 0.05), {"scale": 0.0}, None),
    ("half a bit, at 0", BITS, bce((BITS_NC + BITS_NC.flip(0)) / 2), {"scale": 0.0}, None),
    ("extreme bits", BITS, bce(BITS_NC), {"scale": EXTREME}, None),
    ("bits in half", BITS, in_float32(bce(BITS_NC)), HALF, None),
    ("one bit", BITS, bce(BITS_NC[:1, :1]), {"shape": (1, 1)}, None),
    ("sum of bits", BITS, lambda o: bce(BITS_NC, reduction="sum")(o) / N, {}, "is 5 times"),
    ("bits times 0.5", BITS, lambda o: bce(BITS_NC)(o) / 2, {}, "is 0.5 times"),
    ("pos_weight", BITS, bce(BITS_NC, pos_weight=torch.tensor(5.0)), {}, "for some labels the derivative is 5 times"),
    ("small pos_weight", BITS, bce(BITS_NC, pos_weight=torch.tensor(0.2)), {}, "the derivative is 0.2 times"),
    ("other pos_weight", said(Bernoulli(2.0), target=BITS_NC), bce(BITS_NC), {}, "with pos_weight by up to"),
    ("weights of bits", BITS, bce(BITS_NC, weight=0.5 + 2 * SOFT_NC), {}, "no targets fit"),
    ("missing bits", BITS, bce(BITS_NC, weight=(SOFT_NC > 0.1).float()), {}, "outputs have no derivative"),
    ("squares, bernoulli", BITS, lambda o: F.mse_loss(o, BITS_NC), {}, "no targets fit"),
    ("not a number", NLL, lambda o: 0.0 * F.cross_entropy(o, LABELS_N) / 0.0, {}, None),
    ("no derivative at all", NLL, lambda o: 0 * F.cross_entropy(o, LABELS_N), {}, None),
    ("another object", object(), lambda o: F.l1_loss(o, VALUES_NC), {}, None),
]  # fmt: skip


@pytest.mark.parametrize("case", LOSSES_SEEN, ids=[case[0] for case in LOSSES_SEEN])
def test_a_loss_of_another_kind_is_seen_and_the_likelihoods_own_is_not(case):
    _, likelihood, loss, settings, part = case
    settings = {"shape": (N, C), "dtype": torch.float32, "scale": 1.5, "first_two": 0.0, **settings}
    output = settings["scale"] * torch.randn(settings["shape"], generator=torch.Generator().manual_seed(0))
    output[:, :2] += settings["first_two"]
    found = why(likelihood, loss, output.to(settings["dtype"]))
    assert found is None if part is None else part in str(found), found


@pytest.mark.parametrize("seed", range(6))
def test_a_right_loss_is_never_another_one_whatever_the_size_and_the_precision(seed):
    """Over all dtypes, numbers of samples and classes, and scales of the logits."""
    generator = torch.Generator().manual_seed(seed)
    for dtype, n, c, scale in itertools.product(
        (torch.float64, torch.float32, torch.float16, torch.bfloat16), (1, 3, 70), (2, 3, 4, 100), (1e-3, 1.0, 30.0)
    ):
        output = (scale * torch.randn(n, c, generator=generator)).to(dtype)
        labels = torch.randint(c, (n,), generator=generator)
        soft = (3 * torch.rand(n, c, generator=generator)).softmax(1).to(dtype)
        for loss in (ce(labels), ce(labels, label_smoothing=0.1), ce(soft)):
            assert why(Categorical(), loss, output) is None
        assert why(Bernoulli(), bce(soft), output) is None
        assert why(said(Gaussian(), target=soft), lambda o, y=soft: F.mse_loss(o, y), output) is None


def test_a_check_takes_the_output_in_parts(monkeypatch):
    output = torch.randn(N, C, generator=torch.Generator().manual_seed(0))
    whole = why(Categorical(), focal, output)
    monkeypatch.setattr(contract, "_ELEMENTS", 3 * C)
    assert why(Categorical(), focal, output) == whole
