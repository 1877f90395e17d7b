"""The options of ``fingpt configs``, read without importing anything heavy."""

import argparse
from pathlib import Path

from fingpt_lightning.terminal.command_line import OptionParser, WrongOptions


def build_parser() -> OptionParser:
    """The parser of ``fingpt configs``."""
    parser = OptionParser(
        "fingpt configs", "Lists the configs and sweeps that come with fingpt; shows or copies one."
    )
    add = parser.add_argument
    add("name", nargs="?", help="a config or sweep of the list; left out: the list")
    add("--copy", type=Path, metavar="FOLDER", help="copy it there, with the blocks it names")
    return parser


def parse_options(words: list[str]) -> argparse.Namespace:
    """The options that follow ``fingpt configs``.

    Args:
        words: Part of the command line after the command.

    Raises:
        WrongOptions: An option is unknown, or has no effect.
        SystemExit: With status 0, after ``--help`` has been answered.
    """
    options = build_parser().read(words)
    if options.copy is not None and options.name is None:
        raise WrongOptions("--copy needs the name of a config: fingpt configs NAME --copy FOLDER")
    return options
