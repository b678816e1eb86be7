"""Functions of residuals that `torch.compile` compiles: their evaluations, and their rows by layer.

Dimensions: R residuals of one term, K entries of all trained parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class CompilationError(Exception):
    """`torch.compile` cannot compile a residual function."""


def compiled(function: Callable[..., T], name: str) -> Callable[..., T]:
    """Return the function compiled; ``name`` is the term's, for errors.

    Raises:
        CompilationError: it cannot be compiled, at its first call.
    """
    graph: Any = torch.compile(_alone(function), backend=_BACKEND)

    def call(*args: Any) -> T:
        try:
            result: T = graph(*args)
        except (torch.OutOfMemoryError, KeyboardInterrupt):
            raise
        except Exception as error:
            raise _failed(error, name) from error
        return result

    return call


def compiled_by_layer(residual: Residual, name: str) -> Way:
    """Return the way by layer (`rows_by_layer`) as one graph: forward, backward and products; ``name`` is the term's.

    Dynamo traces the residual function, and guards what it depends on beside points and parameters. Its graph runs by
    layer under `make_fx`; what that traces is compiled by Inductor. Each number of points has a graph; beyond
    ``_MOST_SIZES`` of them, and where guards fail too often, rows are found without one.

    Raises:
        CompilationError: it cannot be compiled, at the way's first call.
        NotByLayerError: the rows do not follow from products with the weights, at any call.
    """
    backend = _RowsBackend()
    graph: Any = torch.compile(_alone(residual), backend=backend, fullgraph=True, dynamic=False)
    sizes: set[int] = set()

    def rows(parameters: Sequence[Tensor], points: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        nonlocal graph
        size = len(points[0])
        if graph is None or (size not in sizes and len(sizes) == _MOST_SIZES):
            return rows_by_layer(lambda: residual(*points), parameters, size)
        try:
            with torch.no_grad():
                r, flat_RK = backend.rows(lambda: graph(*points), parameters, size)
        except (torch.OutOfMemoryError, KeyboardInterrupt, NotByLayerError):
            raise
        except Exception as error:
            if not sizes:
                raise _failed(error, name) from error
            graph = None
            warn_caller(f"the rows of {name!r} are compiled no more: {_first_line(error)}")
            return rows(parameters, points)
        sizes.add(size)
        parts = flat_RK.split([p.numel() for p in parameters], 1)
        return r, [part.view(*r.shape, *p.shape) for part, p in zip(parts, parameters, strict=True)]

    return rows


class _RowsBackend:
    """A backend of `torch.compile` for which running a residual's graph also computes the rows."""

    def __init__(self) -> None:
        self._parameters: Sequence[Tensor] = ()
        self._samples = 0
        self._rows_RK: Tensor | None = None

    def rows(self, residual: Callable[[], Tensor], parameters: Sequence[Tensor], samples: int) -> tuple[Tensor, Tensor]:
        """Return the residuals, and the rows [R, K] of all parameters, of a function that has this backend."""
        self._parameters, self._samples = parameters, samples
        r, rows_RK = residual(), self._rows_RK
        assert rows_RK is not None
        self._rows_RK = None  # it is as large as J̃
        return r, rows_RK

    def __call__(self, graph: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., tuple[Tensor]]:
        """Return what runs the graph: it is compiled at its first call, whose arguments have the parameters."""
        with_rows: Any = None
        trained: list[int] = []

        def run(*args: Any) -> tuple[Tensor]:
            nonlocal with_rows, trained
            if trained != (now := list(map(id, self._parameters))):  # some were frozen since
                trained = now
                with_rows = torch.compile(self._traced(graph, args), backend=_BACKEND, dynamic=False)
            r, self._rows_RK = with_rows(*args)
            return (r,)

        return run

    def _traced(self, graph: fx.GraphModule, args: tuple[Any, ...]) -> fx.GraphModule:
        """Return the graph of residuals and rows."""
        place_of = {id(arg): place for place, arg in enumerate(args)}
        parameters, samples = self._parameters, self._samples

        def with_rows(*args: Any) -> tuple[Tensor, Tensor]:
            own = [args[place_of[id(p)]] if id(p) in place_of else p.detach() for p in parameters]
            r, rows = rows_by_layer(lambda: graph(*args)[0], own, samples)
            return r, torch.cat([part.reshape(r.numel(), -1) for part in rows], 1)

        traced: fx.GraphModule = make_fx(with_rows)(*(x.detach() if isinstance(x, Tensor) else x for x in args))
        return traced


def _alone(function: Callable[..., T]) -> Callable[..., T]:
    """Return the function within code of its own: Dynamo counts recompilations by code, which closures share."""

    def call(*args: Any) -> T:
        return function(*args)

    call.__code__ = call.__code__.replace()
    return call


def _failed(error: Exception, name: str) -> CompilationError:
    return CompilationError(
        f"torch.compile failed on the residual {name!r} ({_first_line(error)}): leave out compiled=True, or write the "
        "residual so that it can be compiled"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
