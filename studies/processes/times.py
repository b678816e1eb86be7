"""The seconds of a step by the cost model. All are predictions: no step was timed on several GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from studies.processes.hardware import MEASURED_SAMPLES, gather_seconds, limits, measured_steps, reduce_seconds
from studies.processes.model import NUMBER, Plans, Way, coupled_part, kept, part_of
from studies.processes.sizes import Sizes, sizes_of
from tengrad_triton.curvature.geometry import EMBEDDING, Geometry
from tengrad_triton.tuning.plan import MAX_BYTES

TIMED = ("ResNet-18", "WRN-28-4", "transformer")
"""The models whose steps were measured on an H200."""
FEWEST, MOST = MEASURED_SAMPLES[0], MEASURED_SAMPLES[-1]
BACKWARD = 2 / 3  # of SGD's step: 4 N P K of 6 N P K flops; DDP averages gradients meanwhile
COPIES = 2  # of what was received: it is read and written once as it is taken from the messages
PLAIN_EVERY = 12  # steps: the interval of the measured ones


@dataclass(frozen=True)
class Host:
    """The host's seconds, measured here.

    Attributes:
        exchange: of a refresh, beside sending, for each parameter and however many processes there are, by model.
    """

    exchange: Mapping[str, float]


@dataclass(frozen=True)
class Times:
    """Seconds in each process.

    Attributes:
        sgd: SGD's step under DDP.
        reuse: a step that reuses the curvature.
        refresh: what a refresh adds to that.
        exchange: of this, the time of the messages.
    """

    sgd: float
    reuse: float
    refresh: float
    exchange: float

    def over_sgd(self, every: int) -> float:
        """Return the mean step with a refresh every T steps, reuse + refresh / T, over SGD's."""
        return (self.reuse + self.refresh / every) / self.sgd


def moving_rate() -> float:
    """Return the flops in a second of passes over memory, as the optimizer's cost model counts these: 11 a byte."""
    return limits().bytes_per_second * Geometry(1, 1, 1, 1, 1, 4, 4, "dense", "cuda").flops_of_pass(1)


def products(plans: Plans) -> float:
    """Return the flops of a step's two products with J that is kept as factors: 4 n P K."""
    return sum(
        4 * g.samples * g.positions * g.entries
        for name, g in plans.sizes.items()
        if plans.chosen[name] == "factored" and g.layout != EMBEDDING
    )


def moved(plans: Plans) -> float:
    """Return the seconds of all else in a step: passes over J and weights, and D⁻¹ V̂."""
    return (plans.work.step(plans.sizes, plans.chosen) - products(plans)) / moving_rate()


def plain(name: str, samples: int) -> Plans:
    """Return what one process alone keeps without D, as in the measured steps."""
    found = kept(sizes_of(name, samples), 1, "DDP, global", every=PLAIN_EVERY)
    return replace(found, work=replace(found.work, sides={}))


@cache
def product_rate() -> float:
    """Return the flops a second of products with factors: of ResNet-18 and WRN-28-4 with the most samples, together."""
    alone = {name: plain(name, MOST) for name in ("ResNet-18", "WRN-28-4")}
    seconds = sum(measured_steps()[name, MOST].reuse - moved(plans) for name, plans in alone.items())
    return sum(map(products, alone.values())) / seconds


def work_of_refresh(plans: Plans, own_samples: int) -> tuple[float, float]:
    """Return the flops of a refresh that were measured, and those of factorizations and of D, which were not.

    The backward pass for the drawn labels is that of a process's own samples; moments, K and J are of all processes.
    """
    of_rows = plans.rows, plans.sizes, plans.chosen
    work = replace(plans.work, backwards=0)
    measured, factoring = replace(work, sides={}).refresh(*of_rows), work.blocks * plans.rows**3
    backward = 4 * sum(own_samples * g.positions * g.entries for g in work.weights.values())
    return backward + measured - factoring, factoring + work.refresh(*of_rows) - measured


@cache
def refresh_rate(name: str) -> float:
    """Return the flops a second of a refresh: those of the cost model over the seconds measured with most samples."""
    return work_of_refresh(plain(name, MOST), MOST)[0] / measured_steps()[name, MOST].refresh


def step_seconds(name: str, samples: int, plans: Plans) -> float:
    """Return a reuse step without what processes send: the host's time, or the device's if it is longer.

    The host's is that of SGD's step and what TENGraD adds with the fewest samples. The device's is that of SGD's step
    with the most samples, in proportion, and of products with J and D⁻¹ V̂.
    """
    steps = measured_steps()
    device = steps[name, MOST].sgd * samples / MOST + products(plans) / product_rate() + moved(plans)
    return max(device, steps[name, samples].sgd + steps[name, FEWEST].reuse)


def refresh_seconds(name: str, samples: int, plans: Plans, host: float = 0.0) -> float:
    """Return what computing a refresh adds to a step: the device's time, or the host's if it is longer.

    Factorizations and D take the time of a matrix product with as many flops, which is the least: the measured steps
    have no D, and fewer rows than there may be here.
    """
    measured, others = work_of_refresh(plans, samples)
    device = measured / refresh_rate(name) + others / limits().flops_per_second
    return max(device, measured_steps()[name, FEWEST].refresh + host)


def times_of(
    name: str, samples: int, count: int, way: Way, host: Host,
    fisher_rows: int | None = None, max_bytes: int = MAX_BYTES,
) -> Times:  # fmt: skip
    """Return the seconds of the steps of R processes with N_r samples each.

    SGD's step is the measured one. DDP averages gradients during backward, and a step is longer by what of that
    outlasts it; likewise what FSDP2 sends during forward and backward. What the optimizer sends comes after it, and
    is added. Within a refresh the host's work and the device's overlap, so that the longer one counts.
    """
    sizes, alone = sizes_of(name, samples), measured_steps()[name, samples].sgd
    plans, model = kept(sizes, count, way, fisher_rows, max_bytes), NUMBER * sizes.parameters
    late = max(0.0, reduce_seconds(model, count) - BACKWARD * alone)
    step = step_seconds(name, samples, plans)
    if way == "DDP, local":
        update = reduce_seconds(2 * model, count)
        return Times(alone + late, step + late + update, refresh_seconds(name, samples, plans), 0.0)
    exchange = gather_seconds(sizes.message_bytes, count)
    calls = len(plans.work.weights) * host.exchange[name] if count > 1 else 0.0
    copied = COPIES * count * sizes.message_bytes / limits().bytes_per_second if count > 1 else 0.0
    refresh = exchange + copied + refresh_seconds(name, samples, plans, calls)
    if way == "DDP, global":
        return Times(alone + late, step + late, refresh, exchange)
    step += max(
        0.0, 3 * gather_seconds(NUMBER * part_of(sizes.shapes.values(), count), count) - alone
    ) + sharded_seconds(sizes, count, plans)
    grams = reduce_seconds(NUMBER * len(sizes.layers) * plans.rows**2, count)
    return Times(alone + late, step, refresh + grams, exchange)


def sharded_seconds(sizes: Sizes, count: int, plans: Plans) -> float:
    """Return the seconds of what a step of FSDP2 sends: J V and a square of each block, and some gradients."""
    numbers = NUMBER * len(sizes.layers) * (plans.rows + 1)
    return reduce_seconds(numbers, count) + gather_seconds(NUMBER * coupled_part(sizes, count), count)
