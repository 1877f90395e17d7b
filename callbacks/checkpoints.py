"""The two checkpoints that every run keeps: the best one and the last one."""

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from fingpt_lightning.files import written_whole
from fingpt_lightning.metric_keys import VAL_LOSS
from fingpt_lightning.models.formats.checkpoint import load_contents


class BestCheckpoint(ModelCheckpoint):
    """Keeps ``best.ckpt``, of the validation with the best value of one metric.

    A resumed run starts a new folder and knows the best of its whole history: as long as it has
    no better one, its ``best.ckpt`` is that of the run before (a hard link where the file
    system has them). Where that file is gone or cannot be read, its best is the best since.

    Keys: none.
    Cost: a write whenever a validation is better than all before.

    Args:
        monitor: Logged key to compare.
        mode: Direction of the comparison: whether ``min`` or ``max`` is better.
        dirpath: Folder of the file; null is ``checkpoints/`` in the run folder.
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

        self._best_before: Path | None = None

    @property
    @override
    def state_key(self) -> str:
        # Without the settings, so that a run may be resumed with others.
        return f"{type(self).__qualname__}({self.monitor})"

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("dirpath") == self.dirpath:
            super().load_state_dict(state_dict)
        elif state_dict["best_model_path"]:
            # Lightning 2.6.6 would forget the score and then name the file of the other folder.
            self._best_before = Path(state_dict["best_model_path"])

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        before, self._best_before = self._best_before, None
        if before is None or self.dirpath is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = Path(self.dirpath) / "best.ckpt"
        score = self._take_over(trainer, before, path) if trainer.is_global_zero else None
        score = trainer.strategy.broadcast(score)
        if score is not None:
            self.best_model_path = self.kth_best_model_path = str(path)
            self.best_model_score = self.kth_value = score
            self.best_k_models = {str(path): score}

    def _take_over(self, trainer: Trainer, before: Path, path: Path) -> Tensor | None:
        """Puts the best checkpoint of the run before into this one's folder; returns its score."""
        if not before.is_file():  # the folder was moved, with the checkpoint that is resumed
            before = Path(str(trainer.ckpt_path)).with_name(before.name)
        try:
            saved = load_contents(before)
            # Not from the resumed state: the file may be of a later step.
            score: Tensor = saved["callbacks"][self.state_key]["best_model_score"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if before.resolve() == path.resolve():
            return score
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as aside:
            try:
                aside.unlink()
                aside.hardlink_to(before)
            except OSError:
                shutil.copyfile(before, aside)
        return score


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt``, of every Nth step and of the last one.

    Keys: none.
    Cost: a write every ``every_n_train_steps``, and another after a validation at such a step, so
    that a resumed run does not miss it.

    Args:
        every_n_train_steps: Optimizer steps from write to write.
        dirpath: Folder of the file; null is ``checkpoints/`` in the run folder.

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
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("dirpath") == self.dirpath:  # else this run has a file of its own
            super().load_state_dict(state_dict)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # A resumed run has been saved at its first step. Within a window of accumulation it would
        # be saved again, with the next batch counted as seen and its gradient lost.
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
            # Lightning 2.6 considers a validation done that comes right after the checkpoint that
            # it resumes from: early stopping and the best checkpoint would not learn of it.
            trainer.save_checkpoint(self.best_model_path)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run or trainer.global_step % self._interval_steps == 0:  # type: ignore[attr-defined]
            return
        assert self.dirpath is not None
        self.best_model_path = str(Path(self.dirpath) / "last.ckpt")
        trainer.save_checkpoint(self.best_model_path)
