"""The page of the study, docs/scaling.md: `page.md`, in which each ``{{…}}`` stands for what the model says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from studies.processes import tables
from studies.processes.answers import ADDED, COUNTS, FEW_ROWS, INTERVALS, SAMPLES, Answers, last_that_fits, plans_of
from studies.processes.figures import answers_of
from studies.processes.hardware import MEMORY, NETWORK, NVLINK, RING, limits, measured_steps
from studies.processes.sizes import sizes_of
from studies.processes.store import HOST, Store
from studies.processes.times import TIMED, moving_rate, product_rate, refresh_rate

TEMPLATE = Path(__file__).with_name("page.md")
GENERATED = (
    "<!-- Written by `python -m studies.processes` from studies/processes/page.md: changes by hand are lost. -->"
)
SHORT, LONG = INTERVALS
FEW = SAMPLES[0]


def markdown(store: Store, template: str) -> str:
    """Return the page; raises `KeyError` for a name that nothing writes."""
    answers = answers_of(store)
    writers = {**_of_tables(store, answers), **_of_sizes(), **_of_answers(answers), **_of_rates(store)}

    def written(match: re.Match[str]) -> str:
        name, _, words = match[1].partition(" ")
        return writers[name](words)

    text = re.sub(r"{{(.+?)}}", written, template)
    return f"{GENERATED}\n\n{re.sub(r' +$', '', text, flags=re.MULTILINE)}"


Writers = dict[str, Callable[[str], str]]
"""What stands for each name, by the words behind it."""


def _of_tables(store: Store, answers: Answers) -> Writers:
    counted = tables.counted_ratios(store.counted())
    return {
        "sent": lambda _: tables.sent_table(FEW),
        "held": lambda _: tables.held_table(FEW),
        "times": lambda _: tables.times_table(answers, FEW),
        "refresh": lambda _: tables.refresh_table(answers, FEW),
        "rows": lambda _: tables.rows_table(answers),
        "counted": lambda _: tables.counted_table(store.counted()),
        "alone": lambda _: tables.alone_table(),
        "largest": lambda _: f"{max(abs(ratio - 1) for ratio in counted):.1%}",
        "cases": lambda _: str(len(store.counted())),
        "most": lambda _: str(max(one["count"] for one in store.counted())),
        "uncounted": lambda _: tables.uncounted(store.counted()),
    }


def _of_sizes() -> Writers:
    def fits(words: str) -> str:
        name, _, samples = words.rpartition(" ")
        return str(last_that_fits(name, int(samples), "DDP, global"))

    return {
        "per_sample": lambda name: f"{sizes_of(name, FEW).message_bytes / FEW / 1e6:.3g}",
        "kept_rows": lambda name: str(plans_of(name, FEW, COUNTS[-1], "DDP, global").rows),
        "fits": fits,
        "memory": lambda _: f"{MEMORY / 1e9:g}",
        "sgd": lambda name: f"{1e3 * measured_steps()[name, FEW].sgd:.1f}",
    }


def _of_answers(answers: Answers) -> Writers:
    def all_rows(words: str) -> str:
        """Return the range over models and N_r of the most samples for which all rows are within the limit."""
        found = [
            samples * answers.last(name, samples, "DDP, global", int(words)) for name in TIMED for samples in SAMPLES
        ]
        return between(min(found), max(found))

    def last_sharded(words: str) -> str:
        every, samples = map(int, words.split())
        found = [answers.last(name, samples, "FSDP2, global", every) for name in TIMED]
        return between(min(found), max(found))

    def last_rows(words: str) -> str:
        return between(*tables.last_with_rows(answers, *map(int, words.split())))

    def beyond(words: str) -> str:
        return between(*(2 * last for last in tables.last_with_rows(answers, *map(int, words.split()))))

    return {
        "all_rows_n": all_rows,
        "last_rows": last_rows,
        "last_sharded": last_sharded,
        "beyond": beyond,
        "advice": lambda _: str(tables.advice(answers)),
        "few_rows": lambda _: str(FEW_ROWS),
        "added": lambda _: f"{ADDED:g}",
        "t_short": lambda _: str(SHORT),
        "t_long": lambda _: str(LONG),
    }


def between(low: int, high: int) -> str:
    """Return a range in words, or the number if it is one."""
    return str(low) if low == high else f"{low} to {high}"


def _of_rates(store: Store) -> Writers:
    host, bytes_a_second = store.host, limits().bytes_per_second
    assert host is not None
    machine = store.machine_of(HOST)
    return {
        "product": lambda _: f"{product_rate() / 1e12:.1f}",
        "refresh_rates": lambda _: ", ".join(f"{refresh_rate(name) / 1e12:.1f}" for name in TIMED),
        "timed": lambda _: ", ".join(TIMED),
        "copy": lambda _: f"{bytes_a_second / 1e12:.2f}",
        "matmul": lambda _: f"{limits().flops_per_second / 1e12:.1f}",
        "nvlink": lambda _: f"{NVLINK / 1e9:g}",
        "network": lambda _: f"{NETWORK / 1e9:g}",
        "ring": lambda _: f"{1e6 * RING.base:g}",
        "hops": lambda _: f"{1e6 * RING.inside:g} or {1e6 * RING.between:g}",
        "host_us": lambda name: f"{1e6 * host.exchange[name]:.0f}",
        "flops_per_byte": lambda _: f"{product_rate() / bytes_a_second:.1f}",
        "assumed": lambda _: f"{moving_rate() / bytes_a_second:g}",
        "machine": lambda _: f"{machine['device']} with torch {machine['torch']}",
    }
