"""Whether losses change as their gradients say: what to ask when no step lowers them.

Dimensions: K entries of the trained parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tengrad_triton.least_squares.evaluations import Evaluations
from tengrad_triton.residuals.suspicions import warn_caller
from tengrad_triton.residuals.terms import Points, Terms

_STEP = 1e-4  # of the difference quotient, along a direction of length 1
_LEAST = 0.01  # a slope that is off by less, relative to the quotient, is not named
_KINKS = 10  # nor is one that is off by less than so many times what the quotients of both sides differ
_ROUNDING = 1e4  # multiples of the quotient's rounding error that are not named either


def warn_of_missing_slopes(
    terms: Terms, evaluations: Evaluations, points: Points, parameters: Sequence[Tensor]
) -> None:
    """Warn of the terms whose losses change, along a random direction, otherwise than autograd says.

    A residual with a part that has no graph has rows, and autograd confirms them, but they are no derivatives. In
    float32 rounding hides the difference, and nothing is done. Parameters and random numbers are changed; the caller
    sets them back.

    Args:
        terms: of the loss.
        evaluations: of the step that was not taken.
        points: of the step.
        parameters: the trained ones.
    """
    if evaluations.start_K.dtype != torch.float64:
        return
    direction_K = torch.nn.functional.normalize(torch.randn_like(evaluations.start_K), dim=0)
    slopes, losses = _slopes(terms, evaluations, points, parameters, direction_K)
    ahead, behind = (_losses_at(terms, evaluations, points, sign * _STEP * direction_K) for sign in (1, -1))
    quotient = (ahead - behind) / (2 * _STEP)
    kink = (ahead + behind - 2 * losses).abs() / _STEP  # the quotients of both sides differ where no slope is defined
    rounding = _ROUNDING * torch.finfo(torch.float64).eps * losses / _STEP
    bound = _KINKS * kink + _LEAST * quotient.abs() + rounding
    wrong = [term.name for term, off in zip(terms.terms, (slopes - quotient).abs() > bound, strict=True) if off]
    if wrong:
        warn_caller(
            "no damping lowers the loss, and it changes otherwise than its gradient says, by the residual "
            f"{', '.join(map(repr, wrong))}: a part of it has no graph, as after detach(), torch.no_grad(), or "
            "torch.autograd.grad without create_graph=True"
        )


def _slopes(
    terms: Terms, evaluations: Evaluations, points: Points, parameters: Sequence[Tensor], direction_K: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the slope of each term's loss along a direction by autograd, and the losses."""
    evaluations.undo()
    with torch.enable_grad():
        losses = [terms.value(term, points[term.name], with_graph=True).square().sum() for term in terms.terms]
    parts = [
        part.view_as(p) for part, p in zip(direction_K.split([p.numel() for p in parameters]), parameters, strict=True)
    ]
    slopes = []
    for loss in losses:
        grads = torch.autograd.grad(loss, list(parameters), allow_unused=True)
        slopes.append(sum(float((g * part).sum()) for g, part in zip(grads, parts, strict=True) if g is not None))
    return direction_K.new_tensor(slopes), torch.stack(losses).detach()


def _losses_at(terms: Terms, evaluations: Evaluations, points: Points, step_K: Tensor) -> Tensor:
    """Return each term's loss after a step."""
    parts = terms.split(evaluations.at(evaluations.start_K + step_K), points)
    return torch.stack([part.square().sum() for part in parts])
