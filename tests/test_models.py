"""The recipes' models and optimizers: shapes, the literature's sizes, images that do not fit, settings that arrive."""

import dataclasses

import pytest
import torch
from torch import nn

from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.models import MODELS, TEXT_MODELS, image_model
from tengrad_triton.recipes.optimizers.muon_with_adamw import hidden_weights
from tengrad_triton.recipes.optimizers.registry import OPTIMIZERS
from tengrad_triton.recipes.training.settings import Settings, installed

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 7, 11), (1, 4, 4)]
SMALL = {**dict.fromkeys(MODELS, 4), "vit-tiny": 12, "wrn-10-1": 2, "densenet-10-4": 3}  # name and width

# Millions of parameters: name, image, classes, width, number, where it is published.
PUBLISHED = [
    ("wrn-28-10", (3, 32, 32), 10, None, 36.5, "Zagoruyko and Komodakis 2016, table 4"),
    ("wrn-40-4", (3, 32, 32), 10, None, 8.9, "Zagoruyko and Komodakis 2016, table 4"),
    ("wrn-40-2", (3, 32, 32), 10, None, 2.2, "Zagoruyko and Komodakis 2016, table 4"),
    ("wrn-16-8", (3, 32, 32), 10, None, 11.0, "Zagoruyko and Komodakis 2016, table 4"),
    ("wrn-28-4", (3, 32, 32), 100, None, 5.87, "github.com/xternalz/WideResNet-pytorch"),
    ("densenet-100-12", (3, 32, 32), 10, None, 0.8, "Huang et al. 2017, table 2: DenseNet-BC"),
    ("densenet-250-24", (3, 32, 32), 10, None, 15.3, "Huang et al. 2017, table 2: DenseNet-BC"),
    ("densenet-190-40", (3, 32, 32), 10, None, 25.6, "Huang et al. 2017, table 2: DenseNet-BC"),
    ("mobilenetv2", (3, 32, 32), 10, None, 2.30, "github.com/kuangliu/pytorch-cifar"),
    ("resnet18", (3, 32, 32), 10, None, 11.17, "github.com/kuangliu/pytorch-cifar"),
    ("resnet50", (3, 32, 32), 10, None, 23.52, "github.com/kuangliu/pytorch-cifar"),
    ("vit-tiny", (3, 224, 224), 1000, None, 5.7, "Touvron et al. 2021, table 1: DeiT-Ti"),
    ("3c1f", (1, 28, 28), 10, 128, 5.486, "the layers that the paper's appendix lists, by hand"),
]


def millions(model):
    return sum(p.numel() for p in model.parameters()) / 1e6


@pytest.mark.parametrize(("name", "shape", "classes", "width", "expected", "source"), PUBLISHED, ids=str)
def test_models_have_the_published_numbers_of_parameters(name, shape, classes, width, expected, source):
    with torch.device("meta"):
        count = millions(image_model(name).build(shape, classes, width))
    digits = len(str(expected).partition(".")[2])
    assert round(count, digits) == expected, source


def test_the_text_model_has_gpt_2s_parameters_and_one_matrix_for_embedding_and_head():
    with torch.device("meta"):
        model = TEXT_MODELS["gpt-small"].build()
    assert round(millions(model)) == 124  # Radford et al. 2019, as released
    small = TEXT_MODELS["gpt-small"].make(11, 6, 12)
    assert small.head.weight is small.embedding.weight
    ids = torch.randint(11, (2, 5))
    logits = small(ids)
    assert logits.shape == (2, 5, 11)
    changed = torch.cat((ids[:, :-1], (ids[:, -1:] + 1) % 11), 1)  # no token sees what comes after it
    torch.testing.assert_close(small(changed)[:, :-1], logits[:, :-1])


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_logit_for_each_class(name, shape):
    model = image_model(name).build(shape, 7, SMALL[name])
    assert model(torch.randn(2, *shape)).shape == (2, 7)


def test_3c1f_has_the_papers_sizes():
    model = MODELS["3c1f"].build((1, 28, 28), 10, 128)
    convolutions = (9 * 128 + 128) + 2 * (9 * 128 * 128 + 128)
    linear = (10368 * 500 + 500) + (500 * 10 + 10)
    assert sum(p.numel() for p in model.parameters()) == convolutions + linear


def test_mlp_has_two_hidden_layers_of_the_width():
    shapes = [tuple(p.shape) for p in MODELS["mlp"].build((3, 4, 5), 10, 6).parameters() if p.dim() == 2]
    assert shapes == [(6, 60), (6, 6), (10, 6)]


MISTAKES = [
    ("3c1f", (1, 2, 8), 4, r"3 x 3.*2 x 8.*--model mlp"),
    ("3c1f", (3, 8, 1), 4, r"3 x 3.*8 x 1.*--model mlp"),
    ("densenet-10-4", (3, 3, 8), 4, "images of 3 x 8"),
    ("densenet-18-4", (3, 8, 8), 4, "3 n .* 4 .*got 18"),
    ("wrn-27-4", (3, 8, 8), 4, "6 n .* 4 .*got 27"),
    ("wrn-4-4", (3, 8, 8), 4, "6 n .* 4 .*got 4"),
    ("vit-tiny", (3, 8, 8), 13, "multiple of 3 or of 64, got 13"),
    ("vgg", (3, 8, 8), 4, "'vgg' is not known.*3c1f, mlp, mobilenetv2, .*wrn-DEPTH-WIDEN.*densenet-DEPTH-GROWTH"),
    ("wrn-28-0", (3, 8, 8), 4, "'wrn-28-0' is not known"),
    ("gpt-small", (3, 8, 8), 4, "model of text"),
]


@pytest.mark.parametrize(("name", "shape", "width", "message"), MISTAKES)
def test_what_does_not_fit_is_refused(name, shape, width, message):
    with pytest.raises(UsageError, match=message):
        image_model(name).build(shape, 10, width)


def test_every_optimizer_has_settings():
    assert [type(Settings().of(name)) for name in OPTIMIZERS] == list(OPTIMIZERS.values())
    assert [settings.__name__.lower() for settings in OPTIMIZERS.values()] == [
        f"{name}settings".replace("_", "") for name in OPTIMIZERS
    ]


@pytest.mark.parametrize("name", installed())
def test_settings_reach_the_optimizer(name):
    settings = dataclasses.replace(Settings().of(name), lr=0.25, weight_decay=0.125)
    group = settings.build(MODELS["mlp"].build((1, 2, 2), 3, 5)).param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.125)


def test_muon_takes_the_hidden_weights_as_matrices_and_adamw_the_rest():
    model = MODELS["3c1f"].build((1, 8, 8), 10, 4)
    assert [tuple(weight.shape) for weight in hidden_weights(model)] == [(4, 4, 3, 3), (4, 4, 3, 3), (500, 16)]
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = Settings().muon.build(model)
    loss = model(torch.randn(3, 1, 8, 8)).square().sum()
    loss.backward()
    hidden = [weight.grad.flatten(1) for weight in hidden_weights(model)]
    optimizer.step()
    steps = [old - p for old, p in zip(before, model.parameters(), strict=True)]
    assert all(step.count_nonzero() for step in steps)
    decayed = [old.flatten(1) * 1e-3 * 0.1 for old in (before[2], before[4], before[6])]
    for grad, step, shrunk in zip(hidden, (steps[2], steps[4], steps[6]), decayed, strict=True):
        # Newton and Schulz's iteration takes singular values to between 0.7 and 1.2 (Jordan et al. 2024).
        values = torch.linalg.svdvals(step.flatten(1) - shrunk) / (1e-3 * 0.2 * max(grad.shape) ** 0.5)
        assert values.max() < 1.3
        assert values.max() > 0.6


def test_a_model_without_hidden_weights_is_refused_by_muon():
    with pytest.raises(ValueError, match="between the first and the last"):
        Settings().muon.build(nn.Linear(3, 2))
