"""States that do not fit: an error names what differs, and nothing has changed."""

import copy

import pytest
import torch
from checkpoint_cases import made, perceptron, train, two_groups
from small_conv import assert_same, flat
from torch import nn

from tengrad_triton import TENGraD
from tengrad_triton.optim.state.packed import packed_of, unpacked_of


def saved(steps=6, **changes):
    model, optimizer = made("lists of blocks", **changes)
    train(model, optimizer, 0, steps)
    return optimizer.state_dict()


def of(model, **settings):
    optimizer = TENGraD(model, refresh_every=4, **settings)
    train(model, optimizer, 0, 6)
    return optimizer.state_dict()


def wider():
    return nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5))


def changed(change):
    """Return a function that returns a saved state whose own entry was changed."""

    def state():
        whole = saved()
        own = whole["state"][0]["tengrad"]
        change(own)
        return whole

    return state


def damaged(change):
    """Return a function that returns a saved state with a changed curvature."""

    def state_with(own):
        packed = unpacked_of(own["curvature"])
        change(packed)
        own["curvature"] = packed_of(packed, torch.device("cpu"))

    return changed(state_with)


def entry(key, value):
    return changed(lambda own: own.update({key: value}))


def group(key, value):
    def state():
        whole = saved()
        whole["param_groups"][0][key] = value
        return whole

    return state


def momentum(value):
    def state():
        whole = saved()
        whole["state"][2]["momentum_buffer"] = value
        return whole

    return state


def without_a_setting():
    whole = saved()
    del whole["param_groups"][0]["damping"]
    return whole


def adamw():
    model = perceptron()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 0, 1)
    return optimizer.state_dict()


def cut(packed, *keys):
    """Drop the last entries of a tensor in a packed curvature."""
    *path, last = keys
    for key in path:
        packed = packed[key]
    packed[last] = packed[last][..., :-1].clone()


def fewer_moments(packed):
    packed["moments"]["2"]["weight"] = [torch.ones(1, 5)] * 4


def flipped(own):
    own["curvature"] = own["curvature"].clone()
    own["curvature"][: len(own["curvature"]) // 2] ^= 85


W = ("jacobians", "2", "weight")
# What is loaded, and what the error says.
STATES = {
    "SGD": (lambda: torch.optim.SGD(perceptron().parameters()).state_dict(), "with an entry 'tengrad' .* got .* none"),
    "AdamW": (adamw, "of TENGraD, with an entry 'tengrad' .* got the entries exp_avg, exp_avg_sq, step"),
    "nothing": (dict, "of an optimizer, with a Mapping 'state'; got \\[\\]"),
    "no dictionary": (lambda: [saved()], "expected a state_dict of TENGraD, got list"),
    "a list of groups": (lambda: {**saved(), "param_groups": {}}, "with a list 'param_groups'"),
    "an entry": (lambda: {**saved(), "state": {0: None}}, "no dictionary"),
    "another width": (lambda: of(wider()), r"of shape \(7, 8\) for a parameter of shape \(6, 8\), '0.weight'"),
    "fewer layers": (lambda: of(nn.Sequential(nn.Linear(8, 5))), "has 2 parameters, .* has 6 .*0.weight, 0.bias"),
    "more groups": (lambda: saved(params=two_groups), "has 2 parameter groups, but this optimizer has 1"),
    "a setting": (group("lr", -1.0), "parameter group 0 of the state: lr must be at least 0"),
    "another setting": (group("nesterov", "yes"), "group 0 of the state: nesterov must be True or False"),
    "no setting": (without_a_setting, "parameter group 0 of the state has no damping"),
    "a momentum": (momentum(torch.zeros(6, 5)), r"of shape \(6, 5\) for a parameter of shape \(6, 6\), '2.weight'"),
    "integers": (momentum(torch.zeros(6, 6, dtype=torch.int64)), "momentum of type torch.int64 for '2.weight'"),
    "no momentum": (momentum([1.0]), "momentum of type list for '2.weight'"),
    "scaling": (lambda: saved(scaling="diagonal"), "saved with scaling='diagonal', but this .* scaling='kronecker'"),
    "unknown scaling": (entry("scaling", 9), "saved with scaling='9'"),
    "steps": (entry("steps", -1), "the state's steps must be a whole number, got -1"),
    "age": (entry("age", 1.5), "the state's age must be a whole number, got 1.5"),
    "no seed": (changed(lambda own: own.pop("seed")), "the state's seed must be a whole number, got None"),
    "generator": (entry("generator", torch.zeros(5056)), "the state's generator"),
    "no generator": (changed(lambda own: own.pop("generator")), "the state's generator"),
    "fisher": (lambda: saved(fisher="exact"), "is of fisher='exact', but this .* fisher='sampled'; remove 'curvature'"),
    "blocks": (lambda: saved(blocks="layer"), "blocks are 0: 0; 2: 2; 4: 4, but this .* are 0 . 2: 0, 2; 4: 4"),
    "curvature": (entry("curvature", torch.zeros(3)), r"expected bytes .* got a tensor torch.float32 \(3,\)"),
    "text": (entry("curvature", "J"), "expected bytes .* got 'J'"),
    "other bytes": (entry("curvature", torch.ones(99, dtype=torch.uint8)), "its 99 bytes cannot be read"),
    "half of the bytes": (changed(lambda own: own.update(curvature=own["curvature"][:999].clone())), "999 bytes"),
    "flipped bytes": (changed(flipped), "bytes cannot be read"),
    "another layer": (
        damaged(lambda packed: packed["jacobians"].update(head=packed["jacobians"].pop("4"))),
        "curvature of head.weight, head.bias, but this optimizer's layers are 0, 2, 4",
    ),
    "outputs": (damaged(lambda packed: cut(packed, *W, "g_NGPO")), "rows of '2.weight' have 30 .* has 36"),
    "inputs": (damaged(lambda packed: cut(packed, *W, "a")), "rows of '2.weight' have 30 .* has 36"),
    "a bias": (damaged(lambda packed: cut(packed, *W[:2], "bias", "j_NK")), "rows of '2.bias' have 5 .* has 6"),
    "kind of J": (damaged(lambda packed: packed["jacobians"]["2"].update(weight={})), "entry of '2.weight' is damaged"),
    "moments": (damaged(fewer_moments), "moments of '2.weight' have 25"),
    "D": (damaged(lambda packed: cut(packed, "scales", "2", "weight", 0)), "D of '2.weight' have 30"),
    "inverse": (damaged(lambda packed: cut(packed, "inverses", 0, "inverse_BNN")), "block '0 . 2' are .7., its"),
    "no inverse": (damaged(lambda packed: packed["inverses"].clear()), "block '0 . 2' are .7., its inverse is of"),
    "damping": (damaged(lambda packed: cut(packed, "damping_L")), r"\[1, 2, 2\] dampings, .* for 2 blocks"),
    "no history": (damaged(lambda packed: packed.pop("history")), "damaged .KeyError: 'history'"),
    "a list": (damaged(lambda packed: packed.update(jacobians=[])), "the state's curvature is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", STATES)
def test_a_state_that_does_not_fit_changes_nothing(case):
    state_of, message = STATES[case]
    state = state_of()
    pairs = [made("lists of blocks", seed=3) for _ in range(2)]
    for pair in pairs:
        train(*pair, 0, 2)
    model, optimizer = pairs[0]
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict(), optimizer.stats])
    with pytest.raises(TypeError if case == "no dictionary" else ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_same([model.state_dict(), optimizer.state_dict(), optimizer.stats], before)
    assert [len(hooks) for hooks in (optimizer._optimizer_load_state_dict_pre_hooks, optimizer.state)] == [0, 6]
    for pair in pairs:
        train(*pair, 2, 6)
    assert torch.equal(flat(model), flat(pairs[1][0]))


@pytest.mark.parametrize("case", ["fisher", "blocks", "flipped bytes", "outputs", "no history"])
def test_what_the_error_advises_works(case):
    state = STATES[case][0]()
    del state["state"][0]["tengrad"]["curvature"]
    model, optimizer = made("lists of blocks", seed=3)
    optimizer.load_state_dict(state)
    train(model, optimizer, 6, 8)
    assert (optimizer.stats.steps, optimizer.stats.last_refresh) == (8, 6)
