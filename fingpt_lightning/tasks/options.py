"""The options of ``fingpt tasks``."""

import argparse
from pathlib import Path

from fingpt_lightning.terminal.command_line import OptionParser


def build_parser() -> OptionParser:
    """The parser of ``fingpt tasks``."""
    parser = OptionParser(
        "fingpt tasks", "The tasks that are shipped, with source and license; or one in detail."
    )
    parser.add_argument("name", nargs="?", help="a task, or a YAML file of your own")
    parser.add_argument(
        "--data_dir", type=Path, help="holds TASK/SPLIT.jsonl, whose rows are counted"
    )
    return parser


def parse_options(words: list[str]) -> argparse.Namespace:
    """The options that follow ``fingpt tasks``.

    Args:
        words: Part of the command line after the command.

    Raises:
        WrongOptions: An option is unknown.
        SystemExit: With status 0, after ``--help`` has been answered.
    """
    return build_parser().read(words)
