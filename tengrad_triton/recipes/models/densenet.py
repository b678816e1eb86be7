"""DenseNet-BC for small images (Huang et al. 2017): bottlenecks, and transitions that halve the channels.

Key: N images, C channels, H height, W width.
"""

import torch
from torch import Tensor, nn

from tengrad_triton.recipes.errors import UsageError


class Dense(nn.Module):
    """Appends ``growth`` channels to its input: a 1 x 1 convolution to 4 growth channels, then a 3 x 3 one."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return the input, followed by the new channels."""
        narrow = self.conv1(self.norm1(x_NCHW).relu())
        return torch.cat((x_NCHW, self.conv2(self.norm2(narrow).relu())), 1)


def densenet(shape_CHW: tuple[int, int, int], classes: int, growth: int, depth: int) -> nn.Module:
    """Return DenseNet-BC of three blocks with (depth - 4) // 6 layers each.

    The paper's depth of 19 is not of the form 6 n + 4. As in the code that the paper builds on, the number of layers is
    rounded down, to two in each block. Raises `UsageError` unless depth = 3 n + 4, and for images smaller than 4 x 4.
    """
    channels, height, wide = shape_CHW
    if min(height, wide) < 4:
        raise UsageError(f"densenet pools 2 x 2 pixels twice, got images of {height} x {wide}: use larger images")
    if depth < 10 or depth % 3 != 1:
        raise UsageError(f"a densenet has a depth of 3 n + 4 (10, 13, 16, 19, ...), got {depth}")
    inputs = 2 * growth
    layers: list[nn.Module] = [nn.Conv2d(channels, inputs, 3, padding=1, bias=False)]
    for block in range(3):
        if block > 0:
            layers += [nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, inputs // 2, 1, bias=False)]
            layers += [nn.AvgPool2d(2)]
            inputs //= 2
        for _ in range((depth - 4) // 6):
            layers.append(Dense(inputs, growth))
            inputs += growth
    tail = [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(*layers, *tail)
