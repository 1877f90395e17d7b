"""The options of ``fingpt export``, read without importing anything heavy."""

import argparse
from pathlib import Path

from fingpt_lightning.hub.names import as_option, check_branch, check_hub_name
from fingpt_lightning.terminal.command_line import (
    OptionParser,
    WrongOptions,
    add_calibration_options,
    add_model_options,
    asks_for_calibration,
    check_calibration_options,
)
from fingpt_lightning.terminal.numbers import number_above_0

FORMATS = {
    "hf": "dense, for plain transformers",
    "low_rank": "low-rank layers as they are, for this package",
    "peft": "the adapter alone",
    "merged": "base and adapter as one model",
    "int8": "quantized",
    "nf4": "quantized",
    "gguf": "one file for llama.cpp",
}


EMBEDDINGS = ("quantized", "kept")


def build_parser() -> OptionParser:
    """The parser of ``fingpt export``."""
    parser = OptionParser(
        "fingpt export", "A model in another form, loaded again and compared before it is there."
    )
    add_model_options(parser, stores=True)
    add = parser.add_argument
    add(
        "--format",
        required=True,
        choices=tuple(FORMATS),
        help="; ".join(f"{name}: {what}" for name, what in FORMATS.items()),
    )
    add("--output", type=Path, required=True, help="folder that is made")
    add("--overwrite", action="store_true", help="replace the folder")
    add(
        "--embeddings",
        choices=EMBEDDINGS,
        help="with int8 and nf4; default: quantized where the model is low-rank",
    )
    add("--prompts", type=Path, help="real prompts to compare on: .txt, one a line, or .jsonl")
    add(
        "--tolerance",
        type=number_above_0,
        help="largest relative error of the logits; by format if unsaid",
    )
    add_calibration_options(parser)
    add(
        "--results",
        nargs="+",
        metavar="FOLDER",
        help="outputs of fingpt evaluate on the model, whose figures get into the card; those of a"
        " run's own evaluations do anyhow",
    )
    add(
        "--push",
        type=as_option(check_hub_name),
        metavar="OWNER/NAME",
        help="repository of the Hugging Face hub that the finished folder is uploaded to; where the"
        " folder is there from the same command before, it is uploaded alone",
    )
    add("--private", action="store_true", help="with --push: only its owner sees the repository")
    add(
        "--revision",
        type=as_option(check_branch),
        metavar="BRANCH",
        help="with --push: new branch for the files; default: main",
    )
    add("--commit_message", metavar="TEXT", help="with --push: of the commit")
    return parser


def parse_options(words: list[str]) -> argparse.Namespace:
    """The options that follow ``fingpt export``.

    Args:
        words: Part of the command line after the command.

    Raises:
        WrongOptions: An option is unknown or missing, has an invalid value, or has no effect.
        SystemExit: With status 0, after ``--help`` has been answered.
    """
    options = build_parser().read(words)
    check_options(options)
    return options


def check_options(options: argparse.Namespace) -> None:
    """Refuses options that have no effect together.

    Raises:
        WrongOptions: There is such an option.
    """
    check_calibration_options(options)
    if asks_for_calibration(options) and options.format not in ("int8", "nf4"):
        raise WrongOptions("calibration has an effect with --format int8 and nf4 alone")
    if options.push is None:
        for name in ("private", "revision", "commit_message"):
            if getattr(options, name):
                raise WrongOptions(f"--{name} has an effect with --push alone")
