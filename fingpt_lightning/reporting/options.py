"""The options of ``fingpt report``, read without importing anything heavy."""

import argparse
from pathlib import Path

from fingpt_lightning.terminal.command_line import OptionParser, WrongOptions
from fingpt_lightning.terminal.messages import wrong_ending
from fingpt_lightning.terminal.numbers import positive_int

FORMS = (".html", ".htm")
"""Endings of the page."""


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
    add(
        "--output",
        type=Path,
        default=Path("report.html"),
        help="the page, .html; default: %(default)s",
    )
    add(
        "--watch",
        nargs="?",
        type=positive_int,
        const=10,
        metavar="SECONDS",
        help="write the page anew while a run goes on; a browser shows it by itself;"
        " without SECONDS every %(const)s",
    )
    return parser


def parse_options(words: list[str]) -> argparse.Namespace:
    """The options that follow ``fingpt report``.

    Args:
        words: Part of the command line after the command.

    Raises:
        WrongOptions: An option is unknown, missing or has an invalid value, or the page is to be
            of another form.
        SystemExit: With status 0, after ``--help`` has been answered.
    """
    options = build_parser().read(words)
    if options.output.suffix not in FORMS and not options.output.is_dir():
        raise WrongOptions(f"output {wrong_ending(options.output, FORMS)}")
    return options
