"""The problems of the study, by name."""

from __future__ import annotations

from studies.pinn.problems import burgers, convection, heat, inverse, poisson
from studies.pinn.problems.base import Problem

PROBLEMS: dict[str, Problem] = {
    problem.name: problem
    for problem in (*poisson.PROBLEMS, *heat.PROBLEMS, burgers.PROBLEM, *convection.PROBLEMS, inverse.PROBLEM)
}
