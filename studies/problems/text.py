"""A GPT on real text: the next character of Python's own help texts.

Key: N samples, T tokens, D features of a token, V characters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from typing_extensions import override

from studies.problems.base import Batch, Problem, Task
from tengrad_triton.recipes.models.transformer import Layer

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
VOCABULARY = len(CHARACTERS) + 1  # 0 stands for any other character
CONTEXT, TEXTS, TEST_TEXTS = 64, 32, 250


class Gpt(nn.Module):
    """A decoder whose logits are [N, V, T], as cross-entropy takes them."""

    def __init__(self, features: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(VOCABULARY, features), nn.Embedding(CONTEXT, features)
        for embedding in (self.embedding, self.position):
            nn.init.normal_(embedding.weight, std=0.02)
        self.layers = nn.Sequential(*(Layer(features, heads=4, causal=True) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(features), nn.Linear(features, VOCABULARY)

    def forward(self, ids_NT: Tensor) -> Tensor:
        """Return the logits of each next character: [N, V, T]."""
        places_NT = torch.arange(ids_NT.shape[1], device=ids_NT.device).expand_as(ids_NT)
        x_NTD = self.embedding(ids_NT) + self.position(places_NT)
        return self.head(self.norm(self.layers(x_NTD))).mT


@dataclass(frozen=True)
class Text(Task):
    """Pieces of a text, and the same pieces one character later; the last tenth is for tests."""

    train: Tensor
    test: Tensor

    @override
    def batches(self, seed: int) -> Iterator[Batch]:
        """Yield pieces [N, T] from random places, with a label for each token."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts_N = torch.randint(len(self.train) - CONTEXT, (TEXTS,), generator=generator)
            yield _pieces(self.train, starts_N)

    @override
    def test_batches(self) -> Iterator[Batch]:
        """Yield pieces that are spread evenly over the test text."""
        starts_N = torch.linspace(0, len(self.test) - CONTEXT - 1, TEST_TEXTS).long()
        for part_N in starts_N.split(125):
            yield _pieces(self.test, part_N)


def _pieces(ids: Tensor, starts_N: Tensor) -> Batch:
    pieces = ids[starts_N[:, None] + torch.arange(CONTEXT + 1)]
    return pieces[:, :-1], pieces[:, 1:]


@cache
def text() -> Text:
    """Return the language reference in `pydoc_data.topics`; its wording depends on the version of Python."""
    from pydoc_data.topics import topics  # noqa: PLC0415 - half a million characters

    number = {character: 1 + i for i, character in enumerate(CHARACTERS)}
    ids = torch.tensor([number.get(character, 0) for name in sorted(topics) for character in topics[name]])
    end = len(ids) * 9 // 10
    return Text(ids[:end], ids[end:])


PROBLEM = Problem(
    "GPT, next character of Python's help texts",
    "judge",
    build=Gpt,
    task=lambda data: text(),
    steps=320,
    likelihood="tokens",
)
