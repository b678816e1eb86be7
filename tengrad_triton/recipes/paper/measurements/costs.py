"""What each measurement costs: its time, from small parts of it, and the least memory that it needs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from tengrad_triton.recipes.paper import memory
from tengrad_triton.recipes.paper.estimates import Found, Probe, probe_of_steps, seconds_of_run
from tengrad_triton.recipes.paper.measurements import complexity, inverses, peaks, phases
from tengrad_triton.recipes.paper.measurements.subject import DAMPING, job_for, names_of
from tengrad_triton.recipes.paper.request import INVERSES
from tengrad_triton.recipes.paper.shared import Shared


@dataclass(frozen=True)
class Cost:
    """How the cost of a target is found.

    Attributes:
        probes: returns what has to be measured for its time.
        seconds: returns the time from what the probes found.
        needed: returns the least memory in bytes.
    """

    probes: Callable[[str, Shared], list[Probe]]
    seconds: Callable[[str, Shared, Found], float]
    needed: Callable[[str, Shared], int]


def _probes_of_inverses(target: str, shared: Shared) -> list[Probe]:
    job = job_for(shared, "sgd", epochs=1)

    def take(method: str) -> tuple[float, float]:
        batch = next(job.data.batches("train", job.settings.batch_size))
        return inverses.seconds_of_columns(inverses.METHODS[method], job.model().to(job.device), batch, DAMPING)

    of_methods = [
        Probe(("inverse", name), f"the inverse Fisher matrix of {name}", partial(take, name))
        for name in inverses.METHODS
    ]
    return [probe_of_steps(job, "sgd"), *of_methods]


def seconds_of_epoch(shared: Shared, found: Found) -> float:
    """Return the time of the epoch of SGD before the inverses, which they share."""
    job = job_for(shared, "sgd", epochs=1)
    return seconds_of_run(job, found[probe_of_steps(job, "sgd").key])


def _seconds_of_inverses(target: str, shared: Shared, found: Found) -> float:
    job = job_for(shared, "sgd", epochs=1)
    weight = job.model().get_parameter(f"{inverses.LAYERS[target]}.weight")
    later = len(inverses.shown_entries(weight)) - 1
    times = [found["inverse", name] for name in inverses.METHODS]
    return sum(a + later * b for a, b in times)


def _needed_for_inverses(target: str, shared: Shared) -> int:
    job = job_for(shared, "sgd", epochs=1)
    sizes = memory.sizes_of(job.model, job.data.train.images.shape[1:])
    return memory.bytes_of_all_classes(sizes, job.settings.batch_size, job.data.classes)


def _probes_of_table1(target: str, shared: Shared) -> list[Probe]:
    return [
        Probe(
            ("table1", name, anchor),
            f"table1, {name}, width {sizes['width']}, batch {sizes['batch']}",
            partial(complexity.seconds_of_round, name, sizes, shared.device),
        )
        for name in names_of(target, shared.request)
        for anchor, sizes in complexity.ANCHORS.items()
    ]


def _seconds_of_table1(target: str, shared: Shared, found: Found) -> float:
    anchors = [
        {anchor: found["table1", name, anchor] for anchor in complexity.ANCHORS}
        for name in names_of(target, shared.request)
    ]
    return sum(complexity.seconds_of_cell(of, sizes) for of in anchors for sizes in complexity.cells())


def _needed_for_table1(target: str, shared: Shared) -> int:
    """Return what the largest cell needs: all optimizers have a model of their own there."""

    def needed(width: int, depth: int, batch: int) -> int:
        sizes = memory.sizes_of(partial(complexity.perceptron, width, depth), (width,))
        return sum(memory.bytes_of_step(sizes, name, batch) for name in names_of(target, shared.request))

    return max(needed(cell["width"], cell["depth"], cell["batch"]) for cell in complexity.cells())


def _probes_of_phases(target: str, shared: Shared) -> list[Probe]:
    return [
        Probe(
            ("phases", name),
            f"phases of {name}",
            lambda name=name: phases.seconds_of_phases(job_for(shared, name), name),  # type: ignore[misc]
        )
        for name in names_of(target, shared.request)
    ]


def _seconds_of_phases(target: str, shared: Shared, found: Found) -> float:
    total: float = sum(found["phases", name] for name in names_of(target, shared.request))
    return total


def _probes_of_memory(target: str, shared: Shared) -> list[Probe]:
    jobs = {name: job_for(shared, name) for name in names_of(target, shared.request)}
    start = Probe("a process", "the start of a process", peaks.seconds_to_start)
    return [start, *(probe_of_steps(job, name) for name, job in jobs.items())]


def _seconds_of_memory(target: str, shared: Shared, found: Found) -> float:
    """Each process takes two steps to warm up, and then three, of which two refresh the curvature."""
    names = names_of(target, shared.request)
    times = [found[probe_of_steps(job_for(shared, name), name).key] for name in names]
    return sum(found["a process"] + of.seconds(2) + 3 * of.plain + 2 * of.refresh for of in times)


def _needed_for_steps(target: str, shared: Shared) -> int:
    return max(memory.needed_bytes(job_for(shared, name), name) for name in names_of(target, shared.request))


COSTS: Mapping[str, Cost] = {
    **dict.fromkeys(INVERSES, Cost(_probes_of_inverses, _seconds_of_inverses, _needed_for_inverses)),
    "table1": Cost(_probes_of_table1, _seconds_of_table1, _needed_for_table1),
    "phases": Cost(_probes_of_phases, _seconds_of_phases, _needed_for_steps),
    "memory": Cost(_probes_of_memory, _seconds_of_memory, _needed_for_steps),
}
