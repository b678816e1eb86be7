"""What is measured of several processes: the bytes that they send, counted, and the host's time for an exchange."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import timeit
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from studies.processes.counting import sent_by_steps
from studies.processes.model import WAYS, Way
from studies.processes.sizes import NETWORKS
from tengrad_triton import TENGraD
from tengrad_triton.capture.blocks import LayerParams
from tengrad_triton.capture.hooks import Capture
from tengrad_triton.curvature.contributions import Contributions
from tengrad_triton.distributed.exchange import form_of, packed, unpacked
from tengrad_triton.distributed.ranks import Gram

EVERY = 2  # steps: a refresh and one that reuses
CLASSES = 10
Gathered = tuple[Contributions, dict[str, str]]


@dataclass(frozen=True)
class Case:
    """Processes that train a model, each with some samples.

    Attributes:
        network: the model's name.
        samples: of each process.
        count: R.
        way: how the model is wrapped, and whose rows the curvature has.
        fisher_rows: the most rows that are kept; None for all.
    """

    network: str
    samples: int
    count: int
    way: Way
    fisher_rows: int | None = None


def cases() -> list[Case]:
    """Return what is counted: each way is one more row for every model and every number of processes."""
    models = (("small 3C1F", 8), ("transformer", 4), ("ResNet-18", 2))
    few = Case("transformer", 4, 4, "DDP, global", fisher_rows=4)
    return [*(Case(*model, count, way) for way in WAYS for model in models for count in (2, 4, 8)), few]


def wrapped(model: nn.Module, way: Way) -> Any:
    """Return the model as the way's loop calls it."""
    if way == "FSDP2, global":
        from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - its import takes a second

        return fully_shard(model, reshard_after_forward=True)  # which is not the default for the outermost module
    return DistributedDataParallel(model)


def sent_in_steps(case: Case) -> dict[str, list[int]]:
    """Return what this process sends in forward and backward, and in the optimizer's step, for both kinds of steps.

    The first two steps are left out: the wrapper arranges its buckets anew after the first backward.
    """
    network = NETWORKS[case.network]
    torch.manual_seed(0)
    called = wrapped(network.build(), case.way)
    gram: Gram = "local" if case.way == "DDP, local" else "global"
    optimizer = TENGraD(called, refresh_every=EVERY, gram=gram, fisher_rows=case.fisher_rows)
    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = (case.samples, *network.sample)
    x = torch.randint(256, shape, generator=generator) if network.tokens else torch.randn(shape, generator=generator)
    y = torch.randint(CLASSES, (case.samples,), generator=generator)
    found = sent_by_steps(called, optimizer, x, y, 2 * EVERY)
    return {"refresh": found[EVERY], "reuse": found[EVERY + 1], "rows": [optimizer.stats.rows or 0]}


def count(case: Case) -> dict[str, Any]:
    """Return the means over the processes of what each of them sends, and the rows of the curvature."""
    found = in_processes(case.count, sent_in_steps, case)

    def mean(kind: str, place: int) -> float:
        return sum(one[kind][place] for one in found) / case.count

    kinds = {kind: {"wrapper": mean(kind, 0), "own": mean(kind, 1)} for kind in ("refresh", "reuse")}
    return {**asdict(case), **kinds, "rows": found[0]["rows"][0]}


def in_processes(number: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what a function returned in each process of a gloo group, each with one thread."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(number)]
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        started = [
            context.Process(target=_run, args=(rank, number, store, sender, function, arguments), daemon=True)
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process in started:
            process.start()
        for _, sender in pipes:
            sender.close()  # so that a process that ends early is an EOFError here
        found = [receiver.recv() for receiver, _ in pipes]
        for process in started:
            process.join()
    return found


def _run(rank: int, number: int, store: Path, sender: Any, function: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=number)
    sender.send(function(*arguments))
    dist.barrier()
    dist.destroy_process_group()


PARTS = 2
"""The number of processes whose parts are taken to measure the host: more of them take no more calls."""
SAMPLES, PIXELS, TOKENS = 2, (3, 9, 9), (4,)  # so few that calls take the time, and copies next to none


def exchange_seconds(name: str, rounds: int = 60) -> float:
    """Return the CPU seconds that the exchange of a refresh takes beside sending, for each parameter and whatever R is.

    One process gets its own message in place of those of several. The copies grow with R, and are the device's work.
    With one sample a process there would be no copies: tensors are then parts of the messages. The least of the rounds
    counts: other programs only add to it.
    """
    torch.manual_seed(0)
    network = NETWORKS[name]
    model = network.build()
    x = torch.randint(256, (SAMPLES, *TOKENS)) if network.tokens else torch.randn(SAMPLES, *PIXELS)
    optimizer = TENGraD(model, seed=0)
    alone, seconds = optimizer._processes.gather, []

    def timed(layers: Sequence[LayerParams], capture: Capture, release_calls: bool) -> Gathered:
        own, missing = alone(layers, capture, release_calls)
        flat_RB = packed(own.by_layer, x.device)[1].repeat(PARTS, 1)
        least = min(timeit.repeat(lambda: _exchange(own, flat_RB), timer=time.process_time, number=1, repeat=rounds))
        seconds.append(least / len(list(model.parameters())))
        return own, missing

    optimizer._processes.gather = timed
    F.cross_entropy(model(x), torch.randint(CLASSES, (SAMPLES,))).backward()
    optimizer.step()
    return seconds[0]


def _exchange(own: Contributions, flat_RB: Tensor) -> None:
    """Do what `gather_from_all` does beside sending."""
    shapes, _ = packed(own.by_layer, flat_RB.device)
    form_of(shapes)
    unpacked(shapes, flat_RB)
