"""The training loop in tests: small jobs, the state after each epoch, and states compared bit for bit."""

import io

import torch
from rich.console import Console

from tengrad_triton.recipes.data.registry import load
from tengrad_triton.recipes.optimizers.tengrad import TengradPaperSettings
from tengrad_triton.recipes.training.job import Job
from tengrad_triton.recipes.training.loop import fit
from tengrad_triton.recipes.training.settings import Settings

IMAGES = 150  # two steps of 64 and one of 22 an epoch


def job(train_limit=IMAGES, test_limit=50, **settings):
    given = {
        "width": 4,
        "epochs": 3,
        "batch_size": 64,
        "tengrad_paper": TengradPaperSettings(refresh_every=4),
    } | settings
    data = load("digits", None, train_limit, test_limit, Console(quiet=True))
    return Job(Settings(**given), data, torch.device("cpu"))


def ignore(epoch, totals_3):
    pass


def states(job, name, state=None, watch=ignore):
    """Return each epoch's state as a checkpoint would keep it: the tensors of a live one move on."""
    return [_through_a_file(state) for state in fit(job, name, state, watch)]


def _through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(left, right, where="state"):
    """Compare nested states bit for bit, except for the seconds in the metrics."""
    assert type(left) is type(right), where
    if isinstance(left, dict):
        keys = [key for key in left if not str(key).endswith("_seconds")]
        assert keys == [key for key in right if not str(key).endswith("_seconds")], where
        for key in keys:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, where
        assert torch.equal(left, right), where
    else:
        assert left == right, where
