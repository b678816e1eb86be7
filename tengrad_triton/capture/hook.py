"""How our hooks and backward passes leave the user's work as it is."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_noted = WeakIdKeyDictionary()  # the tensors whose gradients are retained, as keys
_users: weakref.WeakSet[Any] = weakref.WeakSet()  # those who want calls of `retain_grad` to be noted

_WHY_NOT_COMPILED = (
    "while a refresh of the curvature is due, the optimizer's hooks run between the layers: with fullgraph=True make "
    "the optimizer with the compiled model, TENGraD(torch.compile(model, fullgraph=True))"
)


class Hook:
    """A hook that keeps only a weak reference to its object, and does nothing on copies and pickles of the model."""

    def __init__(self, method: Callable[..., Any], *bound: Any) -> None:
        self._method = weakref.WeakMethod(method)
        self._bound = bound

    @torch.compiler.disable(reason=_WHY_NOT_COMPILED)  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any) -> Any:
        """Call the method, if its object still exists."""
        method = self._method()
        return None if method is None else method(*self._bound, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        # The exit of a null context takes any arguments and returns None; it unpickles without this package.
        return getattr, (contextlib.nullcontext(), "__exit__")


def is_transformed() -> bool:
    """Whether `torch.func`, forward-mode differentiation, a trace or an export runs the present forward."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    )


def check_not_checkpointed() -> None:
    """Raise if a checkpoint that runs the present forward again will compare the tensors that are saved.

    Raises:
        ValueError: the forward is within `torch.utils.checkpoint.checkpoint` with ``use_reentrant=False``.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None and hooks[0].__qualname__.startswith("_checkpoint_hook"):
        raise ValueError(
            "the whole model is called within checkpoint(..., use_reentrant=False), which would repeat what a refresh "
            "of the curvature adds to the forward: checkpoint parts of the model instead, in its forward"
        )


def note_retained(user: object) -> None:
    """Note calls of ``retain_grad`` from now on, until `forget_retained` is called for every user.

    After such a call, every backward pass adds to the tensor's ``.grad``, and autograd offers no way to find such
    tensors in a graph.
    """
    if "retain_grad" not in vars(torch.Tensor):
        plain = torch.Tensor.retain_grad

        def retain_grad(self: Tensor) -> None:
            plain(self)
            _noted[self] = True

        torch.Tensor.retain_grad = retain_grad  # type: ignore[method-assign, assignment]
    _users.add(user)


def forget_retained(user: object) -> None:
    """Note no calls for this user any more."""
    _users.discard(user)
    if not _users and "retain_grad" in vars(torch.Tensor):
        del torch.Tensor.retain_grad
        _noted.clear()


@contextmanager
def protect_retained() -> Iterator[None]:
    """Give every noted tensor, when the context ends, the ``.grad`` that it had before."""
    before = [(tensor, tensor.grad) for tensor in list(_noted.keys())]
    try:
        yield
    finally:
        for tensor, grad in before:
            tensor.grad = grad


@contextmanager
def donated_buffers_explained() -> Iterator[None]:
    """Say what to do about a compiled graph that gives its buffers away in its first backward pass."""
    try:
        yield
    except RuntimeError as error:
        if "donated buffers" not in str(error):
            raise
        raise RuntimeError(
            "the graph of the compiled model gives its buffers away in its first backward pass, but a refresh goes "
            "through it twice: set torch._functorch.config.donated_buffer = False before the first call of the "
            "compiled model, or use compile_train_step"
        ) from error
