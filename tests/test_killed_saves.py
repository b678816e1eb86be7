"""The guide's ways to save leave a whole checkpoint behind, whenever the process is killed."""

import json
from pathlib import Path

import pytest
from helpers.processes import run

PAGE = "docs/guides/checkpoints.md"
KILLS = 12
# A parent that kills children while they save over and over, and loads what is left after each.
KILLING = """
import json, os, random, signal, sys, time, warnings
from pathlib import Path
sys.path.insert(0, "tests")
warnings.filterwarnings("ignore", "torch.distributed is disabled")
page = Path({page!r}).read_text(encoding="utf-8")
import torch
torch.set_num_threads(1)  # children of a fork have no threads of their parent
from checkpoint_cases import convolution, made, train
from helpers.pages import blocks_of, run_python
from tengrad_triton.files import remove_temporary
os.chdir({folder!r})
blocks = [block for block in blocks_of(page) if block.language == "python" and "\\ndef " in block.text]
names = run_python({page!r}, blocks, dict(model=convolution(), loader=[]))
folder, file = Path("runs-killed"), Path("killed.pt")
folder.mkdir()

def save(step, model, optimizer):
    if {way!r} == "file":
        names["save"](file, model, optimizer, step=step, data=data)
    else:
        names["save_folder"](folder, step, model, optimizer)

def load(model, optimizer):
    if {way!r} == "file":
        return names["load"](file, model, optimizer)["step"]
    return names["load_newest"](folder, model, optimizer)

data = torch.zeros(2_000_000)
model, optimizer = made("convolutions")
train(model, optimizer, 0, 3)
save(0, model, optimizer)
start = time.monotonic()
save(1, model, optimizer)
took = time.monotonic() - start
newest, halfway, loaded = 1, 0, []
for kill in range({kills}):
    begun, begins = os.pipe()
    child = os.fork()
    if child == 0:
        for step in range(newest + 1, newest + 10**6):  # the weights and the momenta say in which step they were
            with torch.no_grad():
                model[1].bias.fill_(step)
                optimizer.state[model[1].bias]["momentum_buffer"].fill_(step)
            os.write(begins, b".")
            save(step, model, optimizer)
        os._exit(1)
    os.close(begins)
    for _ in range(random.randint(1, 3)):
        os.read(begun, 1)
    time.sleep(random.uniform(0.0, took))  # some moment of a save
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(begun)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    halfway += bool(list(Path(".").glob(".tengrad-triton-*.tmp"))) or (folder / "part").exists()
    twin, other = made("convolutions", seed=3)
    step = load(twin, other)
    assert step >= newest, (step, newest)
    if step > 1:
        assert (twin[1].bias == step).all()
        assert (other.state[twin[1].bias]["momentum_buffer"] == step).all()
    assert other.stats.steps == 3 and other._curvature is not None
    loaded.append(step)
    newest = step
    remove_temporary(Path("."))
print(json.dumps([halfway, loaded]))
"""


@pytest.mark.parametrize("way", ["file", "folder"])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(way, tmp_path):
    code = KILLING.format(page=str(Path(__file__).parent.parent / PAGE), folder=str(tmp_path), way=way, kills=KILLS)
    halfway, loaded = json.loads(run("-c", code).strip().rpartition("\n")[2])
    assert len(loaded) == KILLS
    assert loaded[-1] > 1  # else no save came to its end
    assert halfway > 0  # else no kill came within a save
