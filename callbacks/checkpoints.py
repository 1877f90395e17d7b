"""The two checkpoints that every run keeps: the best one and the last one."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from fingpt_lightning.metric_keys import VAL_LOSS


class BestCheckpoint(ModelCheckpoint):
    """Keeps ``best.ckpt``, of the validation with the best value of one metric.

    A resumed run starts a new folder, and its best is the best since.

    Keys: none.
    Cost: a write whenever a validation is better than all before.

    Args:
        monitor: The logged key.
        mode: Whether ``min`` or ``max`` is better.
        dirpath: Folder; null is ``checkpoints/`` in the run folder.
    """

    def __init__(
        self, monitor: str = VAL_LOSS, mode: str = "min", dirpath: str | None = None
    ) -> None:
        super().__init__(
            dirpath,
            "best",
            monitor=monitor,
            mode=mode,
            enable_version_counter=False,
            auto_insert_metric_name=False,
        )

    @property
    @override
    def state_key(self) -> str:
        # Without the settings, so that a run may be resumed with others.
        return f"{type(self).__qualname__}({self.monitor})"


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt``, of every Nth step and of the last one.

    Keys: none.
    Cost: a write every ``every_n_train_steps``, and another after a validation at such a step, so
    that a resumed run does not miss it. Each goes aside and is then renamed: a kill while writing
    leaves the one before.

    Args:
        every_n_train_steps: Optimiser steps from write to write.
        dirpath: Folder; null is ``checkpoints/`` in the run folder.

    Raises:
        ValueError: ``every_n_train_steps`` is below 1.
    """

    def __init__(self, every_n_train_steps: int = 100, dirpath: str | None = None) -> None:
        if every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps {every_n_train_steps} is below 1")
        super().__init__(
            dirpath,
            "last",
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
            auto_insert_metric_name=False,
        )
        self._interval_steps = every_n_train_steps
        self._saved_batch: int | None = None

    @property
    @override
    def state_key(self) -> str:
        # Without the settings, so that a run may be resumed with others.
        return type(self).__qualname__

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # A resumed run has been saved at its first step. Within a window of accumulation it would
        # be again, with the next batch counted as seen and its gradient lost.
        self._last_global_step_saved = trainer.global_step
        self._saved_batch = None

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        before = self._last_global_step_saved
        super().on_train_batch_end(trainer, *args, **kwargs)
        if self._last_global_step_saved != before:
            self._saved_batch = trainer.fit_loop.total_batch_idx

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        is_same_batch = self._saved_batch == trainer.fit_loop.total_batch_idx
        if trainer.state.fn == TrainerFn.FITTING and is_same_batch:
            # Lightning 2.6 holds a validation to be done that comes right after what it goes on
            # from, so that early stopping and the best checkpoint would not hear of it.
            trainer.save_checkpoint(self.best_model_path)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run or trainer.global_step % self._interval_steps == 0:  # type: ignore[attr-defined]
            return
        assert self.dirpath is not None
        self.best_model_path = str(Path(self.dirpath) / "last.ckpt")
        trainer.save_checkpoint(self.best_model_path)
