"""MobileNetV2 (Sandler et al. 2018) in its usual form for CIFAR: fewer strides, a projection in each shortcut.

Key: N images, C channels, H height, W width.
"""

from torch import Tensor, nn

# Expansion, channels in 32nds of the width, blocks, stride of the first: Sandler et al., table 2, except two strides.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class Inverted(nn.Module):
    """A 1 x 1 convolution that widens, a depthwise 3 x 3 one, and a 1 x 1 one that narrows, with a shortcut."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        width = expansion * inputs
        self.convs = nn.Sequential(
            *(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False),
            *(nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.shortcut: nn.Module | None = None
        if stride == 1:
            self.shortcut = nn.Sequential()
            if inputs != outputs:
                self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return the convolutions' output plus the shortcut; a block with a stride has no shortcut."""
        hidden: Tensor = self.convs(x_NCHW)
        return hidden if self.shortcut is None else hidden + self.shortcut(x_NCHW)


def mobilenetv2(channels: int, classes: int, width: int = 32) -> nn.Module:
    """Return MobileNetV2 with ``width`` channels in the stem; other layers have channels in proportion."""
    blocks, inputs = [], width
    for expansion, parts, count, stride in STAGES:
        outputs = max(1, parts * width // 32)
        for block in range(count):
            blocks.append(Inverted(inputs, outputs, expansion, stride if block == 0 else 1))
            inputs = outputs
    last = 40 * width
    stem = [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    tail = [nn.Conv2d(inputs, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*stem, *blocks, *tail, nn.Flatten(), nn.Linear(last, classes))
