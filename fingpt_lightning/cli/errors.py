"""Exceptions that end the program with an exit status of their own."""


class ConfigError(ValueError):
    """A wrong command line or config: exit status 2."""


class TerminatedError(BaseException):
    """A command that SIGTERM ended: exit status 143, as in a shell.

    Like KeyboardInterrupt it is not an ``Exception``: code that continues after a failure must not
    continue after it.
    """
