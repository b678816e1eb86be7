"""The two ways in which the command line ends early: each becomes one line on stderr and an exit code."""


class UsageError(Exception):
    """What was asked for cannot be done: the message says what came, what was expected and what to do, in one line."""


class InterruptedRunError(KeyboardInterrupt):
    """Training was interrupted; the message says how to go on."""
