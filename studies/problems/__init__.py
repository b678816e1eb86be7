"""The problems of the study, each with a size that trains for about ten seconds on one core.

A new problem is a file here, with its model, its task and a `Problem`, and a line in `PROBLEMS`. Half of the problems
choose TENGraD's defaults, the others judge them: the role stands in each `Problem`.
"""

from studies.problems import (
    autoencoder,
    finetuning,
    graphs,
    images,
    photograph,
    poisson,
    recurrent,
    segmentation,
    text,
)
from studies.problems.base import Problem

PROBLEMS: dict[str, Problem] = {
    "mlp": images.MLP,
    "3c1f": images.CONV_3C1F,
    "resnet": images.RESNET,
    "vit": images.VIT,
    "pinn": poisson.PROBLEM,
    "autoencoder": autoencoder.PROBLEM,
    "photograph": photograph.PROBLEM,
    "recurrent": recurrent.PROBLEM,
    "gpt": text.PROBLEM,
    "finetuning": finetuning.PROBLEM,
    "unet": segmentation.PROBLEM,
    "graph": graphs.PROBLEM,
}
