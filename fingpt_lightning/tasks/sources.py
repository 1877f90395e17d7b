"""Rows as a task's files or the hub hold them, before they are interpreted."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fingpt_lightning.tasks.row_files import (
    NumberedRow,
    check_csv_settings,
    ending_of,
    endings,
    open_rows,
)
from fingpt_lightning.tasks.task import FILE_NAME, Cut, Hub, LineFile, Task
from fingpt_lightning.terminal.messages import first_line, nearest

_CUT_SPLITS = ("train", "test")


class Source(NamedTuple):
    """Where rows come from, and the rows with their numbers from 1."""

    path: Path
    rows: Iterable[NumberedRow]


def open_split(
    task: Task,
    data_dir: str | Path | None,
    split: str,
    *,
    separator: str | None = None,
    encoding: str | None = None,
) -> Source:
    """Finds a split; its file is read while the rows are taken.

    Args:
        task: Task whose split it is.
        data_dir: Folder of all sets; None reads from the hub.
        split: Name of the split.
        separator: Separator of its CSV file, in place of the task's.
        encoding: Encoding of its CSV file, in place of the task's.

    Raises:
        ValueError: The task is not on the hub, the split exists in two forms, or a setting of CSV
            files has no effect.
        FileNotFoundError: The folder or the split is missing.
        RuntimeError: The hub cannot be reached, or its set does not load (at the first row).
    """
    if data_dir is None:
        for key, value in (("separator", separator), ("encoding", encoding)):
            if value is not None:
                raise ValueError(f"{key} {value!r} has an effect with data_dir alone")
        return _open_on_hub(task, split)
    folder = find_folder(task, data_dir)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    found = [path for path in files if _split_of(path) == split]
    if len(found) > 1:
        both = " and ".join(path.name for path in found)
        raise ValueError(f"task {task.name}: {folder} has {both}; keep one of them")
    if found:
        return Source(found[0], open_file(task, found[0], separator, encoding).rows)
    published = [folder / name for name in task.files.get(split, ())]
    if found := [path for path in published if path.is_file()]:
        parts = [open_file(task, path, separator, encoding).rows for path in found]
        return Source(found[0] if len(found) == 1 else folder, itertools.chain.from_iterable(parts))
    names = task.line_file.names if task.line_file else ()
    whole = next((folder / name for name in names if (folder / name).is_file()), None)
    if task.line_file and task.cut and whole and split in _CUT_SPLITS:
        if ending_of(whole) is None:
            check_csv_settings(whole, separator, encoding)
            rows = list(_line_rows(whole, task.line_file))
        else:
            rows = list(open_file(task, whole, separator, encoding).rows)
        return Source(whole, _part(rows, task.cut, split, whole))
    there = ", ".join(splits_in(task, data_dir)) or "none"
    unread = [path.name for path in files if path.name.startswith(f"{split}.")]
    not_read = f"; {', '.join(unread)} ends in none of these" if unread else ""
    raise FileNotFoundError(
        f"task {task.name}: {folder} has no split {split!r} ({endings()}){not_read}; the splits"
        f" there: {there}"
    )


def find_folder(task: Task, data_dir: str | Path) -> Path:
    """The folder of a task's files.

    Raises:
        FileNotFoundError: There is none.
    """
    folder = Path(data_dir).expanduser() / task.folder
    if not folder.is_dir():
        advice = nearest(folder.name, [path.name for path in folder.parent.glob("*")])
        raise FileNotFoundError(f"task {task.name}: no folder {folder}{advice}")
    return folder


def splits_in(task: Task, data_dir: str | Path) -> list[str]:
    """The splits of a task that a data folder holds, sorted."""
    folder = Path(data_dir).expanduser() / task.folder
    files = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    whole = task.line_file.names if task.line_file else ()
    published = {name: split for split, names in task.files.items() for name in names}
    splits = {published.get(path.name, _split_of(path)) for path in files if path.name not in whole}
    if task.cut and any(path.name in whole for path in files):
        splits |= set(_CUT_SPLITS)
    return sorted(split for split in splits if split is not None)


def open_file(task: Task, path: Path, separator: str | None, encoding: str | None) -> Source:
    """A file of a task's rows, whatever its name; it is read while the rows are taken.

    Raises:
        ValueError: Its ending belongs to no form, or a setting of CSV files has no effect.
        FileNotFoundError: It is missing.
    """
    check_csv_settings(path, separator, encoding)
    rows = open_rows(path, task.csv.overridden(separator, encoding))
    if not task.files:
        return Source(path, rows)
    return Source(path, ((number, {FILE_NAME: path.name, **row}) for number, row in rows))


def _split_of(path: Path) -> str | None:
    """The split in a file's name; None for a file of no known form."""
    ending = ending_of(path)
    return None if ending is None else path.name[: -len(ending)]


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
