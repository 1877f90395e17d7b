"""Rows as a task's files or the hub hold them, before they are interpreted."""

import functools
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
    """Where rows come from.

    Args:
        path: File or folder; for the hub, its name, config and split.
        rows: Rows with their numbers from 1.
        split_rule: Rule that selects the rows of the split, for results that name it.
    """

    path: Path
    rows: Iterable[NumberedRow]
    split_rule: str


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
    if task.cut and task.cut.splits:
        return _cut_anew(task, task.cut, data_dir, split, separator, encoding)
    return _open_in_folder(task, folder, data_dir, split, separator, encoding)


def _cut_anew(
    task: Task,
    cut: Cut,
    data_dir: str | Path,
    split: str,
    separator: str | None,
    encoding: str | None,
) -> Source:
    """A part of the set's own splits, which are put together and cut."""
    whole = f"splits {' + '.join(cut.splits)}"
    if split not in _CUT_SPLITS:
        raise FileNotFoundError(
            f"task {task.name} has no split {split!r}, only {' and '.join(_CUT_SPLITS)}: its"
            f" {whole} are cut anew"
        )
    folder = task.folder_in(Path(data_dir).expanduser())
    rows: list[NumberedRow] = []
    for own in cut.splits:
        # Rows are numbered through, so that a number names one row.
        source = _open_in_folder(task, folder, data_dir, own, separator, encoding)
        rows += [(len(rows) + place, row) for place, (_, row) in enumerate(source.rows, start=1)]
    return Source(folder, _part(rows, cut, split, folder), _cut_rule(cut, whole))


def _open_in_folder(
    task: Task,
    folder: Path,
    data_dir: str | Path,
    split: str,
    separator: str | None,
    encoding: str | None,
) -> Source:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    found = [path for path in files if _split_of(path) == split]
    if len(found) > 1:
        both = " and ".join(path.name for path in found)
        raise ValueError(f"task {task.name}: {folder} has {both}; keep one of them")
    if found:
        return open_file(task, found[0], separator, encoding)
    published = [folder / name for name in task.files.get(split, ())]
    if found := [path for path in published if path.is_file()]:
        parts = [open_file(task, path, separator, encoding).rows for path in found]
        whole_rows = itertools.chain.from_iterable(parts)
        path = found[0] if len(found) == 1 else folder
        return Source(path, whole_rows, f"all rows of {' and '.join(one.name for one in found)}")
    names = task.line_file.names if task.line_file else ()
    whole = next((folder / name for name in names if (folder / name).is_file()), None)
    if task.line_file and task.cut and whole and split in _CUT_SPLITS:
        if ending_of(whole) is None:
            check_csv_settings(whole, separator, encoding)
            rows = list(_line_rows(whole, task.line_file))
        else:
            rows = list(open_file(task, whole, separator, encoding).rows)
        return Source(whole, _part(rows, task.cut, split, whole), _cut_rule(task.cut, whole.name))
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
    folder = task.folder_in(Path(data_dir).expanduser())
    if not folder.is_dir():
        advice = nearest(folder.name, [path.name for path in folder.parent.glob("*")])
        raise FileNotFoundError(f"task {task.name}: no folder {folder}{advice}")
    return folder


def splits_in(task: Task, data_dir: str | Path) -> list[str]:
    """The splits of a task that a data folder holds, sorted."""
    folder = task.folder_in(Path(data_dir).expanduser())
    files = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    whole = task.line_file.names if task.line_file else ()
    published = {name: split for split, names in task.files.items() for name in names}
    if task.cut and task.cut.splits:
        there = {_split_of(path) for path in files}
        return sorted(_CUT_SPLITS) if there >= set(task.cut.splits) else []
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
        return Source(path, rows, f"all rows of {path.name}")
    named = ((number, {FILE_NAME: path.name, **row}) for number, row in rows)
    return Source(path, named, f"all rows of {path.name}")


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
        rule = f"split {hub.splits[split]} of {_named(hub)}"
        return Source(path, _hub_rows(hub, hub.splits[split]), rule)
    names = task.cut.splits or tuple(hub.splits)
    whole = [hub.splits[name] for name in names]
    every = (row for name in whole for _, row in _hub_rows(hub, name))
    rows = _part(list(enumerate(every, start=1)), task.cut, split, path)
    what = f"split{'s' if len(whole) > 1 else ''} {' + '.join(whole)} of {_named(hub)}"
    return Source(path, rows, _cut_rule(task.cut, what))


def _named(hub: Hub) -> str:
    parts = (hub.name, hub.config or hub.data_dir, hub.revision and f"at {hub.revision}")
    return " ".join(part for part in parts if part)


def _cut_rule(cut: Cut, what: str) -> str:
    return f"train_test_split(test_size={cut.test_size}, seed={cut.seed}) of {what}"


@functools.cache
def _reason_of_hub(name: str, revision: str | None) -> str | None:
    """Why the hub does not give a data set; None where it does. Asked once per process."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(name, revision=revision, timeout=10)
    except Exception as error:  # of many libraries; each means that it cannot be had
        return first_line(error)
    return None


def _hub_rows(hub: Hub, split: str) -> Iterator[NumberedRow]:
    import datasets

    reason = _reason_of_hub(hub.name, hub.revision)
    was_offline = datasets.config.HF_HUB_OFFLINE
    # Without it loading repeats each failed request for half a minute before it reads its cache.
    datasets.config.HF_HUB_OFFLINE = was_offline or reason is not None
    try:
        rows = datasets.load_dataset(
            hub.name, hub.config, data_dir=hub.data_dir, revision=hub.revision, split=split
        )
    except Exception as error:
        raise RuntimeError(
            f"{hub.name} cannot be had from the Hugging Face hub ({reason or first_line(error)}); "
            "give data_dir to read local files"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
    yield from enumerate(rows, start=1)
