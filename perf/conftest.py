"""Options of the kernel suite, and the head of its result file."""

from __future__ import annotations

import gc
import time

import pytest
import torch

from perf import record
from perf.limits import measure


def pytest_addoption(parser):
    group = parser.getgroup("perf")
    group.addoption("--scale", choices=("small", "cpu", "gpu"), default="cpu", help="sizes of the arguments")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device to measure on")
    group.addoption("--rounds", type=int, default=9, help="interleaved rounds of each case")
    group.addoption("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    group.addoption("--compiled", action="store_true", help="also compile torch's expressions")
    group.addoption("--seconds", type=float, default=float("inf"), help="skip cases that would start later than this")


def pytest_configure(config):
    torch.set_num_threads(config.getoption("threads"))
    config.perf_start = time.monotonic()


class Reopened:
    """A file that can be written as a whole more than once, for `with` statements."""

    def __init__(self, path):
        self._path = path

    def __enter__(self):
        self._file = open(self._path, "wb")
        return self._file

    def __exit__(self, *error):
        self._file.close()


def pytest_collection_finish(session):
    results = session.config._benchmarksession
    if hasattr(results.json, "write"):  # before pytest-benchmark 5.3 a file, which is closed once it is saved
        results.json = Reopened(results.json.name)
    gc.freeze()  # what has been imported stays: the collections around each case need not look at it


def pytest_runtest_setup(item):
    if time.monotonic() - item.config.perf_start > item.config.getoption("seconds"):
        pytest.skip("out of time")


def pytest_runtest_teardown(item):
    if item.config._benchmarksession.benchmarks:
        item.config._benchmarksession.handle_saving()  # after every case, so that a killed run keeps its results


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("device"))


@pytest.fixture(scope="session")
def limits(request, device):
    return measure(device, small=request.config.getoption("scale") == "small")


def pytest_benchmark_generate_machine_info(config):
    return record.described(torch.device(config.getoption("device")))


def pytest_benchmark_generate_commit_info(config):
    return {"id": record.described(torch.device("cpu"))["commit"]}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["suite"] = "kernels"
    for benchmark in output_json["benchmarks"]:  # names and extra_info have the same; these contain memory addresses
        benchmark.pop("params"), benchmark.pop("options")
