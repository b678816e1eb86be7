"""Compile every launch configuration for several GPUs, and trace every op on CUDA tensors; no GPU is needed.

As a program this file traces the ops; a process of its own does that, because it replaces Triton's driver.
"""

import contextlib
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_checks import map_floats
from torch._functorch.aot_autograd import aot_export_module
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from tengrad_triton import kernels
from tengrad_triton.kernels.pointer_table import TABLE, TABLE_CHANGES

if not kernels.spec.HAS_TRITON or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler", allow_module_level=True)

import triton

from perf.machine_code.compiler import compile_config, resources_of, target_of
from perf.machine_code.configurations import configurations, name_of
from perf.machine_code.gpus import ARCHITECTURES
from perf.machine_code.resources import faults

SPECS = kernels.SPECS
TF32X3, TABLES = kernels.spec.TF32X3, (*TABLE, *TABLE_CHANGES)
TYPES = {**kernels.spec.TRITON_TYPES, torch.int64: "*i64", torch.int32: "*i32"}


def _cases(backend):
    """Every GPU of a maker with every configuration, once even where two ops share it."""
    ops = {id(config): row.name for row in reversed(SPECS) for config in row.configs}
    return [
        pytest.param(
            config,
            architecture,
            id=f"{target}-{ops[id(config)]}-{name.replace(' ', '-')}",
            marks=[pytest.mark.slow] if _others_stand_for(target, config) else [],
        )
        for target, architecture in ARCHITECTURES.items()
        if architecture.backend == backend
        for name, config in configurations(architecture).items()
    ]


def _others_stand_for(target, config):
    """Whether quicker rows prove what a slow one does.

    float16 compiles as bfloat16 does, sm_80 takes less than sm_90, and an update takes as many registers without the
    look-ahead as with it. The configurations that only a plan chooses are compiled for sm_90, and for sm_100 what has
    matrix products: there its instructions are others.
    """
    if target == "sm_80" or "*fp16" in config.types or config.constants.get("NESTEROV") is False:
        return True
    multiplies = "tl.dot(" in config.kernel.src or "weighted_outer(" in config.kernel.src
    return target != "sm_90" and (config.name != "default" or (target == "sm_100" and not multiplies))


@pytest.fixture
def _fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def _without_faults(config, architecture):
    """Compile a configuration; it spills nothing, fits into shared memory and is not empty."""
    compiled = compile_config(config, architecture)
    found = resources_of(compiled, architecture)
    assert faults({architecture.name: {name_of(config): found}}) == []
    return compiled, found


@pytest.mark.usefixtures("_fresh_cache")
@pytest.mark.parametrize(("config", "architecture"), _cases("cuda"))
def test_config_compiles_for_cuda_without_spills(config, architecture):
    compiled, found = _without_faults(config, architecture)
    # Every other float32 dot asks for ieee, which the compiler has been seen to ignore.
    assert ("tf32" in compiled.asm["ptx"]) == (config.name == TF32X3)
    if config.name == TF32X3:  # on sm_100 the instruction does not name the type
        assert {"HMMA.TF32", "HGMMA.TF32", "UTCHMMA"} & found.instructions.keys()
    if config.async_copies:
        assert "LDGSTS.128" in found.instructions


@pytest.mark.usefixtures("_fresh_cache")
@pytest.mark.parametrize(("config", "architecture"), _cases("hip"))
def test_config_compiles_for_amd_without_spills(config, architecture):
    _without_faults(config, architecture)


class _Driver:
    """What tracing asks of Triton's driver."""

    def get_current_target(self):
        return target_of(ARCHITECTURES["sm_90"])

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cuda", 0)


class _Call(torch.nn.Module):
    """An op as a module of its tensor arguments; it returns what the op changes as a part of the graph's signature."""

    def __init__(self, op, arguments):
        super().__init__()
        self.op = op
        leaves, self.structure = pytree.tree_flatten(arguments)
        self.fixed = [None if torch.is_tensor(leaf) else leaf for leaf in leaves]
        self.positions = [at for at, leaf in enumerate(leaves) if torch.is_tensor(leaf)]

    def forward(self, *tensors):
        leaves = list(self.fixed)
        for at, tensor in zip(self.positions, tensors, strict=True):
            leaves[at] = tensor
        result = self.op(*pytree.tree_unflatten(leaves, self.structure))
        return result if isinstance(result, tuple) else () if result is None else (result,)


def _launches(graph):
    """Yield what a traced graph launches, as (kernel, number of warps, of stages, all arguments)."""
    for node in graph.nodes:
        if "triton_kernel_wrapper" in str(node.target):
            # The options of a launch arrive as an autotuner with one choice.
            tuner = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            fixed = kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])
            yield tuner.fn, tuner.configs[0].num_warps, tuner.configs[0].num_stages, fixed | node.kwargs["kwargs"]


def _type_of(argument):
    """The type for which Triton compiles an argument, as `Config.types` names it."""
    if isinstance(argument, tuple):
        return ",".join(map(_type_of, argument))
    if torch.is_tensor(argument):
        return TYPES[argument.dtype]
    return "i32" if argument.bit_length() < 32 else "i64"


@contextlib.contextmanager
def _recorded(compile_all):
    """Record what ops launch that tracing does not look into; go no further than to compile it for its arguments.

    Launches whose arguments have the declared types are compiled above, and here only with ``compile_all``.
    """
    started, start = [], kernels.spec.Config.start

    def record(config, grid, *arguments):
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        if compile_all or " ".join(map(_type_of, arguments)) != config.types:
            assert config.kernel.warmup(*arguments, **config.constants, **options, grid=grid)
        started.append((config.kernel, config.num_warps, config.num_stages, config.constants))

    kernels.spec.Config.start = record
    yield started
    kernels.spec.Config.start = start


def _trace(row, arguments, compile_all, **config):
    """The launches of an op on CUDA tensors; it changes as many arguments as it says."""
    tensors = [leaf for leaf in pytree.tree_leaves(arguments) if torch.is_tensor(leaf)]
    with FakeTensorMode():
        fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in tensors]
        call = _Call(functools.partial(getattr(kernels, row.name), **config), arguments)
        module, signature = aot_export_module(call, fakes, trace_joint=False)
    changed = len(pytree.tree_leaves(arguments[: row.mutates]))
    assert len(signature.user_inputs_to_mutate) == changed, row.name
    launches = list(_launches(module.graph))
    if launches:
        return launches
    with _recorded(compile_all) as started:
        row.triton_impl(*arguments, **config)
        # Launches that are repeated on other tensors write the addresses of these.
        row.triton_impl(*map_floats(torch.Tensor.clone, arguments), **config)
    return started


def _is_launch_of(config, launch):
    kernel, num_warps, num_stages, arguments = launch
    options = (kernel, num_warps, num_stages) == (config.kernel, config.num_warps, config.num_stages)
    return options and config.constants.items() <= arguments.items()


def trace_ops(compile_all):
    """Trace every example of every op: it launches shipped configurations, all of them, and changes what it says.

    Without ``compile_all`` bfloat16 stands for float16.
    """
    triton.runtime.driver.set_active(_Driver())
    launched = []
    for row in SPECS:
        traces = [
            _trace(row, example(dtype, torch.device("cpu")), compile_all, **config)
            for name, example in row.examples.items()
            for dtype in row.dtypes
            if compile_all or dtype != torch.float16
            # Parameters in half precision are loaded and stored by the same code in every configuration.
            for config in ({}, *({"config": config} for config in row.config_names if not name.startswith("half")))
        ]
        launches = [launch for launched in traces for launch in launched]
        for launch in launches:
            assert any(_is_launch_of(config, launch) for config in row.configs), (row.name, launch)
        launched += launches
        for config in (config for config in row.configs if compile_all or "*fp16" not in config.types):
            # The size of a table decides which of the kernels writes it.
            is_seen = any(_is_launch_of(config, launch) for launch in launches)
            assert is_seen or config in TABLES, (row.name, config)
    for config in TABLES:
        assert any(_is_launch_of(config, launch) for launch in launched), config


@pytest.mark.parametrize("compiled", ["others", pytest.param("all", marks=pytest.mark.slow)])
def test_ops_trace_to_shipped_launches_without_a_gpu(compiled):
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    command, env = [sys.executable, __file__, compiled], {**os.environ, "PYTHONPATH": path}
    child = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr


if __name__ == "__main__":
    trace_ops(compile_all=sys.argv[1:] == ["all"])
