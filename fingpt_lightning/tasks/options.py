"""The options of ``fingpt tasks``."""

import argparse
from pathlib import Path

from fingpt_lightning.tasks.audit import NGRAM, THRESHOLD
from fingpt_lightning.terminal.command_line import OptionParser, WrongOptions, names
from fingpt_lightning.terminal.numbers import positive_int, share

AUDIT = "audit"


def build_parser() -> OptionParser:
    """The parser of ``fingpt tasks``."""
    parser = OptionParser(
        "fingpt tasks", "The tasks that are shipped, with source and license; or one in detail."
    )
    add = parser.add_argument
    add(
        "words",
        nargs="*",
        metavar="TASK",
        help="a task, or a YAML file of your own; or audit, and the tasks whose rows are searched"
        " for rows that occur twice (all where none is named)",
    )
    add("--data_dir", type=Path, help="holds TASK/SPLIT.jsonl, whose rows are counted")
    add(
        "--train_files",
        type=_paths,
        help="of audit: files of instructions that are trained on, with commas",
    )
    add("--ngram", type=positive_int, help="of audit: words of an n-gram; default: 8")
    add("--threshold", type=share, help="of audit: share of n-grams seen; default: 0.5")
    add("--strict", action="store_true", help="of audit: status 1 where splits share a row")
    return parser


def _paths(text: str) -> list[Path]:
    return [Path(name) for name in names(text)]


def parse_options(words: list[str]) -> argparse.Namespace:
    """The options that follow ``fingpt tasks``.

    Args:
        words: Part of the command line after the command.

    Raises:
        WrongOptions: An option is unknown, has an invalid value, or has no effect.
        SystemExit: With status 0, after ``--help`` has been answered.
    """
    options = build_parser().read(words)
    if options.words[:1] == [AUDIT]:
        options.words = [name for word in options.words for name in names(word)]
        if options.data_dir is None:
            raise WrongOptions("--data_dir is required: audit reads the rows that lie there")
        options.ngram = NGRAM if options.ngram is None else options.ngram
        options.threshold = THRESHOLD if options.threshold is None else options.threshold
        return options
    if len(options.words) > 1:
        raise WrongOptions(
            f"one task is shown at a time, not {len(options.words)}; audit takes several"
        )
    for name in ("train_files", "ngram", "threshold", "strict"):
        if getattr(options, name) not in (None, False):
            raise WrongOptions(f"--{name} has an effect with audit alone")
    return options
