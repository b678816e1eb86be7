"""Functions of residuals that `torch.compile` compiles: their evaluations, and their rows by layer.

Dimensions: R residuals of one term, K entries of all trained parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from textwrap import shorten
from threading import RLock
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from tengrad_triton.residuals.by_layer import NotByLayerError, rows_by_layer
from tengrad_triton.residuals.suspicions import warn_caller
from tengrad_triton.residuals.terms import Residual
from tengrad_triton.residuals.ways import Way

T = TypeVar("T")
_MOST_SIZES = 4  # numbers of points that get a graph of their own
_BACKEND = "inductor"
_LOCK = RLock()
_LONGEST_REASON = 300  # letters


def compiled(function: Callable[..., T], name: str) -> Callable[..., T]:
    """Return the function compiled, as long as that succeeds; ``name`` is the term's, for a warning where it fails."""
    return _while_it_works(torch.compile(_alone(function), backend=_BACKEND), function, name)


def compiled_by_layer(residual: Residual, name: str) -> Way:
    """Return the way by layer (`rows_by_layer`) as one graph: forward, backward and products; ``name`` is the term's.

    Dynamo traces the residual function, and guards what it depends on beside points and parameters. Its graph runs by
    layer under `make_fx`; what that traces is compiled by Inductor. Each number of points has a graph; beyond
    ``_MOST_SIZES`` of them, and after a warning where compilation fails, rows are found without one.

    Raises:
        NotByLayerError: the rows do not follow from products with the weights, at any call.
    """
    backend = _RowsBackend()
    marked = torch.compiler.allow_in_graph(_marked)
    graph: Any = torch.compile(
        _alone(lambda *points: marked(residual(*points))), backend=backend, fullgraph=True, dynamic=False
    )
    sizes: set[int] = set()

    def without(parameters: Sequence[Tensor], points: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        return rows_by_layer(lambda: residual(*points), parameters, len(points[0]))

    def rows(parameters: Sequence[Tensor], points: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        size = len(points[0])
        if size not in sizes and len(sizes) == _MOST_SIZES:
            return without(parameters, points)
        with torch.enable_grad():  # Dynamo is to see what the function does under no_grad
            r, flat_RK = backend.rows(lambda: graph(*points), parameters, size)
        if flat_RK is None:  # torch.compile is switched off
            return without(parameters, points)
        sizes.add(size)
        parts = flat_RK.split([p.numel() for p in parameters], 1)
        return r, [part.view(*r.shape, *p.shape) for part, p in zip(parts, parameters, strict=True)]

    return _while_it_works(rows, without, name)


def _while_it_works(fast: Callable[..., T], plain: Callable[..., T], name: str) -> Callable[..., T]:
    """Return the function that is compiled until it fails, which is warned of, and from then on the plain one."""
    works = True

    def call(*args: Any) -> T:
        nonlocal works
        if not works:
            return plain(*args)
        try:
            with _calling():
                return fast(*args)
        except (torch.OutOfMemoryError, NotByLayerError):
            raise
        except Exception as error:
            result = plain(*args)  # raises what the function itself does
            works = False
            warn_caller(f"torch.compile failed on the residual {name!r}, which goes on without: {_reason(error)}")
            return result

    return call


class _RowsBackend:
    """A backend of `torch.compile` for which running a residual's graph also computes the rows."""

    def __init__(self) -> None:
        self._parameters: Sequence[Tensor] = ()
        self._samples = 0
        self._rows_RK: Tensor | None = None

    def rows(
        self, residual: Callable[[], Tensor], parameters: Sequence[Tensor], samples: int
    ) -> tuple[Tensor, Tensor | None]:
        """Return the residuals, and the rows [R, K] of all parameters, of a function that has this backend.

        There are no rows where Dynamo calls the function as it is, which `torch.compiler.set_stance` can ask for.
        """
        self._parameters, self._samples, self._rows_RK = parameters, samples, None
        r, rows_RK = residual(), self._rows_RK
        self._rows_RK = None  # it is as large as J̃
        return r, rows_RK

    def __call__(self, graph: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
        """Return what runs the graph: it is compiled at its first call, whose arguments have the parameters."""
        with_rows: Any = None
        trained: list[int] = []

        def run(*args: Any) -> tuple[Any, ...]:
            nonlocal with_rows, trained
            with torch.no_grad():
                if trained != (now := list(map(id, self._parameters))):  # some were frozen since
                    with_rows = torch._dynamo.lookup_backend(_BACKEND)(self._traced(graph, args), list(args))
                    trained = now
                *outputs, self._rows_RK = with_rows(*args)
            return tuple(outputs)

        return run

    def _traced(self, graph: fx.GraphModule, args: tuple[Any, ...]) -> fx.GraphModule:
        """Return the graph of what the function returns and stores elsewhere, and of the rows."""
        place_of = {id(arg): place for place, arg in enumerate(args)}
        parameters, samples = self._parameters, self._samples
        (nodes,) = next(iter(reversed(graph.graph.nodes))).args
        returned = [node.target is _marked for node in nodes].index(True)

        def with_rows(*args: Any) -> tuple[Any, ...]:
            outputs: Sequence[Any] = ()

            def residual() -> Tensor:
                nonlocal outputs
                outputs = graph(*args)
                r: Tensor = outputs[returned]
                return r

            own = [args[place_of[id(p)]] if id(p) in place_of else p.detach() for p in parameters]
            r, rows = rows_by_layer(residual, own, samples)
            rows_RK = torch.cat([part.reshape(r.numel(), -1) for part in rows], 1)
            return *(x.detach() for x in outputs), rows_RK

        traced: fx.GraphModule = make_fx(with_rows)(*(x.detach() if isinstance(x, Tensor) else x for x in args))
        return traced


def _marked(r: Tensor) -> Tensor:
    """Return r: in a graph, it tells what a function returns from what it stores elsewhere."""
    return r


@contextmanager
def _calling() -> Iterator[None]:
    """Have Dynamo notice that a module has got a hook since; leave no level of forward derivatives after an error.

    A graph of `torch.func.jvp` enters such a level and leaves it in two of its nodes. One thread at a time: while
    `make_fx` traces, torch refuses to call compiled functions anywhere.
    """
    try:
        with _LOCK, _with_hook_guards():
            yield
    except BaseException:
        with suppress(RuntimeError):  # there is none
            torch._C._exit_dual_level(level=0)
        raise


@cache
def _with_hook_guards() -> Any:
    """Return what is made once: it takes half of the time of a call's guards."""
    return torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)


def _alone(function: Callable[..., T]) -> Callable[..., T]:
    """Return the function within code of its own: Dynamo counts recompilations by code, which closures share."""

    def call(*args: Any) -> T:
        return function(*args)

    call.__code__ = call.__code__.replace()
    return call


def _reason(error: Exception) -> str:
    """Return what an error's message begins with, and Dynamo's explanation where it has one."""
    if isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit):
        return "it depends on something that differs from call to call: hold a number that changes in a tensor"
    lines = [line for line in str(error).splitlines() if line] or [type(error).__name__]
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]  # as "backend='inductor' raised:"
    explained = [line.split("Explanation: ")[1] for line in lines if "Explanation: " in line]
    return shorten(": ".join([first, *explained[:1]]), _LONGEST_REASON, placeholder=" …")
