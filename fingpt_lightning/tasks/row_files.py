"""Files of rows: JSON lines and arrays, CSV, Parquet and Excel, read as the rows are taken.

A file is read in memory that does not grow with it, but for Excel's and one value of JSON, and a
line or value is not longer than `MAX_LINE_BYTES`.
"""

import codecs
import csv
import glob
import itertools
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from fingpt_lightning.files import (
    DAMAGED,
    MAX_LINE_BYTES,
    ROW_DECODER,
    DuplicateKeyError,
    check_unpacked,
    lines_of,
    unpacked,
)
from fingpt_lightning.terminal.messages import first_line, nearest, nearest_name
from fingpt_lightning.terminal.shapes import kind_of
from fingpt_lightning.units import format_bytes

NumberedRow = tuple[int, Mapping[str, object]]

_PARQUET_ROWS = 1024  # in memory at a time
_CHUNK_BYTES = 2**18
_SEPARATORS = ",;\t|"
"""What separates the values of CSV files, the usual one first."""
_PACKED = (".gz", ".zst")
_BLANKS = re.compile(r"[ \t\r\n]*")
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\n|\r(?=.))", re.DOTALL)
"""A line with its end; the line end of two characters may not have been read whole."""
_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class CsvForm(NamedTuple):
    """What a CSV file does not say of itself.

    Args:
        separator: Character between values; None is a tab in ``.tsv``, and in ``.csv`` the comma,
            or the only one of ``;``, tab and ``|`` in a first line without a comma.
        encoding: Encoding; None is that of the byte order mark, else UTF-8.
        fallback: Encoding of files that are not UTF-8 where ``encoding`` is None.
        columns: Columns of files without a header: those whose first row is none of ``headers``.
        headers: Sets of columns that make a first row a header.
    """

    separator: str | None = None
    encoding: str | None = None
    fallback: str | None = None
    columns: tuple[str, ...] = ()
    headers: tuple[frozenset[str], ...] = ()

    def overridden(self, separator: str | None, encoding: str | None) -> "CsvForm":
        """The form with what a user has set."""
        return self._replace(
            separator=separator or self.separator, encoding=encoding or self.encoding
        )


def checked_separator(text: str) -> str:
    r"""The character that a setting names.

    Args:
        text: The character, or ``\t`` or ``tab`` for a tab.

    Raises:
        ValueError: It is not one character that can separate values.

    >>> checked_separator("tab") == checked_separator(r"\t") == "\t"
    True
    """
    character = {"\\t": "\t", "tab": "\t"}.get(text, text)
    if len(character) != 1 or character in '"\r\n\0':
        raise ValueError(f"separator {text!r} is not one character such as , ; | or tab")
    return character


def checked_encoding(name: str) -> str:
    """The name of an encoding, where Python knows it.

    Raises:
        ValueError: It is not known, or not one of texts.
    """
    try:
        "a".encode(name)
    except (LookupError, ValueError):
        raise ValueError(
            f"encoding {name!r} is not known; such as utf-8, utf-16, iso-8859-1 or cp1252"
        ) from None
    return name


def ending_of(path: Path) -> str | None:
    """The ending of a file that can be read, in lower case; None for another."""
    name = path.name.lower()
    return next((ending for ending in READERS if name.endswith(ending)), None)


def endings() -> str:
    """The endings of the files that can be read, for messages."""
    plain = [ending for ending in READERS if not ending.endswith(_PACKED)]
    return f"{', '.join(plain)}, or .gz or .zst after those of text"


def is_csv(path: Path) -> bool:
    """Whether separator and encoding have an effect on a file."""
    return (ending_of(path) or "").startswith((".csv", ".tsv"))


def open_rows(path: Path, form: CsvForm | None = None) -> Iterator[NumberedRow]:
    """The rows of a file of any size, in the form of its ending, read as they are taken.

    Args:
        path: File whose name ends in one of `READERS`.
        form: Form of a CSV file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The ending belongs to none of the forms, or (when it is reached) a row is wrong.
        ImportError: An Excel file, and the package openpyxl is not installed.
    """
    ending = ending_of(path)
    if ending is None:
        old = "; save it as .xlsx" if path.suffix.lower() == ".xls" else ""
        raise ValueError(f"{path} ends in none of {endings()}{old}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file")
    if not path.is_file():
        there = [file.name for file in path.parent.glob("*")] if path.parent.is_dir() else []
        raise FileNotFoundError(f"no file {path}{nearest(path.name, there)}")
    return READERS[ending](path, form or CsvForm())


def find_row_files(paths: str | Sequence[str], key: str) -> tuple[Path, ...]:
    """The files that paths, folders and globs stand for, each once.

    Args:
        paths: One or more files, folders (their own files, sorted) or globs.
        key: Setting that the paths come from, for the messages.

    Raises:
        FileNotFoundError: A file is missing, or a folder or glob has none that can be read.
        ValueError: No path is given, or a file's ending belongs to none of the forms.
    """
    found: list[Path] = []
    for text in [paths] if isinstance(paths, str) else paths:
        path = Path(text).expanduser()
        if path.is_dir() or glob.has_magic(text):
            each = path.iterdir() if path.is_dir() else map(Path, glob.glob(str(path)))  # noqa: PTH207
            files = sorted(file for file in each if file.is_file() and ending_of(file))
            if not files:
                raise FileNotFoundError(f"{key}: {path} has no file that ends in {endings()}")
            found += files
        elif not text or not path.exists():
            raise FileNotFoundError(f"{key}: {path} does not exist{nearest_name(path)}")
        elif ending_of(path) is None:
            raise ValueError(f"{key}: {path} ends in none of {endings()}")
        else:
            found.append(path)
    if not found:
        raise ValueError(f"{key}: no path is given")
    return tuple(dict.fromkeys(found))


def check_csv_settings(path: Path, separator: str | None, encoding: str | None) -> None:
    """Refuses settings of CSV files for a file that has none of its own.

    Raises:
        ValueError: One is given, and the file is not ``.csv`` or ``.tsv``; or its value is wrong.
    """
    for name, value, check in (
        ("separator", separator, checked_separator),
        ("encoding", encoding, checked_encoding),
    ):
        if value is not None:
            check(value)
            if not is_csv(path):
                raise ValueError(
                    f"{name} {value!r} has an effect on .csv and .tsv alone, not on {path}"
                )


def _jsonl_rows(path: Path, form: CsvForm) -> Iterator[NumberedRow]:
    if _begins_with(path) == "[":
        yield from _array_rows(path)
        return
    try:
        for number, line, _ in lines_of(path):
            if not line.isspace():
                yield number, _json_object(line, path, number)
    except DAMAGED as error:
        _raise_damaged(path, error)


def _json_object(line: bytes, path: Path, number: int) -> Mapping[str, object]:
    try:
        row = ROW_DECODER.decode(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: no UTF-8 at byte {error.start} of the line") from None
    except DuplicateKeyError as error:
        raise ValueError(f"{path}:{number}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}:{number}: no JSON ({error})") from None
    return _checked_object(row, f"{path}:{number}")


def _checked_object(row: object, place: str) -> Mapping[str, object]:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: it holds {kind_of(row)}, not an object")
    return row


def _json_rows(path: Path, form: CsvForm) -> Iterator[NumberedRow]:
    """An array of objects, an object of objects (a key per row), or lines of objects."""
    first = _begins_with(path)
    if first == "[":
        return _array_rows(path)
    if first == "{" and _is_object_of_objects(path):
        return _named_rows(path)
    return _jsonl_rows(path, form)


def _begins_with(path: Path) -> str:
    """The first character that is not blank; nothing where there is none early on."""
    return _start(path).lstrip()[:1]


def _is_object_of_objects(path: Path) -> bool:
    return re.match(r'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*\{', _start(path)) is not None


def _start(path: Path, num_bytes: int = 2**12) -> str:
    try:
        with unpacked(path) as (file, _):
            start = file.read(num_bytes)
    except DAMAGED as error:
        _raise_damaged(path, error)
    return start.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace")


def _array_rows(path: Path) -> Iterator[NumberedRow]:
    values = _JsonValues(path)
    values.take("[")
    for number in values.numbers_until("]"):
        yield number, _checked_object(values.next(), f"{path}:{number}")


def _named_rows(path: Path) -> Iterator[NumberedRow]:
    values = _JsonValues(path)
    values.take("{")
    for number in values.numbers_until("}"):
        key = values.next()
        values.take(":")
        yield number, _checked_object(values.next(), f"{path}: row {key!r}")


class _JsonValues:
    """The values of a JSON file, which is read in parts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._parts = _decoded(path, "utf-8-sig")
        self._text, self._place, self._line, self._is_whole = "", 0, 1, False

    def numbers_until(self, end: str) -> Iterator[int]:
        """Counts values between commas from 1 until the end of file; each has to be taken."""
        number = 0
        is_done = self._takes(end)
        while not is_done:
            number += 1
            yield number
            is_done = self._takes(end)
            if not is_done:
                self.take(",")
        self._skip_blanks()
        if self._place < len(self._text):
            self._fail("Extra data")

    def take(self, character: str) -> None:
        """Goes behind a character, which has to be next."""
        if not self._takes(character):
            self._fail(f"Expecting {character!r}")

    def next(self) -> object:
        """The next value."""
        wanted = _CHUNK_BYTES
        self._skip_blanks()
        while True:
            try:
                value, end = ROW_DECODER.raw_decode(self._text, self._place)
            except DuplicateKeyError as error:
                raise ValueError(f"{self._path}:{self._line}: {error}") from None
            except RecursionError as error:
                self._fail(str(error))
            except ValueError as error:  # perhaps because its end has not been read
                if self._is_whole:
                    self._fail(getattr(error, "msg", str(error)), getattr(error, "pos", 0))
                if len(self._text) - self._place > MAX_LINE_BYTES:
                    self._fail(f"a value longer than {format_bytes(MAX_LINE_BYTES)}")
                self._read(wanted)
                wanted *= 2
                continue
            self._go_to(end)
            return value

    def _takes(self, character: str) -> bool:
        self._skip_blanks()
        found = self._text.startswith(character, self._place)
        if found:
            self._place += 1
        return found

    def _skip_blanks(self) -> None:
        while True:
            found = _BLANKS.match(self._text, self._place)
            assert found is not None  # it matches nothing too
            self._go_to(found.end())
            if self._place < len(self._text) or self._is_whole:
                return
            self._read(_CHUNK_BYTES)

    def _go_to(self, place: int) -> None:
        self._line += self._text.count("\n", self._place, place)
        self._place = place

    def _read(self, num_characters: int) -> None:
        parts = [self._text[self._place :]]
        self._place = 0
        while num_characters > 0 and not self._is_whole:
            part = next(self._parts, "")
            self._is_whole = not part
            num_characters -= len(part)
            parts.append(part)
        self._text = "".join(parts)

    def _fail(self, reason: str, place: int | None = None) -> NoReturn:
        line = self._line + self._text.count("\n", self._place, place or self._place)
        raise ValueError(f"{self._path}: no JSON ({reason} in line {line})")


def _decoded(path: Path, encoding: str) -> Iterator[str]:
    """The text of a file in parts, none of them empty.

    Raises:
        ValueError: It is not of that encoding, or packed and damaged or a bomb.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    position = 0
    with unpacked(path) as (file, bytes_read):
        while True:
            try:
                data = file.read(_CHUNK_BYTES)
            except DAMAGED as error:
                _raise_damaged(path, error)
            num_pending = len(decoder.getstate()[0])
            wrong = None
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeError as error:
                wrong = getattr(error, "start", 0) - num_pending
                text = decoder.decode(data[: max(wrong, 0)])
            if text:
                yield text
            if wrong is not None:
                raise _UndecodedError(path, encoding, position + wrong)
            if not data:
                return
            position += len(data)
            check_unpacked(str(path), position, bytes_read())


class _UndecodedError(ValueError):
    """Text that is not of an encoding."""

    def __init__(self, path: Path, encoding: str, position: int) -> None:
        name = "UTF-8" if encoding.startswith("utf-8") else encoding
        super().__init__(f"{path}: no {name} at byte {position}")
        self.position, self.encoding = position, name


def _csv_rows(path: Path, form: CsvForm) -> Iterator[NumberedRow]:
    encoding = _encoding_of(path, form)
    lines = _lines(path, encoding)
    first = next(lines, "")
    separator = form.separator or _separator_of(path, first)
    # A limit of the process; the default of 128 kB is less than a report has.
    csv.field_size_limit(MAX_LINE_BYTES)
    rows = csv.reader(itertools.chain([first], lines), strict=True, delimiter=separator)
    names: list[str] = []
    number = 1
    try:
        for values in rows:
            if not names and values:
                names, is_header = _columns_of(values, form)
                if twice := [name for name in names if names.count(name) > 1]:
                    raise ValueError(f"{path}:1: the header has {twice[0]!r} twice")
                if is_header:
                    number = rows.line_num + 1
                    continue
            if len(values) > len(names):
                more = f"{len(values)} values, more than the header's {len(names)} names"
                raise ValueError(f"{path}:{number}: {more}{_guessed(form, separator)}")
            if values:
                # Values may be fewer: the columns without one are missing from the row.
                yield number, dict(zip(names, values, strict=False))
            number = rows.line_num + 1
    except _UndecodedError as error:
        raise ValueError(
            f"{path}:{number}: no {error.encoding} text at byte {error.position} of the file"
            + ("" if form.encoding else "; set encoding, such as cp1252 or iso-8859-1")
        ) from None
    except csv.Error as error:
        raise ValueError(f"{path}:{number}: no CSV ({error}){_guessed(form, separator)}") from None


def _guessed(form: CsvForm, separator: str) -> str:
    named = "tab" if separator == "\t" else repr(separator)
    return "" if form.separator else f"; the separator is taken to be {named}"


def _columns_of(first: list[str], form: CsvForm) -> tuple[list[str], bool]:
    """The columns of a file, and whether its first row is their header."""
    is_header = not form.columns or any(names <= set(first) for names in form.headers)
    if is_header or len(first) != len(form.columns):
        return first, True
    return list(form.columns), False


def _separator_of(path: Path, first: str) -> str:
    if (ending_of(path) or "").startswith(".tsv"):
        return "\t"
    unquoted = _QUOTED.sub("", first)
    found = [character for character in _SEPARATORS if character in unquoted]
    return found[0] if len(found) == 1 else _SEPARATORS[0]


def _encoding_of(path: Path, form: CsvForm) -> str:
    if form.encoding is not None:
        return form.encoding
    try:
        with unpacked(path) as (file, _):
            start = file.read(4)
    except DAMAGED as error:
        _raise_damaged(path, error)
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if start.startswith(mark):
            return encoding
    if form.fallback is not None:
        try:
            for _ in _decoded(path, "utf-8"):
                pass
        except _UndecodedError:
            return form.fallback
    return "utf-8"


def _lines(path: Path, encoding: str) -> Iterator[str]:
    """The lines of a text, with their ends."""
    number = 1
    parts: list[str] = []
    for part in _decoded(path, encoding):
        parts.append(part)
        if "\n" in part or "\r" in part:
            text = "".join(parts)
            end = 0
            for found in _LINE.finditer(text):
                number += 1
                yield found[0]
                end = found.end()
            parts = [text[end:]]
        if sum(map(len, parts)) > MAX_LINE_BYTES:
            limit = format_bytes(MAX_LINE_BYTES)
            raise ValueError(f"{path}:{number}: the line is longer than {limit}")
    rest = "".join(parts)
    before, joint, after = rest.partition("\r")
    yield from filter(None, (before + joint, after))


def _raise_damaged(path: Path, error: BaseException) -> NoReturn:
    kind = "Zstandard" if path.suffix.lower() == ".zst" else "gzip"
    raise ValueError(f"{path} is not a whole {kind} file ({first_line(error)})") from None


def _parquet_rows(path: Path, form: CsvForm) -> Iterator[NumberedRow]:
    # Installed with `datasets`, and only this form of file needs it.
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a whole Parquet file ({first_line(error)})") from None
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


def _excel_rows(path: Path, form: CsvForm) -> Iterator[NumberedRow]:
    """The rows of the first sheet; its first row that is not empty is the header."""
    try:
        import openpyxl
    except ImportError:
        raise ImportError(
            f"{path}: Excel files need the package openpyxl: pip install 'fingpt-lightning[excel]'"
        ) from None
    try:
        with zipfile.ZipFile(path) as packed:
            num_bytes = sum(part.file_size for part in packed.infolist())
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:  # of many kinds, and all mean that the file is wrong
        raise ValueError(f"{path} is not a whole Excel file ({first_line(error)})") from None
    names: list[str] = []
    try:
        check_unpacked(str(path), num_bytes, path.stat().st_size)
        for number, cells in enumerate(_cells(path, book), start=1):
            values = [*cells]
            while values and values[-1] in (None, ""):
                del values[-1]
            if not names:
                names = ["" if value is None else str(value) for value in values]
                if twice := [name for name in names if name and names.count(name) > 1]:
                    raise ValueError(f"{path}:{number}: the header has {twice[0]!r} twice")
            elif len(values) > len(names):
                raise ValueError(
                    f"{path}:{number}: {len(values)} values, more than the header's {len(names)}"
                )
            elif values:
                values += [None] * (len(names) - len(values))
                yield number, {n: v for n, v in zip(names, values, strict=True) if n}
    finally:
        book.close()


def _cells(path: Path, book: Any) -> Iterator[tuple[object, ...]]:
    rows = book.worksheets[0].iter_rows(values_only=True)
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # of many kinds, and all mean that the file is wrong
            raise ValueError(f"{path} is not a whole Excel file ({first_line(error)})") from None
        if row is None:
            return
        yield row


_OPENERS: Mapping[str, Callable[[Path, CsvForm], Iterator[NumberedRow]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
}
READERS: Mapping[str, Callable[[Path, CsvForm], Iterator[NumberedRow]]] = {
    **{
        f"{ending}{packed}": opener
        for ending, opener in _OPENERS.items()
        for packed in ("", *_PACKED)
    },
    ".parquet": _parquet_rows,
    ".xlsx": _excel_rows,
}
"""The reader of each kind of file, by the ending of its name."""
