"""Documents from ``.jsonl`` and ``.txt`` files, streamed in memory that does not grow with them."""

import codecs
import difflib
import functools
import glob
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fingpt_lightning.data.corpus import Piece

SUPPORTED_ENDINGS = (".jsonl", ".txt")

_PIECE_BYTES = 2**20
# Byte-level BPE splits text before the last blank of a run of blanks. Cut at such a line end, the
# pieces have the tokens of the whole: either the line end is the whole run, or one blank follows.
_CLEAN_LINE_END = re.compile(r".*(?:(?<=\S)\n(?=\S)|\n(?=\s\S))", re.DOTALL)


@dataclass(frozen=True)
class TextFiles:
    """The documents of some files: each line of a ``.jsonl``, and each ``.txt`` as a whole."""

    paths: tuple[Path, ...]
    text_field: str = "text"

    def pieces(self) -> Iterator[Piece]:
        """Streams all files.

        Raises:
            ValueError: A line is no JSON object, lacks ``text_field`` or holds no string there, or
                a file is no UTF-8 text. The message names file and line or byte.
        """
        for path in self.paths:
            if path.suffix == ".jsonl":
                yield from _jsonl_documents(path, self.text_field)
            else:
                yield from _txt_pieces(path)

    def fingerprint(self) -> str:
        """Follows the contents and the order of the files, not their names."""
        digests = [f"{path.suffix} {_sha256_of_file(path)}" for path in self.paths]
        return f"field {self.text_field!r} of {', '.join(digests)}"

    def __str__(self) -> str:
        if len(self.paths) == 1:
            return str(self.paths[0])
        return f"{len(self.paths)} files from {self.paths[0]} to {self.paths[-1]}"


def find_text_files(paths: str | Sequence[str], key: str = "files") -> tuple[Path, ...]:
    """Finds the files that paths, globs (with ``**``) and folders (recursive, sorted) stand for.

    Hidden files in folders are passed over; a file that is found twice is taken once.

    Args:
        paths: One or more files, folders or globs; ``~`` is the home folder.
        key: The setting that the paths come from, for the messages.

    Raises:
        FileNotFoundError: A file is missing, or a folder or glob has no supported file.
        ValueError: No path is given, or a file's ending is not supported.
    """
    found: list[Path] = []
    for text in [paths] if isinstance(paths, str) else paths:
        path = Path(text).expanduser()
        if path.is_dir():
            found += _files_in_folder(path, key)
        elif path.exists():
            found.append(path)
        elif glob.has_magic(text):
            found += _files_of_glob(path, key)
        else:
            raise FileNotFoundError(f"{key}: {path} does not exist{nearest_name(path)}")
    if not found:
        raise ValueError(f"{key}: no path is given")
    for path in found:
        if path.suffix not in SUPPORTED_ENDINGS:
            raise ValueError(f"{key}: {path} ends in {path.suffix!r}, not in {_endings()}")
    return tuple(dict.fromkeys(found))


def nearest_name(path: Path) -> str:
    """The part of a message that names what stands beside a missing ``path``."""
    if not path.parent.is_dir():
        return f": there is no folder {path.parent}"
    siblings = [sibling.name for sibling in path.parent.iterdir()]
    nearest = difflib.get_close_matches(path.name, siblings, n=1)
    return f"; the nearest name there is {nearest[0]}" if nearest else ""


def _endings() -> str:
    return " or ".join(SUPPORTED_ENDINGS)


def _files_in_folder(folder: Path, key: str) -> list[Path]:
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in SUPPORTED_ENDINGS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise FileNotFoundError(f"{key}: folder {folder} has no file that ends in {_endings()}")
    return found


def _files_of_glob(pattern: Path, key: str) -> list[Path]:
    found = [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True))]  # noqa: PTH207
    found = [path for path in found if path.is_file()]
    if not found:
        raise FileNotFoundError(f"{key}: no file matches {pattern}")
    return found


def _jsonl_documents(path: Path, text_field: str) -> Iterator[Piece]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            text = _text_of_line(line, text_field, f"{path}:{number}")
            yield Piece("" if text.isspace() else text, True)


def _text_of_line(line: bytes, text_field: str, place: str) -> str:
    try:
        row = json.loads(line.decode("utf-8-sig" if place.endswith(":1") else "utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: no UTF-8 text at byte {error.start} of the line") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: no JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a JSON {type(row).__name__} where an object is needed")
    if text_field not in row:
        raise ValueError(f"{place}: no field {text_field!r}; the fields are {sorted(row)}")
    text = row[text_field]
    if not isinstance(text, str):
        kind = type(text).__name__
        raise ValueError(f"{place}: field {text_field!r} holds a {kind}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: half a surrogate pair at character {error.start}") from None
    return text


def _txt_pieces(path: Path) -> Iterator[Piece]:
    """One document, cut at line ends about every MiB."""
    buffer = ""
    num_pieces = 0
    for text in _decoded(path):
        buffer += text
        if len(buffer) >= _PIECE_BYTES and (cut := _cut_after_line(buffer)):
            yield Piece(buffer[:cut], False)
            num_pieces += 1
            buffer = buffer[cut:]
    yield Piece(buffer if num_pieces or not buffer.isspace() else "", True)


def _cut_after_line(text: str) -> int:
    """Where to cut, or 0 to read on: only the last line may still be open, so it is never cut."""
    if text.isspace():
        return 0
    clean = _CLEAN_LINE_END.match(text)
    return clean.end() if clean else text.rfind("\n", 0, -1) + 1


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    position = 0
    with path.open("rb") as file:
        while True:
            data = file.read(_PIECE_BYTES)
            num_pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                place = position - num_pending + error.start
                raise ValueError(f"{path}: no UTF-8 text at byte {place}") from None
            if "\0" in text:
                raise ValueError(f"{path}: binary data, a zero byte at {position + data.find(0)}")
            yield text
            if not data:
                return
            position += len(data)


def _sha256_of_file(path: Path) -> str:
    stat = path.stat()
    return _sha256_of_contents(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _sha256_of_contents(path: Path, size_bytes: int, modified_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
