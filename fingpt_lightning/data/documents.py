"""How each kind of file is read as documents, streamed in memory that does not grow with it."""

import codecs
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fingpt_lightning.data.corpus import OnBadRow, Piece
from fingpt_lightning.files import (
    DAMAGED,
    ROW_DECODER,
    DuplicateKeyError,
    check_unpacked,
    lines_of,
    unpacked,
)
from fingpt_lightning.terminal.messages import first_line, no_field
from fingpt_lightning.terminal.shapes import kind_of

_PIECE_BYTES = 2**20
_PARQUET_ROWS = 64
_LOOK_BACK = 3  # characters that decide whether a text may be cut at a place
# Byte-level BPE splits text before the last blank of a run of blanks. Cut at such a line end, the
# pieces have the tokens of the whole: either the line end is the whole run, or one blank follows.
_CLEAN_LINE_END = re.compile(r".*(?:(?<=\S)\n(?=\S)|\n(?=\s\S))", re.DOTALL)
# So they have where one blank begins a word: for lines that are too long to hold.
_WORD_START = re.compile(r".*\S(?= \S)", re.DOTALL)
_LONG_LINE_CHARACTERS = 8 * 2**20


class BadRowError(ValueError):
    """A row that holds no text while the rows after it can still be read."""


def jsonl_documents(path: Path, text_field: str, on_bad_row: OnBadRow) -> Iterator[Piece]:
    """Each line is a document; empty lines are skipped.

    Raises:
        ValueError: A line is not a JSON object, or its ``text_field`` is missing or not a text,
            and ``on_bad_row`` is ``error``; a line is too long, or packed data are damaged.
    """
    number = 0
    try:
        for number, line, bytes_read in lines_of(path):
            if not line.isspace():
                place = f"{path}:{number}"
                try:
                    row = _json_object(line, place)
                    document = document_of_row(row, text_field, place, bytes_read)
                except BadRowError as error:
                    document = skipped_row(error, on_bad_row, bytes_read)
                yield document
    except DAMAGED as error:
        raise ValueError(_damage(f"{path}:{number + 1}", error)) from None


def txt_pieces(path: Path, _: str, __: OnBadRow) -> Iterator[Piece]:
    """The file is one document, cut at line ends about every MiB, or within very long lines.

    Raises:
        ValueError: It is not UTF-8 text.
    """
    buffer = ""
    num_pieces = num_searched = bytes_read = 0
    for text, bytes_read in _decoded(path):
        buffer += text
        if len(buffer) < _PIECE_BYTES:
            continue
        cut = _cut_after_line(buffer, num_searched)
        if not cut and len(buffer) >= _LONG_LINE_CHARACTERS and not buffer.isspace():
            found = _WORD_START.match(buffer, num_searched)
            cut = found.end() if found else len(buffer)
        num_searched = 0 if cut else max(0, len(buffer) - _LOOK_BACK)
        if cut:
            yield Piece(buffer[:cut], False, bytes_read)
            num_pieces += 1
            buffer = buffer[cut:]
    yield Piece(buffer if num_pieces or not buffer.isspace() else "", True, bytes_read)


def short_pieces(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same documents in pieces of at most about a million characters.

    Longer documents are cut as text files are: at line ends, else where one blank begins a word,
    and where there is neither after a million characters. A tokenizer takes 50 bytes per character.
    """
    for piece in pieces:
        text = piece.text
        start = 0
        while len(text) - start > _PIECE_BYTES:
            window = text[start : start + _PIECE_BYTES]
            found = _CLEAN_LINE_END.match(window) or _WORD_START.match(window)
            length = found.end() if found else len(window)
            yield Piece(window[:length], False, piece.bytes_read)
            start += length
        yield piece._replace(text=text[start:]) if start else piece


def parquet_documents(path: Path, text_field: str, on_bad_row: OnBadRow) -> Iterator[Piece]:
    """Each row is a document; only the column of that name is read.

    Raises:
        ValueError: The file is not Parquet or has no such column, or a row holds no text there
            and ``on_bad_row`` is ``error``.
    """
    import pyarrow as pa  # type: ignore[import-untyped]  # it takes 0.1 s that few runs need
    from pyarrow import parquet

    number = 0
    size_bytes = path.stat().st_size
    try:
        with parquet.ParquetFile(path, buffer_size=_PIECE_BYTES, pre_buffer=False) as file:
            if text_field not in file.schema_arrow.names:
                raise ValueError(no_field(str(path), text_field, file.schema_arrow.names))
            num_rows = file.metadata.num_rows
            for batch in file.iter_batches(_PARQUET_ROWS, columns=[text_field], use_threads=False):
                for value in batch.column(0):
                    number += 1
                    place = f"{path}, row {number}"
                    bytes_read = size_bytes * number // num_rows
                    try:
                        row = {text_field: _python_value(value, place)}
                        document = document_of_row(row, text_field, place, bytes_read)
                    except BadRowError as error:
                        document = skipped_row(error, on_bad_row, bytes_read)
                    yield document
    except (pa.ArrowException, OSError) as error:
        place = f"{path}, row {number + 1}" if number else str(path)
        raise ValueError(f"{place}: no parquet data ({first_line(error)})") from None


READERS: dict[str, Callable[[Path, str, OnBadRow], Iterator[Piece]]] = {
    ".jsonl": jsonl_documents,
    ".jsonl.gz": jsonl_documents,
    ".jsonl.zst": jsonl_documents,
    ".txt": txt_pieces,
    ".txt.gz": txt_pieces,
    ".txt.zst": txt_pieces,
    ".parquet": parquet_documents,
}
"""The reader of each kind of file, by the ending of its name."""


def ending_of(path: Path) -> str | None:
    """The key of ``READERS`` that a file's name ends in, in capitals or not."""
    name = path.name.lower()
    return next((ending for ending in READERS if name.endswith(ending)), None)


def document_of_row(
    row: dict[str, object], text_field: str, place: str, bytes_read: int = 0
) -> Piece:
    """A document that is a whole row.

    Raises:
        BadRowError: ``text_field`` is missing or holds no text; the message starts with ``place``.
    """
    if text_field not in row:
        raise BadRowError(no_field(place, text_field, row))
    text = row[text_field]
    if not isinstance(text, str):
        kind = kind_of(text)
        raise BadRowError(f"{place}: field {text_field!r} holds {kind}, not a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(f"{place}: half a surrogate pair at character {error.start}") from None
    return Piece("" if text.isspace() else text, True, bytes_read)


def skipped_row(error: BadRowError, on_bad_row: OnBadRow, bytes_read: int = 0) -> Piece:
    """The piece that stands for a bad row, in its place among the documents.

    Raises:
        BadRowError: Bad rows are not skipped.
    """
    if on_bad_row == "error":
        raise error
    return Piece("", True, bytes_read, str(error))


def _python_value(value: Any, place: str) -> object:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        raise BadRowError(f"{place}: no UTF-8 text") from None


def _damage(place: str, error: Exception) -> str:
    return f"{place}: the packed data are damaged or cut off here ({first_line(error)})"


def _json_object(line: bytes, place: str) -> dict[str, object]:
    try:
        row = ROW_DECODER.decode(line.decode("utf-8-sig" if place.endswith(":1") else "utf-8"))
    except UnicodeDecodeError as error:
        raise BadRowError(f"{place}: no UTF-8 text at byte {error.start} of the line") from None
    except DuplicateKeyError as error:
        raise BadRowError(f"{place}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"{place}: no JSON ({error})") from None
    if not isinstance(row, dict):
        raise BadRowError(f"{place}: it holds {kind_of(row)}, not an object")
    return row


def _cut_after_line(text: str, start: int) -> int:
    """Where to cut, or 0 to read on: only the last line may still be open, so it is never cut.

    There is no such place before ``start``.
    """
    if text.isspace():
        return 0
    clean = _CLEAN_LINE_END.match(text, start) if text.find("\n", start) >= 0 else None
    return clean.end() if clean else text.rfind("\n", start, -1) + 1


def _decoded(path: Path) -> Iterator[tuple[str, int]]:
    """The text in parts, each with the bytes of the file itself read so far."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    position = 0
    with unpacked(path) as (file, bytes_read):
        while True:
            try:
                data = file.read(_PIECE_BYTES)
            except DAMAGED as error:
                raise ValueError(_damage(f"{path}, text byte {position}", error)) from None
            num_pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                place = position - num_pending + error.start
                raise ValueError(f"{path}: no UTF-8 text at byte {place}") from None
            if "\0" in text:
                raise ValueError(f"{path}: binary data, a zero byte at {position + data.find(0)}")
            yield text, bytes_read()
            if not data:
                return
            position += len(data)
            check_unpacked(str(path), position, bytes_read())
