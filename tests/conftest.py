"""Makes the helpers beside the tests importable under importlib's import mode, and gives every test one thread."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

# For small tensors several threads are no faster, and much slower where other processes are at work.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


def pytest_collection_modifyitems(items):
    """Begin with the longest tests, so that no worker is left with one when the others have nothing to do."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_modifyitems(items):
    """Put the two longest tests where each of two workers begins."""
    longest = [item for item in items if item.originalname == "test_under_the_interpreter"]
    others = [item for item in items if item not in longest]
    half = len(others) // 2
    items[:] = [*longest[:1], *others[:half], *longest[1:], *others[half:]]


@pytest.fixture
def set_threads():
    """Return what sets the number of torch's threads in one test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)
