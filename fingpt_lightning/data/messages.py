"""Parts of messages that several readers of text share."""

import difflib
from collections.abc import Iterable
from pathlib import Path


def nearest_name(path: Path) -> str:
    """The part of a message that names what stands beside a missing ``path``."""
    if not path.parent.is_dir():
        return f": there is no folder {path.parent}"
    siblings = [sibling.name for sibling in path.parent.iterdir()]
    nearest = difflib.get_close_matches(path.name, siblings, n=1)
    return f"; the nearest name there is {nearest[0]}" if nearest else ""


def no_field(place: str, field: str, fields: Iterable[str]) -> str:
    """The message of a row without ``field``.

    >>> no_field("a.jsonl:2", "text", ["txt", "id"])
    "a.jsonl:2: no field 'text'; did you mean 'txt'? The fields are ['id', 'txt']"
    """
    there = sorted(fields)
    nearest = difflib.get_close_matches(field, there, n=1)
    hint = f"did you mean {nearest[0]!r}? The" if nearest else "the"
    return f"{place}: no field {field!r}; {hint} fields are {there}"


def first_line(error: Exception) -> str:
    """What a foreign library's error says first."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")
