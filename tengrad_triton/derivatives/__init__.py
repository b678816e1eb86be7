"""Derivatives of a network with respect to its inputs, carried forward through its layers.

`jet` is what is carried, `activations` and `rules` say how a module carries it, `general` how everything else does by
`torch.func`, and `registry` takes rules of a user's own modules.
"""

from tengrad_triton.derivatives.functions import Derivatives, FirstDerivatives, derivatives, laplacian
from tengrad_triton.derivatives.jet import Jet
from tengrad_triton.derivatives.registry import register, register_activation
from tengrad_triton.derivatives.rules import through

__all__ = [
    "Derivatives",
    "FirstDerivatives",
    "Jet",
    "derivatives",
    "laplacian",
    "register",
    "register_activation",
    "through",
]
