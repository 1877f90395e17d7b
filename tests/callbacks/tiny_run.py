"""A tiny language model, its data and its trainer, for runs that end in milliseconds.

Axes: B batch, T tokens, V vocabulary.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from fingpt_lightning.low_rank.budget import LayerBudget, LayerKind, ModelBudget

VOCABULARY, WIDTH, BLOCK = 13, 22, 7
Batch = dict[str, Tensor]


def make_batch(num_rows: int = 3, num_ignored: int = 2, block: int = BLOCK) -> Batch:
    """Random tokens, of which the first ones of the first row are not supervised."""
    tokens = torch.randint(VOCABULARY, (num_rows, block + 1))
    labels = tokens[:, 1:].clone()
    labels[0, :num_ignored] = -100
    return {"input_ids": tokens[:, :-1].clone(), "labels": labels}


class Batches:
    """The same batches in each epoch; ``clock`` moves on at each fetch."""

    def __init__(self, batches: Sequence[Batch], clock: "Clock | None" = None) -> None:
        self._batches = batches
        self._clock = clock

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            if self._clock is not None:
                self._clock.now_s += 0.5
            yield batch

    def __len__(self) -> int:
        return len(self._batches)


class Clock:
    """Stands in for ``time.perf_counter``: moves only when told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class PlainModule(LightningModule):
    """An embedding, a layer of two factors or none, a head; no budget."""

    def __init__(self, rank: int | None = 3) -> None:
        super().__init__()
        self.rank = rank
        middle = (
            [nn.Linear(WIDTH, WIDTH, bias=False)]
            if rank is None
            else [nn.Linear(WIDTH, rank, bias=False), nn.Linear(rank, WIDTH, bias=False)]
        )
        self.network: Any = nn.Sequential(
            nn.Embedding(VOCABULARY, WIDTH),
            *middle,
            nn.Dropout(0.1),
            nn.Linear(WIDTH, VOCABULARY, bias=False),
        )
        self.losses: list[float] = []

    def loss(self, batch: Batch) -> Tensor:
        logits_BTV = self.network(batch["input_ids"])
        return F.cross_entropy(logits_BTV.flatten(0, 1), batch["labels"].flatten())

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("train/loss", loss)
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss = self.loss(batch)
        self.log("val/loss", loss, batch_size=len(batch["labels"]))

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class TinyModule(PlainModule):
    """`PlainModule` with a budget and a dense baseline, built in ``configure_model``."""

    num_twins = 0

    def budget(self) -> ModelBudget:
        table, dense = VOCABULARY * WIDTH, WIDTH * WIDTH
        middle = dense if self.rank is None else 2 * WIDTH * self.rank
        layers = (
            LayerBudget("0", LayerKind.EMBEDDING, False, table, table, 0, 0),
            LayerBudget("1", LayerKind.LINEAR, True, middle, dense, 2 * middle, 2 * dense),
            LayerBudget("4", LayerKind.HEAD, False, table, table, 2 * table, 2 * table),
        )
        return ModelBudget(layers, BLOCK)

    def dense_baseline(self) -> "TinyModule":
        self.num_twins += 1
        return TinyModule(rank=None)


class TimedModule(TinyModule):
    """A step takes one second, a validation batch 100 and a checkpoint 1000."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self._clock.now_s += 1
        return super().training_step(batch, batch_idx)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._clock.now_s += 100

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._clock.now_s += 1000


def tiny_trainer(folder: Path, callbacks: list[Callback], **options: Any) -> Trainer:
    """A silent trainer on the CPU that logs each step to ``folder/metrics.csv``."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": CSVLogger(folder, name="", version="") if "logger" not in options else None,
        "log_every_n_steps": 1,
        "max_epochs": 1,
        "limit_val_batches": 0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "callbacks": callbacks,
    }
    return Trainer(**(defaults | options))


def fit(
    trainer: Trainer, module: LightningModule, batches: Sequence[Batch], clock: Clock | None = None
) -> None:
    """Trains on some batches; where the trainer validates, on one batch of zeros."""
    zeros = torch.zeros(2, BLOCK, dtype=torch.int64)
    validation = Batches([{"input_ids": zeros, "labels": zeros}])
    trainer.fit(module, Batches(batches, clock), validation)


def logged_rows(folder: Path) -> list[dict[str, float]]:
    """The rows of ``metrics.csv`` without their empty cells."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
