"""Install a wheel and an sdist in a clean environment and use them: `python -m release.smoke dist --torch 2.13.0`.

From an empty folder: the wheel without extras, where the command line must say what it lacks; the wheel with [train],
where every command must run; and the sdist. A line for the table of docs/releasing.md is printed last.
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
        self.env["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")
        subprocess.run([python, "-m", "venv", str(folder / "env")], env=self.env, check=True)

    def run(self, *command: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment; raises `SystemExit` with what it printed if its exit code is another."""
        arguments = [str(self.bin / command[0]), *command[1:]]
        done = subprocess.run(arguments, cwd=self.elsewhere, env=self.env, capture_output=True, text=True, check=False)
        if done.returncode != status:
            raise SystemExit(f"{shlex.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def install(self, *requirements: str) -> None:
        """Install what pip is asked for; what is not imported need not be compiled."""
        self.run(
            "python", "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check", *requirements
        )


def cache_of_pip() -> str:
    """Return the user's cache of downloads: gigabytes of torch are fetched once for all environments."""
    return os.environ.get("PIP_CACHE_DIR", str(Path.home() / ".cache" / "pip"))


def check_command_line(environment: Environment) -> None:
    """Every command runs, prints no error, and leaves the page."""
    version = environment.run("python", "-I", "-c", "import tengrad_triton as t; print(t.__version__)").stdout
    assert environment.run("tengrad-triton", "--version").stdout == version
    for command in COMMANDS:
        done = environment.run("tengrad-triton", *command.split())
        assert not done.stderr, f"{command}: {done.stderr}"
    page = (environment.elsewhere / "page.md").read_text(encoding="utf-8")
    assert "tengrad-triton train" in page, page


def smoke(wheel: Path, sdist: Path, python: str, torch: str) -> str:
    """Install and use the archives; return the line of the table."""
    with tempfile.TemporaryDirectory(prefix="smoke-") as folder:
        environment = Environment(Path(folder), python)
        environment.install(str(wheel), f"torch=={torch}")
        line = environment.run("python", "-I", str(PROBE)).stdout.strip().splitlines()[-1]
        lacking = environment.run("tengrad-triton", "--version", status=2).stderr.splitlines()[-1]  # torch misses numpy
        assert lacking.startswith("tengrad-triton: "), lacking
        assert lacking.endswith("pip install 'tengrad-triton[train]'"), lacking
        environment.install(f"{wheel}[train]", f"torch=={torch}")
        check_command_line(environment)
        environment.run("python", "-m", "pip", "check")
        environment.install("--force-reinstall", "--no-deps", str(sdist))
        environment.run("python", "-I", str(PROBE))
    return line


def main() -> None:
    """Read the arguments, and print the line of the table."""
    parser = argparse.ArgumentParser(prog="python -m release.smoke", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with one wheel and one sdist")
    parser.add_argument("--python", default="python3", help="the interpreter of the environment")
    parser.add_argument("--torch", required=True, help="the version of torch")
    given = parser.parse_args()
    (wheel,), (sdist,) = given.folder.resolve().glob("*.whl"), given.folder.resolve().glob("*.tar.gz")
    print(smoke(wheel, sdist, given.python, given.torch))


if __name__ == "__main__":
    main()
