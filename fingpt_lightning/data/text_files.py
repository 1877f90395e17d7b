"""Files of text: found by paths, folders and globs, and read one after the other."""

import functools
import glob
import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fingpt_lightning.data.corpus import OnBadRow, Piece
from fingpt_lightning.data.documents import READERS, ending_of
from fingpt_lightning.terminal.inputs import refuse_missing_texts


@dataclass(frozen=True)
class TextFiles:
    """The documents of some files.

    Each line of a ``.jsonl`` and each row of a ``.parquet`` is one, and each ``.txt`` as a whole;
    ``.jsonl`` and ``.txt`` with ``.gz`` or ``.zst`` after them are unpacked while they are read.

    Attributes:
        text_field: Name of the field or column that holds the text.
        on_bad_row: Whether a bad line or row is an error or an empty piece that names its fault.
    """

    paths: tuple[Path, ...]
    text_field: str = "text"
    on_bad_row: OnBadRow = "error"

    def pieces(self) -> Iterator[Piece]:
        """Streams all files.

        Raises:
            ValueError: A line is not a JSON object, lacks ``text_field`` or holds no string there
                (where ``on_bad_row`` is ``error``), or a file is not UTF-8 text or damaged. The
                message names file and line, row or byte.
        """
        first_byte = 0
        for path in self.paths:
            for piece in READERS[_known_ending(path)](path, self.text_field, self.on_bad_row):
                yield piece._replace(bytes_read=first_byte + piece.bytes_read)
            first_byte += path.stat().st_size

    def num_bytes(self) -> int:
        """The sizes of the files, as they lie on disk."""
        return sum(path.stat().st_size for path in self.paths)

    def fingerprint(self) -> str:
        """Follows the contents and the order of the files, not their names."""
        digests = [f"{_known_ending(path)} {_sha256_of_file(path)}" for path in self.paths]
        skipping = "with bad rows skipped, " if self.on_bad_row == "skip" else ""
        return f"{skipping}field {self.text_field!r} of {', '.join(digests)}"

    def __str__(self) -> str:
        if len(self.paths) == 1:
            return str(self.paths[0])
        return f"{len(self.paths)} files from {self.paths[0]} to {self.paths[-1]}"


def find_text_files(paths: str | Sequence[str], key: str = "files") -> tuple[Path, ...]:
    """Finds the files that paths, globs (with ``**``) and folders (recursive, sorted) stand for.

    Hidden files in folders are skipped; a file that is found twice is taken once. Endings may
    be in capitals. A warning counts the other files of a folder.

    Args:
        paths: One or more files, folders or globs; ``~`` is the home folder.
        key: Setting that the paths come from, for the messages.

    Raises:
        FileNotFoundError: A file is missing, or a folder or glob has no supported file.
        ValueError: No path is given, or an empty one, or a file's ending is not supported.
    """
    found: list[Path] = []
    for text in [paths] if isinstance(paths, str) else paths:
        refuse_missing_texts(text, key)
        path = Path(text).expanduser()
        if path.is_dir():
            found += _files_in_folder(path, key)
        elif path.is_file():
            found.append(path)
        else:
            names = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207
            found += [file for file in map(Path, names) if file.is_file()]
    if not found:
        raise ValueError(f"{key}: no path is given")
    for path in found:
        if ending_of(path) is None:
            raise ValueError(f"{key}: {path} ends in {path.suffix!r}, not in {_endings()}")
    return tuple(dict.fromkeys(found))


def _known_ending(path: Path) -> str:
    ending = ending_of(path)
    assert ending is not None, path
    return ending


def _endings() -> str:
    *others, last = READERS
    return f"{', '.join(others)} or {last}"


def _files_in_folder(folder: Path, key: str) -> list[Path]:
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    found = [path for path in files if ending_of(path)]
    others = Counter(path.suffix or path.name for path in files if not ending_of(path))
    counted = ", ".join(f"{number} {ending}" for ending, number in sorted(others.items()))
    if not found:
        there = f"; there are {counted}" if others else ""
        raise FileNotFoundError(
            f"{key}: folder {folder} has no file that ends in {_endings()}{there}"
        )
    if others:
        warnings.warn(
            f"{key}: {others.total()} of the {len(files)} files in {folder} are not read:"
            f" {counted}; text is what ends in {_endings()}",
            stacklevel=2,
        )
    return found


def _sha256_of_file(path: Path) -> str:
    stat = path.stat()
    return _sha256_of_contents(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _sha256_of_contents(path: Path, size_bytes: int, modified_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
