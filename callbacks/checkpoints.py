"""The two checkpoints that every run keeps: the best one and the last one."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override


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
        self, monitor: str = "val/loss", mode: str = "min", dirpath: str | None = None
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
    Cost: a write every ``every_n_train_steps``, aside and then renamed: a kill while writing
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

    @property
    @override
    def state_key(self) -> str:
        # Without the settings, so that a run may be resumed with others.
        return type(self).__qualname__

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run or trainer.global_step % self._interval_steps == 0:  # type: ignore[attr-defined]
            return
        assert self.dirpath is not None
        self.best_model_path = str(Path(self.dirpath) / "last.ckpt")
        trainer.save_checkpoint(self.best_model_path)
