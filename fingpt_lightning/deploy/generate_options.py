"""The options of ``fingpt generate``, read without importing anything heavy."""

import argparse
from pathlib import Path

from fingpt_lightning.files import JSON_LINES
from fingpt_lightning.terminal.command_line import (
    OptionParser,
    WrongOptions,
    add_chat_option,
    add_model_options,
    named_paths,
    refuse_input_as_output,
)
from fingpt_lightning.terminal.messages import wrong_ending
from fingpt_lightning.terminal.numbers import number_above_0, positive_int, seed, share


def build_parser() -> OptionParser:
    """The parser of ``fingpt generate``."""
    parser = OptionParser("fingpt generate", "Text that goes on from prompts.")
    add_model_options(parser)
    add_chat_option(parser)
    add = parser.add_argument
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", help="what the text begins with")
    prompts.add_argument(
        "--prompts",
        type=Path,
        help='file of prompts: .txt, one a line, or .jsonl with "prompt" (and "adapter")',
    )
    add("--adapters", type=named_paths, help="NAME=FOLDER,... for prompts that name theirs")
    add("--max_new_tokens", type=positive_int, default=64, help="default: %(default)s")
    add("--batch_size", type=positive_int, default=8, help="prompts at once; default: %(default)s")
    add_sampling_options(parser)
    add("--output", type=Path, help=".jsonl file for the texts, in place of printing them")
    add("--overwrite", action="store_true", help="replace the output")
    return parser


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The options that say how tokens are drawn, which `deploy.sampling.sampling_of` reads."""
    add = parser.add_argument
    add("--temperature", type=number_above_0, help="draw tokens, with logits divided by it")
    add("--top_k", type=positive_int, help="draw from the K likeliest tokens")
    add("--top_p", type=share, help="draw from the likeliest tokens of this probability together")
    add("--seed", type=seed, help="of the draws; default: 1")


def check_sampling_options(options: argparse.Namespace) -> None:
    """Refuses settings of draws where nothing is drawn.

    Raises:
        WrongOptions: There is one.
    """
    for name in ("top_k", "top_p", "seed"):
        if options.temperature is None and getattr(options, name) is not None:
            raise WrongOptions(f"--{name} has no effect without --temperature; 1 draws as is")


def parse_options(words: list[str]) -> argparse.Namespace:
    """The options that follow ``fingpt generate``.

    Args:
        words: Part of the command line after the command.

    Raises:
        WrongOptions: An option is unknown, missing, has an invalid value, or has no effect with
            another.
        SystemExit: With status 0, after ``--help`` has been answered.
    """
    options = build_parser().read(words)
    if options.overwrite and options.output is None:
        raise WrongOptions("--overwrite has no effect without --output")
    if options.output is not None and options.prompts is not None:
        refuse_input_as_output(options.prompts, options.output)
    output = options.output
    if output is not None and output.suffix != JSON_LINES and not output.is_dir():
        raise WrongOptions(f"output {wrong_ending(output, [JSON_LINES])}")
    if options.adapter and options.adapters:
        raise WrongOptions("--adapter and --adapters: give one of them")
    check_sampling_options(options)
    return options
