"""The options of ``fingpt report``, read without importing anything heavy."""

import argparse
from pathlib import Path

from fingpt_lightning.terminal.command_line import OptionParser
from fingpt_lightning.terminal.numbers import positive_int


def build_parser() -> OptionParser:
    """The parser of ``fingpt report``."""
    parser = OptionParser(
        "fingpt report", "One self-contained page about runs, sweeps and evaluations."
    )
    add = parser.add_argument
    add(
        "paths",
        nargs="+",
        type=Path,
        metavar="RUN_OR_SWEEP",
        help="folder of a run, a sweep or an evaluation; several stand side by side",
    )
    add("--output", type=Path, default=Path("report.html"), help="the page; default: %(default)s")
    add(
        "--watch",
        nargs="?",
        type=positive_int,
        const=10,
        metavar="SECONDS",
        help="write the page anew while a run goes on; a browser shows it by itself; default: 10",
    )
    return parser


def parse_options(words: list[str]) -> argparse.Namespace:
    """The options that follow ``fingpt report``.

    Args:
        words: Part of the command line after the command.

    Raises:
        WrongOptions: An option is unknown, missing or has an invalid value.
        SystemExit: With status 0, after ``--help`` has been answered.
    """
    return build_parser().read(words)
