"""What is released: archives with the package and nothing else, one version, and a citation."""

import subprocess
import sys
import tarfile
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest
import yaml
from helpers.pages import table_after

from tengrad_triton import __version__

ROOT = Path(__file__).parent.parent
STEM = f"tengrad_triton-{__version__}"
# Python's ** enters links or not, by version; kernels is a link, in place of which archives have its files.
FILES = {
    str(path.relative_to(ROOT)): path.read_bytes()
    for pattern in ("**/*", "kernels/*")
    for path in ROOT.glob(f"tengrad_triton/{pattern}")
    if path.is_file() and path.suffix != ".pyc"
}
BESIDE_THE_PACKAGE = ("CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "pyproject.toml")


def build(tree, out, *targets):
    """Build archives with the tool that pyproject.toml names."""
    command = [sys.executable, "-m", "hatchling", "build", *targets, "--directory", str(out)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Give the folder of an sdist and a wheel."""
    out = tmp_path_factory.mktemp("archives")
    build(ROOT, out)
    return out


@pytest.fixture(scope="module")
def wheel(archives):
    """Give the files of the wheel by name."""
    with zipfile.ZipFile(archives / f"{STEM}-py3-none-any.whl") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def source(archives, tmp_path_factory):
    """Give the folder that the sdist unpacks to."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(archives / f"{STEM}.tar.gz") as archive:
        assert all(member.isfile() for member in archive)
        archive.extractall(folder, filter="data")
    return folder / STEM


def test_the_wheel_is_the_package(wheel):
    own = {name: data for name, data in wheel.items() if not name.startswith(f"{STEM}.dist-info/")}
    assert own == FILES
    assert {"tengrad_triton/py.typed", "tengrad_triton/kernels/gram.py"} <= own.keys()
    assert wheel[f"{STEM}.dist-info/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


def test_the_sdist_is_the_package_and_what_builds_it(source):
    unpacked = {str(path.relative_to(source)): path.read_bytes() for path in source.rglob("*") if path.is_file()}
    assert unpacked.keys() - FILES.keys() == {*BESIDE_THE_PACKAGE, ".gitignore", "PKG-INFO"}
    assert {name: unpacked[name] for name in FILES} == FILES


def test_the_sdist_builds_the_same_wheel_at_another_time(source, archives, tmp_path):
    (source / "tengrad_triton" / "__init__.py").touch()
    build(source, tmp_path, "-t", "wheel")
    name = f"{STEM}-py3-none-any.whl"
    assert (tmp_path / name).read_bytes() == (archives / name).read_bytes()


METADATA = {
    "Name": ["tengrad-triton"],
    "Version": [__version__],
    "License-Expression": ["MIT"],
    "Requires-Python": [">=3.11"],
    "Description-Content-Type": ["text/markdown"],
    "Project-URL": None,  # none is public
}


@pytest.fixture(scope="module")
def metadata(wheel):
    return BytesParser().parsebytes(wheel[f"{STEM}.dist-info/METADATA"])


@pytest.mark.parametrize("field", METADATA)
def test_the_metadata_say_it(field, metadata):
    assert metadata.get_all(field) == METADATA[field]


def test_every_python_that_is_named_was_used(metadata):
    """docs/releasing.md has the installations that were used; the newest and the oldest torch are among them."""
    tested = table_after("## What was used", (ROOT / "docs/releasing.md").read_text(encoding="utf-8"))
    named = {line.rpartition(" ")[2] for line in metadata.get_all("Classifier") if "Python :: 3." in line}
    assert {python.rpartition(".")[0] for python in tested} == named


def test_the_version_is_everywhere_the_same():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("\n## ")
    assert citation["version"] == __version__
    assert citation["preferred-citation"]["url"].endswith("2106.03947")
    assert changes[1].split()[0] == __version__
