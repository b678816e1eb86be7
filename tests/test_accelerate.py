"""Accelerate: a prepared optimizer takes the steps of the dense solve, and a saved state goes on bit for bit."""

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import accelerate
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader
from trainer_checks import Watched
from trainer_models import bert, flat, sentences

from tengrad_triton import TENGraD

pytestmark = pytest.mark.filterwarnings("default")  # what other libraries warn of is theirs


@pytest.fixture(autouse=True)
def _anew():
    """The state of accelerators is one for the whole process."""
    torch.manual_seed(0)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("fisher", ["sampled", "empirical", "exact"])
def test_steps_are_those_of_the_dense_solve(fisher, count):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=count)
    watched = Watched(bert().double(), fisher, share=1 / count)
    data = DataLoader(sentences(16), batch_size=4 // count)
    model, optimizer, loader = accelerator.prepare(watched.model, watched.optimizer, data)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    assert watched.checked == [count] * 4


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_saved_state_goes_on_as_one_run(precision, tmp_path):
    """With dropout and a falling rate; it is saved within an interval of the curvature."""
    ends = []
    for begin in (0, 4):
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.manual_seed(0)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
        model = bert(0.1)
        optimizer = TENGraD(model, refresh_every=3, seed=0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 9)
        data = DataLoader(sentences(28), batch_size=4)
        model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, data, schedule)
        batches = list(loader)
        if begin:
            accelerator.load_state(str(tmp_path))
        for place in range(begin, len(batches)):
            if place == 4 and not begin:
                accelerator.save_state(str(tmp_path))
            optimizer.zero_grad()
            accelerator.backward(model(**batches[place]).loss)
            optimizer.step()
            schedule.step()
        assert optimizer.optimizer.stats.steps == 7
        ends.append(flat(model))
    assert torch.equal(*ends)
