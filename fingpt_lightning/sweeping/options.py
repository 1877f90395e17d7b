"""The options of ``fingpt sweep``, read without importing anything heavy."""

import argparse
import os
from pathlib import Path

from fingpt_lightning.terminal.command_line import OptionParser, WrongOptions
from fingpt_lightning.terminal.messages import nearest, without_credentials
from fingpt_lightning.terminal.numbers import positive_int

_SCHEMES = ("postgresql", "sqlite")


def build_parser() -> OptionParser:
    """The parser of ``fingpt sweep``."""
    parser = OptionParser(
        "fingpt sweep", "Checks a W&B sweep file and runs its trials, with a server or without one."
    )
    add = parser.add_argument
    add(
        "sweep",
        nargs="?",
        type=Path,
        help="a sweep file, or the name of a shipped one: quick_rank",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--local", action="store_true", help="without a server, runs kept offline; the default"
    )
    where.add_argument(
        "--server", action="store_true", help="create the sweep on the W&B server and run an agent"
    )
    add("--count", type=positive_int, help="trials in all; default: the whole grid, or run_cap")
    add("--project", help="W&B project; default: that of the sweep file or of its config")
    add("--output", type=Path, help="folder of a local sweep; default: runs/sweeps/NAME-DATE-TIME")
    add(
        "--storage",
        help="database in which several machines share a local sweep: postgresql://USER@HOST/NAME,"
        " sqlite:///FILE, or env:VARIABLE that holds such a URL",
    )
    add("--study", help="name of a shared sweep in its database; default: that of the sweep file")
    add("--resume", type=Path, help="folder of a local sweep to go on with, in place of a file")
    return parser


def parse_options(words: list[str]) -> argparse.Namespace:
    """The options that follow ``fingpt sweep``.

    Args:
        words: Part of the command line after the command.

    Raises:
        WrongOptions: An option is unknown, has an invalid value, or does not go with another.
        SystemExit: With status 0, after ``--help`` has been answered.
    """
    try:
        options = build_parser().read(words)
    except WrongOptions as error:
        # A misspelled option's value may be a URL.
        raise WrongOptions(without_credentials(str(error))) from None
    if (options.sweep is None) == (options.resume is None):
        raise WrongOptions("give either a sweep file, or --resume and the folder of a local sweep")
    for name in ("output", "resume", "storage", "study"):
        if options.server and getattr(options, name) is not None:
            raise WrongOptions(f"--{name} is of local sweeps: leave --server out")
    if options.resume is not None and options.output is not None:
        raise WrongOptions("--output: a resumed sweep stays in its folder")
    if options.storage is None and options.study is not None:
        raise WrongOptions("--study names a sweep in a database: give --storage too")
    if options.storage is not None:
        if options.resume is not None:
            raise WrongOptions(
                "--resume: a shared sweep goes on with the sweep file, and the same --storage"
            )
        options.storage = _storage_url(options.storage)
    return options


def _storage_url(text: str) -> str:
    """The URL of a database, of which no message has more than the scheme."""
    kind, _, variable = text.partition(":")
    if kind == "env" and not (text := os.environ.get(variable, "")):
        raise WrongOptions(f"--storage env:{variable}: that environment variable is not set")
    scheme, separator, _ = text.partition("://")
    if not separator:
        raise WrongOptions(
            "--storage is not a database URL; write postgresql://USER@HOST/NAME or sqlite:///FILE"
        )
    if scheme not in _SCHEMES:
        raise WrongOptions(
            f"--storage: scheme {scheme!r} is none of {', '.join(_SCHEMES)}"
            f"{nearest(scheme, _SCHEMES)}"
        )
    file = text.partition(":///")[2].partition("?")[0]
    if scheme == "sqlite" and file and Path(file).is_dir():
        raise WrongOptions(f"--storage: {text} is a folder; write sqlite:///FILE")
    return text
