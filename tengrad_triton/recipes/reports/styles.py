"""The colour and the marker of each optimizer, the same in every figure."""

from tengrad_triton.recipes.optimizers.registry import place
from tengrad_triton.recipes.optimizers.settings import OptimizerName

# Okabe and Ito's colours, which can be told apart with any colour vision, and six more; the markers help in print.
COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000"),
    *("#56B4E9", "#7F3C8D", "#004060", "#7F7F7F", "#8C564B", "#B8860B"),
)
MARKERS = "os^DvxP*h><Xd"  # one more than colours, so that no two pairs are equal when colours come again


def style_of(name: OptimizerName) -> tuple[str, str]:
    """Return the colour and the marker of an optimizer, by its place among all."""
    return COLORS[place(name) % len(COLORS)], MARKERS[place(name) % len(MARKERS)]
