"""Models, loops and Fishers composed at random: each step is the dense solve, or a documented error."""

from collections import Counter

import pytest
import random_loops
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from random_models import AFTER, KINDS, OUTPUTS, WRAPS, ModelPlan, Piece

SEEN = Counter()


def chosen(*options):
    return st.sampled_from(options)


PIECES = st.builds(Piece, kind=chosen(*KINDS), wrap=chosen(*WRAPS), after=chosen(*AFTER))
MODELS = st.builds(
    ModelPlan,
    pieces=st.lists(PIECES, min_size=1, max_size=4).map(tuple),
    output=chosen(*OUTPUTS),
    tokens=st.integers(1, 4),
    eval_mode=st.booleans(),
)
STEPS = st.builds(
    random_loops.StepPlan,
    sizes=st.lists(st.integers(2, 5), min_size=1, max_size=3).map(tuple),
    together=st.booleans(),
    clear=chosen("optimizer", "model", "none", "to zeros", "model to zeros"),
    clears=chosen("first", "last"),
    clips=st.booleans(),
    skips=st.booleans(),
    frozen=st.one_of(st.just(0), st.integers(0, 12)),
    freezes_layer=st.booleans(),
    objective=chosen("mean", "mean", "mean", "weight penalty", "input penalty", "two backwards"),
    between=chosen("nothing", "evaluation", "forward only", "derivative of the input", "torch.func"),
    diagnosis=chosen("nothing", "derivative of the input", "derivative of the input, twice", "clearing"),
)
PLANS = st.builds(
    random_loops.Plan,
    model=MODELS,
    steps=st.lists(STEPS, min_size=2, max_size=4).map(tuple),
    fisher=chosen("sampled", "empirical", "exact"),
    likelihood=chosen("categorical", "gaussian", "bernoulli"),
    blocks=chosen("layer", "network"),
    refresh_every=st.integers(1, 2),
    representation=chosen("auto", "factored", "per_sample"),
)


def check(plan):
    try:
        verdict = random_loops.run(plan)
    except random_loops.InvalidModelError:
        verdict = "invalid"
    SEEN[verdict] += 1
    event(verdict)
    assume(verdict != "invalid")


COMMON = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


@given(PLANS)
@settings(max_examples=40, **COMMON)
def test_steps_equal_the_dense_solve_or_are_refused(plan):
    check(plan)


@pytest.mark.slow
@given(PLANS)
@settings(max_examples=10_000, **COMMON)
def test_many_steps_equal_the_dense_solve_or_are_refused(plan):
    check(plan)
