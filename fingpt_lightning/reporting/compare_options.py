"""The options of ``fingpt compare``, read without importing anything heavy."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fingpt_lightning.evaluation.run_evaluations import PREDICTIONS, RESULTS
from fingpt_lightning.files import refuse_unwritable
from fingpt_lightning.terminal.command_line import OptionParser, WrongOptions, names
from fingpt_lightning.terminal.messages import nearest_name, wrong_ending

FORMS = (".html", ".md")
"""Endings of the pages that are written."""


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
        WrongOptions: An option is unknown, missing or has an invalid value, or the page is to be
            of a form that there is not.
        SystemExit: With status 0, after ``--help`` has been answered.
    """
    options = build_parser().read(words)
    output = options.output
    if output is not None and output.suffix not in FORMS:
        raise WrongOptions(f"output {wrong_ending(output, FORMS)}")
    return options


def check_inputs(options: argparse.Namespace) -> None:
    """Refuses paths that are not there, without reading what lies there.

    Args:
        options: Result of `parse_options`.

    Raises:
        ValueError: There is one result, a folder holds none, or the output is a folder.
        FileNotFoundError: A path does not exist.
    """
    if options.output is not None:
        refuse_unwritable(options.output, "output")
    refuse_missing_results(options.paths)


def refuse_missing_results(paths: Sequence[Path]) -> None:
    """Refuses fewer than two folders, and those without the files of an evaluation.

    Raises:
        ValueError: There is one path, or a folder holds no results.
        FileNotFoundError: A folder or a file does not exist.
    """
    if len({path.resolve() for path in paths}) < 2:
        named = f"; {paths[0]} is named twice" if len(paths) > 1 else ""
        raise ValueError(
            f"compare needs two results or more{named}; fingpt report shows a single one"
        )
    for folder in paths:
        if not folder.is_dir():
            if folder.exists():
                raise FileNotFoundError(f"{folder} is a file; name its folder, {folder.parent}")
            raise FileNotFoundError(f"{folder} does not exist{nearest_name(folder)}")
        if not (folder / RESULTS).is_file():
            inner = sorted(folder.glob(f"eval/*/{RESULTS}"))
            advice = f"; a run has one for each step, as {inner[-1].parent}" if inner else ""
            raise ValueError(f"{folder} holds no {RESULTS}{advice}")
        if not (folder / PREDICTIONS).is_file():
            raise FileNotFoundError(
                f"{folder / PREDICTIONS} is not there: results are compared row by row"
            )
