"""The representation that the cost model chooses, within a memory budget."""

import pytest

from tengrad_triton.curvature.geometry import Geometry
from tengrad_triton.tuning.plan import representations_by_cost, total_bytes

GEOMETRIES = {
    "3c1f convolution": ((128, 1, 784, 1152, 128), "per_sample", "per_sample"),
    "3c1f linear": ((128, 1, 1, 10368, 500), "factored", "factored"),
    "resnet-50, 3x3 on 7x7": ((128, 1, 49, 4608, 512), "per_sample", "per_sample"),
    "512 channels on 4x4": ((128, 1, 16, 4608, 512), "factored", "factored"),
    "512 channels on 5x5": ((128, 1, 25, 4608, 512), "per_sample", "factored"),
    "depthwise": ((128, 96, 3136, 9, 1), "per_sample", "per_sample"),
    "transformer linear": ((128, 1, 512, 4096, 4096), "per_sample", "per_sample"),
}


@pytest.mark.parametrize(
    ("positions", "on_cpu", "on_gpu"),
    [(16, "factored", "factored"), (19, "per_sample", "factored"), (25, "per_sample", "per_sample")],
)
def test_the_device_decides_how_many_positions_are_worth_rows(positions, on_cpu, on_gpu):
    for device, expected in (("cpu", on_cpu), ("cuda", on_gpu), ("another", on_gpu)):
        weight = {"w": Geometry(128, 1, positions, 4608, 512, 4, factored_bytes=0, layout="dense", device=device)}
        assert representations_by_cost(weight, None, max_bytes=2**60, refresh_every=10**6) == {"w": expected}


@pytest.mark.parametrize("layer", GEOMETRIES)
def test_cost_model(layer):
    sizes, *expected = GEOMETRIES[layer]
    geometry = Geometry(*sizes, itemsize=4, factored_bytes=0, layout="dense", device="cpu")
    chosen = [
        representations_by_cost({layer: geometry}, None, max_bytes=2**60, refresh_every=every)[layer]
        for every in (100, 1)
    ]
    assert chosen == expected


def test_memory_budget_is_respected_where_factors_are_smaller():
    geometries = {
        "big": Geometry(8, 1, 100, 50, 50, 4, factored_bytes=1000, layout="dense", device="cpu"),
        "small": Geometry(8, 1, 100, 20, 20, 4, factored_bytes=1000, layout="dense", device="cpu"),
    }
    plenty = representations_by_cost(geometries, None, max_bytes=10**6, refresh_every=100)
    assert plenty == {"big": "per_sample", "small": "per_sample"}
    tight = representations_by_cost(geometries, None, max_bytes=20_000, refresh_every=100)
    assert tight == {"big": "factored", "small": "per_sample"}
    assert total_bytes(geometries, tight) <= 20_000
    # Rows save ever more arithmetic for their bytes the more positions there are, so these keep theirs the longest.
    few, many = (Geometry(8, 1, p, 50, 50, 4, factored_bytes=1000, layout="dense", device="cpu") for p in (50, 500))
    mixed = representations_by_cost({"few": few, "many": many}, None, max_bytes=100_000, refresh_every=100)
    assert mixed == {"few": "factored", "many": "per_sample"}
    by_hand = representations_by_cost(geometries, "per_sample", max_bytes=0, refresh_every=100)
    assert by_hand == plenty


def test_memory_budget_is_respected_where_rows_are_smaller():
    wide = {"wide": Geometry(128, 1, 16, 4608, 512, 4, factored_bytes=1_300_000_000, layout="dense", device="cpu")}
    assert representations_by_cost(wide, None, max_bytes=2**60, refresh_every=1) == {
        "wide": "factored"
    }  # no way to K is dearer
    assert representations_by_cost(wide, None, max_bytes=1_250_000_000, refresh_every=1) == {"wide": "per_sample"}


# Bad settings: the arguments, the error, and what its message says.
