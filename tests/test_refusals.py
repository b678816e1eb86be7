"""Bad settings, models, groups and rules: one clear error, and nothing has changed."""

import copy
from pathlib import Path

import one_step
import pytest
import torch
import torch.nn.functional as F
from small_conv import batch, flat, small_model, take_steps
from torch import nn

from tengrad_triton import Bernoulli, Categorical, LevenbergMarquardt, TENGraD, autotune, compile_train_step

BAD = {
    "negative lr": ({"lr": -1.0}, ValueError, "lr must be at least 0"),
    "lr not a number": ({"lr": "fast"}, TypeError, "lr must be a number"),
    "lr tensor of two": ({"lr": torch.ones(2)}, ValueError, "one element"),
    "zero damping": ({"damping": 0.0}, ValueError, r"got 0.0: F \+ damping D is not invertible otherwise \(D is"),
    "negative damping": ({"damping": -0.1}, ValueError, "damping must be positive"),
    "nan damping": ({"damping": float("nan")}, ValueError, "damping must be positive"),
    "damping schedule out of range": ({"damping": lambda step: -1.0}, ValueError, "damping must be positive"),
    "damping not a number": ({"damping": "large"}, TypeError, "damping must be a number, 'lm' or a function"),
    "momentum of one": ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\)"),
    "nesterov without momentum": ({"momentum": 0.0, "nesterov": True}, ValueError, "nesterov=True needs momentum"),
    "negative weight decay": ({"weight_decay": -1e-3}, ValueError, "weight_decay must be at least 0"),
    "refresh_every 0": ({"refresh_every": 0}, ValueError, "refresh_every must be at least 1, got 0"),
    "refresh_every 1.5": ({"refresh_every": 1.5}, TypeError, "refresh_every must be a whole number"),
    "fisher": ({"fisher": "true"}, ValueError, "fisher must be one of 'sampled', 'empirical', 'exact', got 'true'"),
    "likelihood": ({"likelihood": "poisson"}, ValueError, "categorical, gaussian, bernoulli"),
    "likelihood object": ({"likelihood": object()}, TypeError, "must have sample"),
    "blocks": ({"blocks": "net"}, ValueError, "blocks must be 'layer', 'network' or lists"),
    "representation": ({"representation": "dense"}, ValueError, "representation must be one of"),
    "representation of a weight": ({"representation": {"0.weight": "dense"}}, ValueError, "got 'dense'"),
    "auto of a weight": (
        {"representation": {"0.weight": "auto"}},
        ValueError,
        "representation of '0.weight' must be one",
    ),
    "a misspelt representation": (
        {"representation": {"0.weight": "factord"}},
        ValueError,
        r"got 'factord' \(did you mean 'factored'\?\)",
    ),
    "a misspelt weight": (
        {"representation": {"0.wieght": "factored"}},
        ValueError,
        r"has the key '0.wieght', but the model has no such parameter \(did you mean '0.weight' or ",
    ),
    "no such plan": (
        {"plan": Path(__file__).with_name("test_refusal.py")},
        ValueError,
        r"test_refusal.py: no such plan \(did you mean 'test_refusals.py' or .*\): make one with",
    ),
    "a plan in no folder": ({"plan": "no-folder/plan.json"}, ValueError, "no-folder/plan.json: no such plan: make"),
    "maximize": ({"maximize": "no"}, TypeError, "maximize must be True or False, got 'no'"),
    "decoupled weight decay": (
        {"decoupled_weight_decay": 1},
        TypeError,
        "decoupled_weight_decay must be True or False",
    ),
    "nesterov": ({"nesterov": "yes"}, TypeError, "nesterov must be True or False, got 'yes'"),
    "relative damping": ({"relative_damping": "no"}, TypeError, "relative_damping must be True or False, got 'no'"),
    "unsupported": ({"unsupported": "skip"}, ValueError, "unsupported must be one of"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of"),
    "no share": ({"step_share": 0}, ValueError, "step_share must be positive, or None for no bound, got 0"),
    "share": ({"step_share": "0.1"}, TypeError, "step_share must be a number, or None for no bound, got '0.1'"),
    "clip_threshold": ({"clip_threshold": "1"}, TypeError, "clip_threshold must be a number, or None for no bound"),
    "max_bytes as a text": ({"max_bytes": "1GB"}, TypeError, "max_bytes must be a number, got '1GB'"),
    "tol": ({"tol": "a"}, TypeError, "tol must be a number, got 'a'"),
    "tol of one": ({"tol": 1}, ValueError, r"tol must be in \(0, 1\), got 1"),
    "seed": ({"seed": "a"}, TypeError, "seed must be a whole number, or None for torch's initial seed, got 'a'"),
    "a number for a plan": ({"plan": 3}, TypeError, r"plan must be what autotune\(\) returned, .* or None, got 3"),
    "no blocks": ({"blocks": []}, ValueError, "blocks has no list: use 'layer' for a block of each layer"),
    "max_bytes": ({"max_bytes": -1}, ValueError, "max_bytes must be at least 0"),
    "no max_bytes": ({"max_bytes": float("nan")}, ValueError, "max_bytes must be at least 0, got nan"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings(case):
    arguments, error, message = BAD[case]
    model = small_model()
    with pytest.raises(error, match=message):
        TENGraD(model, **arguments)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_group_with_a_text_for_a_boolean_is_refused():
    model = small_model()
    with pytest.raises(TypeError, match="maximize must be True or False, got 'no'"):
        TENGraD(model, [{"params": [*model.parameters()], "maximize": "no"}])
    optimizer = TENGraD(model, model[6].parameters())
    with pytest.raises(TypeError, match="nesterov must be True or False, got 'no'"):
        optimizer.add_param_group({"params": model[4].parameters(), "nesterov": "no"})
    assert len(optimizer.param_groups) == 1


BAD_KEYS = {
    "misspelt": ("lrr", r"no setting 'lrr' \(did you mean 'lr'\?\): its settings are lr, damping"),
    "misspelt damping": ("dampning", r"no setting 'dampning' \(did you mean 'damping'\?\)"),
    "of all groups": ("fisher", "'fisher' has no effect in a parameter group: pass fisher= to TENGraD"),
    "of the base class": ("seed", "'seed' has no effect in a parameter group: pass seed= to TENGraD"),
}


@pytest.mark.parametrize("case", BAD_KEYS)
def test_keys_without_effect_in_a_group_are_refused(case):
    key, message = BAD_KEYS[case]
    model = small_model()
    with pytest.raises(ValueError, match=message):
        TENGraD(model, [{"params": [*model.parameters()], key: 1}])
    optimizer = TENGraD(model, model[6].parameters())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": model[4].parameters(), key: 1})
    assert len(optimizer.param_groups) == 1


def test_keys_of_schedulers_and_of_ones_own_are_taken():
    model = small_model()
    keys = {"name": "head", "lr_scale": 0.5, "initial_lr": 0.1, "max_momentum": 0.95, "base_momentum": 0.85}
    optimizer = TENGraD(model, [{"params": model.named_parameters(), **keys}])
    assert keys.items() <= optimizer.param_groups[0].items()
    TENGraD(model, optimizer.param_groups)


BAD_OUTPUTS = {
    "nothing": (lambda output: None, r"gave NoneType without a tensor, from what the model returned \(Tensor\)"),
    "a number": (lambda output: 3, "gave int without a tensor"),
    "an empty list": (lambda output: [], "gave a list of 0 without a tensor"),
}


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@pytest.mark.parametrize("case", BAD_OUTPUTS)
def test_an_output_without_a_tensor_is_refused(case, fisher):
    choose, message = BAD_OUTPUTS[case]
    model = small_model()
    _optimizer = TENGraD(model, output=choose, fisher=fisher)
    with pytest.raises(ValueError, match=message):
        model(batch()[0])


BAD_TYPES = {
    "levenberg-marquardt": (lambda: LevenbergMarquardt("a"), "start must be a number, got 'a'"),
    "class weights": (lambda: Categorical(weight="a"), "weight must be numbers of at least 0, got 'a'"),
    "positive weight": (lambda: Bernoulli("a"), "pos_weight must be numbers of at least 0, got 'a'"),
    "example input": (lambda: autotune(small_model(), 3), "example_input must be a torch Tensor, got int"),
    "a model to tune": (lambda: autotune(3, torch.ones(1)), "model must be a torch Module, got int"),
}


@pytest.mark.parametrize("case", BAD_TYPES)
def test_bad_types(case):
    make, message = BAD_TYPES[case]
    with pytest.raises(TypeError, match=message):
        make()


def test_bad_models():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        TENGraD(list(small_model().parameters()))
    with pytest.raises(ValueError, match="no trainable parameters"):
        TENGraD(nn.ReLU())
    frozen = small_model().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        TENGraD(frozen)


def test_a_bad_added_group_is_not_added():
    model = small_model()
    optimizer = TENGraD(model, model[6].parameters())
    with pytest.raises(ValueError, match="damping must be positive"):
        optimizer.add_param_group({"params": model[4].parameters(), "damping": 0.0})
    optimizer.add_param_group({"params": [model[4].weight]})
    with pytest.raises(ValueError, match="block '4' are solved together and need one damping"):
        optimizer.add_param_group({"params": [model[4].bias], "damping": 0.5})
    take_steps(model, optimizer, 0, 1)


def test_a_group_that_does_not_fit_the_blocks_leaves_the_optimizer_as_it_was():
    model = small_model()
    optimizer = TENGraD(model, model[6].parameters(), blocks="network", refresh_every=3)
    take_steps(model, optimizer, 0, 3)
    with pytest.raises(ValueError, match="need one damping"):
        optimizer.add_param_group({"params": model[4].parameters(), "damping": 0.5})
    take_steps(model, optimizer, 3, 7)  # its hooks are still there


def test_an_empty_batch_is_called_so():
    model = small_model()
    optimizer = TENGraD(model, refresh_every=1)
    x, y = batch()
    before = flat(model).clone()
    F.cross_entropy(model(x[:0]), y[:0], reduction="sum").backward()
    with pytest.raises(RuntimeError, match="the batch has 0 samples: take no step for an empty batch"):
        optimizer.step()
    assert torch.equal(flat(model), before)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert not torch.equal(flat(model), before)


def test_a_group_may_be_empty():
    model, twin = small_model(), small_model()
    optimizer = TENGraD(model, [{"params": list(model.parameters())}, {"params": []}], seed=0)
    take_steps(model, optimizer, 0, 2)
    take_steps(twin, TENGraD(twin, seed=0), 0, 2)
    assert torch.equal(flat(model), flat(twin))


def test_frozen_parameters_and_parameters_of_no_module():
    model = small_model()
    model[0].requires_grad_(False)
    model[4].weight.requires_grad_(False)  # a bias alone is a block too
    scale = nn.Parameter(torch.ones(()))
    with pytest.warns(UserWarning, match="not a parameter of the model"):
        optimizer = TENGraD(model, [*model.parameters(), scale])
    before = copy.deepcopy(model.state_dict())
    x, y = batch()
    F.cross_entropy(model(x) * scale, y).backward()
    optimizer.step()
    after = model.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"4.bias", "6.weight", "6.bias"}
    assert scale.item() != 1


BAD_ROWS = {
    "entries": (lambda rows: rows[:, :5], r"returned rows of 5 entries for '1.weight', which has 36"),
    "samples": (lambda rows: rows[:2], r"returned 2 rows for '1.weight', but the batch has \d+ samples"),
}
BAD_RETURNS = {
    "a tensor": (lambda rows: {"weight": rows}, r"returned a Tensor for '1.weight': return a contribution, PerSample"),
    "nothing": (lambda rows: None, "returned a NoneType: return a dictionary from the names of parameters to"),
    "pairs": (lambda rows: [("weight", rows)], "returned a list: return a dictionary"),
}


@pytest.mark.parametrize("case", [*BAD_ROWS, *BAD_RETURNS])
def test_a_custom_rule_that_returns_something_wrong_is_named(case):
    from tengrad_triton import PerSampleGrads, canonical

    spoil, message = {**BAD_ROWS, **BAD_RETURNS}[case]

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(36))

        def forward(self, x):
            return x * self.weight

    @canonical.register
    def _(layer: Scale, x: torch.Tensor, grad_y: torch.Tensor):
        rows = grad_y * x
        return {"weight": PerSampleGrads(spoil(rows))} if case in BAD_ROWS else spoil(rows)

    model = nn.Sequential(nn.Flatten(), Scale(), nn.Linear(36, 4))
    optimizer = TENGraD(model)
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    before = flat(model)
    with pytest.raises(ValueError if case in BAD_ROWS else TypeError, match=f"rule for Scale {message}"):
        optimizer.step()
    assert torch.equal(flat(model), before)


BAD_CONTROLS = {
    "no such module": (
        {"blocks": [["7"]]},
        ValueError,
        r"blocks names '7', but no such module has parameters: use names of layers \('0', '3', '5'\)",
    ),
    "a module twice": ({"blocks": [["0", "3"], ["3"]]}, ValueError, "blocks names '3' more than once"),
    "an empty list": ({"blocks": [[]]}, ValueError, "lists of modules' names"),
    "no draws": ({"fisher_samples": 0}, ValueError, "fisher_samples must be at least 1, got 0"),
    "draws of nothing drawn": ({"fisher_samples": 2, "fisher": "exact"}, ValueError, "use fisher='sampled'"),
    "half a row": ({"fisher_rows": 0.5}, TypeError, "fisher_rows must be a whole number"),
    "no history": ({"history": 0}, ValueError, "history must be at least 1"),
    "compressed history": ({"history": 2, "representation": "compressed"}, ValueError, "choose one of the two"),
    "unclear damping": ({"relative_damping": 1}, TypeError, "relative_damping must be True or False"),
    "no trust": ({"trust_region": 0}, ValueError, "trust_region must be positive"),
    "spring of one": ({"spring": 1.0}, ValueError, r"spring must be in \[0, 1\)"),
    "nesterov and spring": ({"spring": 0.5, "nesterov": True}, ValueError, "no spring"),
    "decay and spring": ({"spring": 0.5, "weight_decay": 0.1}, ValueError, "decoupled_weight_decay=True"),
    "exact without a factor": (
        {"fisher": "exact", "likelihood": one_step.Recording(Categorical())},
        TypeError,
        "factor",
    ),
}


@pytest.mark.parametrize("case", BAD_CONTROLS)
def test_bad_controls(case):
    arguments, error, message = BAD_CONTROLS[case]
    with pytest.raises(error, match=message):
        TENGraD(one_step.small_model(), **arguments)


def test_exact_rows_beyond_the_memory_are_refused_with_the_numbers():
    model = one_step.small_model()
    _optimizer = TENGraD(model, fisher="exact", max_bytes=100)
    with pytest.raises(ValueError, match=r"3 rows for each of 6 samples: .* raise max_bytes"):
        model(one_step.batch(0)[0])


def test_a_block_needs_one_damping():
    model = one_step.small_model()
    groups = [{"params": model[0].parameters()}, {"params": model[3:].parameters(), "damping": 1.0}]
    with pytest.raises(ValueError, match=r"'network' are solved together and need one damping, got 1.0, 10.0"):
        TENGraD(model, groups, blocks="network")


class WithEmpty(nn.Module):
    """A perceptron beside parameters without entries."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.nothing = nn.Parameter(torch.zeros(0))
        self.of_nothing = nn.Linear(0, 3)

    def forward(self, x):
        return self.net(x) + self.nothing.sum() + self.of_nothing(x[:, :0])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", [{}, {"fisher": "exact", "blocks": "network"}], ids=str)
def test_parameters_without_entries_are_left_alone(options, compiled):
    torch.manual_seed(0)
    model = WithEmpty()
    optimizer = TENGraD(model, refresh_every=2, seed=0, **options)
    step = compile_train_step(model, F.cross_entropy, optimizer, backend="eager") if compiled else None
    for _ in range(5):
        x, y = torch.randn(6, 4), torch.arange(6) % 3
        if step is not None:
            step(x, y)
            continue
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    moved = {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias", "of_nothing.bias"}
    assert {entry.parameter for entry in optimizer.summary().parameters} == moved
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert "momentum_buffer" not in optimizer.state[model.nothing]
    optimizer.load_state_dict(optimizer.state_dict())
