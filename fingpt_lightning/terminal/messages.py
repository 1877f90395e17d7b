"""Messages and their parts: the nearest right name, missing fields, an error's first line."""

import difflib
import os
import re
import reprlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

_HTTP_USER = re.compile(r"(\bhttps?:/{1,2})[^\s/?#]*@", re.IGNORECASE)
# A password may hold a slash, which a port does not.
_PASSWORD = re.compile(
    r"(\b(?!hf:)[\w+.-]+:/{1,2}[^\s:/@]*):(?!\d+(?:[/\s]|$))[^\s@]*@(?:[^\s/@]*@)*"
)
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """``; did you mean X?`` for the known name most like ``name``, or nothing.

    Args:
        name: Name that was given.
        known: Names that it could have been.
        cutoff: Least similarity, between 0 and 1.

    >>> nearest("fpd", ["fpb", "tfns"])
    '; did you mean fpb?'
    """
    found = nearest_of(name, known, cutoff)
    return f"; did you mean {found}?" if found is not None else ""


def check_choice(setting: str, value: str, known: Iterable[str]) -> None:
    """Refuses a value that is not one of ``known``, and names the nearest.

    Raises:
        ValueError: It is not one of them.

    >>> check_choice("method", "exakt", ["exact", "randomized"])
    Traceback (most recent call last):
    ...
    ValueError: method 'exakt' is none of exact, randomized; did you mean exact?
    """
    names = list(known)
    if value not in names:
        given = f"{setting} {value!r}"
        raise ValueError(f"{given} is none of {', '.join(names)}{nearest(str(value), names)}")


def nearest_of(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most like ``name`` and not itself, or None where none is alike.

    >>> nearest_of("1f1b", ["1f1c", "gpipe"])
    '1f1c'
    """
    others = [one for one in known if one != name]  # a name may be known where it is not allowed
    return next(iter(difflib.get_close_matches(name, others, n=1, cutoff=cutoff)), None)


def nearest_sibling(path: Path) -> Path | None:
    """The file or folder beside a missing ``path`` whose name is most like its own."""
    if not path.parent.is_dir():
        return None
    found = nearest_of(path.name, (sibling.name for sibling in path.parent.iterdir()))
    return None if found is None else path.with_name(found)


def nearest_name(path: Path) -> str:
    """The part of a message that names what stands beside a missing ``path``."""
    if not path.parent.is_dir():
        return f": there is no folder {path.parent}"
    found = nearest_sibling(path)
    return "" if found is None else f"; the nearest name there is {found.name}"


def listed(names: Iterable[str]) -> str:
    """Names in a message, which may be none.

    >>> listed(["fpb", "tfns"]), listed([])
    ('fpb, tfns', 'none')
    """
    return ", ".join(names) or "none"


def wrong_ending(path: Path, endings: Sequence[str]) -> str:
    """The part of a message that says of a file which endings are known.

    >>> wrong_ending(Path("page.htm"), [".html", ".md"])
    'page.htm ends in none of .html, .md; did you mean .html?'
    >>> wrong_ending(Path("texts.csv"), [".jsonl"])
    'texts.csv does not end in .jsonl'
    """
    if len(endings) == 1:
        return f"{path} does not end in {endings[0]}"
    return f"{path} ends in none of {', '.join(endings)}{nearest(path.suffix, endings)}"


def no_field(place: str, field: str, fields: Iterable[str]) -> str:
    """The message of a row without ``field``.

    >>> no_field("a.jsonl:2", "text", ["txt", "id"])
    "a.jsonl:2: no field 'text'; did you mean 'txt'? The fields are ['id', 'txt']"
    """
    known = sorted(fields)
    if not known:
        return f"{place}: no field {field!r}: the object is empty"
    found = nearest_of(field, known)
    hint = "the" if found is None else f"did you mean {found!r}? The"
    return f"{place}: no field {field!r}; {hint} fields are {known}"


def first_line(error: BaseException) -> str:
    """The first line of a foreign library's error, without credentials."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")
    return without_credentials(line)


def without_credentials(text: str) -> str:
    """A text that may hold URLs, such as a command line, without their passwords.

    >>> without_credentials("https://me:secret@hub.local/models cannot be reached")
    'https://hub.local/models cannot be reached'
    >>> without_credentials("--storage postgresql://me:secret@database/sweeps")
    '--storage postgresql://me:***@database/sweeps'
    """
    # A path has one of the two slashes. Of an HTTP address the name before the @ may be a token.
    return _PASSWORD.sub(r"\1:***@", _HTTP_USER.sub(r"\1", text))


def error_line(message: str, process_rank: int | str = 0) -> str:
    """The line with which the program reports why it ends.

    Args:
        message: Message of one line.
        process_rank: Number of this process among those of the run.

    >>> error_line("the device is on fire", 1)
    'fingpt: error (rank 1): the device is on fire'
    """
    where = "" if str(process_rank) == "0" else f" (rank {process_rank})"
    return f"fingpt: error{where}: {message}"


def process_rank() -> str:
    """Number of this process among those of the run: Lightning's, its launcher's, or 0."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    launched = next((os.environ[name] for name in names if name in os.environ), "0")
    # Where each node starts its own process, only Lightning knows the number of the process.
    lightning = sys.modules.get("lightning.fabric.utilities.rank_zero")
    return str(getattr(getattr(lightning, "rank_zero_only", None), "rank", launched))


def print_status(line: str) -> None:
    """Prints a line about the run on standard error, from the first process only."""
    if process_rank() == "0":
        print(f"fingpt: {line}", file=sys.stderr, flush=True)


def is_panic(error: BaseException) -> bool:
    """Whether code in Rust panicked, which Python shows as an exception that is no `Exception`."""
    return type(error).__name__ == "PanicException"


def shortened(value: object) -> str:
    """A foreign value as a message shows it: at most some words of it, on one line.

    >>> shortened([1, 2, 3, 4, 5, 6, 7, 8])
    '[1, 2, 3, 4, 5, 6, ...]'
    """
    return _SHORT.repr(value)
