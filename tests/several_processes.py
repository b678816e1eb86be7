"""Runs a function in several processes of one gloo group, on the CPU."""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

PATIENCE = 120  # seconds for all processes together
TIMEOUT = 30  # seconds after which a collective fails
_CONTEXT = multiprocessing.get_context("forkserver")  # each process forks from one that has imported torch
_CONTEXT.set_forkserver_preload(["torch", "tengrad_triton"])


def run(count, function, *arguments):
    """Return what ``function(rank, *arguments)`` returned in each process; raise what it raised in one of them."""
    outcomes = outcomes_of(count, function, *arguments)
    failures = [f"rank {rank}: {found}" for rank, found in enumerate(outcomes) if isinstance(found, Failure)]
    assert not failures, "\n".join(failures)
    return outcomes


class Failure(str):
    """The traceback of what a process raised; empty if it was killed."""

    __slots__ = ()


def outcomes_of(count, function, *arguments):
    """Return what the function returned in each process, or a `Failure`."""
    with tempfile.TemporaryDirectory() as folder:
        sent = _bytes_of(arguments)  # tensors themselves would share their memory between the processes
        pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(count)]
        started = [
            _CONTEXT.Process(
                target=_in_process, args=(rank, count, Path(folder) / "store", sender, function, sent), daemon=True
            )
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process in started:
            process.start()
        for _, sender in pipes:
            sender.close()
        deadline = time.monotonic() + PATIENCE
        try:
            return [_received(receiver, deadline) for receiver, _ in pipes]
        finally:
            for process in started:
                process.kill()
                process.join()


def _received(receiver, deadline):
    if not receiver.poll(max(0.0, deadline - time.monotonic())):
        return Failure(f"nothing came within {PATIENCE} s")
    try:
        kind, content = receiver.recv()
    except EOFError:
        return Failure("")
    return Failure(content) if kind == "raised" else _of_bytes(content)


def _bytes_of(value):
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def _of_bytes(content):
    return torch.load(io.BytesIO(content), weights_only=False)


def _in_process(rank, count, store, sender, function, sent):
    torch.set_num_threads(1)
    os.environ["TORCH_SHOW_CPP_STACKTRACES"] = "0"
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timedelta(seconds=TIMEOUT)
    )
    try:
        sender.send(("returned", _bytes_of(function(rank, *_of_bytes(sent)))))
    except Exception:
        sender.send(("raised", traceback.format_exc()))
    finally:
        dist.destroy_process_group()
