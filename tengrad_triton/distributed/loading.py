"""Whether all ranks can load their parts of a state: none of them does where another one cannot."""

from __future__ import annotations

from collections.abc import Mapping

from tengrad_triton.distributed.ranks import Ranks


def check_loads(ranks: Ranks, error: Exception | None, said: Mapping[str, int]) -> None:
    """Raise on every rank if one of them cannot load its state, or if the states of the ranks differ in a number.

    Args:
        ranks: those that load.
        error: of this rank's state; a rank that has one gets no other.
        said: the numbers of this rank's state.

    Raises:
        ValueError: another rank cannot, or the numbers differ.
    """
    of_ranks = ranks.gathered((None if error is None else f"{type(error).__name__}: {error}", dict(said)))
    failures = [(rank, text) for rank, (text, _) in enumerate(of_ranks) if text is not None]
    if error is not None:
        return
    if failures:
        raise ValueError(f"rank {failures[0][0]} cannot load its state, so no rank does: {failures[0][1]}")
    first = of_ranks[0][1]
    for rank, (_, other) in enumerate(of_ranks):
        for name, value in other.items():
            if value != first[name]:
                raise ValueError(
                    f"rank {rank} loads a state with {name} {value}, and rank 0 one with {first[name]}: every rank "
                    "needs the state of the same step"
                )
