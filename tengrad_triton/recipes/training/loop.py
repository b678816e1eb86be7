"""The training loop of one optimizer, epoch by epoch, from a seed or from a checkpoint.

Key: S steps. Totals are the [sum of the losses, right answers, images] of one batch or several.
"""

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tengrad_triton.recipes.measuring.machine import now
from tengrad_triton.recipes.optimizers.settings import OptimizerName
from tengrad_triton.recipes.training.checkpoint import State, restore, state_of
from tengrad_triton.recipes.training.job import Job, closing_hooks
from tengrad_triton.recipes.training.metrics import EpochMetrics, Record, Steps

EVAL_BATCH = 500

Watch = Callable[[int, Tensor], None]  # is called after each step with the epoch and its totals so far


def fit(job: Job, name: OptimizerName, state: State | None, watch: Watch) -> Iterator[State]:
    """Train an optimizer from a state, or from its start, and yield the state after each epoch.

    Ends after the last epoch of the settings, or after the epoch in which the run diverged.
    """
    model, optimizer = job.build(name)
    rates = [group["lr"] for group in optimizer.param_groups]
    record = Record() if state is None else restore(model, optimizer, state, job.device)
    with closing_hooks(optimizer):
        while len(record.epochs) < job.settings.epochs and not record.diverged:
            decays = sum(epoch <= len(record.epochs) for epoch in job.settings.decay_at)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * job.settings.decay**decays
            record = _one_epoch(job, name, model, optimizer, record, watch)
            yield state_of(model, optimizer, record, job.device)


def _one_epoch(
    job: Job, name: OptimizerName, model: nn.Module, optimizer: torch.optim.Optimizer, record: Record, watch: Watch
) -> Record:
    epoch, start, cpu_start = len(record.epochs) + 1, now(job.device), time.process_time()
    closure = job.settings.of(name).needs_closure
    train, ends_S, totals_S3 = _train(job, model, optimizer, closure, epoch, watch)
    middle, cpu_seconds = now(job.device), time.process_time() - cpu_start
    test = _evaluate(job, model)
    end = now(job.device)
    metrics = EpochMetrics(name, epoch, *train, *test, middle - start, end - middle, cpu_seconds)
    return record.then(metrics, Steps.of(record.train_seconds + (ends_S - start), totals_S3))


def _train(
    job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, closure: bool, epoch: int, watch: Watch
) -> tuple[tuple[float, float], Tensor, Tensor]:
    """Train for an epoch. Return its mean loss and accuracy, the host's time at the end of each step, and its totals.

    Losses are read from the device after the last step, so that a GPU never waits for the host.
    """
    model.train()
    totals_3 = torch.zeros(3, dtype=torch.float64, device=job.device)
    ends, totals = [], []
    settings = job.settings
    for images, labels in job.data.batches("train", settings.batch_size, shuffle_seed=settings.seed + epoch):
        totals.append(one_step(model, optimizer, images, labels, closure))
        totals_3 += totals[-1]
        ends.append(time.perf_counter())
        watch(epoch, totals_3)
    return _means(totals_3), torch.tensor(ends, dtype=torch.float64), torch.stack(totals).cpu()


def one_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, closure: bool
) -> Tensor:
    """Take a step, and return the batch's totals from before it: [3].

    The loss is NaN where the output is not finite and the optimizer raised an error for that reason.
    """
    evaluations: list[tuple[Tensor, Tensor]] = []

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        output = model(images)
        loss = cross_entropy(output, labels)
        loss.backward()
        evaluations.append((output.detach(), loss.detach()))
        return loss

    try:
        if closure:
            optimizer.step(evaluate)  # type: ignore[arg-type]  # torch annotates a closure that returns a float
        else:
            evaluate()
            optimizer.step()
    except RuntimeError:  # TENGraD cannot sample labels from logits that are not finite
        if _is_finite(model, images):
            raise
        return images.new_tensor([math.nan, 0, len(labels)], dtype=torch.float64)
    output, loss = evaluations[0]
    return _totals(output, labels, loss)


@torch.no_grad()
def _evaluate(job: Job, model: nn.Module) -> tuple[float, float]:
    """Return the mean loss and the accuracy on the test images."""
    model.eval()
    totals_3 = torch.zeros(3, dtype=torch.float64, device=job.device)
    for images, labels in job.data.batches("test", EVAL_BATCH):
        output = model(images)
        totals_3 += _totals(output, labels, cross_entropy(output, labels))
    return _means(totals_3)


@torch.no_grad()
def _is_finite(model: nn.Module, images: Tensor) -> bool:
    return bool(model(images).isfinite().all())


def _totals(output: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
    """Return the totals of a batch on its device: [3]. Reading them here would make a GPU wait."""
    hits = (output.argmax(1) == labels).sum()
    return torch.stack((loss.double() * len(labels), hits.double(), loss.new_tensor(len(labels)).double()))


def _means(totals_3: Tensor) -> tuple[float, float]:
    loss, hits, images = totals_3.tolist()
    return loss / images, hits / images
