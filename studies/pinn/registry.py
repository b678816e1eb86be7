"""The entrants of the study: families of settings, by the name on the command line.

The settings of a family are tried with the first seed, and the best one runs with all; a family of one is not tuned.
"""

from __future__ import annotations

from collections.abc import Callable

from studies.pinn import first_order, gauss_newton, least_squares
from studies.pinn.entrants import Build, Family
from studies.pinn.frameworks import build as frameworks
from studies.pinn.rivals import build as rivals

FAMILIES: dict[str, Family] = {
    **gauss_newton.FAMILIES,
    **first_order.FAMILIES,
    **least_squares.FAMILIES,
    **frameworks.FAMILIES,
    **rivals.FAMILIES,
}
DAMPED: dict[str, Callable[[float], Build]] = {**gauss_newton.DAMPED, **rivals.DAMPED}
"""Entrants by their starting damping, for `studies.pinn.robustness`."""
