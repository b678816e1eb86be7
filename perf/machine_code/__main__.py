"""Compile every kernel for every GPU, or write the page of what came of it: `python -m perf.machine_code [--page]`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from perf.machine_code import environments, page, results
from perf.machine_code.resources import faults


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perf.machine_code", description=__doc__)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--triton",
        nargs="*",
        metavar="VERSION",
        help="compile with these versions, which pip installs into folders of their own; by default with all of them",
    )
    choice.add_argument(
        "--page", action="store_true", help="compile nothing; write docs/machine-code.md from the results"
    )
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the results")
    parser.add_argument("--processes", type=int, help="processes that compile; one a core by default")
    parser.add_argument("--expect", metavar="VERSION", help="refuse to compile with another version of Triton")
    return parser.parse_args()


def main() -> None:
    """Compile with the installed Triton or with others, or write the page."""
    options = parsed()
    if options.page:
        page.generate()
    elif options.triton is None:
        compile_all(options)
    else:
        processes = ["--processes", str(options.processes)] if options.processes else []
        for version in options.triton or environments.VERSIONS:
            environments.run_with(version, ["--out", str(options.out.resolve()), *processes])


def compile_all(options: argparse.Namespace) -> None:
    """Compile with the installed Triton, keep what comes of it, and print what is wrong."""
    import triton  # noqa: PLC0415 (the page needs no Triton)

    from perf.machine_code import matrix  # noqa: PLC0415

    version = triton.__version__
    if options.expect not in (None, version):
        raise SystemExit(f"Triton {options.expect} is expected, and {version} is imported; look at PYTHONPATH")
    start = time.monotonic()
    found = matrix.compiled(processes=options.processes)
    results.write(options.out, version, found)
    print(f"triton {version}: {sum(map(len, found.values()))} kernels in {time.monotonic() - start:.0f} s")
    print("\n".join(faults(found)) or "no faults", flush=True)


if __name__ == "__main__":
    main()
