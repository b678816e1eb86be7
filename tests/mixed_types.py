"""What stands between layers whose parameters have different types."""

from torch import nn


class Cast(nn.Module):
    """Converts its input to a type."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)
