"""What figures have in common: the colour and the marker of each optimizer, and logarithmic axes."""

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from tengrad_triton.recipes.optimizers.registry import place
from tengrad_triton.recipes.optimizers.settings import OptimizerName

# Okabe and Ito's colours, which can be told apart with any colour vision, and six more; the markers help in print.
COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000"),
    *("#56B4E9", "#7F3C8D", "#004060", "#7F7F7F", "#8C564B", "#B8860B"),
)
MARKERS = "os^DvxP*h><Xd"  # one more than colours, so that no two pairs are equal when colours come again
STYLES = tuple(zip(COLORS, MARKERS, strict=False))
"""Pairs for what is no optimizer, or several settings of one."""


def style_at(place: int) -> tuple[str, str]:
    """Return a colour and a marker by a place, where there may be more places than colours."""
    return COLORS[place % len(COLORS)], MARKERS[place % len(MARKERS)]


def style_of(name: OptimizerName) -> tuple[str, str]:
    """Return the colour and the marker of an optimizer, by its place among all."""
    return style_at(place(name))


def log_axis(panel: Axes) -> None:
    """Make the vertical axis logarithmic, with plain numbers; with few decades, also numbers between them."""
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    if high < 10 * low:
        panel.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))
        panel.yaxis.set_minor_locator(NullLocator())
    elif high < 200 * low:
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())
