"""Residual networks for small images: ResNet (He et al. 2016) and its wide form (Zagoruyko and Komodakis 2016).

Key: N images, C channels, H height, W width.
"""

from torch import Tensor, nn

from tengrad_triton.recipes.errors import UsageError


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class Residual(nn.Module):
    """Normalized convolutions with a shortcut: two of 3 x 3, or 1 x 1, 3 x 3 and 1 x 1 as a bottleneck."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        shapes = [(inputs, width, 3, stride), (width, outputs, 3, 1)]
        if bottleneck:
            shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        self.convs = nn.ModuleList(_conv(*shape) for shape in shapes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(shape[1]) for shape in shapes)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return the rectified sum of the convolutions' output and the shortcut."""
        hidden = x_NCHW
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True), 1):
            hidden = norm(conv(hidden))
            if number < len(self.convs):
                hidden = hidden.relu()
        return (hidden + self.shortcut(x_NCHW)).relu()


def _resnet(channels: int, classes: int, width: int, counts: tuple[int, ...], bottleneck: bool) -> nn.Module:
    """Return a 3 x 3 stem that keeps the size of the image, followed by four stages of blocks."""
    blocks, inputs = [], width
    for stage, count in enumerate(counts):
        for block in range(count):
            blocks.append(Residual(inputs, width << stage, 2 if stage > 0 and block == 0 else 1, bottleneck))
            inputs = (width << stage) * (4 if bottleneck else 1)
    stem = [_conv(channels, width, 3), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def resnet18(channels: int, classes: int, width: int = 64) -> nn.Module:
    """Return ResNet-18 in its CIFAR form."""
    return _resnet(channels, classes, width, (2, 2, 2, 2), bottleneck=False)


def resnet50(channels: int, classes: int, width: int = 64) -> nn.Module:
    """Return ResNet-50 in its CIFAR form."""
    return _resnet(channels, classes, width, (3, 4, 6, 3), bottleneck=True)


class PreActivation(nn.Module):
    """The block of wide residual networks: normalization and activation come before each convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, outputs, 3, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(outputs), _conv(outputs, outputs, 3)
        self.shortcut = _conv(inputs, outputs, 1, stride) if stride != 1 or inputs != outputs else None

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return the sum of the convolutions' output and the shortcut."""
        activated = self.norm1(x_NCHW).relu()
        hidden = self.conv2(self.norm2(self.conv1(activated)).relu())
        return hidden + (x_NCHW if self.shortcut is None else self.shortcut(activated))


def wide_resnet(channels: int, classes: int, width: int = 16, depth: int = 28, widen: int = 4) -> nn.Module:
    """Return WRN-depth-widen; raises `UsageError` unless depth = 6 n + 4."""
    if depth < 10 or depth % 6 != 4:
        raise UsageError(f"a wide residual network has a depth of 6 n + 4 (10, 16, 22, 28, ...), got {depth}")
    blocks, inputs = [], width
    for stage in range(3):
        outputs = (width << stage) * widen
        for block in range((depth - 4) // 6):
            blocks.append(PreActivation(inputs, outputs, 2 if stage > 0 and block == 0 else 1))
            inputs = outputs
    tail = [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(_conv(channels, width, 3), *blocks, *tail)
