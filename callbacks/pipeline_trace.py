"""What each rank of a pipeline does, and how long it waits for the others."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from typing_extensions import override

from fingpt_lightning.files import write_json
from fingpt_lightning.metric_keys import (
    PIPELINE_BUBBLE_SHARE,
    PIPELINE_BUBBLE_SHARE_FORMULA,
    PIPELINE_LARGEST_RANK,
    PIPELINE_SMALLEST_RANK,
    PIPELINE_TIMELINE,
)
from fingpt_lightning.pipeline import Pass, bubble_share, chrome_trace, draw
from fingpt_lightning.profiling.memory import module_memory
from fingpt_lightning.strategies import PipelineStrategy
from fingpt_lightning.units import MIB


class PipelineTrace(Callback):
    """Records a training step pass by pass: a picture, a Chrome trace and the share of idle time.

    Into ``pipeline/`` of the run folder go ``step_N.png`` (ranks over time: forward, backward,
    weights, idle) and ``step_N.json`` for https://ui.perfetto.dev; the picture goes to W&B too. Of
    several pipelines the first is shown.

    Keys:

    - ``pipeline/bubble_share``: the idle share of the ranks' time in that step, measured.
    - ``pipeline/bubble_share_formula``: what the schedule would waste, were all stages equal.
    - ``pipeline/largest_rank_mib``, ``pipeline/smallest_rank_mib``: weights, gradients and
      optimizer state of the ranks with the most and the least.

    Cost: in a recorded step a barrier before it and, on CUDA, a device sync around each pass, which
    keeps passes from overlapping; then a gather of some kB and, on rank 0, a picture. Other steps
    cost nothing.

    Args:
        first_step: First optimizer step to record, from 0.
        every_n_steps: Optimizer steps from record to record; null records one.

    Raises:
        ValueError: ``first_step`` is below 0 or ``every_n_steps`` below 1.
        TypeError: The trainer's strategy is not a ``PipelineStrategy``.
    """

    def __init__(self, first_step: int = 3, every_n_steps: int | None = None) -> None:
        if first_step < 0:
            raise ValueError(f"first_step={first_step} is below 0")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} is below 1")
        self._first_step, self._every_n_steps = first_step, every_n_steps
        self._next_step: int | None = first_step
        self._recorded_step: int | None = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _strategy_of(trainer)
        self._next_step, self._recorded_step = self._first_step, None

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._next_step is None or trainer.global_step < self._next_step:
            return
        self._recorded_step = trainer.global_step
        every = self._every_n_steps
        self._next_step = None if every is None else trainer.global_step + every
        _strategy_of(trainer).record_next_step()

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._recorded_step is None:
            return
        step, self._recorded_step = self._recorded_step, None
        passes = _strategy_of(trainer).recorded_passes()
        held: list[int] = [0] * trainer.world_size
        own = sum(module_memory(pl_module, trainer.optimizers[0]))
        torch.distributed.all_gather_object(held, own)
        if trainer.is_global_zero:
            self._report(trainer, step, passes, held)

    def _report(self, trainer: Trainer, step: int, passes: list[Pass], held: list[int]) -> None:
        layout = _strategy_of(trainer).layout
        figures = {
            PIPELINE_BUBBLE_SHARE: bubble_share(passes),
            PIPELINE_BUBBLE_SHARE_FORMULA: layout.bubble_share,
            PIPELINE_LARGEST_RANK: max(held) / MIB,
            PIPELINE_SMALLEST_RANK: min(held) / MIB,
        }
        folder = Path(trainer.default_root_dir) / "pipeline"
        picture = folder / f"step_{step}.png"
        title = (
            f"{layout.schedule.value}, {layout.num_microbatches} microbatches, step {step}:"
            f" {figures[PIPELINE_BUBBLE_SHARE]:.0%} idle, by formula {layout.bubble_share:.0%}"
        )
        draw(passes, picture, title)
        write_json(picture.with_suffix(".json"), chrome_trace(passes), indent=None)
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=step)
            if isinstance(logger, WandbLogger):
                logger.log_image(PIPELINE_TIMELINE, [str(picture)], step=step)


def _strategy_of(trainer: Trainer) -> PipelineStrategy:
    if not isinstance(trainer.strategy, PipelineStrategy):
        raise TypeError(
            "PipelineTrace needs trainer.strategy PipelineStrategy, not"
            f" {type(trainer.strategy).__name__}"
        )
    return trainer.strategy
