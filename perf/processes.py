"""Steps in several processes, of whole or of sharded models: TENGraD's over SGD's, side by side in the same ones."""

from __future__ import annotations

import multiprocessing
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from perf.loops import plain_step, sgd, tengrad
from perf.models import MODELS
from perf.steps import ratios, sgd_timer, tengrad_timer
from perf.timing import interleaved

Parallel = Literal["DDP", "FSDP2"]
BLOCK = 5  # steps that are timed together: a process waits for the others in each


@dataclass(frozen=True)
class ProcessesCase:
    """A model, the batch of each process, how many processes there are, the rounds, and who has the parameters."""

    model: str
    samples: int
    count: int
    rounds: int
    parallel: Parallel = "DDP"

    def __str__(self) -> str:
        return f"{self.model}, N = {self.count} x {self.samples}" + ("" if self.parallel == "DDP" else ", FSDP2")

    def measure(self, device: torch.device) -> dict[str, Any]:
        """Return the spreads of SGD's steps and of TENGraD's refresh and reuse steps in the first process, and ratios.

        The processes are on the CPU, with one thread each.
        """
        if device.type != "cpu":
            raise RuntimeError("the processes of this suite share a CPU")
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        with tempfile.TemporaryDirectory() as folder:
            started = [
                context.Process(target=_in_process, args=(self, rank, Path(folder) / "store", sender), daemon=True)
                for rank in range(self.count)
            ]
            for process in started:
                process.start()
            sender.close()
            times = receiver.recv()
            for process in started:
                process.join()
        return {**asdict(self), "seconds": times, **ratios(times)}


def _sharded(model: nn.Module) -> nn.Module:
    """Return a model of which each process has a part: each layer alone, as large models have each block."""
    for layer in model.modules():
        if any(True for _ in layer.parameters(recurse=False)):
            fully_shard(layer)
    return fully_shard(model)


def _in_process(case: ProcessesCase, rank: int, store: Path, sender: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=case.count)
    device = torch.device("cpu")
    made = MODELS[case.model]
    x, y = made.batch(case.samples, device)
    wrapped = _sharded if case.parallel == "FSDP2" else DistributedDataParallel
    ours, theirs = (wrapped(made.on(device)) for _ in range(2))
    timers = {
        "sgd": sgd_timer(plain_step(theirs, sgd(theirs)), BLOCK, x, y),
        "tengrad": tengrad_timer(plain_step(ours, tengrad(ours, BLOCK + 2)), BLOCK, x, y),
    }
    for timer in timers.values():
        timer()
    times = interleaved(timers, case.rounds)
    if rank == 0:
        sender.send(times)
    dist.barrier()
    dist.destroy_process_group()
