"""What is measured of several processes: the bytes that they send, counted, and the host's time for a part."""

from __future__ import annotations

import multiprocessing
import pickle
import re
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

from studies.processes.model import WAYS, Way
from studies.processes.sizes import META, NETWORKS, sizes_of
from tengrad_triton import TENGraD
from tengrad_triton.curvature.contributions import Contributions
from tengrad_triton.distributed.exchange import Message, packed
from tengrad_triton.distributed.ranks import Gram

COUNTS = Path("/proc/self/io")
"""Linux counts here what a process writes, into sockets too."""
EVERY = 2  # steps: a refresh and one that reuses
CLASSES = 10


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


def sent_so_far() -> int:
    """Return the bytes that this process has written since it began."""
    found = re.search(r"wchar: (\d+)", COUNTS.read_text(encoding="ascii"))
    assert found is not None
    return int(found[1])


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
    found = []
    for _ in range(2 * EVERY):
        optimizer.zero_grad()
        counts = [sent_so_far()]
        F.cross_entropy(called(x), y).backward()
        counts.append(sent_so_far())
        optimizer.step()
        counts.append(sent_so_far())
        found.append([counts[1] - counts[0], counts[2] - counts[1]])
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


def header_seconds(name: str, repeats: int = 20, rounds: int = 15) -> float:
    """Return the CPU seconds that reading what one process says of its contributions takes: the least of the rounds."""
    sizes = sizes_of(name, 32)
    shapes = packed(sizes.contributions.by_layer, META)[0]
    text = pickle.dumps(Message(None, {}, shapes, [sizes.samples], sizes.message_bytes))
    return (
        min(timeit.repeat(lambda: pickle.loads(text), timer=time.process_time, number=repeats, repeat=rounds)) / repeats
    )


PARTS = (8, 40)
"""The numbers of processes whose parts one process works on to measure what a part takes."""


def part_seconds(rounds: int = 15) -> float:
    """Return the CPU seconds that one more process's part adds to a refresh, for each parameter.

    The parts of other processes stay apart until J is made, so that each takes calls of its own. Here one process
    gets its own part several times, in place of the exchange. The model is so small that calls take all of the time.
    The least of the rounds counts: other programs only add to it.
    """
    model = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(4, 4), nn.Tanh())))
    x, y = torch.randn(1, 4), torch.randint(4, (1,))
    seconds = {parts: min(_refresh_seconds(model, x, y, parts, rounds)) for parts in PARTS}
    parameters = sum(1 for _ in model.parameters())
    return (seconds[PARTS[1]] - seconds[PARTS[0]]) / (PARTS[1] - PARTS[0]) / parameters


def _refresh_seconds(model: nn.Module, x: Tensor, y: Tensor, parts: int, rounds: int) -> Sequence[float]:
    optimizer = TENGraD(model, lr=0.0, refresh_every=1, seed=0)
    alone = optimizer._processes.gather

    def repeated(*arguments: Any) -> tuple[Contributions, dict[str, str]]:
        own, missing = alone(*arguments)
        return Contributions({k: {n: [*b] * parts for n, b in v.items()} for k, v in own.by_layer.items()}), missing

    optimizer._processes.gather = repeated
    found = []
    for _ in range(rounds + 1):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        since = time.process_time()
        optimizer.step()
        found.append(time.process_time() - since)
    return found[1:]
