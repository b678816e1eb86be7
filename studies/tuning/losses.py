"""Which settings fit which loss: a row for each loss, and what `TENGraD` says of it in a step of a small model.

Key: N samples, C classes or outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tengrad_triton import TENGraD
from tengrad_triton.likelihoods import Bernoulli, Categorical, Gaussian
from tengrad_triton.recipes.reports.markdown import table

N, C = 24, 5
_RANDOM = torch.Generator().manual_seed(0)
X = torch.randn(N, 6, generator=_RANDOM)
LABELS, VALUES = torch.arange(N) % C, torch.randn(N, C, generator=_RANDOM)
SOFT, BITS = torch.rand(N, C, generator=_RANDOM).mul(4).softmax(1), (torch.rand(N, C, generator=_RANDOM) > 0.5).float()
TOKENS = torch.where(torch.arange(4 * N).view(N, 4) % 7 == 0, -100, torch.arange(4 * N).view(N, 4) % C)
WEIGHT = torch.tensor([0.2, 0.5, 1.0, 1.5, 3.0])
LOGITS = "let the model return logits: `cross_entropy`"
CLASS_WEIGHTS = "`likelihood=Categorical(weight=w)`; set its `target = y` before each forward"
TOKEN_LABELS = "`likelihood=Categorical(dim=1)`; with padding (`ignore_index`) set its `target = y`"
RESIDUAL = '`likelihood="gaussian"`; the model returns the residual, and the loss is its `square().mean()`'


def _with(likelihood: Any, target: Tensor) -> Any:
    likelihood.target = target
    return likelihood


def _one_output() -> nn.Module:
    return nn.Linear(C, 1)


def _no_dimension() -> nn.Module:
    return nn.Sequential(nn.Linear(C, 1), nn.Flatten(0))


def _focal(logits: Tensor) -> Tensor:
    own = F.cross_entropy(logits, LABELS, reduction="none")
    return ((1 - (-own).exp()) ** 2 * own).mean()


def _contrastive(embeddings: Tensor) -> Tensor:
    left, right = F.normalize(embeddings, dim=1).chunk(2)
    return F.cross_entropy(left @ right.mT / 0.2, torch.arange(N // 2))


@dataclass(frozen=True)
class Loss:
    """A loss, and what to do with it.

    Attributes:
        title: the loss, for the page.
        advice: what to pass to `TENGraD`, or what to change.
        loss: from the model's output to the loss.
        settings: returns what the advice passes to `TENGraD`; None if the advice is to change the loss.
        last: the end of the model.
    """

    title: str
    advice: str
    loss: Callable[[Tensor], Tensor]
    settings: Callable[[], Mapping[str, Any]] | None
    last: Callable[[], nn.Module] = field(default=nn.Identity)

    def default(self) -> str:
        """Return in a word what `TENGraD(model)` does with the loss in its first step."""
        return {"": "fits", "e": "refuses", "t": "warns"}[self.said({})[:1]]

    def said(self, settings: Mapping[str, Any]) -> str:
        """Return what `TENGraD` says of the loss in its first step: a warning, an error, or nothing."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, C), self.last())
            optimizer = TENGraD(model, seed=0, **settings)
            try:
                self.loss(model(X)).backward()
                optimizer.step()
            except (TypeError, ValueError) as error:
                return f"error: {error}"
        return "; ".join(str(one.message) for one in caught if "likelihood" in str(one.message))


class Repeat(nn.Module):
    """Makes logits [N, C, T] of logits [N, C]."""

    def forward(self, x_NC: Tensor) -> Tensor:
        """Return the logits of four tokens."""
        return x_NC[:, :, None] * torch.arange(1, 5)


LOSSES = (
    Loss("`cross_entropy(logits, y)`, also with `label_smoothing`, soft or mixed labels", "nothing",
         lambda o: F.cross_entropy(o, LABELS, label_smoothing=0.1), dict),
    Loss("… with class weights, `weight=w`", CLASS_WEIGHTS,
         lambda o: F.cross_entropy(o, LABELS, weight=WEIGHT),
         lambda: {"likelihood": _with(Categorical(weight=WEIGHT), LABELS)}),
    Loss("… a label for each token, logits [N, C, T]", TOKEN_LABELS,
         lambda o: F.cross_entropy(o, TOKENS), lambda: {"likelihood": _with(Categorical(dim=1), TOKENS)}, Repeat),
    Loss("`nll_loss(log_probabilities, y)`", LOGITS,
         lambda o: F.nll_loss(o, LABELS), None, lambda: nn.LogSoftmax(1)),
    Loss("`kl_div(logits.log_softmax(1), teacher, reduction=\"batchmean\")`", "nothing",
         lambda o: F.kl_div(o.log_softmax(1), SOFT, reduction="batchmean"), dict),
    Loss("… with a temperature", "`fisher=\"empirical\"`",
         lambda o: 4 * F.kl_div((o / 2).log_softmax(1), SOFT, reduction="batchmean"), lambda: {"fisher": "empirical"}),
    Loss("focal loss", "`fisher=\"empirical\"`", _focal, lambda: {"fisher": "empirical"}),
    Loss("`binary_cross_entropy_with_logits(logits, y)`", "`likelihood=\"bernoulli\"`",
         lambda o: F.binary_cross_entropy_with_logits(o, BITS), lambda: {"likelihood": "bernoulli"}),
    Loss("… of one logit, [N, 1]", "`likelihood=\"bernoulli\"`",
         lambda o: F.binary_cross_entropy_with_logits(o, BITS[:, :1]),
         lambda: {"likelihood": "bernoulli"}, _one_output),
    Loss("… with `pos_weight=w`", "`likelihood=Bernoulli(pos_weight=w)`; set its `target = y` before each forward",
         lambda o: F.binary_cross_entropy_with_logits(o, BITS, pos_weight=torch.tensor(3.0)),
         lambda: {"likelihood": _with(Bernoulli(pos_weight=3.0), BITS)}),
    Loss("`binary_cross_entropy(probabilities, y)`", "let the model return logits: `binary_cross_entropy_with_logits`",
         lambda o: F.binary_cross_entropy(o, BITS), None, nn.Sigmoid),
    Loss("`mse_loss(output, y)`, output [N, C]", "`likelihood=\"gaussian\"`",
         lambda o: F.mse_loss(o, VALUES), lambda: {"likelihood": _with(Gaussian(), VALUES)}),
    Loss("… output [N, 1]", "`likelihood=\"gaussian\"`", lambda o: F.mse_loss(o, VALUES[:, :1]),
         lambda: {"likelihood": _with(Gaussian(), VALUES[:, :1])}, _one_output),
    Loss("… output [N]", "`likelihood=\"gaussian\"`", lambda o: F.mse_loss(o, VALUES[:, 0]),
         lambda: {"likelihood": _with(Gaussian(), VALUES[:, 0])}, _no_dimension),
    Loss("the residual of a differential equation, [N, 1]", RESIDUAL,
         lambda o: o.square().mean(), lambda: {"likelihood": "gaussian"}, _one_output),
    Loss("… [N]", "the same", lambda o: o.square().mean(), lambda: {"likelihood": "gaussian"}, _no_dimension),
    Loss("… of C equations, [N, C]", "the same", lambda o: o.square().mean(), lambda: {"likelihood": "gaussian"}),
    Loss("`huber_loss`, `smooth_l1_loss`, `l1_loss`", "`fisher=\"empirical\"`",
         lambda o: F.huber_loss(o, VALUES), lambda: {"fisher": "empirical"}),
    Loss("contrastive (InfoNCE, triplet), of embeddings", "`fisher=\"empirical\"`",
         _contrastive, lambda: {"fisher": "empirical"}),
    Loss("any of these as a sum over the samples", "the mean: `reduction=\"mean\"`",
         lambda o: F.cross_entropy(o, LABELS, reduction="sum"), None),
)  # fmt: skip


def losses() -> str:
    """Return the table of losses, with what the default likelihood says of each."""
    lines = [(one.title, one.advice, one.default()) for one in LOSSES]
    return table(("loss", "pass to `TENGraD`", "what the default does"), lines).replace("---:", "---")
