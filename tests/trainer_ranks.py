"""Trains in one process, or under torchrun in several: what each trainer makes of the same batches, with exact rows.

    torchrun --nproc-per-node 2 tests/trainer_ranks.py trainer FOLDER

Each process writes FOLDER/<rank>.pt with the parameters at the end of every case of the trainer.
"""

import os
import sys
import warnings
from pathlib import Path

import accelerate
import lightning
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader, DistributedSampler
from trainer_models import bert, flat, gpt2, images, sentences, texts, vit

from tengrad_triton import TENGraD
from tengrad_triton.integrations.transformers import ForTrainer, likelihood_of_labels

RANKS, BATCH, SAMPLES = 2, 8, 56  # a batch is that of all ranks together
EXACT = {"fisher": "exact", "refresh_every": 3}
STOP, STEPS = 4, 7  # an interruption, in the middle of an interval of the curvature


def ranks():
    return int(os.environ.get("WORLD_SIZE", "1"))


# -- the Trainer of Hugging Face --------------------------------------------------------------------------------------


def trainer_of(folder, model, data, options=None, chosen=None, **arguments):
    """Return a Trainer; ``options`` are of an optimizer that is made before the Trainer wraps the model."""
    quiet = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}
    steady = {"lr_scheduler_type": "constant", "max_steps": 4, "train_sampling_strategy": "sequential"}
    if ranks() > 1:
        steady["ddp_backend"] = "gloo"
    parts = arguments.get("gradient_accumulation_steps", 1) * ranks()
    settings = {**quiet, **steady, "per_device_train_batch_size": BATCH // parts, **arguments}
    arguments = transformers.TrainingArguments(str(folder), **settings)
    optimizer = None if options is None else TENGraD(model, **options)
    return transformers.Trainer(
        model, arguments, train_dataset=data, optimizers=(optimizer, None), optimizer_cls_and_kwargs=chosen
    )


def of_trainer(make, data, folder, **arguments):
    torch.manual_seed(0)
    model = make().double()
    count = arguments.get("gradient_accumulation_steps", 1)
    likelihood = likelihood_of_labels(model, micro_batches=count)
    trainer = trainer_of(folder, model, data(SAMPLES), {**EXACT, "likelihood": likelihood}, **arguments)
    if make is bert:  # which takes `num_items_in_batch`, but does not use it
        trainer.model_accepts_loss_kwargs = False
    trainer.train()
    return flat(model)


def made_by_the_trainer(folder):
    """Let the Trainer make the optimizer, with a clipped gradient and its groups of weight decay."""
    torch.manual_seed(0)
    model = vit().double()
    chosen = ForTrainer, {**EXACT, "weight_decay": 0.1}
    trainer_of(folder, model, images(SAMPLES), chosen=chosen, max_grad_norm=0.1).train()
    return flat(model)


def resumed_by_the_trainer(folder):
    """Return the ends of a run, and of one from its checkpoint, with dropout and labels of each rank's own."""
    ends = []
    for checkpoint in (None, folder / f"checkpoint-{STOP}"):
        transformers.set_seed(0)
        model = gpt2(0.1)
        chosen = ForTrainer, {"refresh_every": 3, "seed": 0}
        saves = {"save_strategy": "steps", "save_steps": STOP, "max_steps": STEPS, "lr_scheduler_type": "linear"}
        trainer_of(folder, model, texts(SAMPLES), chosen=chosen, **saves).train(resume_from_checkpoint=checkpoint)
        ends.append(flat(model))
    return torch.stack(ends)


# -- Accelerate -------------------------------------------------------------------------------------------------------


def accelerator_anew(**options):
    AcceleratorState._reset_state()  # the process group stays
    GradientState._reset_state()
    return accelerate.Accelerator(cpu=True, **options)


def of_accelerate(folder, parts=1, clip=None):
    """Train with an optimizer that is made before `prepare` wraps the model."""
    accelerator = accelerator_anew(gradient_accumulation_steps=parts)
    torch.manual_seed(0)
    model = bert().double()
    data = DataLoader(sentences(SAMPLES), batch_size=BATCH // parts // ranks())
    called, optimizer, loader = accelerator.prepare(model, TENGraD(model, **EXACT), data)
    for batch in loader:
        with accelerator.accumulate(called):
            accelerator.backward(called(**batch).loss)
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(called.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return flat(model)


def resumed_by_accelerate(folder):
    ends = []
    for begin in (0, STOP):
        accelerator = accelerator_anew()
        torch.manual_seed(0)
        model = bert(0.1)
        optimizer = TENGraD(model, refresh_every=3, seed=0)
        rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 9)
        data = DataLoader(sentences(SAMPLES), batch_size=BATCH // ranks())
        called, optimizer, loader, rate = accelerator.prepare(model, optimizer, data, rate)
        batches = list(loader)
        if begin:
            accelerator.load_state(str(folder))
        for place in range(begin, STEPS):
            if place == STOP and not begin:
                accelerator.save_state(str(folder))
            optimizer.zero_grad()
            accelerator.backward(called(**batches[place]).loss)
            optimizer.step()
            rate.step()
        ends.append(flat(model))
    return torch.stack(ends)


# -- Lightning --------------------------------------------------------------------------------------------------------


class Module(lightning.LightningModule):
    """Trains a model that returns its loss."""

    def __init__(self, net, **options):
        super().__init__()
        self.net, self.options = net, options

    def training_step(self, batch, batch_idx):
        return self.net(**batch).loss

    def configure_optimizers(self):
        optimizer = TENGraD(self.net, **self.options)
        rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}


def fit(module, strategy="ddp", path=None, **options):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "use_distributed_sampler": False,
    }
    chosen = {"strategy": strategy, "devices": ranks(), "accelerator": "cpu", "enable_model_summary": False}
    trainer = lightning.Trainer(**{**quiet, **chosen, "max_epochs": 1, **options})
    size = BATCH // options.get("accumulate_grad_batches", 1) // ranks()
    data = sentences(SAMPLES)  # the sampler that Lightning would make shuffles, also where the loader does not
    sampler = DistributedSampler(data, ranks(), int(os.environ.get("RANK", "0")), shuffle=False)
    trainer.fit(module, DataLoader(data, batch_size=size, sampler=sampler), ckpt_path=path)
    return trainer


def of_lightning(folder, strategy="ddp", **options):
    torch.manual_seed(0)
    module = Module(bert().double(), **EXACT)
    fit(module, strategy if ranks() > 1 else "auto", **options)
    return flat(module)


def resumed_by_lightning(folder):
    ends = []
    for path in (None, folder / "half.ckpt"):
        torch.manual_seed(0)
        module = Module(bert(), refresh_every=3, seed=0)
        if path is not None:
            fit(module).save_checkpoint(path)
            module = Module(bert(), refresh_every=3, seed=0)
        fit(module, path=path, max_epochs=2)
        ends.append(flat(module))
    return torch.stack(ends)


CASES = {
    "trainer": {
        "bert": lambda folder: of_trainer(bert, sentences, folder),
        "bert, micro-batches": lambda folder: of_trainer(bert, sentences, folder, gradient_accumulation_steps=2),
        "vit, made by the Trainer": made_by_the_trainer,
        "gpt2": lambda folder: of_trainer(gpt2, texts, folder, max_steps=2),
        "gpt2, micro-batches": lambda folder: of_trainer(
            gpt2, texts, folder, max_steps=2, gradient_accumulation_steps=2
        ),
    },
    "accelerate": {
        "plain": of_accelerate,
        "micro-batches": lambda folder: of_accelerate(folder, parts=2),
        "clipped": lambda folder: of_accelerate(folder, clip=0.1),
    },
    "lightning": {
        "plain": of_lightning,
        "unused parameters": lambda folder: of_lightning(folder, "ddp_find_unused_parameters_true"),
        "micro-batches, clipped": lambda folder: of_lightning(folder, accumulate_grad_batches=2, gradient_clip_val=0.1),
    },
}
RESUMED = {"trainer": resumed_by_the_trainer, "accelerate": resumed_by_accelerate, "lightning": resumed_by_lightning}


def quietly():
    """Take the optimizer's warnings of a loss that is not the likelihood's for errors; silence the libraries."""
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", "the loss is not that|no exact rows")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def main(trainer, folder):
    torch.set_num_threads(1)
    quietly()
    folder = Path(folder)
    found = {name: case(folder / name) for name, case in CASES[trainer].items()}
    found["resumed"] = RESUMED[trainer](folder / "resumed")
    torch.save(found, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
