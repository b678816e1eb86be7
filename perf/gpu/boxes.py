"""Boxes of time: each runs its tasks in parallel, stops them gently when its time is up, and writes how they ended.

A task is a process of its own, so that no fault of one costs another. Time that a box leaves goes to the later boxes.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from perf.record import KEEP_PAGES, ROOT, without_places
from perf.suites import DEVICE_LOST

GRACE = 0.85  # of a box's time: its tasks begin no case later
LAST_WORDS = 5  # seconds that interrupted tasks have to write their results
LAST_LINES = 15  # of a task's log that are in the summary: its failed tests, or its last lines if it failed
LONGEST_LOG = 1_000_000  # characters of a task's log that are kept, from its end
INTERRUPTED = (130, -signal.SIGINT)


@dataclass(frozen=True)
class Task:
    """A process of a box.

    Attributes:
        command: a function from the seconds after which no case may begin to the command line.
        python: whether the command line is that of Python.
        packages: the Python packages without which the task cannot run.
        program: the program without which the task cannot run.
        resumes: whether the task continues with ``--resume`` after a fault that has cost it the GPU.
        impossible: why the task cannot run on this machine, if it cannot.
    """

    name: str
    command: Callable[[float], Sequence[str]]
    python: bool = True
    packages: Sequence[str] = ()
    program: str | None = None
    resumes: bool = False
    impossible: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def why_not(self) -> str | None:
        """Return why the task cannot run here; None if it can."""
        missing = [package for package in self.packages if importlib.util.find_spec(package) is None]
        if self.program is not None and shutil.which(self.program) is None:
            missing.append(self.program)
        return self.impossible or (f"not installed: {', '.join(missing)}" if missing else None)


@dataclass(frozen=True)
class Box:
    """Tasks that run in parallel, and their seconds. ``suites`` are the result files that they write."""

    name: str
    seconds: float
    tasks: Sequence[Task]
    suites: Sequence[str] = ()


class Running:
    """A task that has been started."""

    def __init__(self, task: Task, seconds: float) -> None:
        self.task, self.stopped = task, False
        self._start, self._end = time.monotonic(), 0.0
        self._log: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = self._started(list(task.command(GRACE * seconds)))
        self._until = self._start + seconds

    def _started(self, command: list[str]) -> subprocess.Popen[bytes]:
        line = [sys.executable, *command] if self.task.python else command
        environment = {**os.environ, **KEEP_PAGES, "PYTHONUNBUFFERED": "1", **self.task.environment}
        return subprocess.Popen(
            line, cwd=ROOT, env=environment, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def has_ended(self) -> bool:
        """Return whether the process has ended; start it again if a fault has cost it the GPU."""
        code, now = self._process.poll(), time.monotonic()
        left = self._until - now
        if code == DEVICE_LOST and self.task.resumes and left > 0 and not self.stopped:
            self._process = self._started([*self.task.command(GRACE * left), "--resume"])
            return False
        self._end = self._end or (now if code is not None else 0.0)
        return code is not None

    def signal(self, number: int) -> None:
        """Send a signal to the process and its children, if it still runs."""
        if self._process.poll() is None:
            self.stopped = True
            os.killpg(self._process.pid, number)

    def ending(self) -> dict[str, Any]:
        """Return how the task ended, once it has: in words, its exit status, and the last lines of a failure."""
        code, end = self._process.wait(), self._end or time.monotonic()
        lines = self.log().rstrip().splitlines()
        # pytest ends with 2 when it is interrupted, and `python -m` with 1.
        if self.stopped and (code in (0, *INTERRUPTED, 2) or lines[-1:] == ["KeyboardInterrupt"]):
            ended = "stopped: out of time"
        else:
            ended = "finished" if code == 0 else f"failed with exit status {code}"
        found = {"task": self.task.name, "ended": ended, "seconds": round(end - self._start, 1)}
        found["said last"] = lines[-1].strip("= ") if lines else ""
        failures = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
        said = failures[:LAST_LINES] or (lines[-LAST_LINES:] if ended.startswith("failed") else [])
        return found | ({"lines": said} if said else {})

    def log(self) -> str:
        """Return what the task has printed."""
        self._log.seek(0)
        return without_places(self._log.read())[-LONGEST_LOG:]


def run(box: Box, deadline: float, log: Path) -> list[dict[str, Any]]:
    """Run a box until the deadline at most, append to the log, and return how each task ended."""
    why = {task.name: task.why_not() for task in box.tasks}
    running = [Running(task, deadline - time.monotonic()) for task in box.tasks if why[task.name] is None]
    try:
        wait(running, deadline)
    finally:
        stop(running)
    with log.open("a", encoding="utf-8") as file:
        file.writelines(f"==== {box.name}: {each.task.name}\n{each.log()}\n" for each in running)
    not_run = [{"task": name, "ended": f"not run: {reason}"} for name, reason in why.items() if reason is not None]
    return [*(each.ending() for each in running), *not_run]


def wait(running: Sequence[Running], deadline: float) -> None:
    """Wait until all tasks have ended, or until the deadline."""
    while time.monotonic() < deadline:
        ended = [each.has_ended() for each in running]  # of every task, because this starts some again
        if all(ended):
            return
        time.sleep(0.05)


def stop(running: Sequence[Running]) -> None:
    """Interrupt the tasks that still run, and kill those that do not end within `LAST_WORDS`."""
    for each in running:
        each.signal(signal.SIGINT)
    wait([each for each in running if each.stopped], time.monotonic() + LAST_WORDS)
    for each in running:
        each.signal(signal.SIGKILL)
