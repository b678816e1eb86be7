"""The matrix with other versions of Triton than the installed one, each in a folder of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from perf.record import ROOT

VERSIONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
"""The versions of Triton that the kernels are compiled with."""


def pinned() -> str:
    """Return the version of Triton that the tests run with: the one that constraints.txt names."""
    return re.search(r"^triton==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[1]


class UnavailableError(RuntimeError):
    """pip cannot install a version of Triton here."""


def run_with(version: str, arguments: Sequence[str]) -> None:
    """Run `python -m perf.machine_code` with a version of Triton, and with everything else as it is here.

    Raises:
        UnavailableError: pip cannot install that version.
        RuntimeError: the command failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        install(version, folder)
        path = os.pathsep.join(filter(None, (folder, str(ROOT), os.environ.get("PYTHONPATH"))))
        env = {**os.environ, "PYTHONPATH": path}
        command = [sys.executable, "-m", "perf.machine_code", "--expect", version, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"compiling with triton {version} failed:\n{done.stderr}")


def install(version: str, folder: str) -> None:
    """Install one version of Triton, and nothing else, into a folder."""
    quiet = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "install", *quiet, "--target", folder, f"triton=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnavailableError(f"pip cannot install triton=={version}: {done.stderr.strip().splitlines()[-1:]}")
