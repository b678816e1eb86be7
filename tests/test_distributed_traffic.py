"""What steps in several processes send, counted by the system."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import several_processes
import torch
from helpers.pages import blocks_of
from torch.nn.parallel import DistributedDataParallel
from traffic import numbers_of_factors

from studies.processes import counting
from tengrad_triton import TENGraD
from tengrad_triton.recipes.models import conv_3c1f

EVERY, SAMPLES, WIDTH = 3, 8, 16


def sent_by_steps(rank):
    """Return what each backward and each step sends, the bytes of all parameters, and those of the factors."""
    torch.manual_seed(0)
    model = conv_3c1f((1, 28, 28), 10, WIDTH)
    called = DistributedDataParallel(model)
    optimizer = TENGraD(called, refresh_every=EVERY)
    x, y = torch.randn(SAMPLES, 1, 28, 28), torch.randint(10, (SAMPLES,))
    found = counting.sent_by_steps(called, optimizer, x, y, 2 * EVERY)
    return found, sum(p.nbytes for p in model.parameters()), 4 * SAMPLES * numbers_of_factors(model)


@pytest.mark.skipif(not counting.COUNTS.exists(), reason="the system counts no bytes")
@pytest.mark.parametrize("count", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (4, 8))])
def test_steps_send_what_the_equations_say(count):
    for found, parameters, factors in several_processes.run(count, sent_by_steps):
        gradients = 2 * (count - 1) / count * parameters
        for step, (backward, own) in enumerate(found[1:], 1):
            if step % EVERY:
                assert backward + own <= 1.05 * gradients
            else:
                assert own <= 1.1 * (count - 1) * factors


@pytest.mark.parametrize("guide", ["distributed", "sharded"])
def test_the_guides_program_runs_in_two_processes(guide, tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "guides" / f"{guide}.md").read_text(encoding="utf-8")
    code, _, printed = (block.text for block in blocks_of(page)[:3])
    (tmp_path / "train.py").write_text(f"{code}\n\nmain()\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    said, expected = (re.fullmatch(r"loss (\S+), (\d+) rows(?:, .*)?\s*", text) for text in (done.stdout, printed))
    assert said[2] == expected[2]
    assert abs(float(said[1]) - float(expected[1])) < 0.02  # another CPU rounds differently
