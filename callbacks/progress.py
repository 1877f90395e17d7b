"""How far a run is, on a terminal."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import psutil
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column
from typing_extensions import override

from fingpt_lightning.metric_keys import TRAIN_LOSS, TRAIN_TOKENS, VAL_LOSS
from fingpt_lightning.units import format_bytes, format_duration

_REFRESH_S = 0.5
_WINDOW = 20
"""Refreshes over which tokens per second are measured."""


class Seen(NamedTuple):
    """How far a run is; the arguments of `progress_text`."""

    step: int
    num_steps: int | None
    left_s: float | None
    losses: dict[str, float]
    tokens_per_s: float | None
    num_bytes: int


class Pace:
    """How fast a fit goes, from looks at it now and then."""

    def __init__(self) -> None:
        self._first_step = 0
        self._began_s = self._started_s = 0.0
        self._past: deque[tuple[float, float]] = deque(maxlen=_WINDOW)
        self._tokens_per_s: float | None = None

    @property
    def time_s(self) -> float:
        """Seconds since the start, other work included."""
        return time.monotonic() - self._began_s

    def start(self, trainer: Trainer) -> None:
        """Begins at the trainer's current step, which is not 0 where it resumes."""
        self._began_s = self._started_s = time.monotonic()
        self._first_step, self._tokens_per_s = trainer.global_step, None
        self._past.clear()
        tokens = getattr(trainer.lightning_module, "tokens_seen", None)
        if tokens is not None:
            self._past.append((self._began_s, float(tokens)))

    def skip(self, time_s: float | int, in_time_left: bool = False) -> None:
        """Leaves out work that is not training.

        Args:
            time_s: Seconds of that work, which tokens per second leave out.
            in_time_left: Whether the time left expects such work too, as it does validations.
        """
        if not in_time_left:
            self._started_s += time_s
        moved = [(seen_s + time_s, tokens) for seen_s, tokens in self._past]
        self._past = deque(moved, maxlen=_WINDOW)

    def look(self, trainer: Trainer) -> Seen:
        """How far the run is now."""
        now_s, metrics, step = time.monotonic(), trainer.callback_metrics, trainer.global_step
        tokens = metrics.get(TRAIN_TOKENS)
        if tokens is not None:
            self._past.append((now_s, float(tokens)))
            (first_s, first), (last_s, last) = self._past[0], self._past[-1]
            if last_s > first_s:
                self._tokens_per_s = (last - first) / (last_s - first_s)
        total = trainer.estimated_stepping_batches
        num_steps = None if total == float("inf") else int(total)
        num_done, left_s = step - self._first_step, None
        if num_steps is not None and num_done:
            left_s = (num_steps - step) * (now_s - self._started_s) / num_done
        found = {"train": metrics.get(TRAIN_LOSS), "val": metrics.get(VAL_LOSS)}
        losses = {key: float(value) for key, value in found.items() if value is not None}
        memory = _memory_bytes(trainer.strategy.root_device)
        return Seen(step, num_steps, left_s, losses, self._tokens_per_s, memory)


class TrainingProgress(ProgressBar):
    """Shows how far a run is: steps, time left, loss, tokens per second, memory.

    Logs nothing. Cost: twice a second, on the first rank, a read of the last logged loss, which
    waits for the device. Memory is the peak of CUDA's allocator, elsewhere what the process holds.
    The time left is that of the steps of this fit so far, with validation, without evaluation.
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_enabled = True
        self._display: Progress | None = None
        self._training: TaskID | None = None
        self._evaluating: TaskID | None = None
        self._pace = Pace()
        self._shown_s = self._evaluating_since_s = 0.0

    @property
    def is_enabled(self) -> bool:
        """Whether a bar is shown."""
        return self._is_enabled

    @override
    def disable(self) -> None:
        self._is_enabled = False

    @override
    def enable(self) -> None:
        self._is_enabled = True

    @override
    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._display is None:
            print(*args, **kwargs)
        else:
            self._display.console.print(*args, markup=False, highlight=False)

    @contextmanager
    def work(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Shows other work of the run, such as an evaluation, below the training.

        Args:
            what: Description of the work.
            total: Units of work.

        Yields:
            Function to be called with the number of units that are done.
        """
        if not self._is_enabled:
            yield _unseen
            return
        is_alone = self._display is None
        began_s = time.monotonic()
        display = self._started()
        task = display.add_task(what, total=total, text="")

        def show(done: int) -> None:
            display.update(task, completed=done, text=f"{done:,}/{total:,}")

        try:
            yield show
        finally:
            display.remove_task(task)
            # It does not count as part of the training's pace.
            self._pace.skip(time.monotonic() - began_s)
            if is_alone:
                self._stop()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_enabled:
            return
        self._pace.start(trainer)
        total = trainer.estimated_stepping_batches
        self._training = self._started().add_task(
            "training",
            total=None if total == float("inf") else int(total),
            completed=trainer.global_step,
            text="",
        )

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._training is not None and time.monotonic() - self._shown_s >= _REFRESH_S:
            self._show_training(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._training is not None:
            self._show_training(trainer)
        self._stop()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_evaluating("validating", trainer.num_val_batches)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_evaluating("testing", trainer.num_test_batches)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_evaluating("predicting", trainer.num_predict_batches)

    @override
    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self._advance()

    @override
    def on_test_batch_end(self, *_: Any, **__: Any) -> None:
        self._advance()

    @override
    def on_predict_batch_end(self, *_: Any, **__: Any) -> None:
        self._advance()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_evaluating(trainer)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_evaluating(trainer)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_evaluating(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def _started(self) -> Progress:
        if self._display is None:
            column = Column(no_wrap=True, overflow="ellipsis")
            self._display = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(16),
                TextColumn("{task.fields[text]}", markup=False, table_column=column),
                console=Console(stderr=True, highlight=False),
            )
            self._display.start()
        return self._display

    def _stop(self) -> None:
        if self._display is not None:
            self._display.stop()
        self._display = self._training = self._evaluating = None

    def _show_training(self, trainer: Trainer) -> None:
        assert self._display is not None
        assert self._training is not None
        self._shown_s = time.monotonic()
        seen = self._pace.look(trainer)
        text = progress_text(**seen._asdict())
        self._display.update(self._training, completed=seen.step, text=text)

    def _begin_evaluating(self, what: str, num_batches: Any) -> None:
        if not self._is_enabled:
            return
        self._evaluating_since_s = time.monotonic()
        counts = num_batches if isinstance(num_batches, list) else [num_batches]
        total = sum(counts)
        self._evaluating = self._started().add_task(
            what, total=None if total == float("inf") else total, text=""
        )

    def _advance(self) -> None:
        if self._display is not None and self._evaluating is not None:
            self._display.advance(self._evaluating)

    def _end_evaluating(self, trainer: Trainer) -> None:
        if self._display is not None and self._evaluating is not None:
            self._display.remove_task(self._evaluating)
        self._evaluating = None
        self._pace.skip(time.monotonic() - self._evaluating_since_s, in_time_left=True)
        if trainer.state.fn != TrainerFn.FITTING:
            self._stop()


def progress_text(
    step: int,
    num_steps: int | None,
    left_s: float | None,
    losses: dict[str, float],
    tokens_per_s: float | None,
    num_bytes: int,
) -> str:
    """The text behind the bar; what is not known is left out.

    >>> progress_text(1200, 20000, 7384.0, {"train": 3.2141, "val": 3.4}, 8123.4, 3 * 2**29)
    '1,200/20,000, 2 h 03 min left, loss 3.214, val 3.400, 8,123 tokens/s, 1.5 GiB'
    >>> progress_text(7, None, None, {}, None, 2**20)
    '7 steps, 1.0 MiB'
    >>> progress_text(7, None, None, {}, 0.25, 2**20)
    '7 steps, 0.25 tokens/s, 1.0 MiB'
    """
    parts = [f"{step:,} steps" if num_steps is None else f"{step:,}/{num_steps:,}"]
    if left_s is not None and num_steps != step:
        parts.append(f"{format_duration(left_s)} left")
    names = {"train": "loss", "val": "val"}
    parts += [f"{names[key]} {loss:.3f}" for key, loss in losses.items()]
    if tokens_per_s is not None:
        parts.append(f"{tokens_per_s:,.{0 if tokens_per_s >= 10 else 2}f} tokens/s")
    return ", ".join([*parts, format_bytes(num_bytes)])


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def _unseen(done: int) -> None:
    """Callback of a bar that is not shown."""
