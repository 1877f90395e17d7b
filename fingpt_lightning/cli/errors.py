"""What ends the program with a status of its own."""


class ConfigError(ValueError):
    """A wrong command line or config: exit status 2."""


class TerminatedError(BaseException):
    """A command that SIGTERM ended: exit status 143, as the shell has it.

    No ``Exception``, as KeyboardInterrupt is none: what goes on after a failure must not after it.
    """
