"""The options of ``fingpt compare``, read without importing anything heavy."""

import argparse
from pathlib import Path

from fingpt_lightning.terminal.command_line import OptionParser, names


def build_parser() -> OptionParser:
    """The parser of ``fingpt compare``."""
    parser = OptionParser(
        "fingpt compare",
        "Results of the same rows side by side: figures with intervals, McNemar's test.",
    )
    add = parser.add_argument
    add(
        "paths",
        nargs="+",
        type=Path,
        metavar="RESULTS",
        help="output folder of fingpt evaluate, or eval/STEP of a run; the first is the baseline",
    )
    add("--tasks", type=names, help="with commas; left out: all that two results have")
    add("--output", type=Path, help="a page, .html or .md; left out: the terminal")
    return parser


def parse_options(words: list[str]) -> argparse.Namespace:
    """The options that follow ``fingpt compare``.

    Args:
        words: Part of the command line after the command.

    Raises:
        WrongOptions: An option is unknown, missing or has an invalid value.
        SystemExit: With status 0, after ``--help`` has been answered.
    """
    return build_parser().read(words)
