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


@pytest.fixture
def set_threads():
    """Return what sets the number of torch's threads in one test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)
