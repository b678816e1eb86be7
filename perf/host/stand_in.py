"""A stand-in for a GPU: Triton's own launcher on tensors of the CPU, with a driver library that does nothing."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver

from tengrad_triton.kernels import dispatch

SOURCE = Path(__file__).with_name("libcuda.c")


class NoStandInError(RuntimeError):
    """The stand-in cannot be made here."""


def install() -> ctypes.CDLL:
    """Have this process launch kernels through the stand-in, and the ops launch them for tensors of the CPU.

    Nothing that the ops return has a meaning afterwards. There is no way back, so it takes a process of its own, and it
    must come before Triton's driver is used.

    Returns:
        the library; its ``launch_count()`` returns how many kernels were launched.

    Raises:
        NoStandInError: there is no C compiler.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NoStandInError("no C compiler: the stand-in for the driver library cannot be built")
    folder = Path(tempfile.mkdtemp(prefix="tengrad-triton-"))
    library = folder / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-O2", "-w", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([compiler, *options, "-o", str(library), str(SOURCE)], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    # Whatever links to a library of this name later gets this one.
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    loaded.launch_count.restype = ctypes.c_long
    triton.runtime.driver.set_active(Driver())
    dispatch.is_on_gpu = lambda x: True
    return loaded


class Driver(CudaDriver):  # type: ignore[misc]
    """Triton's driver of NVIDIA GPUs, with what it would ask torch answered for one GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None
        self.get_current_stream = lambda device: 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")
