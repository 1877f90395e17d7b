"""Settings as config files hold them."""

from typing import Any


def as_list(given: Any) -> list[Any]:
    """What may be written as one thing, as a list of several, or be left out."""
    if given is None:
        return []
    return given if isinstance(given, list) else [given]
