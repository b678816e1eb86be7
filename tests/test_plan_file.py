"""The file of a plan: merged, refused or set aside, and never at the cost of another file."""

import errno
import json
import os

import pytest
import torch
from torch import nn

from tengrad_triton import Plan, TENGraD, autotune
from tengrad_triton.tuning import plan_file
from tengrad_triton.tuning.plan import Measured

CPU = torch.device("cpu")
FACTORED = Measured({"sample_grads": {"torch": 1e-3}, "project_rows": {"torch": 1e-3}}, 1000)
PER_SAMPLE = Measured({"sample_grads": {"torch": 1e-1}, "project_rows": {"torch": 1e-4}}, 9000)
PLAN = Plan({"a weight": {"factored": FACTORED, "per_sample": PER_SAMPLE}})


def model():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def tuned(folder, progress=None):
    return autotune(model(), torch.randn(5, 3), seconds=1e-3, path=folder / "plan.json", progress=progress)


def test_the_file_gives_back_the_plan_and_merges(tmp_path):
    path = tmp_path / "deep" / "plan.json"
    plan_file.save(PLAN, path, CPU)
    assert plan_file.load(path, CPU) == PLAN
    newer = Plan({"a weight": {"factored": FACTORED}, "another": {"factored": FACTORED}})
    merged = plan_file.save(newer, path, CPU)
    assert merged == plan_file.load(path, CPU) == newer
    assert {file.name for file in path.parent.iterdir()} == {"plan.json", ".tengrad-triton-plan.lock"}


def saved(folder, part):
    """Save a plan whose header has another value in a part, and return its path."""
    path = folder / "plan.json"
    plan_file.save(PLAN, path, CPU)
    content = json.loads(path.read_text())
    content["header"][part] = "other"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("part", ["schema", "kernels", "torch", "triton", "device", "processors", "arch"])
def test_a_plan_from_elsewhere_is_not_used_and_says_why(tmp_path, part):
    path = saved(tmp_path, part)
    with pytest.warns(UserWarning, match=f"not used: it was measured with {part} 'other'"):
        assert plan_file.load(path, CPU) == Plan({})
    assert path.exists()


@pytest.mark.parametrize("part", ["schema", "kernels", "torch", "triton"])
def test_a_plan_of_other_versions_is_replaced(tmp_path, part):
    path = saved(tmp_path, part)
    with pytest.warns(UserWarning, match=f"is replaced: it was measured with {part} 'other'"):
        assert plan_file.save(PLAN, path, CPU) == PLAN
    assert plan_file.load(path, CPU) == PLAN


@pytest.mark.parametrize("part", ["device", "processors", "arch"])
def test_a_plan_of_another_device_is_not_replaced(tmp_path, part):
    path = saved(tmp_path, part)
    content = path.read_text()
    with pytest.raises(ValueError, match=f"holds the plan of another device \\({part} 'other', here"):
        plan_file.save(PLAN, path, CPU)
    assert path.read_text() == content


WHOLE = {"file": plan_file.MARK, "header": plan_file.header_of(CPU)}
MEASURED = {"seconds": {"project_rows": {"torch": 1.0}}, "bytes": 1}
DAMAGED = {  # what follows the mark
    "cut off": plan_file.HEAD,
    "no header": json.dumps({"file": plan_file.MARK, "entries": {}}),
    "a header of another kind": json.dumps(WHOLE | {"header": [], "entries": {}}),
    "no entries": json.dumps(WHOLE),
    "entries of another kind": json.dumps(WHOLE | {"entries": []}),
    "no candidates": json.dumps(WHOLE | {"entries": {"k": {}}}),
    "an unknown representation": json.dumps(WHOLE | {"entries": {"k": {"factoerd": MEASURED}}}),
    "no seconds": json.dumps(WHOLE | {"entries": {"k": {"factored": {"bytes": 1}}}}),
    "no kernel": json.dumps(WHOLE | {"entries": {"k": {"factored": MEASURED | {"seconds": {}}}}}),
    "seconds as text": json.dumps(WHOLE | {"entries": {"k": {"factored": MEASURED | {"seconds": {"a": {"b": "c"}}}}}}),
    "a number that is too large": json.dumps(WHOLE | {"entries": {"k": {"factored": MEASURED | {"bytes": 10**400}}}}),
    "bytes as text": json.dumps(WHOLE | {"entries": {"k": {"factored": MEASURED | {"bytes": "1"}}}}),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_plan_is_refused_and_its_content_kept_when_another_replaces_it(tmp_path, case):
    path, taken = tmp_path / "plan.json", tmp_path / "plan.json.damaged"
    path.write_text(DAMAGED[case])
    taken.write_text("mine")
    with pytest.raises(ValueError, match=r"a damaged plan .*: measure again into this file, or delete it"):
        TENGraD(model(), plan=path)
    assert path.read_text() == DAMAGED[case]
    with pytest.warns(UserWarning, match="its content is now in plan.json.damaged-1"):
        plan_file.save(PLAN, path, CPU)
    assert plan_file.load(path, CPU) == PLAN
    assert taken.read_text() == "mine"
    assert (tmp_path / "plan.json.damaged-1").read_text() == DAMAGED[case]


def test_a_file_that_becomes_unwritable_costs_the_file_only(tmp_path, monkeypatch):
    """As on a disk that becomes full while the plan is measured."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.warns(UserWarning, match=r"the plan is not saved in .*plan\.json: No space left on device"):
        plan = tuned(tmp_path)
    assert plan.entries
    assert [file.name for file in tmp_path.iterdir()] == [".tengrad-triton-plan.lock"]


def test_what_is_read_back_must_be_what_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr("os.replace", lambda temporary, path: path.write_text(json.dumps(WHOLE | {"entries": {}})))
    with pytest.raises(OSError, match="it holds something else than what was written"):
        plan_file.save(PLAN, tmp_path / "plan.json", CPU)


@pytest.mark.parametrize("kind", ["missing", "a folder", "somebody's", "empty", "a pipe", "a link to nothing"])
def test_what_is_no_plan_is_refused_and_stays(tmp_path, kind):
    path = tmp_path / "plan.json"
    make = {
        "missing": lambda: None,
        "a folder": path.mkdir,
        "somebody's": lambda: path.write_text("{}"),
        "empty": path.touch,
        "a pipe": lambda: os.mkfifo(path),
        "a link to nothing": lambda: path.symlink_to("nothing"),
    }
    make[kind]()
    before = os.lstat(path) if kind != "missing" else None
    with pytest.raises(ValueError, match=r"plan\.json: "):
        TENGraD(model(), plan=path)
    if before is not None:
        with pytest.raises(ValueError, match=r"plan\.json: "):
            tuned(tmp_path, progress=lambda *_: pytest.fail("it measured"))
        assert os.lstat(path) == before
        assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_a_link_to_a_plan_stays_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    path = tmp_path / "link.json"
    path.symlink_to(tmp_path / "folder" / "plan.json")
    plan_file.save(PLAN, tmp_path / "folder" / "plan.json", CPU)
    newer = Plan({"another": {"factored": FACTORED}})
    plan_file.save(newer, path, CPU)
    assert path.is_symlink()
    assert plan_file.load(tmp_path / "folder" / "plan.json", CPU).entries.keys() == {*PLAN.entries, "another"}
