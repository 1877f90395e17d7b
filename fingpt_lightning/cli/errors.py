"""What ends the program with a status of its own."""


class ConfigError(ValueError):
    """A wrong command line or config: exit status 2."""


class TerminatedError(RuntimeError):
    """A run that was told to end: exit status 143, as the shell has it of SIGTERM."""
