"""Run the cases of one piece, and write NAME.json: `python -m perf.gpu.pieces NAME --out DIR`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from perf import suites
from perf.gpu.pieces import race, smoke, trace, variants
from perf.selection import Case

PIECES: Mapping[str, Callable[[argparse.Namespace], Iterable[Case]]] = {
    "smoke": lambda options: smoke.cases(options.quick),
    "trace": lambda options: trace.cases(options.quick),
    "variants": lambda options: variants.cases(options.quick),
    "race": lambda options: race.cases(options.quick, options.data, options.device),
}


def main() -> None:
    """Run the cases of one piece, and write NAME.json."""
    parser = argparse.ArgumentParser(prog="python -m perf.gpu.pieces", description=__doc__)
    parser.add_argument("name", choices=PIECES)
    parser.add_argument("--out", type=Path, required=True, help="folder of NAME.json")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case later than this")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to rehearse")
    parser.add_argument("--resume", action="store_true", help="continue NAME.json: leave out the cases that it holds")
    parser.add_argument("--data", type=Path, help="images of the race, as `python -m perf.gpu data` writes them")
    options = parser.parse_args()
    torch.set_num_threads(1 if options.quick else torch.get_num_threads())
    suites.run_cases(
        options.name, PIECES[options.name](options), options.device, options.out, options.seconds, options.resume
    )


if __name__ == "__main__":
    main()
