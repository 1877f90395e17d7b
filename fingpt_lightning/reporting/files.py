"""Files of run folders, read with errors that name file and line."""

import csv
import json
from pathlib import Path
from typing import Any, cast

import yaml

from fingpt_lightning.files import ROW_DECODER, DuplicateKeyError, not_utf8
from fingpt_lightning.terminal.shapes import check_shape, kind_of

Row = dict[str, float]
"""The figures of one line of ``metrics.csv``; an empty cell has no entry."""


def read_metrics(path: Path) -> list[Row]:
    """The lines of a ``metrics.csv``; none where there is no such file.

    A last line without a line end is incomplete, from a run that was killed, and is left out.

    Raises:
        ValueError: A line is broken: the file and the line are named.
    """
    if not path.exists():
        return []
    rows = []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    try:
        text = whole.decode()
    except UnicodeDecodeError:
        raise ValueError(not_utf8(path)) from None
    reader = csv.reader(text.splitlines())
    try:
        header = next(reader, [])
        if header and "step" not in header:
            raise ValueError(f"{path}:1: there is no column step")
        rows += [_row(header, cells, f"{path}:{reader.line_num}") for cells in reader]
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num + 1}: {error}") from error
    return rows


def _row(header: list[str], cells: list[str], where: str) -> Row:
    if len(cells) != len(header):
        raise ValueError(f"{where}: {len(cells)} cells, and the header has {len(header)}")
    row = {}
    for key, cell in zip(header, cells, strict=True):
        try:
            if cell:
                row[key] = float(cell)
        except ValueError:
            raise ValueError(f"{where}: {key} is {cell!r}, which is not a number") from None
    if "step" not in row:
        raise ValueError(f"{where}: there is no step")
    return row


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no such file.

    Raises:
        ValueError: The file is broken or holds something else: the file and the line are named.
    """
    if not path.exists():
        return {}
    return _object(path.read_bytes(), str(path), 1, {})


def read_objects(path: Path, shape: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects in the lines of a JSON Lines file; none where there is no such file.

    Args:
        path: File.
        shape: Shape of each object, as of `check_shape`.

    Raises:
        ValueError: A line is broken or holds something else: the file and the line are named.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    return [_object(line, str(path), number, shape) for number, line in enumerate(lines, start=1)]


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a YAML file; none where there is no such file.

    Raises:
        ValueError: The file is broken: the file and the line are named.
    """
    if not path.exists():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{path}:{line}: {error.problem}") from error
    except UnicodeDecodeError:
        raise ValueError(not_utf8(path)) from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: it holds {kind_of(found)}, not settings")
    return found


def _object(content: bytes, path: str, line: int, shape: dict[str, Any]) -> dict[str, Any]:
    try:
        found = ROW_DECODER.decode(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{line + error.lineno - 1}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{line}: no UTF-8 text at byte {error.start} of it") from error
    except DuplicateKeyError as error:
        raise ValueError(f"{path}:{line}: {error}") from None
    check_shape(found, shape, f"{path}:{line}")
    return cast("dict[str, Any]", found)
