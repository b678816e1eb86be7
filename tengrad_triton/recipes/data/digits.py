"""The digits that ship with scikit-learn."""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from tengrad_triton.recipes.data.images import Part, Split


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels; the last 360 are the test set.

    The digits keep their order, in which those of one writer are neighbours. A shuffled split would test on digits of
    writers that the model was trained on, which is easier.
    """

    classes: int = 10
    shape: tuple[int, int, int] = (1, 8, 8)
    train_size: int = 1437

    def split(self, part: Part, folder: Path | None, limit: int | None, console: Console) -> Split:
        """Return the first ``limit`` digits of a part; there is no folder of them."""
        assert folder is None
        # Imported here because scikit-learn takes a second to import, and only the digits need it.
        from sklearn.datasets import load_digits  # noqa: PLC0415

        pixels, labels = load_digits(return_X_y=True)
        samples = slice(self.train_size) if part == "train" else slice(self.train_size, None)
        images_NCHW = torch.from_numpy(pixels[samples]).to(torch.uint8).view(-1, *self.shape)
        return Split(images_NCHW[:limit], torch.from_numpy(labels[samples])[:limit])
