"""The options of our classes are frozen: a change of one is a change for users.

Remake the list with ``python -m tests.cli.test_cli_options > tests/golden/cli_options.txt``.
"""

import inspect
from pathlib import Path

from callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from callbacks.compression import CompressionMonitor
from callbacks.financial_evaluation import FinancialEvaluation
from callbacks.memory import MemoryMonitor
from callbacks.summary import RunSummary
from callbacks.throughput import ThroughputMonitor
from fingpt_lightning.data import FinancialInstructions, TextBlocks
from fingpt_lightning.modules import LowRankPretraining, QuantizedFinetuning

GOLDEN = Path(__file__).parents[1] / "golden" / "cli_options.txt"
CLASSES = {
    "model": LowRankPretraining,
    "data": TextBlocks,
    "model.QuantizedFinetuning": QuantizedFinetuning,
    "data.FinancialInstructions": FinancialInstructions,
    "best_checkpoint": BestCheckpoint,
    "last_checkpoint": LastCheckpoint,
    "callbacks.CompressionMonitor": CompressionMonitor,
    "callbacks.FinancialEvaluation": FinancialEvaluation,
    "callbacks.MemoryMonitor": MemoryMonitor,
    "callbacks.RunSummary": RunSummary,
    "callbacks.ThroughputMonitor": ThroughputMonitor,
}


def options() -> list[str]:
    """One line an option: key, type and default."""
    return [
        f"{key}.{parameter}"
        for key, class_ in CLASSES.items()
        for parameter in inspect.signature(class_).parameters.values()
    ]


def test_no_option_changes_unnoticed() -> None:
    assert options() == GOLDEN.read_text().splitlines()


if __name__ == "__main__":
    print("\n".join(options()))
