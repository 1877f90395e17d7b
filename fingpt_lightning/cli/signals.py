"""SIGTERM ends a command as an interrupt does: what it had begun is cleaned up on the way."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from fingpt_lightning.cli.errors import TerminatedError

_is_left_to: list[Callable[[], bool]] = []


@contextmanager
def raised_sigterm() -> Iterator[None]:
    """Within it SIGTERM raises `TerminatedError` in the main thread, once.

    An existing handler stays: then another program decides.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def sigterm_left_to(is_handled: Callable[[], bool]) -> Iterator[None]:
    """Within it SIGTERM raises only where no other code handles it.

    Args:
        is_handled: Function that returns whether other code handles it at this moment.
    """
    _is_left_to.append(is_handled)
    try:
        yield
    finally:
        _is_left_to.remove(is_handled)


def _raise(signum: int, frame: FrameType | None) -> None:
    if any(is_handled() for is_handled in _is_left_to):
        return
    # A second signal would interrupt the cleanup.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise TerminatedError("ended by SIGTERM")
