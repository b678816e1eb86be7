"""Helpers beside the tests are importable under importlib's import mode; one thread, and few garbage collections."""

import gc
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

# For small tensors several threads are no faster, and much slower where other processes are at work.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


# One test or two of each trainer are quick ones; `make test-trainers` runs them all.
OF_TRAINERS = {
    "test_transformers": ("gpt2-sampled-plain", "goes_on_as_one_run[gpt2]", "stats_are_logged", "likelihood"),
    "test_accelerate": ("[sampled-1]", "goes_on_as_one_run[no]"),
    "test_lightning": ("[sampled-automatic]", "goes_on_as_one_run", "stats_are_logged"),
    "test_peft": ("llama-LoRA-sampled-4", "gpt2-DoRA-sampled-16"),
    "test_trainers_distributed": (),
}


@pytest.hookimpl(tryfirst=True)
def pytest_itemcollected(item):
    """Mark those tests of trainers slow that are not among `OF_TRAINERS`."""
    quick = OF_TRAINERS.get(item.path.stem)
    if quick is not None and not any(part in item.name for part in quick):
        item.add_marker(pytest.mark.slow)


@pytest.hookimpl(trylast=True)  # after the slow ones are deselected
def pytest_collection_modifyitems(items):
    """Put the longest tests where each of two workers begins, so that none of them is left over at the end."""
    longest = [item for item in items if item.get_closest_marker("long")]
    others = [item for item in items if item not in longest]
    half = len(others) // 2
    items[:] = [*longest[::2], *others[:half], *longest[1::2], *others[half:]]


def pytest_collection_finish(session):
    """Have the garbage collector run less often, and leave out what stays: tracing makes millions of objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture
def set_threads():
    """Return what sets the number of torch's threads in one test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture
def float64():
    """Have torch make tensors of double precision in one test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return a folder with small images of every data set of the paper; torch's threads are restored at the end."""
    # Imported here because most tests need nothing of the command line.
    from helpers.commands import threads_restored
    from helpers.paper import write_data

    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    with threads_restored():
        yield folder
