"""The entry point of `tengrad-triton`: its exit codes, and one line on stderr for every error."""

import sys
from collections.abc import Sequence

from tengrad_triton.recipes.errors import InterruptedRunError, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 if it cannot be carried out, or 130 after Ctrl-C.

    Where the output is a pipe that nobody reads any more, rich ends the process with 1 and prints nothing.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        # Imported here because Ctrl-C may come while torch is imported, and [train] may not be installed.
        from tengrad_triton.recipes.cli.commands import run  # noqa: PLC0415

        run(arguments)
    except UsageError as error:
        return _fail(2, str(error))
    except InterruptedRunError as stop:
        return _fail(130, str(stop))
    except KeyboardInterrupt:
        return _fail(130, "interrupted before training began")
    except OSError as error:  # of the file system: no command ends in a traceback for what lies on the user's disk
        return _fail(2, f"{error.filename or 'a file'}: {error.strerror or error}: it cannot be read or written")
    except ModuleNotFoundError as error:
        return _fail(2, f"{error}: the command line needs more packages: pip install 'tengrad-triton[train]'")
    return 0


def _fail(code: int, line: str) -> int:
    sys.stderr.write(f"tengrad-triton: {' '.join(line.split())}\n")
    return code
