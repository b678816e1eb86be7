"""Processes that tests start in the repository's root: tests do not import perf."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def run(*arguments, stdin=None, status=0):
    """Run Python; return what it printed."""
    command = [sys.executable, *arguments]
    # pytest-benchmark measures nothing in a worker of pytest-xdist, nor in what a worker starts.
    env = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    done = subprocess.run(command, cwd=ROOT, env=env, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


CHECKING = """
import json, sys, traceback
for name in {absent}:
    sys.modules[name] = None
errors = {{}}
for name, code in json.load(sys.stdin).items():
    try:
        exec(code, {{}})
    except Exception:
        errors[name] = traceback.format_exc()
print(json.dumps(errors))
"""


def errors_of(checks, absent=()):
    """Run pieces of code by name in one process, to which some packages are absent; return the errors by name."""
    printed = run("-c", CHECKING.format(absent=tuple(absent)), stdin=json.dumps(checks))
    return json.loads(printed.strip().rpartition("\n")[2])
