"""Install an archive in a clean environment and use it: `python -m release.smoke ARCHIVE --torch 2.13.0`.

Two installations are used from an empty folder: without extras, where the command line must say what it lacks, and with
[train], where it must work. A line for the table of docs/releasing.md is printed last.
"""

import argparse
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

PROBE = Path(__file__).with_name("probe.py")
# Nothing of the caller's Python may leak into the environment, and its caches stay untouched.
KEPT = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
TRAIN = "train --epochs 1 --train-limit 100 --test-limit 50 --width 4 --device cpu --threads 1 --out run"
COMMANDS = [TRAIN, "train --resume run", "report run --to page.md", "autotune --width 4 --seconds 0.01", "plan show"]


class Environment:
    """A new virtual environment in ``folder``, used from the empty folder ``elsewhere``."""

    def __init__(self, folder: Path, python: str) -> None:
        self.bin, self.elsewhere = folder / "env" / "bin", folder / "elsewhere"
        self.elsewhere.mkdir()
        self.env = KEPT | {"HOME": str(folder), "PIP_CACHE_DIR": cache_of_pip(), "OMP_NUM_THREADS": "1"}
        subprocess.run([python, "-m", "venv", str(folder / "env")], env=self.env, check=True)

    def run(self, *command: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment; raises `SystemExit` with what it printed if its exit code is another."""
        arguments = [str(self.bin / command[0]), *command[1:]]
        done = subprocess.run(arguments, cwd=self.elsewhere, env=self.env, capture_output=True, text=True, check=False)
        if done.returncode != status:
            raise SystemExit(f"{shlex.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def install(self, *requirements: str) -> None:
        """Install what pip is asked for."""
        self.run("python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements)


def cache_of_pip() -> str:
    """Return the user's cache of downloads: a torch of gigabytes is fetched once for all environments."""
    return os.environ.get("PIP_CACHE_DIR", str(Path.home() / ".cache" / "pip"))


def check_command_line(environment: Environment) -> None:
    """Every command runs, prints no error, and leaves the page."""
    version = environment.run("python", "-I", "-c", "import tengrad_triton as t; print(t.__version__)").stdout
    assert environment.run("tengrad-triton", "--version").stdout == version
    for command in COMMANDS:
        done = environment.run("tengrad-triton", *command.split())
        assert not done.stderr, f"{command}: {done.stderr}"
    assert "test accuracy" in (environment.elsewhere / "page.md").read_text(encoding="utf-8")


def smoke(archive: Path, python: str, torch: str) -> str:
    """Install and use the archive; return the line of the table."""
    with tempfile.TemporaryDirectory(prefix="smoke-") as folder:
        environment = Environment(Path(folder), python)
        environment.install(str(archive), f"torch=={torch}")
        row = environment.run("python", "-I", str(PROBE)).stdout.strip().splitlines()[-1]
        lacking = environment.run("tengrad-triton", "--version", status=2).stderr.splitlines()[-1]  # torch misses numpy
        assert lacking.startswith("tengrad-triton: "), lacking
        assert lacking.endswith("pip install 'tengrad-triton[train]'"), lacking
        environment.install(f"{archive}[train]", f"torch=={torch}")
        check_command_line(environment)
        environment.run("python", "-m", "pip", "check")
    return f"{row} {'wheel' if archive.suffix == '.whl' else 'sdist'} |"


def main() -> None:
    """Read the arguments, and print the line of the table."""
    parser = argparse.ArgumentParser(prog="python -m release.smoke", description=__doc__)
    parser.add_argument("archive", type=Path, help="a wheel or an sdist")
    parser.add_argument("--python", default="python3", help="the interpreter of the environment")
    parser.add_argument("--torch", required=True, help="the version of torch")
    given = parser.parse_args()
    print(smoke(given.archive.resolve(strict=True), given.python, given.torch))


if __name__ == "__main__":
    main()
