"""Use the installed package as its users do; `release.smoke` runs this in a clean environment and an empty folder.

It imports nothing of the checkout, and what fails raises.
"""

import math
import shutil
import sys
import warnings
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import tengrad_triton
from tengrad_triton import TENGraD, autotune, compile_train_step

CLASSES = 3


class LastOfSequence(nn.Module):
    """An LSTM and a head on its last output."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Attention(nn.Module):
    """Self-attention with a norm before it, and a head on the mean of its outputs."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.norm(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


MODELS = {
    "perceptron": lambda: (nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES)), torch.randn(12, 5)),
    "convolutions": lambda: (
        nn.Sequential(
            *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2)),
            *(nn.Flatten(), nn.Linear(2 * 5 * 5, CLASSES)),
        ),
        torch.randn(12, 2, 6, 6),
    ),
    "embedding": lambda: (
        nn.Sequential(nn.Embedding(20, 4), nn.Flatten(), nn.Linear(20, CLASSES)),
        torch.randint(20, (12, 5)),
    ),
    "recurrent": lambda: (LastOfSequence(), torch.randn(12, 5, 4)),
    "attention": lambda: (Attention(), torch.randn(12, 5, 8)),
}


def made(name):
    """Return a model, its input and labels, the same at every call."""
    torch.manual_seed(0)
    model, x = MODELS[name]()
    return model, x, torch.randint(CLASSES, (len(x),))


def step(model, optimizer, x, y):
    """Take one step and return the loss."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def weights(model):
    """Return a copy of all parameters in one vector."""
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def check_installation():
    """The package is the installed one, typed, with its kernels and one version."""
    package = files(tengrad_triton)
    assert "site-packages" in str(package), package
    assert (package / "py.typed").is_file()
    assert (package / "kernels" / "gram.py").is_file()
    assert tengrad_triton.__version__ == version("tengrad-triton")


def check_steps():
    """A step changes every parameter of every model, all of which have a block, and the loss falls."""
    for name in MODELS:
        model, x, y = made(name)
        optimizer = TENGraD(model)
        losses = [step(model, optimizer, x, y) for _ in range(5)]
        assert all(map(math.isfinite, losses)), (name, losses)
        assert losses[-1] < losses[0], (name, losses)
        assert all(parameter.block != "-" for parameter in optimizer.summary().parameters), name


def check_state():
    """A state that went through a file continues bit for bit."""
    model, x, y = made("convolutions")
    optimizer = TENGraD(model)
    step(model, optimizer, x, y)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "state.pt")
    step(model, optimizer, x, y)
    twin, x, y = made("convolutions")
    resumed = TENGraD(twin)
    state = torch.load("state.pt", weights_only=True)
    twin.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    step(twin, resumed, x, y)
    assert torch.equal(weights(model), weights(twin))


def check_compiled(backend):
    """Compiled steps lower the loss, and are not the plain ones under another name."""
    model, x, y = made("perceptron")
    optimizer = TENGraD(model)
    train_step = compile_train_step(model, F.cross_entropy, optimizer, backend=backend)
    losses = [train_step(x, y).item() for _ in range(6)]
    assert losses[-1] < losses[0], losses
    assert not train_step.why_plain, train_step.why_plain


def check_autotune():
    """A plan is measured, kept in a file, and used."""
    model, x, y = made("perceptron")
    plan = autotune(model, x, seconds=0.01, path="plan.json")
    assert Path("plan.json").is_file()
    optimizer = TENGraD(model, plan=plan)
    assert math.isfinite(step(model, optimizer, x, y))


def main():
    """Run every check; print the versions and torch.compile's backend."""
    backend = "inductor" if shutil.which("cc") or shutil.which("g++") else "eager"
    torch.set_num_threads(1)
    # A library that warns at its first use is a library that looks broken; torch's own compiler may warn.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_installation()
        check_steps()
        check_state()
        check_autotune()
    check_compiled(backend)
    triton = version("triton") if sys.platform == "linux" else "-"
    print(f"| {sys.version.split()[0]} | {torch.__version__} | {triton} | {backend} |")


if __name__ == "__main__":
    main()
