"""The options of ``fingpt evaluate``, read without importing anything heavy."""

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
    names,
)
from fingpt_lightning.terminal.numbers import positive_int, seed, whole_number


def build_parser() -> OptionParser:
    """The parser of ``fingpt evaluate``."""
    parser = OptionParser(
        "fingpt evaluate", "Accuracy and F1 of a model on tasks, with a table of every answer."
    )
    add = parser.add_argument
    add_model_options(parser)
    add(
        "--tasks",
        required=True,
        type=names,
        help="names or YAML files, with commas: fpb,fiqa_sa,tfns",
    )
    add("--data_dir", type=Path, help="holds TASK/SPLIT.jsonl; left out: the Hugging Face hub")
    add_chat_option(parser)
    add_csv_options(parser)
    add("--split", default="validation", help="default: %(default)s")
    add("--output", type=Path, help="folder for the results; left out: the table alone")
    add("--overwrite", action="store_true", help="replace the results in it")
    add(
        "--scoring",
        default="choices",
        choices=("choices", "generate", "both"),
        help="the likeliest of the possible answers, or the label in a written one; numbers, spans,"
        " summaries and scores are written in any case",
    )
    add("--calibrate", action="store_true", help="take out the bias for labels without content")
    add("--strict", action="store_true", help="an empty text is an error, not left out")
    add(
        "--too_long",
        default="cut",
        choices=("cut", "drop", "error"),
        help="what happens to rows of more tokens than the model reads: they lose tokens of their"
        " text, or are left out, or end the run; default: %(default)s",
    )
    add(
        "--num_fewshot",
        type=whole_number,
        default=0,
        metavar="N",
        help="examples of the train split before each question; default: %(default)s",
    )
    add("--fewshot_seed", type=seed, help="of their draw; default: 1")
    add("--batch_tokens", type=positive_int, help="tokens of a batch, padding included")
    add("--limit", type=positive_int, help="rows of each task")
    add_shard_options(parser, "batches of each task")
    return parser


def parse_options(words: list[str]) -> argparse.Namespace:
    """The options that follow ``fingpt evaluate``; ``shard_command`` is the command of a shard.

    Args:
        words: Part of the command line after the command.

    Raises:
        WrongOptions: An option is unknown or missing, has an invalid value, or has no effect.
        SystemExit: With status 0, after ``--help`` has been answered.
    """
    options = build_parser().read(words)
    check_options(options)
    for name in ("shard", "merge"):
        if getattr(options, name) is not None and options.output is None:
            raise WrongOptions(f"--{name} has an effect with --output alone: shards lie beside it")
    check_merge_options(options)
    options.shard_command = shard_command("fingpt evaluate", words)
    return options


def check_options(options: argparse.Namespace) -> None:
    """Refuses options that have no effect together.

    Raises:
        WrongOptions: There is such an option.
    """
    if options.overwrite and options.output is None:
        raise WrongOptions("--overwrite has an effect with --output alone")
    if options.fewshot_seed is not None and not options.num_fewshot:
        raise WrongOptions("--fewshot_seed has an effect with --num_fewshot alone")
