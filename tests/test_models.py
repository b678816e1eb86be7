"""The recipes' models and optimizers: shapes, the paper's sizes, images that do not fit, settings that arrive."""

import dataclasses
from typing import get_args

import pytest
import torch

from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.models import MODELS, ModelName
from tengrad_triton.recipes.optimizers import AdamwSettings, OptimizerName, SgdSettings, TengradSettings
from tengrad_triton.recipes.settings import Settings

NAMES = get_args(OptimizerName)
SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 7, 11), (1, 3, 3)]


def test_every_name_has_a_row():
    assert set(MODELS) == set(get_args(ModelName))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_logit_for_each_class(name, shape):
    model = MODELS[name](shape, 7, 5)
    assert model(torch.randn(2, *shape)).shape == (2, 7)


def test_3c1f_has_the_papers_sizes():
    model = MODELS["3c1f"]((1, 28, 28), 10, 128)
    convolutions = (9 * 128 + 128) + 2 * (9 * 128 * 128 + 128)
    linear = (10368 * 500 + 500) + (500 * 10 + 10)
    assert sum(p.numel() for p in model.parameters()) == convolutions + linear


def test_mlp_has_two_hidden_layers_of_the_width():
    shapes = [tuple(p.shape) for p in MODELS["mlp"]((3, 4, 5), 10, 6).parameters() if p.dim() == 2]
    assert shapes == [(6, 60), (6, 6), (10, 6)]


@pytest.mark.parametrize("shape", [(1, 2, 8), (3, 8, 1)], ids=str)
def test_3c1f_refuses_images_smaller_than_its_pooling(shape):
    with pytest.raises(UsageError, match=rf"3 x 3.*{shape[1]} x {shape[2]}.*--model mlp"):
        MODELS["3c1f"](shape, 10, 4)


def test_every_optimizer_has_settings():
    assert [type(Settings().of(name)) for name in NAMES] == [TengradSettings, SgdSettings, AdamwSettings]


@pytest.mark.parametrize("name", NAMES)
def test_settings_reach_the_optimizer(name):
    settings = dataclasses.replace(Settings().of(name), lr=0.25, weight_decay=0.125)
    group = settings.build(torch.nn.Linear(3, 2)).param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.125)
