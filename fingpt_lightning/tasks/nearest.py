"""The end of a message about a wrong name: the right name most like it."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean X?`` for the known name most like ``name``, or nothing.

    >>> nearest("fpd", ["fpb", "tfns"])
    '; did you mean fpb?'
    """
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""
