"""The command `tengrad-triton`: exit codes, and one line on stderr for everything that went wrong."""

import sys
from collections.abc import Sequence

from tengrad_triton.recipes.errors import InterruptedRunError, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 2 for what cannot be done, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        # Imported here because Ctrl-C may come while torch is imported, and [train] may not be installed.
        from tengrad_triton.recipes.cli.commands import run  # noqa: PLC0415

        run(arguments)
    except UsageError as error:
        return _end(2, str(error))
    except InterruptedRunError as stop:
        return _end(130, str(stop))
    except KeyboardInterrupt:
        return _end(130, "interrupted before training began")
    except ModuleNotFoundError as error:
        return _end(2, f"{error}: the command line needs more packages: pip install 'tengrad-triton[train]'")
    return 0


def _end(code: int, line: str) -> int:
    sys.stderr.write(f"tengrad-triton: {' '.join(line.split())}\n")
    return code
