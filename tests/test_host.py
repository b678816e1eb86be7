"""The host's time of a step is measured through Triton's own launcher, with a driver library that does nothing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tengrad_triton import kernels

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
    pytest.mark.skipif(not kernels.spec.HAS_TRITON, reason="needs Triton"),
]


def test_kernels_are_launched_through_the_stand_in():
    command = [sys.executable, "-m", "perf.host.measure", "MLP", "3"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # Two products with two kernels, a solution and an update: at least once each for rows and for factors.
    assert found["launches"] >= 2 * (2 + 1) + 1
    assert found["parameters"] == 6
    assert {spread["rounds"] for spread in found["seconds"].values()} == {3}
    assert found["reuse_over_sgd"] == found["seconds"]["reuse"]["median"] / found["seconds"]["sgd"]["median"]
