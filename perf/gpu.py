"""All benchmarks that need a GPU, in one command and under ten minutes: `python -m perf.gpu --out DIR [--data DIR]`.

The machine needs this repository, torch, triton, numpy, pytest, pytest-benchmark, pyarrow and pillow; the package does
not have to be installed. Each part has its own time limit, and keeps what it has measured by then:

    tests      every kernel against its definition, on the hardware        log.txt
    kernels    every kernel against torch and the machine's limit          kernels.json
    steps      whole steps, memory, the authors' formulation, scaling      steps.json, memory.json, ...
    training   3C1F on Fashion-MNIST, TENGraD and SGD, five seeds          training.json

summary.json says how each part ended. `python -m perf --report-only` reads a copy of DIR under perf/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
SECONDS = {"tests": 110, "kernels": 140, "steps": 150, "training": 130}
GRACE = 0.85  # of a part's time: it starts no case later
LAST_WORDS = 5  # seconds that a part has to write its results once its time is up
SHARDS = ("cholesky", "gram", "expand", "sample_grads")  # of the tests, which mostly compile


def commands(part: str, options: argparse.Namespace) -> list[list[str]]:
    """Return the commands of a part, which run in parallel."""
    until = ["--seconds", str(GRACE * options.budget[part])]
    place = ["--device", options.device, "--out", str(options.out)]
    if part == "tests":
        options_of_pytest = ["-v", "--no-header", "-p", "no:cacheprovider", "-W", "default"]
        tests = ["-m", "pytest", "tests/test_kernels.py", *options_of_pytest]
        return [[*tests, "-k", shard] for shard in (["costs"] if options.quick else shards())]
    if part == "training":
        small = ["--limit", "256", "--epochs", "1", "--seeds", "2", "--width", "8"] if options.quick else []
        return [["-m", "perf.training", "--data", str(options.data), *place, *until, *small]]
    suites = ["kernels"] if part == "kernels" else ["steps", "optimizers", "memory", "scaling"]
    quick = ["--quick"] if options.quick else []
    return [["-m", "perf", *place, *until, *quick, "--no-page", "--only", *suites]]


def shards() -> Iterator[str]:
    """Yield disjoint selections of tests, which together have all tests."""
    for index, name in enumerate(SHARDS):
        yield " and ".join([name, *(f"not {earlier}" for earlier in SHARDS[:index])])
    yield " and ".join(f"not {name}" for name in SHARDS)


def run(lines: Sequence[Sequence[str]], environment: dict[str, str], log: Path, seconds: float) -> dict[str, Any]:
    """Run the commands of a part, append their output to a file, and return how they ended."""
    start = time.monotonic()
    with ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8")) for _ in lines]
        children = [
            subprocess.Popen(
                [sys.executable, *line], cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True
            )
            for line, out in zip(lines, outputs, strict=True)
        ]
        try:
            endings = [ending(child, start + seconds) for child in children]
        finally:
            for child in children:
                stop(child)
        texts = [output.read() for output in outputs if output.seek(0) == 0]
    with log.open("a", encoding="utf-8") as file:
        file.writelines(f"{text}\n" for text in texts)
    last = [text.rstrip().rpartition("\n")[2].strip("= ") for text in texts]
    return {"ended": endings, "said last": last, "seconds": round(time.monotonic() - start, 1)}


def ending(child: subprocess.Popen[bytes], deadline: float) -> str:
    """Wait for a process until the deadline, and return how it ended."""
    try:
        code = child.wait(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "stopped: out of time"
    return "finished" if code == 0 else f"failed with exit status {code}"


def stop(child: subprocess.Popen[bytes]) -> None:
    """Interrupt a process and its children, and kill them if they do not end within `LAST_WORDS`."""
    if child.poll() is not None:
        return
    os.killpg(child.pid, signal.SIGINT)
    try:
        child.wait(LAST_WORDS)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m perf.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's Parquet files; without it no training")
    parser.add_argument("--only", nargs="+", choices=SECONDS, default=list(SECONDS), help="parts to run")
    parser.add_argument("--seconds", type=float, help="time limit of all parts together, in proportion to their own")
    parser.add_argument("--commit", help="the commit of this tree, if there is no git")
    parser.add_argument("--device", default="cuda", help="cpu to rehearse")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to rehearse")
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu --quick rehearses without one")
    options.out = options.out.resolve()
    options.data = options.data and options.data.resolve()
    options.parts = [name for name in options.only if name != "training" or options.data]
    own = sum(SECONDS[name] for name in options.parts)
    options.budget = {name: SECONDS[name] * (options.seconds or own) / own for name in options.parts}
    return options


def main() -> None:
    """Run the parts one after the other, and print how each ended."""
    options = parsed()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "log.txt"
    log.unlink(missing_ok=True)
    parts: dict[str, Any] = {}
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    for part in options.parts:
        print(f"{part} ... ", end="", flush=True)
        parts[part] = run(commands(part, options), environment, log, options.budget[part])
        print(f"{parts[part]['seconds']} s: {', '.join(parts[part]['said last'])}", flush=True)
        summary = {"commit": options.commit, "parts": parts}
        (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
