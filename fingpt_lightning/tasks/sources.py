"""Rows as a task's files or the hub hold them, before they are interpreted."""

import csv
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fingpt_lightning.files import lines_of, not_utf8
from fingpt_lightning.tasks.task import Cut, Hub, LineFile, Task
from fingpt_lightning.terminal.messages import first_line, nearest

NumberedRow = tuple[int, Mapping[str, object]]

_CUT_SPLITS = ("train", "test")
_PARQUET_ROWS = 1024  # in memory at a time


class Source(NamedTuple):
    """Where rows come from, and the rows with their numbers from 1."""

    path: Path
    rows: Iterable[NumberedRow]


def open_split(task: Task, data_dir: str | Path | None, split: str) -> Source:
    """Finds a split; its file is read while the rows are taken.

    Raises:
        ValueError: The task is not on the hub, or the split exists in two forms.
        FileNotFoundError: The folder or the split is missing.
        RuntimeError: The hub cannot be reached, or its set does not load (at the first row).
    """
    if data_dir is None:
        return _open_on_hub(task, split)
    folder = Path(data_dir).expanduser() / task.folder
    if not folder.is_dir():
        advice = nearest(folder.name, [path.name for path in folder.parent.glob("*")])
        raise FileNotFoundError(f"task {task.name}: no folder {folder}{advice}")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    found = [path for path in files if _split_of(path) == split]
    if len(found) > 1:
        both = " and ".join(path.name for path in found)
        raise ValueError(f"task {task.name}: {folder} has {both}; keep one of them")
    if found:
        return Source(found[0], open_rows(found[0]))
    names = task.line_file.names if task.line_file else ()
    whole = next((folder / name for name in names if (folder / name).is_file()), None)
    if task.line_file and task.cut and whole and split in _CUT_SPLITS:
        rows = list(_line_rows(whole, task.line_file))
        return Source(whole, _part(rows, task.cut, split, whole))
    splits = [name for path in files if (name := _split_of(path)) is not None]
    there = ", ".join(sorted([*splits, *(_CUT_SPLITS if whole else ())])) or "none"
    endings = ", ".join(_READERS)
    unread = [path.name for path in files if path.name.startswith(f"{split}.")]
    not_read = f"; {', '.join(unread)} ends in none of these" if unread else ""
    raise FileNotFoundError(
        f"task {task.name}: {folder} has no split {split!r} ({endings}){not_read}; the splits"
        f" there: {there}"
    )


def _ending_of(path: Path) -> str | None:
    name = path.name.lower()
    return next((ending for ending in _READERS if name.endswith(ending)), None)


def _split_of(path: Path) -> str | None:
    """The split in a file's name; None for a file of no known form."""
    ending = _ending_of(path)
    return None if ending is None else path.name[: -len(ending)]


def open_rows(path: Path) -> Iterator[NumberedRow]:
    """The rows of a file of any size, in the form of its ending, read as they are taken.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The ending belongs to none of the forms, or (when it is reached) a row is wrong.
    """
    ending = _ending_of(path)
    if ending is None:
        raise ValueError(f"{path} ends in none of {', '.join(_READERS)}")
    if not path.is_file():
        there = [file.name for file in path.parent.glob("*")] if path.parent.is_dir() else []
        raise FileNotFoundError(f"no file {path}{nearest(path.name, there)}")
    return _READERS[ending](path)


def _jsonl_rows(path: Path) -> Iterator[NumberedRow]:
    try:
        for number, line, _ in lines_of(path):
            if not line.isspace():
                yield number, _json_object(line, path, number)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is no whole gzip file ({first_line(error)})") from None


def _json_object(line: bytes, path: Path, number: int) -> Mapping[str, object]:
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: no UTF-8 at byte {error.start} of the line") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}:{number}: no JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{path}:{number}: a JSON {type(row).__name__}, not an object")
    return row


def _json_rows(path: Path) -> Iterator[NumberedRow]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON ({error}); lines of objects end in .jsonl") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: a JSON {type(rows).__name__}, not an array of objects")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: a JSON {type(row).__name__}, not an object")
        yield number, row


def _csv_rows(path: Path) -> Iterator[NumberedRow]:
    # Limit of the process; the default of 128 kB is less than a report has.
    csv.field_size_limit(_LONGEST_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        names: list[str] = []
        number = 1
        try:
            for values in rows:
                if not names:
                    names = values
                    if twice := [name for name in names if names.count(name) > 1]:
                        raise ValueError(f"{path}:1: the header has {twice[0]!r} twice")
                elif len(values) > len(names):
                    raise ValueError(f"{path}:{number}: more values than the header has names")
                elif values:
                    # Values may be fewer: the columns without one are missing from the row.
                    yield number, dict(zip(names, values, strict=False))
                number = rows.line_num + 1
        except UnicodeDecodeError:
            raise ValueError(not_utf8(path)) from None
        except csv.Error as error:
            raise ValueError(f"{path}:{number}: no CSV ({error})") from None


def _parquet_rows(path: Path) -> Iterator[NumberedRow]:
    # Installed with `datasets`, and only this form of file needs it.
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no whole Parquet file ({first_line(error)})") from None
    number = 0
    with file:
        batches = file.iter_batches(_PARQUET_ROWS)
        while True:
            try:
                rows = next(batches).to_pylist()
            except StopIteration:
                return
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"{path}: damaged behind row {number} ({first_line(error)})"
                ) from None
            for row in rows:
                number += 1
                yield number, row


_LONGEST_FIELD = 2**31 - 1
_READERS: Mapping[str, Callable[[Path], Iterator[NumberedRow]]] = {
    ".jsonl": _jsonl_rows,
    ".jsonl.gz": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}


def _line_rows(path: Path, line_file: LineFile) -> Iterator[NumberedRow]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("iso-8859-1")
    # Not splitlines: in ISO-8859-1 it would split at the bytes 0x1C to 0x1E and 0x85 too.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        values = line.rsplit(line_file.separator, len(line_file.columns) - 1)
        if len(values) != len(line_file.columns):
            form = line_file.separator.join(line_file.columns)
            raise ValueError(f"{path}:{number}: not of the form {form}")
        yield number, dict(zip(line_file.columns, values, strict=True))


def _part(rows: Sequence[NumberedRow], cut: Cut, split: str, path: Path) -> Iterator[NumberedRow]:
    # Its import takes two seconds, which the other forms of file do not need.
    from datasets import Dataset  # type: ignore[import-untyped]

    if math.ceil(len(rows) * cut.test_size) >= len(rows):
        raise ValueError(f"{path}: {len(rows)} rows are too few for train and test")
    indices = Dataset.from_dict({"index": list(range(len(rows)))})
    parts = indices.train_test_split(test_size=cut.test_size, seed=cut.seed)
    return (rows[index] for index in parts[split]["index"])


def _open_on_hub(task: Task, split: str) -> Source:
    hub = task.hub
    if hub is None:
        raise ValueError(f"task {task.name} names no data set on the hub; give data_dir")
    splits = _CUT_SPLITS if task.cut else tuple(hub.splits)
    if split not in splits:
        there = ", ".join(splits)
        raise ValueError(f"task {task.name}: {hub.name} has no split {split!r}, only {there}")
    path = Path(hub.name, hub.config or hub.data_dir or "", split)
    if task.cut is None:
        return Source(path, _hub_rows(hub, hub.splits[split]))
    (whole,) = hub.splits.values()
    return Source(path, _part(list(_hub_rows(hub, whole)), task.cut, split, path))


def _hub_rows(hub: Hub, split: str) -> Iterator[NumberedRow]:
    from datasets import load_dataset

    try:
        rows = load_dataset(
            hub.name, hub.config, data_dir=hub.data_dir, revision=hub.revision, split=split
        )
    except Exception as error:
        raise RuntimeError(
            f"{hub.name} cannot be had from the Hugging Face hub ({first_line(error)}); "
            "give data_dir to read local files"
        ) from error
    yield from enumerate(rows, start=1)
