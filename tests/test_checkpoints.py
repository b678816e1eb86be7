"""Checkpoints in one process: every way to save and load continues bit for bit, with the curvature and without."""

import copy
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_cases import CASES, WAYS, backward, by_file, made, perceptron, train
from helpers.processes import run
from small_conv import assert_same, flat
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, get_state_dict
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict as set_state

from tengrad_triton import TENGraD, compile_train_step
from tengrad_triton.baselines import KBFGS, KFAC

pytestmark = pytest.mark.filterwarnings(
    "error", "ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated"
)


def uninterrupted(case, steps, **changes):
    pair = made(case, **changes)
    train(*pair, 0, steps)
    return pair


IN_PART = {"memory, without what is frozen": "frozen"}  # ways for one case
PAIRS = [(case, way) for case in CASES for way in WAYS if IN_PART.get(way, case) == case]


@pytest.mark.parametrize(("case", "way"), PAIRS)
def test_a_resumed_run_is_the_uninterrupted_one(case, way):
    old, new = uninterrupted(case, 6), made(case, seed=3)
    WAYS[way](old, new)
    new[0].load_state_dict(old[0].state_dict())  # what is frozen too
    assert_same(new[1].state_dict(), old[1].state_dict())
    assert new[1].stats.last_refresh == 4
    train(*new, 6, 11)
    whole = uninterrupted(case, 11)
    assert torch.equal(flat(new[0]), flat(whole[0]))
    assert_same(new[1].state_dict(), whole[1].state_dict())


@pytest.mark.parametrize("pause", [0, 1, 4, 5, 8])
@pytest.mark.parametrize("way", ["torch.save", "DCP", "DCP, flat", "DCP, full", "DCP of the optimizer"])
def test_any_step_is_one_to_resume_from(way, pause):
    old, new = uninterrupted("tied", pause), made("tied", seed=3)
    train(*new, 20, 22)  # an optimizer that has trained
    WAYS[way](old, new)
    train(*new, pause, 10)
    assert torch.equal(flat(new[0]), flat(uninterrupted("tied", 10)[0]))


RESUMING = """
import sys
sys.path.insert(0, "tests")
import torch, torch.distributed.checkpoint as dcp
from checkpoint_cases import made, train
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
pair = made({case!r}, seed=9)
state = dict(zip(("model", "optimizer"), get_state_dict(*pair)))
dcp.load(state, checkpoint_id={folder!r})
set_state_dict(*pair, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
train(*pair, 6, 11)
torch.save(torch.cat([p.detach().flatten() for p in pair[0].parameters()]), {folder!r} + "/end.pt")
"""


@pytest.mark.parametrize("case", ["convolutions", "tied"])
def test_another_process_continues(case, tmp_path):
    states = get_state_dict(*uninterrupted(case, 6))
    dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=tmp_path)
    run("-c", RESUMING.format(case=case, folder=str(tmp_path)))
    assert torch.equal(torch.load(tmp_path / "end.pt"), flat(uninterrupted(case, 11)[0]))


# -- a new optimizer -----------------------------------------------------------------------------------------------

ASKED = {
    "get": get_optimizer_state_dict,
    "get, flat": lambda *pair: get_optimizer_state_dict(
        *pair, options=StateDictOptions(flatten_optimizer_state_dict=True)
    ),
    "get and set": lambda model, optimizer: set_state(model, optimizer, get_optimizer_state_dict(model, optimizer)),
    "its own": lambda model, optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "its own, by keyword": lambda model, optimizer: optimizer.load_state_dict(state_dict=optimizer.state_dict()),
}


@pytest.mark.parametrize("moment", ["at first", "after a backward", "after a step"])
@pytest.mark.parametrize("case", ["tied", "frozen", "groups", "schedules"])
@pytest.mark.parametrize("asked", ASKED)
def test_who_asks_for_the_state_leaves_no_trace(asked, case, moment):
    """torch would take a step of a new optimizer to learn what its state has, and reset the gradients."""
    if moment == "after a backward" and not asked.startswith("get,") and asked != "get":
        pytest.skip("as in torch, a state is not loaded between a backward and its step")
    (model, optimizer), (twin, other) = pairs = made(case), made(case)
    for pair in pairs:
        train(*pair, 0, int(moment == "after a step"))
        if moment == "after a backward":
            backward(*pair, 1)
    state = copy.deepcopy((model.state_dict(), other.state_dict()))
    grads, random = [p.grad for p in model.parameters()], torch.get_rng_state()
    taken = optimizer.register_step_pre_hook(lambda *_: pytest.fail("took a step"))
    ASKED[asked](model, optimizer)
    taken.remove()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert_same([model.state_dict(), optimizer.state_dict()], list(state))
    for pair in pairs:
        if moment == "after a backward":
            pair[1].step()
        train(*pair, 2, 7)
    assert torch.equal(flat(model), flat(twin))


def test_momenta_are_zeros_until_a_step():
    model, optimizer = made("tied")
    assert all(not optimizer.state[p]["momentum_buffer"].any() for p in model.parameters())
    assert optimizer.stats.steps == 0


# -- hooks ---------------------------------------------------------------------------------------------------------


def test_hooks_see_and_change_all_that_is_saved():
    _, optimizer = uninterrupted("tied", 6)
    seen = []

    def after(_, state):
        seen.append(copy.deepcopy(state))
        state["state"][0]["tengrad"]["steps"] = 40
        return {**state, "own": "kept"}

    handles = [
        optimizer.register_state_dict_pre_hook(seen.append),
        optimizer.register_state_dict_post_hook(after),
    ]
    saved = optimizer.state_dict()
    for handle in handles:
        handle.remove()
    assert seen[0] is optimizer
    assert_same(seen[1], optimizer.state_dict())  # the live state has not changed
    assert saved["own"] == "kept"
    assert saved["state"][0]["tengrad"]["steps"] == 40


def test_hooks_see_and_change_all_that_is_loaded():
    old, new = uninterrupted("tied", 6), made("tied", seed=3)
    seen = []

    def before(_, state):
        seen.append(len(state["state"][0]["tengrad"]["curvature"]))
        own = {**state["state"][0]["tengrad"], "steps": 40}
        return {**state, "state": {**state["state"], 0: {**state["state"][0], "tengrad": own}}}

    new[1].register_load_state_dict_pre_hook(before)
    new[1].register_load_state_dict_post_hook(lambda own: seen.append((own.stats.steps, own.stats.last_refresh)))
    saved = old[1].state_dict()
    new[1].load_state_dict(saved)
    assert seen == [len(saved["state"][0]["tengrad"]["curvature"]), (40, 38)]
    assert saved["state"][0]["tengrad"]["steps"] == 6


# -- without the curvature -----------------------------------------------------------------------------------------


def without(optimizer):
    state = optimizer.state_dict()
    del state["state"][0]["tengrad"]["curvature"]
    return state


LIGHT = {
    "its entry is removed": without,
    "an argument": lambda optimizer: optimizer.state_dict(include_curvature=False),
    "by file": lambda optimizer: by_file(optimizer.state_dict(include_curvature=False), None),
}


@pytest.mark.parametrize("light", LIGHT)
@pytest.mark.parametrize("case", ["convolutions", "tied", "exact, tied", "compressed", "history", "lists of blocks"])
def test_without_the_curvature_the_next_step_refreshes(case, light):
    """D's running means and the counts of failures stay, except where the whole entry is removed."""
    old, new = uninterrupted(case, 6), made(case, seed=3)
    train(*new, 0, 2)
    new[0].load_state_dict(old[0].state_dict())
    new[1].load_state_dict(LIGHT[light](old[1]))
    old[1]._curvature = None if light == "its entry is removed" else old[1]._curvature.released()
    old[1]._rearm()
    for pair in (old, new):
        train(*pair, 6, 7)
        assert (pair[1].stats.steps, pair[1].stats.last_refresh) == (7, 6)
        train(*pair, 7, 12)
    assert torch.equal(flat(new[0]), flat(old[0]))


@pytest.mark.parametrize("way", [way for way in WAYS if way not in IN_PART])
@pytest.mark.parametrize("saves", [False, True])
def test_the_setting_holds_for_whoever_asks(saves, way):
    """Those who save and those who load may have it or not."""
    old, new = uninterrupted("tied", 6, include_curvature=saves), made("tied", seed=3, include_curvature=not saves)
    WAYS[way](old, new)
    assert new[1]._curvature.is_released != saves

    train(*new, 6, 8)
    assert new[1].stats.last_refresh == (4 if saves else 6)


@pytest.mark.parametrize("value", ["no", 0, None])
def test_the_setting_is_true_or_false(value):
    with pytest.raises(TypeError, match="include_curvature must be True or False"):
        TENGraD(perceptron(), include_curvature=value)


# -- other optimizers, several optimizers, wrapped models ----------------------------------------------------------


@pytest.mark.filterwarnings("ignore:no exact rows")
@pytest.mark.parametrize("kind", [KFAC, KBFGS])
@pytest.mark.parametrize("way", ["torch.save", "DCP", "DCP, flat", "full file"])
def test_baselines_resume_too(way, kind):
    def new(seed):
        torch.manual_seed(seed)
        model = perceptron()
        return model, kind(model, refresh_every=4, seed=seed)

    def run_on(model, optimizer, first, last):
        for step in range(first, last):
            optimizer.step(lambda: backward(model, optimizer, step))  # noqa: B023

    old, resumed = new(0), new(3)
    run_on(*old, 0, 6)
    WAYS[way](old, resumed)
    for pair in (old, resumed):
        run_on(*pair, 6, 11)
    assert torch.equal(flat(old[0]), flat(resumed[0]))


@pytest.mark.parametrize("through", ["memory", "file"])
@pytest.mark.parametrize("flat_state", [False, True])
def test_several_optimizers_of_one_model(flat_state, through):
    options = StateDictOptions(flatten_optimizer_state_dict=flat_state)

    def new(seed):
        torch.manual_seed(seed)
        model = perceptron()
        return model, [TENGraD(model, model[k].parameters(), refresh_every=4, seed=seed + k) for k in (0, 2, 4)]

    (model, old), (twin, resumed) = new(0), new(5)
    for step in range(6):
        for optimizer in old:
            optimizer.zero_grad()
        backward(model, None, step)
        for optimizer in old:
            optimizer.step()
    state = get_optimizer_state_dict(model, old, options=options)
    set_state(twin, resumed, by_file(state, None) if through == "file" else state, options=options)
    for left, right in zip(old, resumed, strict=True):
        assert_same(left.state_dict(), right.state_dict())


def test_a_compiled_model_and_a_compiled_step_have_the_plain_names():
    old = uninterrupted("convolutions", 6)
    model, optimizer = made("convolutions", seed=3)
    wrapped = torch.compile(model, backend="eager")
    again = TENGraD(wrapped, refresh_every=4, seed=3)
    WAYS["DCP"](old, (wrapped, again))
    assert_same(again.state_dict(), old[1].state_dict())
    step = compile_train_step(model, torch.nn.functional.cross_entropy, optimizer, backend="eager")
    step(torch.rand(7, 8), torch.arange(7) % 5)
    WAYS["DCP"](old, (model, optimizer))
    assert_same(optimizer.state_dict(), old[1].state_dict())


def test_a_scheduler_goes_on():
    ends = []
    for pauses in (False, True):
        model, optimizer = made("tied")
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        for step in range(12):
            if pauses and step == 6:
                states = by_file([x.state_dict() for x in (model, optimizer, scheduler)], None)
                model, optimizer = made("tied", seed=3)
                scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
                for x, state in zip((model, optimizer, scheduler), states, strict=True):
                    x.load_state_dict(state)
            train(model, optimizer, step, step + 1)
            scheduler.step()
        ends.append(flat(model))
    assert torch.equal(*ends)


def test_a_state_of_another_type_of_device_draws_other_labels_and_says_so_once():
    old, new = uninterrupted("tied", 6), made("tied", seed=3)
    state = old[1].state_dict()
    state["state"][0]["tengrad"]["generator"] = torch.zeros(16, dtype=torch.uint8)  # of a GPU
    with pytest.warns(UserWarning, match="another type of device than cpu") as said:
        new[1].load_state_dict(state)
    assert [one.filename for one in said] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new[1].load_state_dict(state)
    train(*new, 6, 10)
