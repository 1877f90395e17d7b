"""``fingpt plan``: passes the Trainer's parser to the planner, which lies below this package."""

import argparse

from fingpt_lightning.cli.early_checks import WITHOUT_LOGGERS
from fingpt_lightning.cli.trainer import build_trainer_command
from fingpt_lightning.planning import command


def run(options: argparse.Namespace) -> None:
    """Prints the plan of a run.

    Args:
        options: Result of `planning.options.parse_options`.

    Raises:
        ConfigError: The command line or a config is wrong, as with ``fingpt fit``.
        ValueError: The model's shapes are not known, or the folder of ``--json`` does not exist.
    """
    own_options = options.own_options
    command.run(
        options, lambda words: build_trainer_command([*words, *WITHOUT_LOGGERS], own_options)
    )
