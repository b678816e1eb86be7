"""Several GPUs, by stand-ins: kernels launch where their tensors are, and a model has to be on one device."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from tengrad_triton import TENGraD
from tengrad_triton.baselines.kfac import KFAC
from tengrad_triton.kernels.spec import Config, Repeated
from tengrad_triton.tuning import measure


class Gpus:
    """A stand-in for ``torch.cuda.device``, of which tensors without memory need no GPU."""

    def __init__(self, monkeypatch):
        self.current = 0
        monkeypatch.setattr(torch.cuda, "device", self._as_current)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)

    @contextmanager
    def _as_current(self, device):
        before, self.current = self.current, torch.device(device).index
        yield
        self.current = before


class Kernel:
    """A stand-in for a kernel and for what Triton compiles of it: notes the current GPU of each launch."""

    arg_names = ("x_ptr", "BLOCK")

    def __init__(self, gpus):
        self._gpus, self.launched_on = gpus, []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launched_on.append(self._gpus.current)
            return self

        return launch


LAUNCHERS = {"at once": lambda config: config.start, "repeatedly": lambda config: Repeated(config).start}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_kernels_launch_on_the_gpu_of_their_tensors(launcher, monkeypatch):
    gpus = Gpus(monkeypatch)
    kernel = Kernel(gpus)
    config = Config(kernel, "*fp32", {"BLOCK": 4}, (), 4, 2, async_copies=False, name="default")
    start = LAUNCHERS[launcher](config)
    with FakeTensorMode():
        for _ in range(2):
            start((1,), torch.empty(4, device="cuda:1"))
    assert kernel.launched_on == [1, 1]
    assert gpus.current == 0


def test_times_are_measured_on_the_gpu_of_the_tensors(monkeypatch):
    gpus = Gpus(monkeypatch)
    monkeypatch.setattr("triton.testing.do_bench", lambda call, **options: 1e3 * gpus.current)
    assert measure.median_seconds(lambda: None, 1.0, torch.device("cuda:1")) == 1


def linear_on(device):
    """A layer whose parameters are without values, which a GPU that is not there cannot make."""
    layer = nn.Linear(2, 2, bias=False)
    layer.weight = nn.Parameter(torch.empty(2, 2, device=device))
    return layer


@pytest.mark.parametrize("optimizer", [TENGraD, KFAC])
def test_a_model_on_two_devices_is_refused(optimizer):
    with FakeTensorMode():
        model = nn.Sequential(linear_on("cuda:0"), linear_on("cuda:1"))
        said = r"parameters are on cuda:0, cuda:1, but must be on one device: move them by model.to\(device\)"
        with pytest.raises(ValueError, match=said):
            optimizer(model)


@pytest.mark.parametrize("place", [0, 1])
def test_frozen_parameters_may_be_on_another_device(place):
    layers = [nn.Linear(2, 2)]
    layers.insert(place, nn.Linear(2, 2, device="meta").requires_grad_(False))
    model = nn.Sequential(*layers)
    trained = layers[1 - place]
    before = trained.weight.clone()
    optimizer = TENGraD(model, fisher="empirical")
    model.forward = trained.forward
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(3, 2)).square().mean().backward()
        optimizer.step()
    assert not torch.equal(trained.weight, before)


def test_parameters_of_others_may_be_on_another_device():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    optimizer = TENGraD(model, model[0].parameters())
    with pytest.raises(ValueError, match="are on cpu, meta, but must be on one device"):
        optimizer.add_param_group({"params": model[1].parameters()})
    assert len(optimizer.param_groups) == 1
