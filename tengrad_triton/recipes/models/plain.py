"""Two models without normalization: the paper's 3C1F and a perceptron.

Key: C channels, H height and W width of an image.
"""

from torch import nn

from tengrad_triton.recipes.errors import UsageError


def conv_3c1f(shape_CHW: tuple[int, int, int], classes: int, width: int) -> nn.Module:
    """Return the paper's 3C1F: three convolutions of ``width`` channels (there 128), one pooling, two linear layers.

    28 x 28 images become 9 x 9 maps, so the first linear layer has 81 * width inputs. Raises `UsageError` if the image
    is smaller than the pooling window.
    """
    channels, height, wide = shape_CHW
    if min(height, wide) < 3:
        raise UsageError(f"3c1f pools 3 x 3 pixels, got images of {height} x {wide}: use larger images or --model mlp")
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3),
        nn.Flatten(),
        nn.Linear(width * (height // 3) * (wide // 3), 500),
        nn.ReLU(),
        nn.Linear(500, classes),
    )


def mlp(shape_CHW: tuple[int, int, int], classes: int, width: int) -> nn.Module:
    """Return a perceptron with two hidden layers of ``width`` units."""
    channels, height, wide = shape_CHW
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * height * wide, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )
