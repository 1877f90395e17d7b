"""What a run does, line by line, where no one watches a bar."""

import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from callbacks.progress import Pace, TrainingProgress, progress_text
from callbacks.recording import HoldsStages, PartlyTrained, parameter_totals
from fingpt_lightning.metric_keys import (
    TRAIN_LEARNING_RATE,
    VAL_BITS_PER_BYTE,
    VAL_LOSS,
    VAL_PERPLEXITY,
)
from fingpt_lightning.units import format_bytes, format_duration

LOG_FILE = "log.txt"
"""Name of the file in the run folder."""
_RARELY_AFTER = 60
"""Lines at the first pace; after them, lines come six times less often."""
_RARELY = 6
_SLOW_FIRST_S = 5.0


class LogLines(Callback):
    """Writes a line about every stage of a run, and one every some seconds while it trains.

    The lines go to ``log.txt`` in the trainer's ``default_root_dir``, and to standard error where
    no `TrainingProgress` shows a bar. ``fingpt fit`` has this callback unless one is given.

    Logs nothing. Cost: a look at the clock in each step; at a line, on the first rank, a read of
    the last logged loss, which waits for the device.

    Args:
        every_s: Seconds from line to line; six times as many after the first 60 lines.
        every_n_steps: Optimizer steps from line to line, in place of seconds.
        file: Whether the lines go to ``log.txt`` too.

    Raises:
        ValueError: ``every_s`` or ``every_n_steps`` is not above 0.
    """

    def __init__(
        self, every_s: float = 10.0, every_n_steps: int | None = None, file: bool = True
    ) -> None:
        if not every_s > 0:
            raise ValueError(f"every_s {every_s} is not above 0")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps {every_n_steps} is below 1")
        self._every_s, self._every_n_steps, self._to_file = every_s, every_n_steps, file
        self._pace = Pace()
        self._has_begun = False
        self._told_s = self._began_s = 0.0
        self._told_step = 0
        self._num_lines = 0
        self._best: float | None = None
        self._saved_step: int | None = None
        self._first_batch_s: float | None = None

    def tell(self, trainer: Trainer, text: str) -> None:
        """Writes one line, on the first rank.

        Args:
            trainer: Trainer of the run.
            text: Text of the line.
        """
        if not trainer.is_global_zero:
            return
        line = f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S} {text}"
        bar = trainer.progress_bar_callback
        if not (isinstance(bar, TrainingProgress) and bar.is_enabled):
            print(line, file=sys.stderr, flush=True)
        folder = Path(trainer.default_root_dir)
        if self._to_file and folder.is_dir():
            with (folder / LOG_FILE).open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pace.start(trainer)
        self._has_begun = True
        self._told_s, self._told_step, self._num_lines = time.monotonic(), trainer.global_step, 0
        self._best, self._saved_step, self._first_batch_s = None, None, None
        for text in start_texts(trainer, pl_module):
            self.tell(trainer, text)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._tell_saved(trainer)
        if self._first_batch_s is None:
            self._first_batch_s = time.monotonic()

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        now_s, step = time.monotonic(), trainer.global_step
        if self._first_batch_s is not None and self._first_batch_s >= 0:
            took_s, self._first_batch_s = now_s - self._first_batch_s, -1.0
            if took_s >= _SLOW_FIRST_S:
                with_it = ", compilation included" if pl_module.hparams.get("compile") else ""
                self.tell(trainer, f"first batch: {format_duration(took_s)}{with_it}")
        self._tell_saved(trainer)
        if step == self._told_step:
            return
        if self._every_n_steps is not None:
            is_due = step % self._every_n_steps == 0
        else:
            often = self._num_lines < _RARELY_AFTER
            is_due = now_s - self._told_s >= self._every_s * (1 if often else _RARELY)
        if is_due:
            self._tell_step(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began_s = time.monotonic()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        took_s = time.monotonic() - self._began_s
        self._pace.skip(took_s, in_time_left=True)
        if trainer.sanity_checking:
            return
        metrics = trainer.callback_metrics
        parts = []
        if (value := metrics.get(VAL_LOSS)) is not None:
            loss = float(value)
            is_best = self._best is None or loss < self._best
            parts.append(f"loss {loss:.4f}{' (best so far)' if is_best else ''}")
            self._best = loss if is_best else self._best
        if (value := metrics.get(VAL_PERPLEXITY)) is not None:
            parts.append(f"perplexity {float(value):.4g}")
        if (value := metrics.get(VAL_BITS_PER_BYTE)) is not None:
            parts.append(f"{float(value):.4f} bits per byte")
        parts.append(format_duration(took_s))
        is_fit = trainer.state.fn == TrainerFn.FITTING
        when = f" after step {trainer.global_step:,}" if is_fit else ""
        self.tell(trainer, f"validation{when}: {', '.join(parts)}")

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._saved_step = trainer.global_step

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell_saved(trainer)
        if trainer.global_step != self._told_step:
            self._tell_step(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell_saved(trainer)
        took = format_duration(self._pace.time_s)
        self.tell(trainer, f"training ended after step {trainer.global_step:,}: {took}")

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self._has_begun:  # else the program's own line says all, and no file is to be left
            what = type(exception).__name__
            self.tell(trainer, f"ended by {what} at step {trainer.global_step:,}")

    def _tell_step(self, trainer: Trainer) -> None:
        self._told_s, self._told_step = time.monotonic(), trainer.global_step
        self._num_lines += 1
        if trainer.is_global_zero:
            self.tell(trainer, f"step {step_text(trainer, self._pace)}")

    def _tell_saved(self, trainer: Trainer) -> None:
        if self._saved_step is None:
            return
        step, self._saved_step = self._saved_step, None
        names = [
            Path(checkpoint.best_model_path).name
            for checkpoint in trainer.checkpoint_callbacks
            if isinstance(checkpoint, ModelCheckpoint)
            and checkpoint._last_global_step_saved == step
            and checkpoint.best_model_path
        ]
        written = f": {', '.join(dict.fromkeys(names))}" if names else ""
        self.tell(trainer, f"checkpoint of step {step:,}{written}")


def tell(trainer: Trainer, text: str) -> None:
    """Writes a line of the run where it has a `LogLines`.

    Args:
        trainer: Trainer of the run.
        text: Text of the line.
    """
    # Lightning 2.6 sets the list outside the class, unseen by type checkers.
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LogLines):
            callback.tell(trainer, text)


def start_texts(trainer: Trainer, pl_module: LightningModule) -> list[str]:
    """What a run is, before its first step: its length, what it trains, what that takes.

    All ranks call it together: a pipeline's parameters are those of all its stages.
    """
    steps = trainer.estimated_stepping_batches
    until = "" if steps == float("inf") else f" to {int(steps):,}"
    first = f"{trainer.global_step + 1:,}"
    ranks = f"{trainer.world_size} x " if trainer.world_size > 1 else ""
    where = f"{ranks}{trainer.strategy.root_device.type}, {trainer.precision}"
    trained = [p for p in pl_module.parameters() if p.requires_grad]
    num_all, _, num_trained = parameter_totals(trainer, pl_module)
    is_part = isinstance(trainer.strategy, HoldsStages)
    if isinstance(pl_module, PartlyTrained) and num_trained and not is_part:
        num_all = round(num_trained / pl_module.trained_share())  # a base in 4 bits is packed
    weights = sum(p.numel() * p.element_size() for p in pl_module.parameters())
    gradients = sum(p.numel() * p.element_size() for p in trained)
    on_first = " on the first rank" if is_part else ""
    return [
        f"training of {type(pl_module).__name__}: steps {first}{until}, {where}",
        # As PEFT prints it.
        f"trainable params: {num_trained:,} || all params: {num_all:,} || trainable%:"
        f" {100 * num_trained / max(num_all, 1):.4f}",
        f"memory before activations{on_first}: weights {format_bytes(weights)}, gradients"
        f" {format_bytes(gradients)}; optimizer state and activations come on top",
    ]


def step_text(trainer: Trainer, pace: Pace) -> str:
    """How far a run is: steps, time left, losses, learning rate, tokens per second, memory."""
    seen = pace.look(trainer)
    text = progress_text(**seen._asdict())
    rate = trainer.callback_metrics.get(TRAIN_LEARNING_RATE)
    if rate is None:
        return text
    *parts, memory = text.rsplit(", ", 1)
    return ", ".join([*parts, f"rate {float(rate):.2e}", memory])
