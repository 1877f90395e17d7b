"""The options of ``fingpt tokenize``, read without importing anything heavy."""

import argparse

from fingpt_lightning.shards.options import add_shard_options, shard_command
from fingpt_lightning.terminal.command_line import OptionParser, WrongOptions

_OF_TOKENIZING = ("--data.num_tokenizing_workers", "--data.init_args.num_tokenizing_workers")
"""Options of a run for how its text is tokenized, which the tokens do not depend on."""


def build_parser() -> OptionParser:
    """The parser of ``fingpt tokenize``."""
    parser = OptionParser(
        "fingpt tokenize",
        "Tokenizes the text of a run into its cache, before the run or by many jobs. Takes every"
        " option of fingpt fit (--config FILE ...) beside these.",
    )
    add_shard_options(parser, "text's batches")
    parser.add_argument("--overwrite", action="store_true", help="begin the shard anew")
    return parser


def parse_options(words: list[str]) -> argparse.Namespace:
    """The options that follow ``fingpt tokenize``; ``words`` holds those of ``fingpt fit``.

    Args:
        words: Words of the command line.

    Raises:
        WrongOptions: An option has an invalid value or no effect.
        SystemExit: ``--help`` was given; the status is 0.
    """
    options = build_parser().read_beside_others(words)
    if options.overwrite and options.shard is None:
        raise WrongOptions("--overwrite has an effect with --shard alone")
    for word in words if options.merge is not None else ():
        if (name := word.partition("=")[0]) in _OF_TOKENIZING:
            raise WrongOptions(f"{name} has no effect with --merge, which tokenizes nothing")
    options.shard_command = shard_command("fingpt tokenize", words)
    return options
