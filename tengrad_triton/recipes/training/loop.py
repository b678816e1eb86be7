"""The training loop: one optimizer, epoch by epoch, from a seed or from a checkpoint."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass
from itertools import cycle, islice, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tengrad_triton.recipes.data.images import Data
from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.measuring.machine import now
from tengrad_triton.recipes.models import image_model
from tengrad_triton.recipes.optimizers.settings import OptimizerName
from tengrad_triton.recipes.training.metrics import Record, Row, Steps
from tengrad_triton.recipes.training.settings import Settings

EVAL_BATCH = 500
ABOVE = 1.1  # times the first loss: what is less may be chance

State = dict[str, Any]  # what torch.save keeps: the model, the optimizer, the random numbers and the record so far
Watch = Callable[[int, Tensor], None]  # takes the epoch, and the sums over its images so far: see `_totals`


@dataclass(frozen=True)
class Job:
    """What all optimizers of a run share; `data` is on `device`."""

    settings: Settings
    data: Data
    device: torch.device

    def model(self) -> nn.Module:
        """Return the model with its first weights, which depend on the seed alone, where torch makes new tensors."""
        torch.manual_seed(self.settings.seed)
        _, channels, height, width = self.data.train.images.shape
        made = image_model(self.settings.model)
        return made.build((channels, height, width), self.data.classes, self.settings.width)

    def build(self, name: OptimizerName) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return the model with its first weights on the device, and a new optimizer of it."""
        model = self.model().to(self.device)
        return model, self.settings.of(name).build(model)


@dataclass(frozen=True)
class WarmUp:
    """How long an optimizer's first steps took, and what it says about each parameter, if it says anything."""

    seconds: float
    summary: str | None


def warm_up(job: Job, name: OptimizerName) -> WarmUp:
    """Take two steps with a model that is then forgotten.

    Kernels are compiled and libraries loaded here, out of every optimizer's time; and an optimizer that cannot train
    this model says so before anything is written. The second step is TENGraD's first with reused curvature.
    """
    start = now(job.device)
    model, optimizer = job.build(name)
    size = job.settings.batch_size
    with closing_hooks(optimizer):
        for _, (images, labels) in zip(range(2), job.data.batches("train", size), strict=False):
            one_step(model, optimizer, images, labels, job.settings.of(name).closure)
        seconds = now(job.device) - start
        return WarmUp(seconds, str(optimizer.summary()) if hasattr(optimizer, "summary") else None)


def seconds_of_steps(job: Job, name: OptimizerName, steps: int) -> list[float]:
    """Return how long each of an optimizer's first steps takes once all is warm; the first refreshes the curvature."""
    warm_up(job, name)
    model, optimizer = job.build(name)
    batches = cycle(islice(job.data.batches("train", job.settings.batch_size), steps))
    times = [now(job.device)]
    with closing_hooks(optimizer):
        for images, labels in islice(batches, steps):
            one_step(model, optimizer, images, labels, job.settings.of(name).closure)
            times.append(now(job.device))
    return [end - start for start, end in pairwise(times)]


def fit(job: Job, name: OptimizerName, state: State | None, watch: Watch) -> Iterator[State]:
    """Yield the state after each epoch that is left, until the last one or until the run has diverged."""
    model, optimizer = job.build(name)
    rates = [group["lr"] for group in optimizer.param_groups]
    record = Record() if state is None else _restore(model, optimizer, state, job.device)
    with closing_hooks(optimizer):
        while len(record.rows) < job.settings.epochs and not diverged(record):
            passed = sum(epoch <= len(record.rows) for epoch in job.settings.decay_at)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * job.settings.decay**passed
            record = _one_epoch(job, name, model, optimizer, record, watch)
            yield _state(model, optimizer, record, job.device)


def record_of(state: State | None) -> Record:
    """Return the epochs and steps that a state has behind it."""
    return Record() if state is None else Record([Row(**row) for row in state["rows"]], Steps(**state["steps"]))


def diverged(record: Record) -> bool:
    """Tell whether going on would be a waste: the last epoch's loss is no number, or was far above the first one."""
    if not record.rows:
        return False
    loss_S = record.steps.loss
    last_S = loss_S[-(len(loss_S) // len(record.rows)) :]
    return not math.isfinite(record.rows[-1].train_loss) or bool((last_S > ABOVE * loss_S[0]).all())


def closing_hooks(optimizer: torch.optim.Optimizer) -> AbstractContextManager[object]:
    """Take an optimizer's hooks off the model at the end, where it has some."""
    return closing(optimizer) if hasattr(optimizer, "close") else nullcontext()


def _one_epoch(
    job: Job, name: OptimizerName, model: nn.Module, optimizer: torch.optim.Optimizer, record: Record, watch: Watch
) -> Record:
    epoch, start, processors = len(record.rows) + 1, now(job.device), time.process_time()
    closure = job.settings.of(name).closure
    train, ends_S, totals_S3 = _train(job, model, optimizer, closure, epoch, watch)
    middle, processors = now(job.device), time.process_time() - processors
    test = _evaluate(job, model)
    end = now(job.device)
    row = Row(name, epoch, *train, *test, middle - start, end - middle, processors)
    return record.then(row, Steps.of(record.train_seconds + (ends_S - start), totals_S3))


def _train(
    job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, closure: bool, epoch: int, watch: Watch
) -> tuple[tuple[float, float], Tensor, Tensor]:
    """Return the epoch's mean loss and accuracy, and the time of each step's end with its `_totals`.

    Each image is seen with the weights of its step. What steps return is read after the last: a GPU never waits.
    """
    model.train()
    totals_3 = torch.zeros(3, dtype=torch.float64, device=job.device)
    ends, each = [], []
    settings = job.settings
    for images, labels in job.data.batches("train", settings.batch_size, shuffle_seed=settings.seed + epoch):
        each.append(one_step(model, optimizer, images, labels, closure))
        totals_3 += each[-1]
        ends.append(time.perf_counter())
        watch(epoch, totals_3)
    return _means(totals_3), torch.tensor(ends, dtype=torch.float64), torch.stack(each).cpu()


def one_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, closure: bool
) -> Tensor:
    """Return the batch's totals, from before the step."""
    seen: list[tuple[Tensor, Tensor]] = []

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        output = model(images)
        loss = cross_entropy(output, labels)
        loss.backward()
        seen.append((output.detach(), loss.detach()))
        return loss

    try:
        if closure:
            optimizer.step(evaluate)  # type: ignore[arg-type]  # torch annotates a closure that returns a float
        else:
            evaluate()
            optimizer.step()
    except RuntimeError:  # TENGraD cannot draw labels from logits that are not finite
        if _is_finite(model, images):
            raise
        return images.new_tensor([math.nan, 0, len(labels)], dtype=torch.float64)
    output, loss = seen[0]
    return _totals(output, labels, loss)


@torch.no_grad()
def _evaluate(job: Job, model: nn.Module) -> tuple[float, float]:
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
    """Return [sum of the losses, right answers, images] of a batch, on its device: reading them here would stop it."""
    hits = (output.argmax(1) == labels).sum()
    return torch.stack((loss.double() * len(labels), hits.double(), loss.new_tensor(len(labels)).double()))


def _means(totals_3: Tensor) -> tuple[float, float]:
    loss, hits, images = totals_3.tolist()
    return loss / images, hits / images


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, record: Record, device: torch.device) -> State:
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "rows": [asdict(row) for row in record.rows],
        "steps": dict(vars(record.steps)),
    }


def _restore(model: nn.Module, optimizer: torch.optim.Optimizer, state: State, device: torch.device) -> Record:
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise UsageError(f"a checkpoint does not fit the run's settings ({error}): restore settings.json") from error
    torch.set_rng_state(state["rng"])
    if device.type == "cuda" and state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"], device)
    return record_of(state)
