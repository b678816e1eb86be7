"""Text that ships with Python, as numbers of printable characters: the help topics of `pydoc`, and source code.

Dimensions: N samples, T tokens.
"""

from __future__ import annotations

import argparse
import inspect
import string
import tarfile
import typing
import unittest.mock
from collections.abc import Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from torch import Tensor

VOCABULARY = len(string.printable)
MODULES = (argparse, inspect, tarfile, typing, unittest.mock)


@dataclass(frozen=True)
class Text:
    """Characters as numbers below `VOCABULARY`, for training and, from other pages, for testing."""

    train: Tensor
    test: Tensor


def prose() -> Text:
    """Return Python's help topics."""
    return _text([topics[name] for name in sorted(topics)])


def code() -> Text:
    """Return source code of the standard library; a page is about one top-level definition."""
    return _text([page for module in MODULES for page in inspect.getsource(module).split("\n\n\n")])


def _text(pages: Sequence[str]) -> Text:
    """Return the text; every tenth page is for testing."""
    test, train = pages[::10], [page for index, page in enumerate(pages) if index % 10]
    return Text(_numbers(train), _numbers(test))


def _numbers(pages: Sequence[str]) -> Tensor:
    number = {character: index for index, character in enumerate(string.printable)}
    return torch.tensor([number[character] for character in "\n\n".join(pages) if character in number])


def batch(tokens: Tensor, samples: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return random pieces [N, T] of a text, and the characters that follow theirs."""
    starts_N = torch.randint(len(tokens) - length, (samples,), generator=generator)
    piece = tokens[starts_N[:, None] + torch.arange(length + 1)]
    return piece[:, :-1], piece[:, 1:]
