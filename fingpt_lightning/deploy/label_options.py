"""The options of ``fingpt label``, read without importing anything heavy."""

import argparse
from pathlib import Path

from fingpt_lightning.shards.options import (
    add_shard_options,
    check_merge_options,
    shard_command,
)
from fingpt_lightning.terminal.command_line import (
    OptionParser,
    WrongOptions,
    add_chat_option,
    add_csv_options,
    add_model_options,
    named_paths,
    refuse_input_as_output,
)
from fingpt_lightning.terminal.numbers import positive_int


def build_parser() -> OptionParser:
    """The parser of ``fingpt label``."""
    parser = OptionParser("fingpt label", "Labels with probabilities for the texts of a file.")
    add_model_options(parser)
    add = parser.add_argument
    add("--task", required=True, help="name or YAML file of a task with labels, such as fpb")
    add(
        "--input",
        type=Path,
        required=True,
        help=".csv, .tsv, .json, .jsonl, those with .gz or .zst, .parquet or .xlsx",
    )
    add("--output", type=Path, required=True, help=".csv, .jsonl or .parquet")
    add_chat_option(parser)
    add_csv_options(parser)
    add("--text_column", default="text", help="where the texts are; default: %(default)s")
    add("--adapters", type=named_paths, help="NAME=FOLDER,... of which each row names one")
    add("--adapter_column", help="where rows name their adapter; empty is the base")
    add("--no_calibrate", action="store_true", help="keep the bias for labels without content")
    add("--batch_tokens", type=positive_int, help="tokens of a batch, padding included")
    add("--overwrite", action="store_true", help="replace the output; begin anew")
    add_shard_options(parser, "rows, 1,024 at a time")
    return parser


def parse_options(words: list[str]) -> argparse.Namespace:
    """The options that follow ``fingpt label``; ``shard_command`` is the command of a shard.

    Args:
        words: Part of the command line after the command.

    Raises:
        WrongOptions: An option is unknown, missing, has an invalid value, or has no effect with
            another.
        SystemExit: With status 0, after ``--help`` has been answered.
    """
    options = build_parser().read(words)
    refuse_input_as_output(options.input, options.output)
    if options.adapter and options.adapters:
        raise WrongOptions("--adapter and --adapters: give one of them")
    if bool(options.adapters) != bool(options.adapter_column):
        raise WrongOptions("--adapters and --adapter_column: give both or none")
    check_merge_options(options)
    options.shard_command = shard_command("fingpt label", words)
    return options
