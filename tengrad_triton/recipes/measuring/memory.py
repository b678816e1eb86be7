"""Memory in bytes: the most that a process has had, and what is free."""

import os
import resource
import sys
from pathlib import Path

import torch


def peak_process_bytes() -> int:
    """Return the most memory that this process has had.

    Linux counts it for this program in /proc; `resource` also includes the process that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def free_bytes(device: torch.device) -> int:
    """Return the free memory of the GPU or the machine; all of the machine's where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    linux = Path("/proc/meminfo")
    if linux.exists():
        entries = dict(line.split(":") for line in linux.read_text(encoding="utf-8").splitlines())
        return 1024 * int(entries["MemAvailable"].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
