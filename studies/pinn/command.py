"""What the commands of the study share: names that must be known, and one line for every mistake."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from cyclopts import App, CycloptsError, Parameter

from studies.pinn.frameworks.build import INSTALLATION, is_missing
from tengrad_triton.recipes.errors import UsageError


def new_app(name: str, text: str | None) -> App:
    """Return a command whose arguments of several values take them one after another."""
    return App(name=name, help=text, help_format="plaintext", default_parameter=Parameter(consume_multiple=True))


def known(given: Sequence[str], names: Iterable[str], what: str) -> list[str]:
    """Return the names that were given, or all if none was; raises `UsageError` for one that is not known."""
    all_names = list(names)
    for name in given:
        if name not in all_names:
            raise UsageError(f"--{what} {name}: there is none of this name; there are {', '.join(all_names)}")
    return list(dict.fromkeys(given)) or all_names


def installed(given: Sequence[str], families: Sequence[str]) -> list[str]:
    """Return the families whose packages are installed, and say which are left out.

    Args:
        given: the families that were asked for by name, if any.
        families: these, or all.

    Raises:
        UsageError: one was asked for whose package is not installed.
    """
    missing = [family for family in families if is_missing(family)]
    if missing and given:
        raise UsageError(f"--entrant {' '.join(missing)}: not installed: {INSTALLATION}")
    if missing:
        sys.stderr.write(f"{' and '.join(missing)} are left out, for they are not installed: {INSTALLATION}\n")
    return [family for family in families if family not in missing]


def main(app: App, argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, or 2 with one line on stderr if it cannot be carried out."""
    try:
        app(argv, exit_on_error=False, print_error=False, result_action="return_value")
    except (UsageError, CycloptsError, OSError) as error:
        sys.stderr.write(f"{app.name[0]}: {' '.join(str(error).split())}\n")
        return 2
    return 0
