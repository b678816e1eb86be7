"""The models of the recipes, by name. The name of a member of a family has its sizes: wrn-28-4, wrn-16-2.

A new model is a function in a file of this folder, and an entry of `MODELS` or, for a family, of `FAMILIES`.
`tests/test_models.py` compares the numbers of parameters with published ones.

Key: C channels, H height and W width of an image.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.models.densenet import densenet
from tengrad_triton.recipes.models.mobilenet import mobilenetv2
from tengrad_triton.recipes.models.plain import conv_3c1f, mlp
from tengrad_triton.recipes.models.resnet import resnet18, resnet50, wide_resnet
from tengrad_triton.recipes.models.transformer import gpt, vit_tiny

ImageShape = tuple[int, int, int]


@dataclass(frozen=True)
class ImageModel:
    """A classifier of images.

    Attributes:
        make: takes an image's [C, H, W], the number of classes and the width, and returns the model; raises
            `UsageError` if the images or the width do not fit.
        width: the default width, which is the published one except for 3c1f and mlp: channels of the first
            convolution, units of a hidden layer or features of a token.
    """

    make: Callable[[ImageShape, int, int], nn.Module]
    width: int

    def build(self, shape_CHW: ImageShape, classes: int, width: int | None = None) -> nn.Module:
        """Return the model with new weights."""
        return self.make(shape_CHW, classes, self.width if width is None else width)


@dataclass(frozen=True)
class TextModel:
    """A model of text, from token ids [N, T] to logits [N, T, vocabulary]. No recipe trains one yet.

    Attributes:
        make: takes the size of the vocabulary, the greatest number of tokens and the features of a token, and
            returns the model.
        width: the published features of a token.
        vocabulary: the published size of the vocabulary.
        context: the published greatest number of tokens.
    """

    make: Callable[[int, int, int], nn.Module]
    width: int
    vocabulary: int
    context: int

    def build(self, vocabulary: int | None = None, context: int | None = None, width: int | None = None) -> nn.Module:
        """Return the model with new weights."""
        return self.make(vocabulary or self.vocabulary, context or self.context, width or self.width)


def _wrn(depth: int, widen: int) -> ImageModel:
    return ImageModel(lambda shape, classes, width: wide_resnet(shape[0], classes, width, depth, widen), width=16)


def _densenet(depth: int, growth: int) -> ImageModel:
    return ImageModel(lambda shape, classes, width: densenet(shape, classes, width, depth), width=growth)


MODELS: Mapping[str, ImageModel] = {
    "3c1f": ImageModel(conv_3c1f, width=32),
    "mlp": ImageModel(mlp, width=32),
    "mobilenetv2": ImageModel(lambda shape, classes, width: mobilenetv2(shape[0], classes, width), width=32),
    "resnet18": ImageModel(lambda shape, classes, width: resnet18(shape[0], classes, width), width=64),
    "resnet50": ImageModel(lambda shape, classes, width: resnet50(shape[0], classes, width), width=64),
    "vit-tiny": ImageModel(vit_tiny, width=192),
}
FAMILIES: Mapping[str, Callable[[int, int], ImageModel]] = {"wrn": _wrn, "densenet": _densenet}
TEXT_MODELS: Mapping[str, TextModel] = {"gpt-small": TextModel(gpt, width=768, vocabulary=50257, context=1024)}
KNOWN = ", ".join([*MODELS, "wrn-DEPTH-WIDEN (such as wrn-28-4)", "densenet-DEPTH-GROWTH (such as densenet-19-100)"])


def image_model(name: str) -> ImageModel:
    """Return a model or the member of a family; raises `UsageError` with the known names if the name is unknown."""
    if name in MODELS:
        return MODELS[name]
    member = re.fullmatch(rf"({'|'.join(FAMILIES)})-([1-9]\d*)-([1-9]\d*)", name)
    if member is not None:
        family, depth, size = member.groups()
        return FAMILIES[family](int(depth), int(size))
    why = "a model of text, and the recipes train on images" if name in TEXT_MODELS else "not known"
    raise UsageError(f"model {name!r} is {why}: choose from {KNOWN}")
