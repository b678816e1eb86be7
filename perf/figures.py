"""The figures of docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from perf.gpu.outcomes import by_optimizer
from perf.loops import within
from perf.results import Device

# Okabe and Ito's colours can be told apart with any colour vision.
STYLES = {"sgd": ("#D55E00", "s"), "refresh": ("#0072B2", "o"), "reuse": ("#009E73", "^")}
LABELS = {
    "sgd": "SGD, whole step",
    "refresh": "TENGraD, the optimizer's part of a refresh step",
    "reuse": "TENGraD, the optimizer's part of a reuse step",
}
RACERS = ("#D55E00", "#0072B2", "#56B4E9", "#E69F00", "#CC79A7")
AXES = {"samples": "batch size", "width": "channels", "depth": "convolutions"}


def draw(device: Device, folder: Path) -> Iterator[tuple[str, str]]:
    """Write the figures of a device; yield the file name and the caption of each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure, caption in (
        ("steps", _steps(device), "Steps of TENGraD in units of SGD's"),
        ("scaling", _scaling(device), "Cost by batch, width and depth, with fitted exponents"),
        ("kernels", _kernels(device), "Kernels: share of the machine's limit"),
        ("race", _race(device), "Test accuracy of 3C1F on Fashion-MNIST by training time, a line for each seed"),
    ):
        if figure is not None:
            file = f"performance-{device.folder}-{name}.png"
            figure.savefig(folder / file, metadata={"Software": None})
            yield file, caption


def _scaling(device: Device) -> Figure | None:
    cases = device.cases("scaling")
    if not cases:
        return None
    figure = Figure(figsize=(3.7 * len(cases), 4), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(cases), squeeze=False, sharey=True)[0]
    for panel, case in zip(panels, cases, strict=True):
        for curve, seconds in case["curves"].items():
            color, marker = STYLES[curve]
            label = f"exponent {case['exponents'][curve]:.2f}"
            panel.plot(case["values"], [1e3 * s for s in seconds], color=color, marker=marker, label=label)
        panel.set(xscale="log", yscale="log", xlabel=AXES[case["quantity"]])
        panel.xaxis.set_major_locator(FixedLocator(case["values"]))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xticklabels([str(value) for value in case["values"]])
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    panels[0].set_ylabel("ms")
    lines = panels[0].get_lines()
    figure.legend(lines, [LABELS[c] for c in cases[0]["curves"]], loc="outside upper center", ncols=3, fontsize="small")
    return figure


def _steps(device: Device) -> Figure | None:
    cases = device.cases("steps")
    if not cases:
        return None
    labels = [f"{case['model']}, {case['samples']}, {case['mode']}{within(case['max_bytes'])}" for case in cases]
    figure = Figure(figsize=(8, 1.5 + 0.35 * len(cases)), dpi=110, layout="constrained")
    panel = figure.subplots()
    for name, offset in (("refresh", -0.2), ("reuse", 0.2)):
        sgd = [case["seconds"]["sgd"]["median"] for case in cases]
        spreads = [case["seconds"][name] for case in cases]
        ratios = [spread["median"] / s for spread, s in zip(spreads, sgd, strict=True)]
        errors = [[(x["median"] - x["q1"]) / s for x, s in zip(spreads, sgd, strict=True)]]
        errors += [[(x["q3"] - x["median"]) / s for x, s in zip(spreads, sgd, strict=True)]]
        places = [index + offset for index in range(len(cases))]
        panel.barh(places, ratios, 0.4, xerr=errors, color=STYLES[name][0], label=name)
    panel.axvline(1, color="black", linewidth=1)
    panel.set_yticks(range(len(cases)), labels)
    panel.invert_yaxis()
    panel.set_xlabel("time of a step over SGD's (quartiles as whiskers)")
    figure.legend(loc="outside upper center", ncols=2)  # within the panel it would cover bars or whiskers
    return figure


def _kernels(device: Device) -> Figure | None:
    kernels = device.kernels()
    if not kernels:
        return None
    figure = Figure(figsize=(8, 1.2 + 0.25 * len(kernels)), dpi=110, layout="constrained")
    panel = figure.subplots()
    panel.barh([f"{k.name}: {k.size}" for k in kernels], [100 * k.share for k in kernels], color=STYLES["refresh"][0])
    panel.axvline(100, color="black", linewidth=1)
    panel.margins(y=0.01)
    panel.invert_yaxis()
    panel.set_xlabel("time at the machine's measured rates over the time taken (%)")
    return figure


def _race(device: Device) -> Figure | None:
    runs = by_optimizer(device)
    if not runs:
        return None
    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    panel = figure.subplots()
    for color, (optimizer, cases) in zip(RACERS, runs.items(), strict=False):
        for case in cases:
            points = [(point["seconds"], point["accuracy"]) for point in case["curve"]]
            label = optimizer if case is cases[0] else None
            panel.plot(*zip(*points, strict=True), color=color, label=label, marker=".")
    panel.set(xlabel="seconds of training", ylabel="test accuracy (%)")
    panel.grid(alpha=0.3)
    panel.legend()
    return figure
