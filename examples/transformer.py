"""A small GPT of torch's own layers, its head tied to its embedding.

Dimensions: N samples, T tokens, D features, C characters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Causal attention, then an MLP. The input of each is normalized, and its output is added to the features."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(features), nn.LayerNorm(features)
        self.attention = nn.MultiheadAttention(features, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features))

    def forward(self, x_NTD: Tensor, mask_TT: Tensor) -> Tensor:
        """Return [N, T, D]."""
        y = self.before_attention(x_NTD)
        x_NTD = x_NTD + self.attention(y, y, y, attn_mask=mask_TT, need_weights=False)[0]
        return x_NTD + self.mlp(self.before_mlp(x_NTD))


class GPT(nn.Module):
    """A decoder that returns the logits of the next character at every position."""

    def __init__(self, vocabulary: int, length: int, features: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(vocabulary, features), nn.Embedding(length, features)
        self.blocks = nn.ModuleList(Block(features, heads) for _ in range(blocks))
        self.last = nn.LayerNorm(features)
        self.head = nn.Linear(features, vocabulary, bias=False)
        for embedding in (self.characters, self.places):
            nn.init.normal_(embedding.weight, std=0.02)
        self.head.weight = self.characters.weight
        self.register_buffer("mask_TT", torch.ones(length, length, dtype=torch.bool).triu(1))

    def forward(self, ids_NT: Tensor) -> Tensor:
        """Return [N, T, C]."""
        length = ids_NT.shape[1]
        x_NTD = self.characters(ids_NT) + self.places(torch.arange(length, device=ids_NT.device).expand_as(ids_NT))
        for block in self.blocks:
            x_NTD = block(x_NTD, self.mask_TT[:length, :length])
        return self.head(self.last(x_NTD))
