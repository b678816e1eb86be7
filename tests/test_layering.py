"""The tree is the architecture: arrows between modules point one way, and the package imports on a bare machine."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tengrad_triton"
KERNELS = ROOT / "kernels"

# Each module of the package and what it may import of the rest; a new module is a new line.
MAY_IMPORT = {
    "autotune": {
        *("blocks", "capture", "fisher", "jacobian", "layers", "plan", "plan_file", "refresh"),
        *("representation", "update", "uses", "woodbury", "kernels"),
    },
    "backend": {"kernels"},
    "blocks": {"layers"},
    "capture": {"blocks", "deriving", "fisher", "frozen", "layers", "phases", "record"},
    "damping": set(),
    "deriving": {"blocks", "explicit", "fisher", "frozen", "layers", "provenance", "record"},
    "explicit": {"record"},
    "fisher": set(),
    "frozen": set(),
    "interval": set(),
    "jacobian": {"layers", "plan", "products", "update", "uses"},
    "layers": {"kernels"},
    "optimizer": {
        *(
            "backend",
            "blocks",
            "capture",
            "damping",
            "fisher",
            "interval",
            "options",
            "phases",
            "plan",
            "refresh",
            "shell",
        ),
        *("state", "summary", "update", "validation", "woodbury"),
    },
    "options": {"backend", "blocks", "fisher", "plan", "plan_file"},
    "phases": set(),
    "plan": set(),
    "plan_file": {"kernels", "plan"},
    "provenance": {"blocks", "layers", "record"},
    "record": {"layers"},
    "refresh": {
        *("backend", "blocks", "capture", "jacobian", "layers", "plan", "record", "representation", "uses", "woodbury"),
    },
    "representation": {"backend", "jacobian", "layers", "plan", "table", "uses"},
    "shell": {"blocks", "capture", "damping", "options", "summary", "update", "validation"},
    "resident": set(),
    "state": {"backend", "blocks", "representation", "teams", "woodbury"},
    "summary": {"blocks", "jacobian", "layers", "plan", "products", "woodbury"},
    "update": set(),
    "validation": {"options"},
    "table": {"jacobian", "layers", "plan", "update", "uses"},
    "lesson": {"blocks", "fisher", "layers", "optimizer", "record", "tape"},
    "tape": {"layers", "record"},
    "uses": {"layers", "plan"},
    "graphs": {
        *("blocks", "explicit", "fisher", "layers", "lesson", "plan", "record", "refresh", "state", "tape", "update"),
        "woodbury",
    },
    "train_step": {
        *("explicit", "fisher", "graphs", "lesson", "optimizer", "resident", "state", "tape", "woodbury"),
    },
    "products": {"plan", "update"},
    "teams": {"jacobian", "kernels", "products", "update"},
    "woodbury": {"jacobian", "phases", "teams", "update", "kernels"},
}

# What the rivals may import of the rest: what TENGraD stands on, and nothing of TENGraD.
RIVALS_MAY_IMPORT = {
    *(
        "baselines",
        "blocks",
        "capture",
        "damping",
        "fisher",
        "kernels",
        "layers",
        "options",
        "phases",
        "plan",
        "refresh",
    ),
    *("shell", "summary", "update", "validation"),
}


def imported(path):
    """Yield the dotted names that a file imports, relative ones resolved within the package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f"tengrad_triton.{path.parent.name}.{node.module or ''}"


def of_package(path):
    """Return the modules of the package that a file imports, without the package's own name."""
    names = (name.split(".") for name in imported(path))
    return {name[1] for name in names if name[0] == "tengrad_triton" and len(name) > 1} - {path.stem}


@pytest.mark.parametrize("module", sorted(path.stem for path in PACKAGE.glob("[!_]*.py")))
def test_modules_import_only_what_is_below_them(module):
    assert module in MAY_IMPORT, f"{module}.py is new: say in MAY_IMPORT what it may import"
    assert of_package(PACKAGE / f"{module}.py") <= MAY_IMPORT[module]


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("baselines/*.py")), ids=lambda path: path.stem)
def test_rivals_know_nothing_of_their_rival(path):
    assert of_package(path) <= RIVALS_MAY_IMPORT


def test_the_arrows_have_no_cycle():
    order = []
    while len(order) < len(MAY_IMPORT):
        ready = [m for m, below in MAY_IMPORT.items() if m not in order and below <= {*order, "kernels"}]
        assert ready, f"a cycle among {set(MAY_IMPORT) - set(order)}"
        order += ready


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.stem)
def test_kernels_know_only_torch_and_triton(path):
    outside = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "triton", "tengrad_triton"}
    assert of_package(path) <= {"kernels"}


def test_only_layers_knows_layer_types():
    types = {"Linear", "Conv2d", "Conv1d", "Conv3d", "Embedding", "BatchNorm2d", "LayerNorm"}
    for path in PACKAGE.glob("*.py"):
        named = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert path.stem == "layers" or not named & types, path


def test_tests_and_perf_never_import_each_other():
    for path in (ROOT / "tests").glob("*.py"):
        assert not any(name.split(".")[0] == "perf" for name in imported(path))
    for path in (ROOT / "perf").rglob("*.py"):
        assert not any(name.split(".")[0] == "tests" for name in imported(path))


def run(code):
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)


def test_import_needs_no_triton_and_no_gpu():
    code = """
import sys
sys.modules["triton"] = None
import torch, tengrad_triton
from torch import nn
model = nn.Linear(4, 3)
optimizer = tengrad_triton.TENGraD(model)
nn.functional.cross_entropy(model(torch.randn(5, 4)), torch.zeros(5, dtype=torch.long)).backward()
optimizer.step()
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_the_library_alone_needs_none_of_the_command_lines_packages():
    code = """
import sys, tengrad_triton
heavy = {"rich", "cyclopts", "matplotlib", "datasets", "sklearn", "pyarrow", "tensorboard"} & set(sys.modules)
assert not heavy, heavy
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
