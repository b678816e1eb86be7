"""Compile every launch configuration for several GPUs, and trace every op on CUDA tensors; no GPU is needed.

As a program this file traces the ops; a process of its own does that, because it replaces Triton's driver.
"""

import contextlib
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._functorch.aot_autograd import aot_export_module
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from tengrad_triton import kernels

if not kernels.spec.HAS_TRITON or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SPECS = kernels.SPECS
TF32X3 = kernels.spec.TF32X3
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CUDA = {f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (80, 90, 100)}
HIP = {"gfx942": GPUTarget("hip", "gfx942", 64)}
TYPES = {**kernels.spec.TRITON_TYPES, torch.int64: "*i64", torch.int32: "*i32"}
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, "gfx942": 64 << 10}  # bytes that a program may have


def _cases(targets):
    """Every target with every configuration, once even where two ops share it."""
    configs = {id(config): (row, config) for row in reversed(SPECS) for config in row.configs}.values()
    return [
        pytest.param(
            config,
            target,
            id=f"{name}-{_label(row, config)}",
            marks=[pytest.mark.slow] if _others_stand_for(name, config) else [],
        )
        for name, target in targets.items()
        for row, config in configs
        if target.backend in config.backends
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


def _label(row, config):
    entries = next((kind for kind in ("fp16", "bf16") if f"*{kind}" in config.types), "fp32")
    constants = "-".join(str(value) for value in config.constants.values())
    return f"{row.name}-{config.name}-{config.kernel.__name__}-{entries}-{constants}"


def compile_config(config, target):
    """Compile one configuration for one target, with every argument but the unaligned ones a multiple of 16."""
    names = config.kernel.arg_names
    kinds = [tuple(kind.split(",")) if "," in kind else kind for kind in config.types.split()]
    types = dict(zip([name for name in names if name not in config.constants], kinds, strict=True))
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in types if name not in config.unaligned}
    signature = types | dict.fromkeys(config.constants, "constexpr")
    source = ASTSource(fn=config.kernel, signature=signature, constexprs=dict(config.constants), attrs=aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=target, options=options)


def _tool(name, *arguments):
    return subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def cuda_resources(compiled, folder):
    """Registers, bytes of local memory and the machine code of a kernel compiled for CUDA."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups())
    return registers, stack + local, _tool("nvdisasm", "-c", "-ndf", str(cubin))


def hip_resources(compiled):
    """Vector registers, bytes of scratch memory and the machine code of a kernel compiled for AMD."""
    code = compiled.asm["amdgcn"]
    # Scalar registers that spill go to lanes of vector registers, not to memory.
    registers, scratch = (
        int(re.search(rf"\.{name}:\s+(\d+)", code)[1]) for name in ("vgpr_count", "private_segment_fixed_size")
    )
    return registers, scratch, code


@pytest.fixture
def _fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.usefixtures("_fresh_cache")
@pytest.mark.parametrize(("config", "target"), _cases(CUDA))
def test_config_compiles_for_cuda_without_spills(config, target, tmp_path):
    compiled = compile_config(config, target)
    _, spilled, code = cuda_resources(compiled, tmp_path)
    assert spilled == 0
    assert compiled.metadata.shared <= SHARED_MEMORY[target.arch]
    assert not re.search(r"\b(STL|LDL)\b", code)
    assert re.search(r"\bSTG\b", code), "an empty kernel: the compiler dropped every store"
    # Every other float32 dot asks for ieee, which the compiler has been seen to ignore.
    assert ("tf32" in compiled.asm["ptx"]) == (config.name == TF32X3)
    if config.name == TF32X3:  # on sm_100 the instruction does not name the type
        assert re.search(r"\bUTCHMMA\b" if target.arch == 100 else r"\bHG?MMA\.\S*TF32", code)
    if config.async_copies:
        assert re.search(r"\bLDGSTS\.\S*128", code)


@pytest.mark.usefixtures("_fresh_cache")
@pytest.mark.parametrize(("config", "target"), _cases(HIP))
def test_config_compiles_for_amd_without_spills(config, target):
    compiled = compile_config(config, target)
    _, spilled, code = hip_resources(compiled)
    assert spilled == 0
    assert compiled.metadata.shared <= SHARED_MEMORY[target.arch]
    assert re.search(r"\b(global|buffer)_store", code), "an empty kernel: the compiler dropped every store"


class _Driver:
    """What tracing asks of Triton's driver."""

    def get_current_target(self):
        return CUDA["sm_90"]

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
        for config in (config for config in row.configs if compile_all or "*fp16" not in config.types):
            assert any(_is_launch_of(config, launch) for launch in launches), (row.name, config)


@pytest.mark.parametrize("compiled", ["others", pytest.param("all", marks=pytest.mark.slow)])
def test_ops_trace_to_shipped_launches_without_a_gpu(compiled):
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    command, env = [sys.executable, __file__, compiled], {**os.environ, "PYTHONPATH": path}
    child = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr


if __name__ == "__main__":
    trace_ops(compile_all=sys.argv[1:] == ["all"])
