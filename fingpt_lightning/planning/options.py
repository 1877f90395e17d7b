"""The options of ``fingpt plan``, read without importing anything heavy."""

import argparse
from pathlib import Path

from fingpt_lightning.terminal.command_line import OptionParser


def build_parser() -> OptionParser:
    """The parser of ``fingpt plan``."""
    parser = OptionParser(
        "fingpt plan",
        "What a run would need, before it starts: parameters, memory, steps, time. Takes every"
        " option of fingpt fit (--config FILE ...) beside these.",
    )
    add = parser.add_argument
    add("--devices", help="short for --trainer.devices")
    add("--json", type=Path, help="write the figures to this file too")
    calibration = parser.add_mutually_exclusive_group()
    calibration.add_argument(
        "--calibrate",
        action="store_true",
        default=True,
        help="time a few real steps where the model fits in memory (the default)",
    )
    calibration.add_argument(
        "--no_calibrate",
        dest="calibrate",
        action="store_false",
        help="count only: no weights are made",
    )
    return parser


def parse_options(words: list[str]) -> argparse.Namespace:
    """The options that follow ``fingpt plan``; ``words`` holds those of ``fingpt fit`` among them.

    Args:
        words: Words of the command line.

    Raises:
        WrongOptions: An option has an invalid value.
        SystemExit: ``--help`` was given; the status is 0.
    """
    options = build_parser().read_beside_others(words)
    if options.devices is not None:
        options.words += ["--trainer.devices", options.devices]
    return options
