"""The cost model of many processes: by hand where sizes are small, against counted bytes, and what its page says."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import several_processes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from studies.processes import __main__ as study  # noqa: E402
from studies.processes import counting, hardware, measured, model, page, tables, times  # noqa: E402
from studies.processes.answers import ADDED, COUNTS, FEW_ROWS, INTERVALS, SAMPLES, Answers, plans_of, powers  # noqa: E402
from studies.processes.sizes import META, NETWORKS, Network, Sizes, sizes_of  # noqa: E402
from studies.processes.store import Store  # noqa: E402
from tengrad_triton.capture.outputs import output_tensors  # noqa: E402
from tengrad_triton.distributed.exchange import packed, unpacked  # noqa: E402

PAGE = ROOT / "docs" / "scaling.md"
STORE = Store(ROOT / "studies" / "processes" / "results")
SMALL = Network(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (3,), tokens=False)
WITHIN = 0.1  # of the model


@pytest.fixture(scope="module")
def small():
    return Sizes(SMALL, 5)


def test_a_small_model_by_hand(small):
    # a, g and rows of the bias: 60, 80 and 80 bytes for 4 outputs, 80, 40 and 40 for 2; each filled up to 64.
    assert small.message_bytes == 64 + 128 + 128 + 128 + 64 + 64
    assert small.parameters == 3 * 4 + 4 + 4 * 2 + 2
    ddp, local = (model.sent(small, 3, way, 15) for way in ("DDP, global", "DDP, local"))
    assert ddp.wrapper == pytest.approx(2 * 2 / 3 * 4 * 26)
    assert ddp.refresh == 2 * 576
    assert ddp.reuse == 0
    assert local.refresh == local.reuse == pytest.approx(2 * ddp.wrapper)


def test_a_small_model_in_parts_by_hand(small):
    # Of 3 processes the first has 2 of 4 outputs, and 1 of 2.
    assert model.part_of(small.shapes.values(), 3) == 2 * 3 + 2 + 1 * 4 + 1
    # D has matrices for 4 outputs: 3 · 15 samples / 12 of them pay for sides of up to 3 entries, so for 2 outputs only.
    assert {name: form.rows_are_matrices for name, form in small.forms(3).items()} == {
        **dict.fromkeys(("0.weight", "0.bias", "2.bias"), False),
        "2.weight": True,
    }
    assert model.coupled_part(small, 3) == 4
    cut = model.sent(small, 3, "FSDP2, global", 15)
    assert cut.wrapper == 3 * 2 * 4 * 13
    assert cut.reuse == pytest.approx(2 * 2 / 3 * 4 * 2 * 16 + 2 * 4 * 4)
    assert cut.refresh == pytest.approx(2 * 576 + 2 * 2 / 3 * 4 * 2 * 15**2 + cut.reuse)


def test_fisher_rows_bound_what_is_kept_but_not_what_is_sent(small):
    whole, few = (model.kept(small, 4, "DDP, global", rows) for rows in (None, 3))
    assert (whole.rows, few.rows) == (20, 3)
    sent = [model.sent(small, 4, "DDP, global", plans.rows) for plans in (whole, few)]
    assert sent[0] == sent[1]
    all_of_it, part = (model.held(small, 4, "DDP, global", plans) for plans in (whole, few))
    assert part.curvature < all_of_it.curvature
    assert part.messages == all_of_it.messages == 6 * 576
    assert part.contributions == all_of_it.contributions == 4 * 576


def of_processes(sizes, count):
    """Return the contributions of several processes, made from their messages, on the meta device."""
    shapes, flat = packed(sizes.contributions.by_layer, META)
    return unpacked(shapes, flat.new_empty(count, len(flat)))


def test_a_shared_input_is_sent_once_and_copied_once():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

        def forward(self, x):
            return self.first(x) + self.second(x)

    sizes = Sizes(Network(Two, (16,), tokens=False), 2)
    assert sizes.message_bytes == (1 + 2) * 2 * 16 * 4
    copied = {id(x): x.nbytes for x in output_tensors(of_processes(sizes, 3))}
    assert sum(copied.values()) == 3 * sizes.message_bytes


def test_the_peak_of_a_refresh_has_either_messages_or_j(small):
    few, many = model.Held(7, 3, 10, 100), model.Held(7, 30, 10, 100)
    assert (few.peak, many.peak) == (117, 137)
    alone, local = (
        model.held(small, count, way, model.kept(small, count, way))
        for count, way in ((1, "DDP, global"), (4, "DDP, local"))
    )
    assert alone == local
    assert (alone.messages, alone.contributions) == (0, 576)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_parts_of_all_processes_become_one_micro_batch(name):
    # Only then do the calls of a refresh, and so the host's time after the exchange, not grow with R.
    parts = 3
    found = of_processes(sizes_of(name, 32), parts)
    assert found
    for params in found.values():
        for batches in params.values():
            assert [{call.samples for call in calls} for calls in batches] == [{32 * parts}]


class Calls(TorchDispatchMode):
    """Counts the calls of torch's operations."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", times.TIMED)
def test_the_calls_of_an_exchange_do_not_grow_with_the_processes(name):
    shapes, flat = packed(sizes_of(name, 32).contributions.by_layer, META)
    numbers = []
    for count in (2, 64):
        flat_RB = flat.new_empty(count, len(flat))
        with Calls() as calls:
            unpacked(shapes, flat_RB)
        numbers.append(calls.number)
    assert numbers[0] == numbers[1] > 0


def test_an_exchange_takes_the_host_time():
    assert 0 < measured.exchange_seconds("transformer", rounds=2) < 1e-2


def test_collectives_by_hand():
    assert model.gathered(10, 4) == 30
    assert model.reduced(10, 4) == 15
    large, tiny = 1e9, 4.0
    inside = 8.4e-6 + 14 * 3.4e-6 + 2 * 7 / 8 * large / 450e9
    assert hardware.reduce_seconds(large, 8) == pytest.approx(inside)
    tree = 4.4e-6 + 2 * (7 * 0.52e-6 + 9 * 5e-6) + 2 * tiny / (0.9 / 3.8 * 400e9)
    assert hardware.reduce_seconds(tiny, 4096) == pytest.approx(tree)
    ring = 8.4e-6 + (4095 - 511) * 3.4e-6 + 511 * 9.6e-6 + 4095 * large / 400e9
    assert hardware.gather_seconds(large, 4096) == pytest.approx(ring)
    assert hardware.reduce_seconds(large, 1) == hardware.gather_seconds(large, 1) == 0


@pytest.mark.parametrize("name", times.TIMED)
def test_j_of_the_model_is_what_a_gpu_kept(name):
    for samples in hardware.MEASURED_SAMPLES:
        assert times.plain(name, samples).j_bytes == hardware.measured_steps()[name, samples].kept


def sent_by_rank(rank, cases):
    return [measured.sent_in_steps(case) for case in cases]


@pytest.mark.skipif(not counting.COUNTS.exists(), reason="the system counts no bytes")
def test_two_processes_send_what_the_model_says():
    cases = [measured.Case("small 3C1F", 8, 2, way) for way in model.WAYS]
    for of_rank in several_processes.run(2, sent_by_rank, cases):
        for case, found in zip(cases, of_rank, strict=True):
            expected = model.sent(sizes_of(case.network, 8), 2, case.way, found["rows"][0], scatters=False)
            (wrapper, reuse), own = found["reuse"], found["refresh"][1]
            assert wrapper == pytest.approx(expected.wrapper, rel=WITHIN)
            assert own == pytest.approx(expected.refresh, rel=WITHIN)
            assert reuse == pytest.approx(expected.reuse, rel=WITHIN)


def test_nothing_is_missing_and_all_counted_bytes_are_those_of_the_model():
    counted = STORE.counted()
    assert STORE.missing() == []
    assert {one["way"] for one in counted} == set(model.WAYS)
    assert {one["count"] for one in counted} == {2, 4, 8}
    for one in counted:
        for found, expected in tables.pairs_of(one):
            assert found == pytest.approx(expected, rel=WITHIN)
    assert all(one["reuse"]["own"] == 0 for one in counted if one["way"] == "DDP, global")


def test_counted_bytes_do_not_depend_on_fisher_rows():
    few = next(one for one in STORE.counted() if one["fisher_rows"])
    alike = [one for one in STORE.counted() if all(one[k] == few[k] for k in ("network", "samples", "count", "way"))]
    assert len(alike) == 2
    assert {one["rows"] for one in alike} == {few["fisher_rows"], few["count"] * few["samples"]}
    assert alike[0]["refresh"]["own"] == pytest.approx(alike[1]["refresh"]["own"], rel=1e-3)


@pytest.fixture(scope="module")
def answers():
    return Answers(STORE.host)


def test_more_processes_send_more_and_take_longer(answers):
    for way in model.WAYS:
        for name in NETWORKS:
            sizes = sizes_of(name, 32)
            sent = [model.sent(sizes, count, way, 128) for count in (2, *COUNTS)]
            assert [one.refresh for one in sent] == sorted(one.refresh for one in sent)
            assert [one.wrapper for one in sent] == sorted(one.wrapper for one in sent)
    for name in times.TIMED:
        refreshes = [answers.times(name, 32, count, "DDP, global", FEW_ROWS).refresh for count in (1, *COUNTS)]
        assert refreshes == sorted(refreshes)


# What the page says in words.


@pytest.mark.parametrize("name", times.TIMED)
def test_one_process_is_above_the_limit_that_nobody_can_blame_on_others(answers, name):
    assert all(
        answers.over_sgd(name, samples, 1, "DDP, global", every) > 1 + ADDED
        for samples in SAMPLES
        for every in INTERVALS
    )


@pytest.mark.parametrize("name", times.TIMED)
def test_what_a_refresh_adds_grows_no_faster_than_the_processes_where_no_row_is_few_enough(answers, name):
    counts = (16, 32, 64, 128, 256, 512, 1024)
    refreshes = [answers.times(name, 32, count, "DDP, global", FEW_ROWS).refresh for count in counts]
    assert all(1 < many / few < 2 for few, many in pairwise(refreshes))


@pytest.mark.parametrize("name", times.TIMED)
def test_most_of_what_grows_with_the_processes_is_the_exchange_and_half_of_it_later(answers, name):
    found = [answers.times(name, 32, count, "DDP, global", FEW_ROWS) for count in (8, 64, 512)]
    first, later = ((many.exchange - few.exchange) / (many.refresh - few.refresh) for few, many in pairwise(found))
    assert first > 0.5
    assert later == pytest.approx(0.5, abs=0.1)


def test_the_advised_rows_are_within_the_limit_as_far_as_any_are(answers):
    assert tables.advice(answers) == FEW_ROWS
    for every in INTERVALS:
        lasts = [
            max(count for count in powers() if count == 1 or answers.most_rows(name, 32, count, every) >= FEW_ROWS)
            for name in times.TIMED
        ]
        assert (min(lasts), max(lasts)) == tables.last_with_rows(answers, every, 32)


@pytest.mark.parametrize("name", times.TIMED)
def test_weights_change_to_factors_when_there_are_more_rows(name):
    few, many = (plans_of(name, 32, count, "DDP, global") for count in (2, 64))
    assert times.products(few) / few.rows <= times.products(many) / many.rows
    assert few.j_bytes < model.MAX_BYTES
    assert many.why.startswith("max_bytes")


def test_the_model_is_near_the_steps_that_it_was_not_made_from():
    for name in times.TIMED:
        step, plans = hardware.measured_steps()[name, 128], times.plain(name, 128)
        assert times.step_seconds(name, 128, plans) == pytest.approx(step.sgd + step.reuse, rel=0.1)
        assert times.refresh_seconds(name, 128, plans) == pytest.approx(step.refresh, rel=0.35)


def test_the_page_is_that_of_the_kept_measurements(tmp_path):
    study.app(["--report-only", "--out", str(tmp_path)], result_action="return_value")
    assert (tmp_path / "scaling.md").read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {study.figures.FILE}
    assert f"figures/{study.figures.FILE}" in PAGE.read_text(encoding="utf-8")
    assert (ROOT / "docs" / "figures" / study.figures.FILE).exists()


def test_a_page_with_an_unknown_name_is_an_error():
    with pytest.raises(KeyError):
        page.markdown(STORE, "{{nothing}}")


def test_without_measurements_there_is_no_page(tmp_path):
    with pytest.raises(FileNotFoundError, match="no seconds of the host"):
        study.app(["--report-only", "--results", str(tmp_path), "--out", str(tmp_path)], result_action="return_value")
