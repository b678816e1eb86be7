"""Layers of models of `fully_shard` train as in one process with the whole batch and whole parameters."""

import warnings

import pytest
import several_processes
from sharded_layer_cases import CASES, SOME, as_a_whole, by_layers, depends_on_parts, made, replicated, trained

TOLERANCE = 1e-10  # of the parameters after ten steps in float64
TOGETHER = 60  # layers in the same processes, which have two minutes
UNSCALED = {"scaling": "none", "damping": 0.1}
DIAGONAL = {"scaling": "diagonal", "fisher": "empirical"}


def ranks_trained(rank, count, states, wrap, options):
    """Return the parameters of each model, or the error, and those of DistributedDataParallel if it is to be that."""
    warnings.simplefilter("ignore")  # torch warns of views that layers return
    return {
        name: (
            ended(name, state, wrap, rank, count, **options),
            ended(name, state, replicated, rank, count, **options) if depends_on_parts(name) else None,
        )
        for name, state in states.items()
    }


def ended(*arguments, **options):
    try:
        return trained(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def wrong_rows(count, names, wrap, options):
    states = {name: made(name).state_dict() for name in names}
    of_ranks = several_processes.run(count, ranks_trained, count, states, wrap, options)
    found = {}
    for name, state in states.items():
        expected = of_ranks[0][name][1]
        if expected is None:
            expected = trained(name, state, lambda model, _: model, **options)
        own = [of_rank[name][0] for of_rank in of_ranks]
        said = [x for x in (expected, *own) if isinstance(x, str)]
        error = float("nan") if said else max((x - expected).abs().max().item() for x in own)
        if not error <= TOLERANCE:
            found[name] = said[0] if said else f"{error:.1e}"
    return found


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own, of its own forward
@pytest.mark.parametrize(
    ("count", "names", "wrap", "options"),
    [
        pytest.param(2, SOME, by_layers, {}, id="some layers"),
        *(
            pytest.param(count, list(CASES), wrap, options, marks=pytest.mark.slow, id=name)
            for name, count, wrap, options in [
                ("layers", 2, by_layers, {}),
                ("the model, factored", 2, as_a_whole, {"representation": "factored"}),
                ("layers in three ranks, diagonal D", 3, by_layers, DIAGONAL),
                ("the model in three ranks, no D", 3, as_a_whole, UNSCALED),
                ("layers in three ranks, per sample", 3, by_layers, {"representation": "per_sample"}),
            ]
        ),
    ],
)
def test_layers_train_as_in_one_process(count, names, wrap, options):
    parts = [names[first : first + TOGETHER] for first in range(0, len(names), TOGETHER)]
    wrong = [wrong_rows(count, part, wrap, options) for part in parts]
    assert [one for one in wrong if one] == []
