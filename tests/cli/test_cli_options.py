"""The options of our classes and commands are frozen: a change of one is a change for users.

Remake the list with ``python -m tests.cli.test_cli_options > tests/golden/cli_options.txt``.
"""

import importlib
import inspect
from argparse import SUPPRESS, Action
from collections.abc import Iterator
from pathlib import Path

import callbacks as our_callbacks
from callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from callbacks.predictions import PredictionWriter
from fingpt_lightning import strategies
from fingpt_lightning.cli.main import COMMANDS
from fingpt_lightning.data import FinancialInstructions, TextBlocks
from fingpt_lightning.modules import LowRankPretraining, QuantizedFinetuning

GOLDEN = Path(__file__).parents[1] / "golden" / "cli_options.txt"
CLASSES: dict[str, type] = {
    "model": LowRankPretraining,
    "data": TextBlocks,
    "model.QuantizedFinetuning": QuantizedFinetuning,
    "data.FinancialInstructions": FinancialInstructions,
    "best_checkpoint": BestCheckpoint,
    "last_checkpoint": LastCheckpoint,
    "predictions": PredictionWriter,
    **{
        f"callbacks.{name}": getattr(our_callbacks, name)
        for name in our_callbacks.__all__
        if name not in ("DISTRIBUTION", "BestCheckpoint", "LastCheckpoint", "PredictionWriter")
    },
    **{f"strategies.{name}": getattr(strategies, name) for name in strategies.__all__},
}


def options() -> list[str]:
    """One line per option: key, type and default of classes, words and default of commands."""
    of_classes = [
        f"{key}.{parameter}"
        for key, class_ in CLASSES.items()
        for parameter in inspect.signature(class_).parameters.values()
    ]
    return [*of_classes, *_of_commands()]


def _of_commands() -> Iterator[str]:
    for command, (_, module, _) in COMMANDS.items():
        if module is None:  # its options are those of the classes and of Lightning's Trainer
            continue
        for action in importlib.import_module(module).build_parser()._actions:
            if action.dest != "help":
                yield f"fingpt {command} {_described(action)}"


def _described(action: Action) -> str:
    words = "|".join(action.option_strings) or action.dest
    choices = "" if action.choices is None else f" {{{','.join(map(str, action.choices))}}}"
    needed = " required" if action.required else ""
    default = "" if action.default in (None, SUPPRESS) else f" = {action.default}"
    return f"{words}{choices}{needed}{default}"


def test_no_option_changes_unnoticed() -> None:
    lines = options()
    assert len(CLASSES) >= 15
    assert {line.split()[1] for line in lines if line.startswith("fingpt ")} >= {
        "chat", "evaluate", "generate", "label", "decompose", "export", "sweep", "report", "plan",
        "tasks",
    }  # fmt: skip
    assert lines == GOLDEN.read_text().splitlines()


if __name__ == "__main__":
    print("\n".join(options()))
