"""Steps of models of `fully_shard`: those of one process with the whole batch and whole parameters."""

from dataclasses import replace

import pytest
import several_processes
from distributed_cases import CASES, trained

TOLERANCE = 1e-10  # of the parameters after 20 steps in float64
REFUSED = {"history", "some exact rows"}
OF_DDP = {"static graph", "static graph, labels", "gradients as views of buckets", "averaged by the loop"}
SHARDED = {name: replace(case, sharded={}) for name, case in CASES.items() if name not in REFUSED | OF_DDP}


def ranks_trained(rank, count, names):
    return {name: trained(SHARDED[name], rank, count) for name in names}


@pytest.mark.parametrize("count", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (4, 8))])
def test_ranks_take_the_step_of_one_process_with_the_whole_batch(count):
    wrong = {}
    names, each = list(SHARDED), 40 // count  # trainings of many processes take their time
    for some in (names[first : first + each] for first in range(0, len(names), each)):
        of_ranks = several_processes.run(count, ranks_trained, count, some)
        for name in some:
            alone = trained(SHARDED[name])
            error = max((own[name] - alone).abs().max().item() for own in of_ranks)
            if not error <= TOLERANCE:
                wrong[name] = f"{error:.1e}"
    assert not wrong
