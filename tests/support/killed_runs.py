"""What tests of killed finetunings share: their end, a base and rows, the status of a command.

Ends are raised in the process of the test, so that a run of a second is no new process.
"""

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, Trainer

from fingpt_lightning.cli.main import main
from fingpt_lightning.data import FinancialInstructions
from tests.models.tiny_models import tiny_llama


class Killed(Callback):
    """Ends a run, without its hooks for an end, when it has made ``after`` steps."""

    after: ClassVar[int | None] = 5

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.after:
            raise RuntimeError("killed")


def status_of(words: list[str]) -> int:
    """The exit status of a command.

    Args:
        words: Command and its options.
    """
    try:
        main(words)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def write_base_and_rows(folder: Path, num_items: int) -> None:
    """Writes a tiny Llama with its tokenizer, ``base``, and three rows of the task fpb, ``data``.

    Args:
        folder: Folder of both.
        num_items: Number of synthetic items on which the tokenizer is trained.
    """
    data = FinancialInstructions(num_synthetic_items=num_items, vocab_size=400, max_length=400)
    data.prepare_data()
    data.setup()
    config = tiny_llama().config
    config.vocab_size, config.max_position_embeddings = data.vocabulary_size, 400
    torch.manual_seed(2)
    type(tiny_llama())(config).save_pretrained(folder / "base")
    data.tokenizer.save_pretrained(folder / "base")
    rows = [{"text": f"Profit rose {n} %", "label": "positive"} for n in range(3)]
    (folder / "data" / "fpb").mkdir(parents=True)
    for split in ("train", "validation"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"data/fpb/{split}.jsonl").write_text(lines)
