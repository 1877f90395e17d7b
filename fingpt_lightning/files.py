"""Files that are whole or not there, and folders that have one owner."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
"""The ending of what is not whole yet."""


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Hands out a path beside ``path``; what is written there takes its place at the end.

    It is on the disk before it is renamed, so that a crash leaves the old file or the new one. An
    error on the way leaves the old one and removes what was begun.

    Args:
        path: File in a folder that is there; a file of that name is replaced.
    """
    aside = path.with_name(f"{path.name}{PARTIAL}")
    try:
        yield aside
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # a full disk does not say of which file
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file aside and then renames it; text is UTF-8, its line ends are as given.

    Args:
        path: File in a folder that is there; a file of that name is replaced.
        content: All of the file.
    """
    with written_whole(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


def make_owned(folder: Path) -> bool:
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


def new_folder(parent: Path, name: str, is_ours: Callable[[Path], bool] = make_owned) -> Path:
    """``PARENT/NAME-DATE-TIME``, with a number behind it when that is taken.

    Args:
        parent: Folder to be in.
        name: Beginning of the folder's name.
        is_ours: Whether a folder can be had. The usual one makes it, since two processes that
            only look for a free name within one second would both find the same.
    """
    first = parent / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, number = first, 2
    while not is_ours(folder):
        folder, number = first.with_name(f"{first.name}-{number}"), number + 1
    return folder


def not_utf8(path: Path) -> str:
    """The message of a file that is not UTF-8 text: it names line and byte.

    Args:
        path: File that could not be decoded.
    """
    position = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return (
                    f"{path}:{number}: no UTF-8 text at byte {position + error.start} of the file"
                )
            position += len(line)
    return f"{path} is no UTF-8 text"
