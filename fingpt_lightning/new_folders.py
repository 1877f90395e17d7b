"""Folders named after what is done in them and when it began, each with one owner."""

import time
from collections.abc import Callable
from pathlib import Path


def is_made(folder: Path) -> bool:
    """Makes a folder; False if it was there already.

    Raises:
        FileExistsError: A file stands where a folder above it should.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if not folder.exists():  # a file is in the way, above
            raise
        return False
    return True


def new_folder(parent: Path, name: str, is_ours: Callable[[Path], bool] = is_made) -> Path:
    """``PARENT/NAME-DATE-TIME``, with a number behind it when that is taken.

    Args:
        parent: The folder to be in.
        name: The beginning of the folder's name.
        is_ours: Whether a folder can be had. The usual one makes it, as of two processes that
            only look for a free name within a second both find the same.
    """
    first = parent / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, number = first, 2
    while not is_ours(folder):
        folder, number = first.with_name(f"{first.name}-{number}"), number + 1
    return folder
