"""The two ways in which a command ends early. Each becomes one line on stderr and an exit code."""


class UsageError(Exception):
    """The command cannot be carried out. The message is one line: what came, what was expected and what to do."""


class InterruptedRunError(KeyboardInterrupt):
    """Training was interrupted. The message says how to resume it."""
