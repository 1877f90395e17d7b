"""The options of ``fingpt sweep``, read without importing anything heavy."""

import argparse
from pathlib import Path

from fingpt_lightning.terminal.command_line import OptionParser, WrongOptions, positive_int


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
    options = build_parser().read(words)
    if (options.sweep is None) == (options.resume is None):
        raise WrongOptions("give either a sweep file, or --resume and the folder of a local sweep")
    for name in ("output", "resume"):
        if options.server and getattr(options, name) is not None:
            raise WrongOptions(f"--{name} is of local sweeps: leave --server out")
    if options.resume is not None and options.output is not None:
        raise WrongOptions("--output: a resumed sweep stays in its folder")
    return options
