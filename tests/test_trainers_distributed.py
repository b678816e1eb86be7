"""Trainers in two processes: the steps of one process with the whole batch, and checkpoints that go on bit for bit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("lightning")
pytest.importorskip("transformers")

import trainer_ranks

SCRIPT = Path(trainer_ranks.__file__)
TOLERANCE = {"gpt2": 1e-5, "gpt2, micro-batches": 1e-5}  # whose loss is computed in float32; else 1e-9
pytestmark = pytest.mark.filterwarnings("default", "error:the loss is not that", "error:no exact rows")


def under_torchrun(trainer, folder):
    """Return what each rank has found."""
    count = trainer_ranks.RANKS
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    done = subprocess.run([*command, SCRIPT, trainer, folder], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


@pytest.mark.parametrize("trainer", trainer_ranks.CASES)
def test_two_processes_take_the_steps_of_one_and_go_on_from_their_checkpoint(trainer, tmp_path):
    first, second = under_torchrun(trainer, tmp_path)
    wrong = {}
    for name, case in trainer_ranks.CASES[trainer].items():
        error = (first[name] - case(tmp_path / "alone" / name)).abs().max().item()
        if not error <= TOLERANCE.get(name, 1e-9) or not torch.equal(first[name], second[name]):
            wrong[name] = f"{error:.1e} from one process, {(first[name] - second[name]).abs().max():.1e} apart"
    assert not wrong
    assert torch.equal(first["resumed"], second["resumed"])
    assert torch.equal(*first["resumed"])
