"""The tree is the architecture: arrows between packages point one way, and the package imports on a bare machine."""

import ast
import subprocess
import sys

import pytest

from website.imports import FILES, ORDER, PACKAGE, ROOT, imported, part_of, parts_imported

NEVER = {"baselines": {"compiled"}, "profiling": {"kernels", "likelihoods"}, "likelihoods": {"kernels"}}
OF_TENGRAD = {"tengrad", "woodbury", "jacobians", "refresh", "step_access"}  # what no baseline may know
LAYER_TYPES = {"Linear", "Bilinear", "Conv1d", "Conv2d", "Conv3d", "Embedding", "BatchNorm2d", "LayerNorm", "LSTM"}


def name_of(path):
    return str(path.relative_to(PACKAGE).with_suffix(""))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_import_only_what_stands_before_them(path):
    part = part_of(path)
    assert parts_imported(path) <= set(ORDER[: ORDER.index(part) + 1]) - NEVER.get(part, set())


def test_a_package_is_a_line_in_the_order():
    assert {part_of(path) for path in FILES} == set(ORDER)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("baselines/*.py")), ids=name_of)
def test_baselines_know_nothing_of_tengrad(path):
    assert not OF_TENGRAD & {part for name in imported(path) for part in name.split(".")[2:3]}


def modules_imported(path):
    """Return the modules of the same package that a file imports."""
    package = path.parent
    found = set()
    for name in imported(path):
        parts = name.split(".")[1:]
        for end in range(len(parts), 0, -1):
            module = PACKAGE.joinpath(*parts[:end]).with_suffix(".py")
            if module.exists():
                found |= {module} if module.parent == package else set()
                break
    return found - {path}


@pytest.mark.parametrize("package", sorted({path.parent for path in FILES} - {PACKAGE}), ids=name_of)
def test_modules_of_a_package_have_no_circle(package):
    waiting = {path: modules_imported(path) for path in package.glob("*.py") if path.name != "__init__.py"}
    while waiting:
        ready = [path for path, below in waiting.items() if not below & waiting.keys()]
        assert ready, f"a circle among {sorted(path.name for path in waiting)}"
        for path in ready:
            del waiting[path]


@pytest.mark.parametrize("package", sorted({path.parent for path in FILES} - {PACKAGE}), ids=name_of)
def test_a_folder_is_taken_in_at_a_glance(package):
    modules = [path for path in package.glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= (27 if package.name == "kernels" else 12)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 300


def test_kernels_know_only_torch_and_triton():
    for path in PACKAGE.glob("kernels/*.py"):
        outside = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
        assert outside <= {"torch", "triton", "tengrad_triton"}, path


def layer_types_in(path):
    """Return the layer types that a file names, as attributes (``nn.Linear``) or imported names."""
    tree = ast.parse(path.read_text())
    names = (node for node in ast.walk(tree) if isinstance(node, (ast.Attribute, ast.Name)))
    return LAYER_TYPES & {node.attr if isinstance(node, ast.Attribute) else node.id for node in names}


def test_only_layers_knows_layer_types():
    elsewhere = [path for path in FILES if part_of(path) not in ("derivatives", "layers", "recipes")]
    assert {name_of(path) for path in elsewhere if layer_types_in(path)} == set()
    assert layer_types_in(PACKAGE / "layers" / "dense.py") == {"Linear", "Bilinear"}  # the check finds them


def test_tests_know_of_perf_only_what_compiles_and_perf_knows_no_test():
    of_tests = {name for path in (ROOT / "tests").rglob("*.py") for name in imported(path)}
    assert all(name.startswith("perf.machine_code") for name in of_tests if name.split(".")[0] == "perf")
    for path in (ROOT / "perf").rglob("*.py"):
        assert not any(name.split(".")[0] == "tests" for name in imported(path)), path


def test_tests_never_import_each_other():
    for path in (ROOT / "tests").rglob("*.py"):
        assert not any(part.startswith("test_") for name in imported(path) for part in name.split(".")[:1]), path


BARE = """
import sys
sys.modules["triton"] = None  # what importing finds where it is not installed
import torch, tengrad_triton
from torch import nn
a_NGPI = torch.ones(3, 1, 1, 4)
assert tengrad_triton.kernels.gram([a_NGPI], [a_NGPI], [0], 1).tolist() == [[[16.0] * 3] * 3]
model = nn.Linear(4, 3)
optimizer = tengrad_triton.TENGraD(model)
nn.functional.cross_entropy(model(torch.randn(5, 4)), torch.zeros(5, dtype=torch.long)).backward()
optimizer.step()
heavy = {"rich", "cyclopts", "matplotlib", "datasets", "sklearn", "pyarrow", "tensorboard"} & set(sys.modules)
assert not heavy, heavy
"""


def test_the_library_needs_no_triton_no_gpu_and_no_package_of_the_command_line():
    command = [sys.executable, "-W", "error", "-c", BARE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# Each line of recipes/ imports what stands before it, and itself.
RECIPES_ORDER = [
    *("errors", "files", "terminal", "measuring", "data", "models", "optimizers", "training", "reports"),
    *("paper.published", "paper.request", "paper.progress", "paper.runs", "paper.shared", "paper.memory"),
    *("paper.estimates", "paper.table", "paper.report", "paper.measurements", "paper.forecast", "paper.execute", "cli"),
]
RECIPES = PACKAGE / "recipes"


def recipes_part(parts):
    """Return the line of `RECIPES_ORDER` that a dotted name within recipes belongs to."""
    return ".".join(parts[:2] if parts[0] == "paper" else parts[:1])


@pytest.mark.parametrize("path", [p for p in RECIPES.rglob("*.py") if p.parent.name != "paper" or p.stem != "__init__"])
def test_recipes_import_only_what_stands_before_them(path):
    if path == RECIPES / "__init__.py":
        return
    own = RECIPES_ORDER.index(recipes_part(path.relative_to(RECIPES).with_suffix("").parts))
    names = [name.split(".")[2:] for name in imported(path) if name.startswith("tengrad_triton.recipes.")]
    assert {recipes_part(parts) for parts in names} <= set(RECIPES_ORDER[: own + 1])
