#!/usr/bin/env bash
# pytest-benchmark 5.3.1: a program that a test starts measures nothing when that test runs in a worker of pytest-xdist.
#
# pytest-benchmark disables itself where the environment has PYTEST_XDIST_WORKER, which pytest-xdist sets in its workers
# and every process they start inherits. So a benchmark command that a test runs as a program of its own, without -n and
# even with -p no:xdist, passes with exit status 0, but does not write the file that --benchmark-json asks for. Its
# warning says that xdist is active. A test that starts benchmarks has to take the variable out of the environment.
#
# Seen with pytest 9.2.0, pytest-benchmark 5.3.1 and pytest-xdist 3.8.0, Python 3.11, on Linux x86-64:
#   one process: exit 0, 1 passed, file written
#   a worker: exit 0, 1 passed, no file
#   a worker, variable taken out: exit 0, 1 passed, file written
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    pytest==9.2.0 pytest-benchmark==5.3.1 pytest-xdist==3.8.0
cd "$folder"
cat > bench_sum.py <<'PYTHON'
def test_sum(benchmark):
    benchmark.pedantic(sum, ([1, 2, 3],), rounds=3)
PYTHON
cat > test_program.py <<'PYTHON'
import os
import pathlib
import subprocess
import sys


def test_benchmarks_run_as_a_program():
    env = {name: value for name, value in os.environ.items() if name != os.environ.get("TAKE_OUT")}
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "bench_sum.py", "--benchmark-json", "times.json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    passed = "1 passed" if "1 passed" in done.stdout else done.stdout
    file = "file written" if pathlib.Path("times.json").exists() else "no file"
    pathlib.Path("outcome.txt").write_text(f"exit {done.returncode}, {passed}, {file}\n")
PYTHON

outcome() { # what to call it, then pytest's arguments
    rm -f times.json outcome.txt
    venv/bin/python -m pytest -q test_program.py "${@:2}" > parent.txt
    echo "$1: $(cat outcome.txt)" | tee -a seen.txt
}
outcome "one process" -p no:xdist
outcome "a worker" -n 1
TAKE_OUT=PYTEST_XDIST_WORKER outcome "a worker, variable taken out" -n 1
diff seen.txt - <<'EXPECTED'
one process: exit 0, 1 passed, file written
a worker: exit 0, 1 passed, no file
a worker, variable taken out: exit 0, 1 passed, file written
EXPECTED
