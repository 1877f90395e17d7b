"""Class paths of configs: jsonargparse shortens one where it can, so that a class has several."""

import importlib
from typing import Any


def class_at(path: str) -> Any:
    """What a class path leads to; None where that is nothing."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError):
        return None


def is_same_class(one: str, other: str) -> bool:
    """Whether two class paths lead to one class."""
    return one == other or (class_at(one) is not None and class_at(one) is class_at(other))
