"""Files that are whole or not there, and folders that have one owner."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file aside and then renames it; text is UTF-8, its line ends are as given.

    Args:
        path: File in a folder that is there; a file of that name is replaced.
        content: All of the file.
    """
    with written_whole(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


def to_json(
    value: Any,
    *,
    indent: int | None = None,
    ensure_ascii: bool = True,
    sort_keys: bool = False,
    default: Callable[[Any], Any] | None = None,
) -> str:
    """JSON that every reader takes: Python alone would write and read a bare ``NaN``.

    Args:
        value: Mappings, sequences, texts, numbers, booleans and None.
        indent: As in `json.dumps`.
        ensure_ascii: As in `json.dumps`.
        sort_keys: As in `json.dumps`.
        default: As in `json.dumps`.

    Raises:
        ValueError: A number is NaN or infinite: its place in ``value`` is named.

    >>> to_json({"tasks": [{"loss": math.inf}]})
    Traceback (most recent call last):
    ValueError: tasks.0.loss is inf, which JSON cannot hold
    """
    try:
        return json.dumps(
            value,
            allow_nan=False,
            indent=indent,
            ensure_ascii=ensure_ascii,
            sort_keys=sort_keys,
            default=default,
        )
    except ValueError:
        if (place := next(_not_finite(value, ""), None)) is None:
            raise
        raise ValueError(f"{place}, which JSON cannot hold") from None


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Writes ``value`` as a JSON file, whole or not at all.

    Args:
        path: File in a folder that is there; a file of that name is replaced.
        value: As in `to_json`.
        indent: As in `json.dumps`.

    Raises:
        ValueError: A number is NaN or infinite: file and place in ``value`` are named.
    """
    try:
        text = to_json(value, indent=indent)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    write_whole(path, f"{text}\n")


def _not_finite(value: Any, place: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{place or 'the number'} is {value}"
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _not_finite(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _not_finite(item, f"{place}.{index}" if place else str(index))


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
