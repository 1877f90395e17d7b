"""An output file that grows in parts, so that a run that was killed resumes where it was.

The parts lie in a folder beside the file that one process owns; each is written to a temporary
file and renamed: their number is the position. In the end they become the file and their folder
is removed.
"""

import csv
import datetime
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from fingpt_lightning.files import (
    WHOLE,
    check_settings,
    clear_finished,
    clear_owned,
    mark_finished,
    owned,
    parts_of,
    refuse_existing,
    remove_finished,
    sync_folder,
    written_whole,
)
from fingpt_lightning.terminal.messages import wrong_ending
from fingpt_lightning.terminal.shapes import kind_of

Row = Mapping[str, object]


class LabelledFile:
    """The rows of one output.

    Args:
        path: Path that ends in ``.csv``, ``.jsonl`` or ``.parquet``.
        settings: Settings that determine the rows, as JSON; parts of other settings are not
            continued.
        schema: Schema of the rows, for Parquet; None takes that of the first part.

    Raises:
        ValueError: The ending is not one of the three.
    """

    def __init__(self, path: Path, settings: Mapping[str, object], schema: Any = None) -> None:
        if path.suffix not in _FORMS:
            raise ValueError(f"output {wrong_ending(path, list(_FORMS))}")
        self.path, self._settings, self._schema = path, dict(settings), schema
        self.folder = parts_of(path)

    def check_replaceable(self, overwrite: bool) -> None:
        """Raises where the output may not be written.

        The parts of one that a killed process had finished are removed.

        Args:
            overwrite: Whether an existing output is deleted.

        Raises:
            OSError: The output exists already, or a part of its path is a file.
            ValueError: It is a folder.
        """
        try:
            refuse_existing(self.path, "output", overwrite)
        except FileExistsError:
            remove_finished(self.folder)
            raise

    @contextmanager
    def begun(self, overwrite: bool) -> Iterator[int]:
        """Makes the folder of parts, or finds that of an earlier run, and owns it until the end.

        A folder without a part counts as empty: whatever its settings, nothing is lost with it.

        Args:
            overwrite: Whether an existing output or existing parts are deleted.

        Yields:
            Number of parts that are whole.

        Raises:
            FileExistsError: The output exists already.
            InUseError: Another process writes this output.
            ValueError: The existing parts are of other settings.
        """
        self.check_replaceable(overwrite)
        with owned(self.folder):
            clear_finished(self.folder)
            if overwrite or not self._parts():
                clear_owned(self.folder)
            try:
                check_settings(self.folder, self._settings)
                yield len(self._parts())
            finally:
                if not self._parts():
                    clear_owned(self.folder)

    def add(self, number: int, rows: Sequence[Row], names: Sequence[str]) -> None:
        """Writes a part.

        Args:
            number: Number of the part, from 0.
            rows: Rows of the part, at least one.
            names: Names of all columns, in order.
        """
        with written_whole(self._part(number)) as aside:
            _FORMS[self.path.suffix](aside, rows, names, number == 0, self._schema)

    def finish(self) -> None:
        """Makes the output from the parts."""
        with written_whole(self.folder / WHOLE) as aside:
            join_parts(self._parts(), aside, self.path.suffix)
        mark_finished(self.folder)
        (self.folder / WHOLE).replace(self.path)
        sync_folder(self.path.parent)
        clear_owned(self.folder)

    def _part(self, number: int) -> Path:
        return part_in(self.folder, number)

    def _parts(self) -> list[Path]:
        """The parts up to the first that is not there."""
        return list(takewhile(Path.is_file, map(self._part, self._numbers())))

    def _numbers(self) -> Iterable[int]:
        """The numbers of all parts, in order, without end."""
        return count()


def part_in(folder: Path, number: int) -> Path:
    """The file of a part in its folder."""
    return folder / f"{number:07}.part"


def join_parts(parts: Sequence[Path], whole: Path, ending: str) -> None:
    """Writes one file of parts.

    Args:
        parts: Files of the parts in order, at least one.
        whole: File to write.
        ending: Ending of the form that the parts have.
    """
    if ending == ".parquet":
        _join_parquet(parts, whole)
        return
    with whole.open("wb") as joined:
        for part in parts:
            with part.open("rb") as opened:
                shutil.copyfileobj(opened, joined)


def check_writable(row: Row, ending: str) -> None:
    """Raises where a file of that ending cannot hold a row.

    Raises:
        ValueError: A value is not of the form's types; the message names its column.
    """
    if ending in _PLAIN:
        for name, value in row.items():
            _PLAIN[ending](name, value)


def _csv_value(name: str, value: object) -> object:
    """The content of a cell: nothing where a value is missing, truth values as in JSON."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple | dict):
        raise ValueError(
            f"column {name!r} holds {kind_of(value)}, which a cell of a .csv cannot; write"
            " .jsonl or .parquet"
        )
    return _json_value(name, value)


def _json_value(name: str, value: object) -> object:
    """The value in JSON's types: dates in ISO 8601, decimals as texts, NaN as null."""
    match value:
        case dict():
            return {key: _json_value(name, item) for key, item in value.items()}
        case list() | tuple():
            return [_json_value(name, item) for item in value]
        case float() if math.isnan(value):
            return None
        case float() if math.isinf(value):
            raise ValueError(f"column {name!r} holds {value}, which is not a finite number")
        case None | str() | int() | float():
            return value
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
        case Decimal():
            return str(value)
    raise ValueError(
        f"column {name!r} holds {kind_of(value)}, which is neither text nor number; write .parquet"
    )


_PLAIN: Mapping[str, Callable[[str, object], object]] = {
    ".csv": _csv_value,
    ".jsonl": _json_value,
}


def _write_csv(
    file: Path, rows: Sequence[Row], names: Sequence[str], is_first: bool, _: object
) -> None:
    with file.open("w", encoding="utf-8", newline="") as opened:
        # The end of a line of RFC 4180, because both its characters are quoted then: a text with a
        # bare carriage return would end its row.
        writer = csv.DictWriter(opened, names, lineterminator="\r\n")
        if is_first:
            writer.writeheader()
        writer.writerows(
            {name: _csv_value(name, value) for name, value in row.items()} for row in rows
        )


def _write_jsonl(
    file: Path, rows: Sequence[Row], names: Sequence[str], is_first: bool, _: object
) -> None:
    plain = ({name: _json_value(name, value) for name, value in row.items()} for row in rows)
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in plain)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _write_parquet(
    file: Path, rows: Sequence[Row], names: Sequence[str], is_first: bool, schema: Any
) -> None:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    if schema is None and not is_first:
        schema = parquet.read_schema(file.with_name(f"{0:07}.part"))
    whole = [{name: row.get(name) for name in names} for row in rows]
    try:
        table = pyarrow.Table.from_pylist(whole, schema=schema)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the rows do not fit the types of those before, which Parquet needs ({reason}); write"
            " .jsonl"
        ) from error
    parquet.write_table(table, file)


_FORMS: Mapping[str, Callable[[Path, Sequence[Row], Sequence[str], bool, Any], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}


def _join_parquet(parts: Sequence[Path], whole: Path) -> None:
    from pyarrow import parquet

    with parquet.ParquetWriter(whole, parquet.read_schema(parts[0])) as writer:
        for part in parts:
            writer.write_table(parquet.read_table(part, partitioning=None))
