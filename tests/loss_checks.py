"""Whether a likelihood takes a loss for its own."""

import torch

from tengrad_triton.likelihoods import why_loss_differs


def why(likelihood, loss, output):
    output = output.detach().requires_grad_()
    (grad_output,) = torch.autograd.grad(loss(output), output)
    return why_loss_differs(likelihood, output, grad_output * len(output))


def said(likelihood, **attributes):
    for name, value in attributes.items():
        setattr(likelihood, name, value)
    return likelihood
