"""PyTorch Lightning: its steps are those of the dense solve, and its checkpoints go on bit for bit."""

import csv
import logging

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("transformers")

import lightning
from torch.utils.data import DataLoader
from trainer_checks import Watched
from trainer_models import bert, flat, sentences

from tengrad_triton import TENGraD
from tengrad_triton.integrations.lightning import LogStats

pytestmark = pytest.mark.filterwarnings("default")  # what other libraries warn of is theirs
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)


class Automatic(lightning.LightningModule):
    """Trains a model that returns its loss; the optimizer is made with the model that `training_step` calls."""

    def __init__(self, net, make_optimizer):
        super().__init__()
        self.net, self.make_optimizer = net, make_optimizer

    def training_step(self, batch, batch_idx):
        return self.net(**batch).loss

    def configure_optimizers(self):
        return self.make_optimizer(self.net)


class Manual(Automatic):
    def __init__(self, *args):
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.net(**batch).loss)
        optimizer.step()


def fit(module, count=16, batch=4, path=None, **options):
    trainer = lightning.Trainer(**{**QUIET, "max_epochs": 1, **options})
    trainer.fit(module, DataLoader(sentences(count), batch_size=batch), ckpt_path=path)
    return trainer


WAYS = {
    "automatic": (Automatic, {}),
    "clipped": (Automatic, {"gradient_clip_val": 0.1}),
    "clipped by value": (Automatic, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "micro-batches": (Automatic, {"accumulate_grad_batches": 2}),
    "manual": (Manual, {}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fisher", ["sampled", "empirical", "exact"])
def test_steps_are_those_of_the_dense_solve(fisher, way):
    kind, options = WAYS[way]
    count = options.get("accumulate_grad_batches", 1)
    watched = Watched(bert().double(), fisher, share=1 / count)
    fit(kind(watched.model, lambda net: watched.optimizer), batch=4 // count, **options)
    assert watched.checked == [count] * 4


def test_a_checkpoint_goes_on_as_one_run(tmp_path):
    """With a falling rate; it is saved within an interval of the curvature. Lightning keeps no state of generators."""

    def make(net):
        optimizer = TENGraD(net, refresh_every=3, seed=0)
        rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    ends = []
    for path in (None, tmp_path / "half.ckpt"):
        torch.manual_seed(0)
        module = Automatic(bert(), make)
        if path is not None:
            fit(module, max_epochs=1).save_checkpoint(path)
            module = Automatic(bert(), make)
        trainer = fit(module, max_epochs=2, path=path)
        assert trainer.optimizers[0].stats.steps == 8
        ends.append(flat(module))
    assert torch.equal(*ends)


@pytest.mark.parametrize("fisher", ["sampled", "empirical", "exact"])
def test_bf16_mixed_takes_the_steps_of_autocast(fisher):
    ends = []
    for mixed in (True, False):
        torch.manual_seed(0)
        module = Automatic(bert(), lambda net: TENGraD(net, fisher=fisher, seed=0))
        if mixed:
            fit(module, precision="bf16-mixed")
        else:
            optimizer = module.configure_optimizers()
            for batch in DataLoader(sentences(16), batch_size=4):
                with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                    loss = module.training_step(batch, 0)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        ends.append(flat(module))
    assert torch.equal(*ends)


class Clipped(Automatic):
    """Clips without the plugin, which refuses optimizers that unscale gradients themselves, also without a scaler."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)


def test_clipping_in_bf16_mixed_needs_a_method():
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(Automatic(bert(), TENGraD), precision="bf16-mixed", gradient_clip_val=0.1)
    module = Clipped(bert(), TENGraD)
    before = flat(module)
    fit(module, precision="bf16-mixed", gradient_clip_val=0.1)
    assert not torch.equal(before, flat(module))


def test_damping_is_adapted_in_the_closure_of_lightning():
    module = Automatic(bert(), lambda net: TENGraD(net, damping="lm", scaling="none"))
    trainer = fit(module)
    assert trainer.optimizers[0].stats.actual_change is not None


def test_an_optimizer_of_the_lightning_module_is_told_what_to_call():
    class OfItself(Automatic):
        def configure_optimizers(self):
            return TENGraD(self)

    with pytest.raises(RuntimeError, match=r"no forward and backward of the model .* call model\(inputs\) itself"):
        fit(OfItself(bert(), None))


def test_stats_are_logged(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1000)
    fit(Automatic(bert(), TENGraD), logger=logger, callbacks=[LogStats(every=2)], max_epochs=2)
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv") as file:
        lines = list(csv.DictReader(file))
    assert [(line["step"], float(line["tengrad/steps"])) for line in lines] == [(str(s), s) for s in (2, 4, 6, 8)]
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        LogStats(every=0)
