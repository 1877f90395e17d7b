"""The end of a message about a wrong name: the right name most like it."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """``; did you mean X?`` for the known name most like ``name``, or nothing.

    Args:
        name: What was given.
        known: What it could have been.
        cutoff: How alike they must be, between 0 and 1.

    >>> nearest("fpd", ["fpb", "tfns"])
    '; did you mean fpb?'
    """
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {found[0]}?" if found else ""
