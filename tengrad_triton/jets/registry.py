"""Rules of a user's own modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from tengrad_triton.jets.activations import ACTIVATIONS, ActivationRule
from tengrad_triton.jets.rules import RULES, Rule

A = TypeVar("A", bound=ActivationRule)
R = TypeVar("R", bound=Rule)


def register_activation(kind: type[nn.Module]) -> Callable[[A], A]:
    """Give an elementwise module its f, f' and f'', so that it need not be differentiated.

    ```python
    class Sine(nn.Module):
        def forward(self, z):
            return z.sin()


    @register_activation(Sine)
    def _(layer, z):
        sin = z.sin()
        return sin, z.cos(), -sin
    ```

    The function gets the module and its input, of any shape, and returns three tensors of that shape; None in place of
    f'' where that is zero. The rule is for this very type, not for its subclasses.

    Args:
        kind: the module's type.

    Returns:
        A decorator, which returns the function as it came.
    """
    return _entering(ACTIVATIONS, kind)


def register(kind: type[nn.Module]) -> Callable[[R], R]:
    """Give any other module a rule that carries a `Jet` through it.

    ```python
    class Residual(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return x + self.inner(x)


    @register(Residual)
    def _(layer, jet):
        return Jet(*(before + after for before, after in zip(jet, through(layer.inner, jet))))
    ```

    The function gets the module and the jet of its input, and returns that of its output. `through` carries a jet
    through another module. The rule is for this very type, not for its subclasses.

    Args:
        kind: the module's type.

    Returns:
        A decorator, which returns the function as it came.
    """
    return _entering(RULES, kind)


def _entering(table: dict[type[nn.Module], Any], kind: type[nn.Module]) -> Callable[[Any], Any]:
    """Return a decorator that enters a rule into a table, and returns it as it came."""

    def enter(rule: Any) -> Any:
        table[kind] = rule
        return rule

    return enter
