"""Choice by measurement: the arithmetic of a plan, its file, and the tuner."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tengrad_triton import Plan, TENGraD, autotune, kernels
from tengrad_triton.curvature.choices import ops_for
from tengrad_triton.curvature.geometry import Geometry
from tengrad_triton.tuning import measure, plan_file
from tengrad_triton.tuning.plan import Measured

CPU = torch.device("cpu")


def geometry(layout="dense"):
    return Geometry(8, 1, 100, 50, 50, 4, factored_bytes=1000, layout=layout, device="cpu")


def measured(refresh, step, nbytes, **others):
    seconds = {
        "sample_grads": {"torch": refresh},
        "project_rows": {"torch": step},
        "expand_rows_update_": {"torch": step},
    }
    return Measured({**seconds, **others}, nbytes)


FAST_REFRESH = measured(refresh=1e-3, step=1e-3, nbytes=1000)
FAST_STEP = measured(refresh=1e-1, step=1e-4, nbytes=9000)
PLAN = Plan({geometry().key: {"factored": FAST_REFRESH, "per_sample": FAST_STEP}})


@pytest.mark.parametrize(("refresh_every", "expected"), [(1, "factored"), (10, "factored"), (100, "per_sample")])
def test_a_refresh_is_shared_by_the_steps_that_use_it(refresh_every, expected):
    chosen = PLAN.choose({"w": geometry()}, None, refresh_every, max_bytes=10**9)
    assert chosen["w"].representation == expected


def test_each_kernel_is_served_by_whoever_is_faster():
    mixed = measured(
        1e-3, 1e-3, 1000, gram_rows={"torch": 2e-3, "triton": 1e-3}, project_rows={"torch": 1e-3, "triton": 2e-3}
    )
    assert mixed.kernel_overrides == ("project_rows",)
    assert mixed.per_step(1) == pytest.approx(1e-3 + 1e-3 + 1e-3 + 1e-3)
    chosen = Plan({geometry().key: {"per_sample": mixed}}).choose({"w": geometry()}, None, 1, 10**9)
    assert chosen["w"].kernel_overrides == ("project_rows",)


def test_memory_gives_up_what_costs_least_for_each_byte():
    cheap_to_give_up = {"factored": measured(0, 2e-4, 1000), "per_sample": measured(0, 1e-4, 9000)}
    dear_to_give_up = {"factored": measured(0, 9e-4, 1000), "per_sample": measured(0, 1e-4, 9000)}
    geometries = {"cheap": geometry("a"), "dear": geometry("b")}
    plan = Plan({geometries["cheap"].key: cheap_to_give_up, geometries["dear"].key: dear_to_give_up})

    def choose(max_bytes):
        return {name: choice.representation for name, choice in plan.choose(geometries, None, 1, max_bytes).items()}

    assert choose(18_000) == {"cheap": "per_sample", "dear": "per_sample"}
    assert choose(10_000) == {"cheap": "factored", "dear": "per_sample"}
    assert choose(2_000) == {"cheap": "factored", "dear": "factored"}
    assert choose(0) == {"cheap": "factored", "dear": "factored"}  # `Budget` then takes fewer rows


def test_by_hand_is_by_hand_and_the_unknown_gets_the_cost_model():
    chosen = PLAN.choose({"w": geometry(), "other": geometry("new")}, {"w": "factored"}, 100, 10**9)
    assert chosen["w"].representation == "factored"
    assert chosen["other"].representation == "per_sample"


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)),
    )


def tuned(tmp_path, seconds=1e-3, **options):
    return autotune(model(), torch.randn(16, 1, 6, 6), seconds=seconds, path=tmp_path / "plan.json", **options)


def test_autotune_measures_each_geometry_once_and_the_optimizer_uses_it(tmp_path):
    net, path, seen = model(), tmp_path / "plan.json", []
    plan = autotune(net, torch.randn(16, 1, 6, 6), seconds=1e-3, path=path, progress=lambda *at: seen.append(at))
    assert [at[:2] for at in seen] == [(0, 3), (1, 3), (2, 3)]  # two of the four weights have the same geometry
    assert all(set(entry) == {"factored", "per_sample"} for entry in plan.entries.values())
    assert all(
        t > 0
        for entry in plan.entries.values()
        for m in entry.values()
        for one in m.seconds.values()
        for t in one.values()
    )
    assert all(p.grad is None for p in net.parameters())
    for given in (plan, path, str(path)):
        optimizer = TENGraD(net, plan=given)
        F.cross_entropy(net(torch.randn(16, 1, 6, 6)), torch.zeros(16, dtype=torch.long)).backward()
        optimizer.step()
        choices = optimizer.choices()
        for name in ("0.weight", "2.weight", "7.weight"):
            fastest = [
                min(entry, key=lambda r, entry=entry: entry[r].per_step(100))
                for key, entry in plan.entries.items()
                if key.endswith("32-bit") and choices[name].representation in entry
            ]
            assert choices[name].representation in fastest


def test_compression_is_tried_at_the_users_tolerance(tmp_path):
    stored = []
    for tol in (0.5, 1e-9):
        options = {"representations": ("per_sample", "compressed"), "tol": tol, "path": tmp_path / "plan.json"}
        plan = autotune(model(), torch.randn(16, 1, 6, 6), seconds=1e-3, **options)
        stored.append([entry["compressed"].bytes for entry in plan.entries.values()])
        for entry in plan.entries.values():
            assert {"compress", "project_rows", "expand_rows_update_"} <= set(entry["compressed"].seconds)
            assert entry["compressed"].bytes <= entry["per_sample"].bytes
    assert all(few < many for few, many in zip(*stored, strict=True))


def test_an_incumbent_stays_unless_a_rival_is_noticeably_faster():
    triton = {"torch": 2e-3, "triton": 1e-3, "tall": 0.98e-3}
    assert measured(0, 1e-3, 1, project_rows=triton).kernel_overrides == ()
    assert measured(0, 1e-3, 1, project_rows=triton | {"tall": 0.9e-3}).kernel_overrides == ("project_rows:tall",)
    assert measured(0, 1e-3, 1, project_rows=triton | {"torch": 0.5e-3}).kernel_overrides == ("project_rows",)
    rows = {"factored": measured(0, 0.98e-3, 1), "per_sample": measured(0, 1e-3, 1)}  # the rule's choice is the latter
    chosen = Plan({geometry().key: rows}).choose({"w": geometry()}, None, 100, 10**9)
    assert chosen["w"].representation == "per_sample"


def test_every_configuration_that_a_plan_can_name_is_an_op():
    named = [f"{spec.name}:{tile}" for spec in kernels.SPECS for tile in spec.config_names]
    ops = ops_for("auto", named)
    assert named
    assert all(isinstance(getattr(ops, name.partition(":")[0]), partial) for name in named)
    with pytest.raises(ValueError, match="no kernels named project_rows:huge"):
        ops_for("auto", ("project_rows:huge",))
    with pytest.raises(ValueError, match="no kernels named unfold_conv"):
        ops_for("auto", ("unfold_conv",))


class Gpu:
    """The tuner as on a GPU, where every configuration is tried; a call takes as long as ``times`` says, or 2 ms."""

    def __init__(self, monkeypatch):
        self.times, self.spent = {}, {}
        module = measure
        monkeypatch.setattr(module, "_device_of", lambda args: torch.device("cuda"))
        monkeypatch.setattr(module, "median_seconds", self.median_seconds)

    def median_seconds(self, call, seconds, device):
        assert device.type == "cuda"
        kernel = getattr(call.func, "_name", None)  # of an op; the definition is a plain function
        who = call.keywords.get("config", "triton") if kernel else "torch"
        kernel = kernel or call.func.__name__.replace("_torch", "")
        self.spent.setdefault(kernel, []).append(seconds)
        return self.times.get((kernel, who), 2e-3)


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


def test_every_configuration_is_tried_and_the_fastest_is_used(tmp_path, gpu):
    gpu.times = {("conv_sample_grads", "narrow"): 1e-3, ("gram_rows", "deep"): 1e-3, ("project_rows", "torch"): 1e-3}
    plan = tuned(tmp_path, 0.1, representations=("per_sample",))
    offered = {spec.name: {"torch", "triton", *spec.config_names} for spec in kernels.SPECS}
    for entry in plan.entries.values():
        assert {name: set(times) for name, times in entry["per_sample"].seconds.items()}.items() <= offered.items()
    for name, spent in gpu.spent.items():  # however many share it
        assert set(spent) == {0.1 / len(offered[name])}
    net = model()
    optimizer = TENGraD(net, plan=plan, representation="per_sample")
    F.cross_entropy(net(torch.randn(16, 1, 6, 6)), torch.zeros(16, dtype=torch.long)).backward()
    optimizer.step()
    assert optimizer.choices()["2.weight"].kernel_overrides == (
        "conv_sample_grads:narrow",
        "gram_rows:deep",
        "project_rows",
    )
    row = next(row for row in optimizer.summary().parameters if row.parameter == "2.weight")
    assert row.kernels == "gram_rows:deep, project_rows:torch, expand_rows_update_, conv_sample_grads:narrow"
    assert set(plan_file.load(tmp_path / "plan.json", CPU).entries) == set(plan.entries)


class OutOfResourcesError(Exception):
    """As Triton's own, which is no RuntimeError."""


def test_a_configuration_that_fails_is_dropped_alone(tmp_path, gpu, monkeypatch):
    gram_rows, project_rows = kernels.gram_rows, kernels.project_rows

    def inexact_and_large(*args, config="default"):
        if config == "deep":
            raise OutOfResourcesError("out of resource: shared memory\nand more")
        return gram_rows(*args) * (1.1 if config == "small" else 1)

    def large(*args, config="default"):
        if config == "default":
            raise OutOfResourcesError("out of resource: registers")
        return project_rows(*args)

    monkeypatch.setattr(kernels, "gram_rows", inexact_and_large)
    monkeypatch.setattr(kernels, "project_rows", large)
    with pytest.warns(UserWarning, match=r"dropped") as said:
        plan = tuned(tmp_path, 0.1, representations=("per_sample",))
    assert {str(one.message) for one in said} == {
        "gram_rows (deep) is dropped: out of resource: shared memory",
        "gram_rows (small) is dropped: its error is more than twice PyTorch's",
        "project_rows (triton) is dropped: out of resource: registers",
    }
    for measured in (entry["per_sample"] for entry in plan.entries.values()):
        assert set(measured.seconds["gram_rows"]) == {"torch", "triton", "smallest", "tf32x3"}
        assert measured.kernel_overrides == ("project_rows",)  # not by what was dropped, slow as the others may be
    assert plan_file.load(tmp_path / "plan.json", CPU) == plan


def test_a_launch_is_split_only_where_its_own_kernels_differ():
    from tengrad_triton.curvature.jacobians.per_sample import PerSample

    plain, tuned = (
        PerSample(torch.ones(2, 3), ops_for("auto", names), "samples") for names in ((), ("gram_rows:deep",))
    )
    assert plain.group_key("gram") != tuned.group_key("gram")
    assert all(plain.group_key(product) == tuned.group_key(product) for product in ("project", "expand"))


def test_a_candidate_that_fails_is_left_out_and_named(tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("no such luck\nand a long trace")

    specs = [replace(spec, torch_impl=broken) if spec.name == "project_rows" else spec for spec in kernels.SPECS]
    monkeypatch.setattr(kernels, "SPECS", specs)
    with pytest.warns(UserWarning, match=r"per_sample of \d\.weight is not measured: no such luck$"):
        plan = autotune(model(), torch.randn(16, 1, 6, 6), seconds=1e-3, path=tmp_path / "plan.json")
    assert all(set(entry) == {"factored"} for entry in plan.entries.values())


def test_nothing_to_tune(tmp_path):
    with pytest.raises(ValueError, match="no weight of BatchNorm1d multiplies its layer's input"):
        autotune(nn.BatchNorm1d(4), torch.randn(16, 4), path=tmp_path / "plan.json")
