"""Files that are whole or not there, and folders that have one owner.

Nothing here is ever half of what its name promises: a file is written beside its name and renamed
when it is on the disk, and a folder of parts belongs to one process at a time. What a killed
process left goes with the next one that writes the same name.
"""

import ctypes
import errno
import gzip
import hashlib
import io
import itertools
import json
import logging
import math
import os
import shutil
import socket
import stat
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from typing_extensions import override

from fingpt_lightning.units import format_bytes

MAX_LINE_BYTES = 2**26
"""Of a line that is read as one value."""
_MAX_PACKED_RATIO, _MIN_BOMB_BYTES = 500, 2**26
JSON_LINES = ".jsonl"
"""Ending of files with an object per line."""
PARTIAL = ".partial"
"""The ending of what is not whole yet."""
OWNER = "owner.lock"
"""The file in a folder of parts that its process has locked; it says which process that is."""
WHOLE = "whole"
"""The name of what is made of the parts, in their folder, until it moves to its place."""
SETTINGS = "settings.json"
"""The file in a folder of parts that says of which settings they are."""
_FINISHED = "finished"

_log = logging.getLogger(__name__)
_numbers = itertools.count()
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Native writers (safetensors, Arrow) have the system's words in an error of their own class, and
# SQLite has its own words.
_NO_SPACE_WORDS = (*map(os.strerror, _NO_SPACE), "database or disk is full", "disk I/O error")
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}
_NO_FOLDER_SYNC = {errno.EINVAL, errno.EBADF, errno.EACCES, errno.EPERM, errno.EOPNOTSUPP}
_AT_FDCWD, _EXCHANGE = -100, 2
_WAIT_S = 0.2


class NoSpaceError(OSError):
    """A disk is full, or a quota or limit reached; says which file and what it needs."""

    def __init__(self, path: Path, reason: str, needed_bytes: int | None = None) -> None:
        try:
            free = f"{format_bytes(shutil.disk_usage(path.parent).free)} free"
        except OSError:
            free = "free space unknown"
        needs = "" if needed_bytes is None else f" it needs {needed_bytes:,} bytes,"
        is_kept = path.exists() and path.suffix != PARTIAL
        kept = "; the one that was there is kept" if is_kept else ""
        super().__init__(f"{path} cannot be written ({reason}):{needs} {free}{kept}")


class InUseError(RuntimeError):
    """Another process works in a folder."""


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Hands out a path beside ``path``; what is written there takes its place at the end.

    It is on the disk before it is renamed, and the folder after, so that a crash leaves the old
    file or the new one. An error on the way leaves the old one and removes what was begun. What
    killed processes left of this file goes first.

    Args:
        path: File in a folder that is there; a file of that name is replaced.

    Raises:
        NoSpaceError: The disk is full.
    """
    remove_leftovers(path)
    aside, descriptor = path.with_name(_aside_name(path)), None
    try:
        while (descriptor := _new_locked(aside)) is None:
            aside = path.with_name(_aside_name(path))
        yield aside
        # Of the name, not of our descriptor: a writer may have put another file in its place.
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        usual = os.fstat(descriptor).st_mode
        if aside.stat().st_mode != usual:  # safetensors makes files that their owner alone may read
            aside.chmod(stat.S_IMODE(usual))
        aside.replace(path)
    except BaseException as error:
        needed_bytes = error.needed_bytes if isinstance(error, _CutShortError) else None
        aside.unlink(missing_ok=True)
        if (reason := _no_space(error)) is not None:
            raise NoSpaceError(path, reason, needed_bytes) from error
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # the system does not say of which file
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)
    sync_folder(path.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file aside and then renames it; text is UTF-8, its line ends are as given.

    Args:
        path: File in a folder that is there; a file of that name is replaced.
        content: All of the file.

    Raises:
        NoSpaceError: The disk is full.
    """
    with written_whole(path) as aside, CountedWriter(aside) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def append_whole(path: Path, content: str | bytes) -> None:
    """Adds to a file in one write; an error takes back what of it was written.

    Args:
        path: File that is there.
        content: All that is added; text is UTF-8, its line ends are as given.

    Raises:
        NoSpaceError: The disk is full.
    """
    rest = memoryview(content.encode() if isinstance(content, str) else content)
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            while len(rest):
                rest = rest[file.write(rest) :]
        except BaseException as error:
            file.truncate(before)
            if (reason := _no_space(error)) is not None:
                raise NoSpaceError(path, reason, before + len(rest)) from error
            raise


@contextmanager
def named_when_full(path: Path) -> Iterator[None]:
    """Within it a full disk, whoever met it, raises `NoSpaceError` of ``path``."""
    try:
        yield
    except Exception as error:
        if (reason := _no_space(error)) is not None:
            raise NoSpaceError(path, reason) from error
        raise


class CountedWriter:
    """A file to write to that goes on counting where the disk is full.

    So a writer that knows its size only at its end, as ``torch.save``, can tell what it needs.
    Leaving the context raises what the disk said, with the bytes in all.

    Args:
        path: File that is made anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_bytes = 0
        self._error: OSError | None = None

    def __enter__(self) -> "CountedWriter":
        self._file = self._path.open("wb", buffering=0)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._file.close()
        except OSError as error:  # some file systems tell of a full disk only here
            self._error = self._error or error
        if self._error is not None and (kind is None or issubclass(kind, Exception)):
            raise _CutShortError(self._error, self._num_bytes) from self._error

    def write(self, content: bytes | memoryview) -> int:
        """Writes all of it, or only counts once that has failed."""
        view = memoryview(content).cast("B")
        self._num_bytes += len(view)
        written = 0
        while self._error is None and written < len(view):
            try:
                written += self._file.write(view[written:])
            except OSError as error:
                self._error = error
        return len(view)

    def flush(self) -> None:
        """Does nothing: nothing is held back."""


class _CutShortError(OSError):
    """A disk that was full, and what would have been needed."""

    def __init__(self, error: OSError, needed_bytes: int) -> None:
        super().__init__(error.errno, error.strerror)
        self.needed_bytes = needed_bytes


def remove_leftovers(path: Path) -> None:
    """Removes what killed processes left of a file or a folder: nobody would look for it.

    Args:
        path: Name of the whole one. What a living process is writing stays, and where the file
            system has no locks everything does.
    """
    begin = f"{path.name}."
    with suppress(OSError):
        for left in path.parent.iterdir():
            number = left.name.removeprefix(begin).removesuffix(PARTIAL).replace("-", "")
            if left.name.startswith(begin) and left.suffix == PARTIAL and number.isdecimal():
                _remove_left(left)


def sync_folder(folder: Path) -> None:
    """Puts a folder's names on the disk, where the system knows of such a thing."""
    if os.name == "nt":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Puts all files in a folder on the disk, with their names."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def try_lock(descriptor: int) -> bool | None:
    """Takes the lock of an open file, which goes with the process, however that ends.

    Returns:
        Whether it is ours; None where there are no locks, of which one warning tells.
    """
    try:
        import fcntl  # there is none on Windows

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        _warn_of_no_locks()
        return None
    return True


@contextmanager
def owned(folder: Path) -> Iterator[Path]:
    """Makes a folder this process's own, where it goes on with what is there.

    What a dead process left is taken over: its lock went with it. At the end a folder with
    nothing in it goes.

    Args:
        folder: Is made where it is not there.

    Raises:
        InUseError: A living process has it; names the file and the owner.
        NoSpaceError: The disk is full.
    """
    descriptor = None
    try:
        descriptor = _take(folder)
        with named_when_full(folder):
            yield folder
    finally:
        _give_up(folder, descriptor)


def is_unused(folder: Path, *names: str) -> bool:
    """Whether no file but the owner's lock and these is whole in a folder, or below it."""
    known = {OWNER, _FINISHED, *names}
    return not any(
        path.is_file() and path.name not in known and path.suffix != PARTIAL
        for path in folder.rglob("*")
    )


def clear_owned(folder: Path) -> None:
    """Removes all in a folder of `owned` but its lock; what says of what kind the parts are, last.

    So parts that a kill leaves in between are not taken for those of other settings.
    """
    for path in sorted(folder.iterdir(), key=lambda path: path.name in (SETTINGS, _FINISHED)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != OWNER:
            path.unlink()


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings of the parts into a folder of `owned`, or compares them.

    Args:
        folder: Folder of the parts.
        settings: Settings that determine the parts.

    Raises:
        ValueError: The parts that are there are of others; folder and setting are named.
    """
    file = folder / SETTINGS
    if not file.is_file():
        write_json(file, settings)
        return
    before, now = read_json(file), json.loads(to_json(settings))
    for name, value in now.items():
        if before.get(name) != value:
            # What auto takes may have been another one: it is measured.
            same = f"--dtype {before.get(name)} goes on with it, else " if name == "dtype" else ""
            raise ValueError(
                f"{folder} is of an earlier run with {name} {before.get(name)!r}, now {value!r};"
                f" {same}remove it or --overwrite"
            )


def mark_finished(folder: Path) -> None:
    """Notes in a folder of `owned` that its `WHOLE` is complete and about to move to its place."""
    write_whole(folder / _FINISHED, "")


def clear_finished(folder: Path) -> None:
    """Clears a folder of `owned` where a process was killed when its `WHOLE` had moved.

    Where it had not moved yet, the parts stay, as those of any unfinished run.
    """
    if not (folder / _FINISHED).is_file():
        return
    if (folder / WHOLE).exists():
        (folder / _FINISHED).unlink()
    else:
        clear_owned(folder)


def remove_finished(folder: Path) -> None:
    """Removes a folder of parts that `clear_finished` would clear, unless a process uses it."""
    if (folder / _FINISHED).is_file() and not (folder / WHOLE).exists():
        with suppress(InUseError), owned(folder):
            clear_finished(folder)


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A new folder on the file system of ``target``, which goes at the end with all in it.

    What is to stay is moved out of it. What killed processes left of this target goes first.

    Args:
        target: Name to be of what is made in the folder; the folders above it are made.

    Raises:
        NoSpaceError: The disk is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    folder = target.with_name(_aside_name(target))
    try:
        while not make_owned(folder):
            folder = target.with_name(_aside_name(target))
        with owned(folder):
            made = folder / "made"
            made.mkdir()
            with named_when_full(target):
                yield made
            clear_owned(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Lets two paths change names in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, TypeError, AttributeError):
        return False
    names = (os.fsencode(one), os.fsencode(other))
    status: int = rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _EXCHANGE)
    return status == 0


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


class DamagedZstdError(OSError):
    """Packed data of a ``.zst`` file that end early or are of another form."""


DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, DamagedZstdError)
"""What reading a packed file raises where its data are damaged."""


@contextmanager
def unpacked(path: Path) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """The contents of a file, those of ``.gz`` and ``.zst`` unpacked, and the bytes of it read."""
    with path.open("rb") as raw:
        match path.suffix.lower():
            case ".gz":
                with gzip.GzipFile(fileobj=raw) as opened:
                    yield cast(IO[bytes], opened), raw.tell
            case ".zst":
                with io.BufferedReader(_ZstdStream(raw), 2**16) as stream:
                    yield stream, raw.tell
            case _:
                yield raw, raw.tell


class _ZstdStream(io.RawIOBase):
    """The unpacked bytes of a Zstandard stream of one or more frames."""

    def __init__(self, raw: IO[bytes]) -> None:
        import pyarrow  # type: ignore[import-untyped]  # few runs read such files

        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except OSError as error:
            raise DamagedZstdError(str(error)) from None
        buffer[: len(data)] = data
        return len(data)


def check_unpacked(place: str, num_bytes: int, packed_bytes: int) -> None:
    """Checks that a packed file is not one that would never end.

    Args:
        place: File, for the message.
        num_bytes: Bytes that were unpacked so far.
        packed_bytes: Bytes that were read of the file itself.

    Raises:
        ValueError: It unpacks to hundreds of times its size, as no text does.
    """
    if num_bytes > max(_MIN_BOMB_BYTES, _MAX_PACKED_RATIO * packed_bytes):
        raise ValueError(f"{place} unpacks to more than {_MAX_PACKED_RATIO} times its size")


def lines_of(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """The lines of a file by number, packed ones unpacked, each with the bytes read so far.

    Raises:
        ValueError: A line is longer than `MAX_LINE_BYTES`, or a packed file is a bomb.
        OSError, EOFError, zlib.error: The packed data are damaged: one of `DAMAGED`.
    """
    num_bytes = 0
    with unpacked(path) as (file, position):
        for number in itertools.count(1):
            line = file.readline(MAX_LINE_BYTES + 1)
            num_bytes += len(line)
            check_unpacked(str(path), num_bytes, position())
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(
                    f"{path}:{number}: the line is longer than {format_bytes(MAX_LINE_BYTES)}"
                )
            if not line:
                return
            yield number, line, position()


def not_utf8(path: Path) -> str:
    """The message of a file that is not UTF-8 text: it names line and byte.

    Args:
        path: File that could not be decoded.
    """
    position = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return (
                    f"{path}:{number}: no UTF-8 text at byte {position + error.start} of the file"
                )
            position += len(line)
    return f"{path} is not UTF-8 text"


class DuplicateKeyError(ValueError):
    """An object of JSON has a key twice, of which `json.loads` would take the last silently."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise DuplicateKeyError(
            f"key {next(n for n in names if names.count(n) > 1)!r} is there twice"
        )
    return found


# Made once: `json.loads` with a hook makes one for every line, which doubles its time.
ROW_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
"""Decoder of rows that people write: it raises a `DuplicateKeyError` for a key that is there twice.

Cost: at most a tenth of the time of `json.loads`.
"""


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: It holds none; the message names file and line.
    """
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{file} holds no JSON object")
    return contents


def files_sha256(files: tuple[Path, ...]) -> str:
    """The digest of one file, or of the digests of several in the order of their names.

    Cost: all bytes are read once, about 1 s per GB.
    """
    digests = []
    for file in sorted(files):
        with file.open("rb") as opened:
            digests.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    )


def refuse_unwritable(file: Path, key: str) -> None:
    """Refuses a file to write whose folder is not there; one that is there may be replaced.

    Args:
        file: File to write.
        key: Option that names it.

    Raises:
        FileNotFoundError: There is no folder for it.
        PermissionError: The folder cannot be written to.
        ValueError: It is a folder.
    """
    if not file.resolve().parent.is_dir():
        raise FileNotFoundError(f"{key} {file}: there is no folder {file.parent}")
    refuse_read_only(file.resolve().parent, f"{key} {file}")
    if file.is_dir():
        raise ValueError(f"{key} {file} is a folder, not a file")


def refuse_existing(file: Path, key: str, overwrite: bool) -> None:
    """Refuses a file to write that is there already, or cannot be.

    Args:
        file: File to write.
        key: Setting that names it, as GROUP.NAME beside GROUP.overwrite; or an option beside
            ``--overwrite``.
        overwrite: Whether a file of that name is replaced.

    Raises:
        FileExistsError: The file is there, and ``overwrite`` is false.
        NotADirectoryError: A part of its path is a file.
        PermissionError: Its folder cannot be written to.
        ValueError: It is a folder.
    """
    refuse_blocked(file, key)
    if file.is_dir():
        raise ValueError(f"{key} {file} is a folder, not a file")
    if file.exists() and not overwrite:
        group = key.rpartition(".")[0]
        switch = f"{group}.overwrite" if group else "--overwrite"
        raise FileExistsError(f"{key} {file} is there already; {switch} replaces it")


def refuse_blocked(path: Path, key: str) -> None:
    """Refuses a path to write whose folder can be neither found nor made.

    Args:
        path: File or folder to make.
        key: Option that names it.

    Raises:
        NotADirectoryError: A part of the path is a file.
        PermissionError: The folder that is there cannot be written to.
    """
    for parent in path.parents:
        if parent.is_dir():
            refuse_read_only(parent, f"{key} {path}")
            return
        if parent.exists():
            raise NotADirectoryError(f"{key} {path}: {parent} is a file, not a folder")


def refuse_read_only(folder: Path, what: str) -> None:
    """Refuses a folder in which this user may make no file.

    Args:
        folder: Folder that is there.
        what: Beginning of the message, with the setting and its value.

    Raises:
        PermissionError: It cannot be written to.
    """
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{what}: the folder {folder} cannot be written to")


def check_replaceable(output: Path, overwrite: bool, is_ours: bool, what: str) -> None:
    """Raises where a finished folder could not be put in place.

    Args:
        output: Name that it is to have.
        overwrite: Whether one of its kind may be replaced.
        is_ours: Whether what is there is of its kind.
        what: Kind of the folder, for the message.

    Raises:
        FileExistsError: ``output`` is there and not to be replaced.
        NotADirectoryError: A part of its path is a file.
        PermissionError: Its folder cannot be written to.
    """
    refuse_blocked(output, "output")
    if not output.exists():
        return
    if not is_ours:
        raise FileExistsError(f"output {output} is there, and no {what}; name another folder")
    if not overwrite:
        raise FileExistsError(f"output {output} is there already; --overwrite replaces it")


def parts_of(output: Path) -> Path:
    """The folder of what is finished of an output, for a process that goes on after a kill."""
    return output.with_name(f"{output.name}{PARTIAL}")


def check_made_in_parts(output: Path, overwrite: bool, record: str, what: str) -> None:
    """As `check_replaceable`; the parts of an output that a killed process finished are removed.

    Args:
        output: Name that the folder is to have.
        overwrite: Whether one of its kind may be replaced.
        record: File by which its kind is known.
        what: Kind of the folder, for the message.

    Raises:
        FileExistsError: ``output`` is there and not to be replaced.
        NotADirectoryError: A part of its path is a file.
    """
    remove_finished(parts_of(output))
    check_replaceable(output, overwrite, (output / record).is_file(), what)


def put_in_place(finished: Path, output: Path) -> None:
    """Gives a folder of files its name; what had that name goes when the new one has it.

    The files are on the disk before. Where the system can, both change names in one step, so that
    the name is never without a folder.

    Args:
        finished: Folder on the file system of ``output``; gone afterwards.
        output: Name that it gets.
    """
    for path in (finished, *finished.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)  # else some are their owner's alone
    sync_files(finished)
    if not output.exists():
        finished.rename(output)
    elif exchange(finished, output):
        shutil.rmtree(finished)
    else:
        with scratch_folder(output) as old:
            output.rename(old / output.name)
            finished.rename(output)
    sync_folder(output.parent)


def _aside_name(path: Path) -> str:
    """A name that no other writer of this machine takes; of another one it may."""
    return f"{path.name}.{os.getpid()}-{next(_numbers)}{PARTIAL}"


def _new_locked(path: Path) -> int | None:
    """Makes a file, locked, so that no other process takes it for a leftover; None if one did."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return None
    if try_lock(descriptor) is not False and _is_at(descriptor, path):
        return descriptor
    os.close(descriptor)
    return None


def _remove_left(path: Path) -> None:
    is_folder = path.is_dir()
    with suppress(OSError):
        descriptor = os.open(path / OWNER if is_folder else path, os.O_RDWR)
        try:
            if not try_lock(descriptor):
                return
            if is_folder:
                clear_owned(path)
                (path / OWNER).unlink()
                path.rmdir()
            else:
                path.unlink()
        finally:
            os.close(descriptor)
    if is_folder:
        with suppress(OSError):  # killed before it had its lock
            path.rmdir()


def _take(folder: Path) -> int:
    file = folder / OWNER
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # its owner has just finished
            continue
        try:
            is_ours = try_lock(descriptor)
            if is_ours is False:
                owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                raise InUseError(f"{folder} is in use by {owner or 'another process'} ({file})")
            if _is_at(descriptor, file):
                write_owner(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def write_owner(descriptor: int) -> None:
    """Says in an open lock file whose it is."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _give_up(folder: Path, descriptor: int | None) -> None:
    with suppress(OSError):  # somebody else's, or not empty
        if descriptor is not None and [path.name for path in folder.iterdir()] == [OWNER]:
            (folder / OWNER).unlink()
        folder.rmdir()
    if descriptor is not None:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the name still means the file that was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _no_space(error: BaseException | None) -> str | None:
    """What the system says where an error, or one behind it, comes of a full disk; else None."""
    if error is None or isinstance(error, NoSpaceError):
        return None
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return error.strerror or str(error)
    if not isinstance(error, Exception):
        return None
    said = next((words for words in _NO_SPACE_WORDS if words in str(error)), None)
    return said or _no_space(error.__cause__)


_warned: set[str] = set()


def _warn_of_no_locks() -> None:
    if not _warned:
        _warned.add("locks")
        _log.warning(
            "this file system has no locks: two processes that write one output are not kept apart"
        )
