"""Transformers of plain `Linear` layers: ViT-Tiny for images (Touvron et al. 2021) and a GPT-2 for text.

Key: N samples, T tokens, D features of a token; C channels, H height and W width of an image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tengrad_triton.recipes.errors import UsageError

PATCHES = 7  # at least so many on each side: patches of 4 x 4 pixels for 28 or 32 pixels, 16 x 16 for 224


class Layer(nn.Module):
    """A pre-norm transformer layer whose projections are plain `Linear` layers."""

    def __init__(self, features: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.query, self.key, self.value, self.out = (nn.Linear(features, features) for _ in range(4))
        self.up, self.down = nn.Linear(features, 4 * features), nn.Linear(4 * features, features)

    def forward(self, x_NTD: Tensor) -> Tensor:
        """Return the tokens after attention and perceptron."""
        normed = self.norm1(x_NTD)
        projections = (self.query, self.key, self.value)
        query, key, value = (p(normed).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in projections)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal).transpose(1, 2).flatten(2)
        x_NTD = x_NTD + self.out(mixed)
        return x_NTD + self.down(F.gelu(self.up(self.norm2(x_NTD))))


class VisionTransformer(nn.Module):
    """A class token followed by the patches as tokens; the logits come from the class token."""

    def __init__(self, shape_CHW: tuple[int, int, int], classes: int, features: int, patch: int, layers: int) -> None:
        super().__init__()
        channels, height, wide = shape_CHW
        self.patches = nn.Conv2d(channels, features, patch, stride=patch)
        tokens = (height // patch) * (wide // patch) + 1
        self.token = nn.Parameter(torch.zeros(1, 1, features))
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, features))
        self.layers = nn.Sequential(*(Layer(features, _heads(features)) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(features), nn.Linear(features, classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return the logits [N, classes]."""
        patches_NTD = self.patches(x_NCHW).flatten(2).transpose(1, 2)
        x_NTD = torch.cat((self.token.expand(len(x_NCHW), -1, -1), patches_NTD), 1) + self.position
        logits: Tensor = self.head(self.norm(self.layers(x_NTD)[:, 0]))
        return logits


def vit_tiny(shape_CHW: tuple[int, int, int], classes: int, width: int = 192, layers: int = 12) -> nn.Module:
    """Return ViT-Tiny with ``width`` features for each token, and the largest patches of which `PATCHES` fit on a side.

    Raises `UsageError` if the width is not a multiple of 3 or of 64.
    """
    _, height, wide = shape_CHW
    sizes = [size for size in range(1, 17) if height % size == 0 and wide % size == 0]
    patch = max([size for size in sizes if min(height, wide) // size >= PATCHES], default=1)
    return VisionTransformer(shape_CHW, classes, width, patch, layers)


def _heads(features: int) -> int:
    """Return one head for every 64 features, as in ViT and GPT-2, or three heads if 64 does not divide them."""
    heads = features // 64 if features % 64 == 0 else 3
    if features % heads:
        raise UsageError(f"a transformer needs a width that is a multiple of 3 or of 64, got {features}")
    return heads


class Gpt(nn.Module):
    """A decoder with a head that shares the table of the token embedding."""

    def __init__(self, vocabulary: int, context: int, features: int, layers: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocabulary, features), nn.Embedding(context, features)
        for embedding in (self.embedding, self.position):
            nn.init.normal_(embedding.weight, std=0.02)
        self.layers = nn.Sequential(*(Layer(features, _heads(features), causal=True) for _ in range(layers)))
        self.norm = nn.LayerNorm(features)
        self.head = nn.Linear(features, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids_NT: Tensor) -> Tensor:
        """Return the logits of the next token for every token: [N, T, vocabulary]."""
        x_NTD = self.embedding(ids_NT) + self.position.weight[: ids_NT.shape[1]]
        logits: Tensor = self.head(self.norm(self.layers(x_NTD)))
        return logits


def gpt(vocabulary: int, context: int, width: int = 768, layers: int = 12) -> nn.Module:
    """Return GPT-2 in its small form (Radford et al. 2019), with ``width`` features for each token."""
    return Gpt(vocabulary, context, width, layers)
