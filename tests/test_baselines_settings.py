"""Settings of the baselines: what is refused, what groups and signs do, and that every argument is documented."""

import copy
import inspect

import pytest
import torch
from baseline_cases import BASELINES, closure_of, take_steps
from small_conv import batch, flat, small_model
from torch import nn

from tengrad_triton.baselines import settings

# Bad settings: the optimizers, the arguments, the error, and what its message says.
ALL, FISHERS = tuple(BASELINES), ("kfac", "ekfac")
BAD = {
    "negative lr": (ALL, {"lr": -1.0}, ValueError, "lr must be at least 0"),
    "zero damping": (ALL, {"damping": 0.0}, ValueError, "damping must be positive, got 0.0"),
    "adaptive damping": (ALL, {"damping": "lm"}, ValueError, "only TENGraD takes 'lm'"),
    "momentum of one": (ALL, {"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\)"),
    "nesterov without momentum": (ALL, {"momentum": 0.0, "nesterov": True}, ValueError, "nesterov=True needs momentum"),
    "negative weight decay": (ALL, {"weight_decay": -1e-3}, ValueError, "weight_decay must be at least 0"),
    "maximize": (ALL, {"maximize": "no"}, TypeError, "maximize must be True or False, got 'no'"),
    "nesterov": (ALL, {"nesterov": 1}, TypeError, "nesterov must be True or False, got 1"),
    "decoupled weight decay": (ALL, {"decoupled_weight_decay": "no"}, TypeError, "decoupled_weight_decay must be True"),
    "refresh_every 0": (ALL, {"refresh_every": 0}, ValueError, "refresh_every must be at least 1, got 0"),
    "refresh_every 1.5": (ALL, {"refresh_every": 1.5}, TypeError, "refresh_every must be a whole number"),
    "stat_decay of one": (ALL, {"stat_decay": 1.0}, ValueError, r"stat_decay must be in \[0, 1\), got 1.0"),
    "unsupported": (ALL, {"unsupported": "skip"}, ValueError, "unsupported must be one of"),
    "kl_clip 0": (FISHERS, {"kl_clip": 0.0}, ValueError, "kl_clip must be positive, or None"),
    "factors_every 0": (FISHERS, {"factors_every": 0}, ValueError, "factors_every must be at least 1"),
    "fisher": (FISHERS, {"fisher": "true"}, ValueError, "fisher must be one of 'sampled', 'empirical', 'exact'"),
    "likelihood": (FISHERS, {"likelihood": "poisson"}, ValueError, "categorical, gaussian, bernoulli"),
    "fisher_samples 0": (FISHERS, {"fisher_samples": 0}, ValueError, "fisher_samples must be at least 1"),
    "fisher_samples without draws": (
        FISHERS,
        {"fisher": "empirical", "fisher_samples": 2},
        ValueError,
        "use fisher='sampled'",
    ),
    "rescale_every 0": (("ekfac",), {"rescale_every": 0}, ValueError, "rescale_every must be at least 1"),
    "a fisher matrix": (
        ("kbfgs", "kbfgsl"),
        {"fisher": "exact"},
        TypeError,
        "KBFGSL? has no argument 'fisher': it takes",
    ),
    "memory 0": (("kbfgsl",), {"memory": 0}, ValueError, "memory must be at least 1"),
}


@pytest.mark.parametrize(
    ("case", "baseline"), [(case, baseline) for case, (baselines, *_) in BAD.items() for baseline in baselines]
)  # fmt: skip
def test_bad_settings(case, baseline):
    _, arguments, error, message = BAD[case]
    model = small_model()
    with pytest.raises(error, match=message):
        BASELINES[baseline][0](model, **arguments)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("baseline", BASELINES)
def test_groups_have_their_own_settings(baseline):
    make, own = BASELINES[baseline]
    model = small_model()
    optimizer = make(model, [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[4:].parameters()}], **own)
    before = copy.deepcopy(model.state_dict())
    take_steps(model, optimizer, 0, 2)
    after = model.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"4.weight", "4.bias", "6.weight", "6.bias"}
    with pytest.raises(ValueError, match="has no spring, which is a setting of TENGraD"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "spring": 0.5})
    with pytest.raises(ValueError, match=r"no setting 'dampning' \(did you mean 'damping'\?\)"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "dampning": 0.5})
    with pytest.raises(ValueError, match="'refresh_every' has no effect in a parameter group: pass refresh_every= to"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "refresh_every": 5})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("baseline", BASELINES)
def test_ascending_is_descending_on_the_negative_loss(baseline):
    make, own = BASELINES[baseline]
    models = [small_model().double(), small_model().double()]
    options = {"fisher": "empirical"} if baseline in FISHERS else {}
    for model, sign in zip(models, (1, -1), strict=True):
        optimizer = make(model, maximize=sign < 0, **own, **options)
        for step in range(3):
            x, y = batch(step)
            optimizer.step(closure_of(model, optimizer, x.double(), y, sign))
    assert torch.allclose(flat(models[0]), flat(models[1]), rtol=1e-9, atol=1e-12)


SHARED = {
    "kfac": settings.FactorSettings, "ekfac": settings.FactorSettings,
    "kbfgs": settings.QuasiNewtonSettings, "kbfgsl": settings.QuasiNewtonSettings,
}  # fmt: skip


@pytest.mark.parametrize("baseline", BASELINES)
def test_every_argument_is_documented_and_no_other(baseline):
    make, _ = BASELINES[baseline]
    named = [p.name for p in inspect.signature(make).parameters.values() if p.kind is not p.VAR_KEYWORD]
    arguments, _, errors = inspect.cleandoc(make.__doc__).partition("Args:\n")[2].partition("\nRaises:\n")
    documented = {line.split(":")[0].strip() for line in arguments.splitlines() if line[4:5].strip()}
    assert documented == {*named, *SHARED[baseline].__annotations__, *settings.Common.__annotations__}
    assert "ValueError" in errors


@pytest.mark.parametrize("baseline", BASELINES)
def test_an_unknown_argument_is_named(baseline):
    make, own = BASELINES[baseline]
    arguments = inspect.cleandoc(make.__doc__).partition("Args:\n")[2].partition("\nRaises:\n")[0]
    message = rf"{make.__name__} has no argument 'dampning' \(did you mean 'damping'\?\): it takes lr, "
    with pytest.raises(TypeError, match=message) as raised:
        make(small_model(), dampning=0.1, **own)
    listed = set(str(raised.value).partition(": it takes ")[2].split(", "))
    documented = {line.split(":")[0].strip() for line in arguments.splitlines() if line[4:5].strip()}
    assert listed == documented - {"model", "params"}


def test_types_and_defaults_name_the_same_settings():
    assert settings.Common.__annotations__.keys() == settings.DEFAULTS.keys()
