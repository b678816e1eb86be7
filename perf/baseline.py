"""The paper's formulation as the paper writes it, as the baseline of the optimizer's time.

It loops over layers and unfolds their inputs. The Gram matrix comes from all pairs of positions of all pairs of samples
(equations 9 to 11), which are N² P² numbers. The inverse is explicit. Every step computes the products with J anew from
unfolded inputs.

Key: N samples, P positions, I inputs (the last one is the bias's 1), O outputs of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tengrad_triton.capture.blocks import CapturedLayer
from tengrad_triton.capture.hooks import Capture
from tengrad_triton.capture.options import CaptureOptions
from tengrad_triton.likelihoods import likelihood_of


@dataclass(frozen=True)
class Captured:
    """What a refresh keeps for a layer: its input, the gradient with respect to its output, and (K + NαI)⁻¹."""

    x: Tensor
    g_NPO: Tensor
    inverse_NN: Tensor


class PaperNGD:
    """TENGraD with the paper's own operations: sampled labels, and one block for each layer with its bias.

    The capture and the sampled labels are those of `TENGraD`, so that the steps of both agree to rounding. All layers
    with parameters must be `Linear` or plain `Conv2d` layers with a bias.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        damping: float,
        momentum: float,
        weight_decay: float,
        refresh_every: int,
        seed: int,
    ) -> None:
        self._layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
        self._lr, self._damping, self._momentum, self._weight_decay = lr, damping, momentum, weight_decay
        self._momenta = {p: torch.zeros_like(p) for layer in self._layers.values() for p in layer.parameters()}
        self._refresh_every, self._steps = refresh_every, 0
        self._captured: dict[str, Captured] = {}
        generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
        layers = {
            name: CapturedLayer(layer, dict(layer.named_parameters()), has_rule=False, takes_half_precision=False)
            for name, layer in self._layers.items()
        }
        options = CaptureOptions("sampled", likelihood_of("categorical"), verify="never")
        self._capture = Capture(model, layers, options, generator)
        self._capture.arm()

    def zero_grad(self) -> None:
        self._capture.forget()
        for parameter in self._momenta:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        if self._steps % self._refresh_every == 0:
            (record,) = self._capture.records
            calls = {name: calls[0] for name, calls in record.calls.items()}
            self._captured = {
                name: self._refresh(self._layers[name], call.inputs(name), call.scaled_grads(1))
                for name, call in calls.items()
            }
        for name, captured in self._captured.items():
            self._update(self._layers[name], captured)
        self._steps += 1
        self._capture.disarm()
        if self._steps % self._refresh_every == 0:
            self._capture.arm()

    def close(self) -> None:
        self._capture.disarm()

    def _refresh(self, layer: nn.Module, x: Tensor, grad_y: Tensor) -> Captured:
        g_NPO = grad_y.flatten(2).mT if grad_y.dim() == 4 else grad_y[:, None]
        n, positions, _ = g_NPO.shape
        a_RI, g_RO = unfolded(layer, x).flatten(0, 1), g_NPO.flatten(0, 1)  # R: positions of all samples
        pairs_RR = (a_RI @ a_RI.mT).mul_(g_RO @ g_RO.mT)
        k_NN = pairs_RR.view(n, positions, n, positions).sum((1, 3))
        eye_NN = torch.eye(n, dtype=x.dtype, device=x.device)
        return Captured(x, g_NPO, torch.linalg.inv(k_NN + n * self._damping * eye_NN))

    def _update(self, layer: nn.Module, captured: Captured) -> None:
        a_NPI, g_NPO = unfolded(layer, captured.x), captured.g_NPO
        v_OI = torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], 1)
        y_N = torch.einsum("npi,oi,npo->n", a_NPI, v_OI, g_NPO)
        w_N = captured.inverse_NN @ y_N
        u_OI = torch.einsum("n,npo,npi->oi", w_N, g_NPO, a_NPI)
        d_OI = (v_OI - u_OI) / self._damping
        for parameter, d in ((layer.weight, d_OI[:, :-1]), (layer.bias, d_OI[:, -1])):
            direction = d.reshape(parameter.shape) + self._weight_decay * parameter
            self._momenta[parameter].mul_(self._momentum).add_(direction)
            parameter.sub_(self._momenta[parameter], alpha=self._lr)


def unfolded(layer: nn.Module, x: Tensor) -> Tensor:
    """Return a_NPI: the inputs of each position, with a column of ones for the bias."""
    if isinstance(layer, nn.Conv2d):
        a_NPI = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
    else:
        a_NPI = x[:, None]
    return torch.cat([a_NPI, a_NPI.new_ones(*a_NPI.shape[:2], 1)], 2)
