"""YAML that people write, read within bounds: aliases can expand to more than any memory holds."""

from pathlib import Path
from typing import Any

import yaml

MAX_VALUES = 100_000
"""Keys and values of one file, those that aliases repeat counted each time."""


def parse_yaml(text: str, path: Path) -> Any:
    """The contents of a YAML file.

    Args:
        text: Contents of the file.
        path: Name of the file, for messages.

    Raises:
        yaml.YAMLError: It is not YAML.
        ValueError: It is nested too deeply, refers to itself, or its aliases expand to too many
            values.
    """
    try:
        contents = yaml.safe_load(text)
        num_values = _num_values(contents, {})
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply, or an alias refers to itself") from None
    if num_values > MAX_VALUES:
        raise ValueError(
            f"{path}: with its aliases it has {num_values:,} values, more than {MAX_VALUES:,}"
        )
    return contents


def _num_values(contents: Any, known: dict[int, int]) -> int:
    """Counts each shared list or mapping as often as it is referred to, in linear time."""
    if not isinstance(contents, dict | list):
        return 1
    if id(contents) not in known:
        items = [*contents, *contents.values()] if isinstance(contents, dict) else contents
        known[id(contents)] = 1 + sum(_num_values(item, known) for item in items)
    return known[id(contents)]
