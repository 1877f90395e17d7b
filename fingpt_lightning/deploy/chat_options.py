"""The options of ``fingpt chat``, read without importing anything heavy."""

import argparse

from fingpt_lightning.deploy.generate_options import add_sampling_options, check_sampling_options
from fingpt_lightning.terminal.command_line import (
    OptionParser,
    add_chat_option,
    add_model_options,
)
from fingpt_lightning.terminal.numbers import positive_int


def build_parser() -> OptionParser:
    """The parser of ``fingpt chat``."""
    parser = OptionParser(
        "fingpt chat",
        "A conversation with a model in the terminal; from a pipe, each line is a message.",
    )
    add_model_options(parser)
    add_chat_option(parser)
    add = parser.add_argument
    add("--system", metavar="TEXT", help="what the conversation begins with; /system changes it")
    add(
        "--context",
        type=positive_int,
        metavar="TOKENS",
        help="tokens of conversation and answer together that the model sees; default: 4096, or the"
        " model's positions where they are fewer",
    )
    add(
        "--max_new_tokens",
        type=positive_int,
        help="of an answer; default: 512, or a quarter of the context where that is less",
    )
    add_sampling_options(parser)
    parser.set_defaults(adapters=None)
    return parser


def parse_options(words: list[str]) -> argparse.Namespace:
    """The options that follow ``fingpt chat``.

    Args:
        words: Part of the command line after the command.

    Raises:
        WrongOptions: An option is unknown, missing, has an invalid value or no effect.
        SystemExit: With status 0, after ``--help`` has been answered.
    """
    options = build_parser().read(words)
    check_sampling_options(options)
    return options
