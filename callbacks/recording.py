"""When the callbacks' figures are due, and how they reach the loggers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, WandbLogger
from torch import Tensor, nn

from fingpt_lightning.data.batch import IGNORED_LABEL
from fingpt_lightning.low_rank.budget import ModelBudget
from fingpt_lightning.low_rank.parameters import parameter_counts, unpacked_size


@runtime_checkable
class Budgeted(Protocol):
    """A module that knows its parameters and floating-point operations."""

    def budget(self) -> ModelBudget:
        """The figures at the block length of the data."""


@runtime_checkable
class PartlyTrained(Protocol):
    """A module that trains a part of its parameters."""

    def trained_share(self) -> float:
        """Trained parameters over all."""


@runtime_checkable
class Finetunes(PartlyTrained, Protocol):
    """A module that trains an adapter of a base."""

    def base_text(self) -> str:
        """Name of the base, and how it is stored."""

    def adapter_text(self) -> str:
        """Kind and size of the adapter."""


@runtime_checkable
class HoldsStages(Protocol):
    """A strategy under which each rank holds some stages of the network."""

    def own_parameters(self) -> list[nn.Parameter]:
        """The parameters that this rank answers for: of all stages together each is there once."""

    def over_stages(self, counts: Sequence[int]) -> list[int]:
        """Counts added up over the stages; the ranks call it together."""


class ParameterTotals(NamedTuple):
    """The numbers of parameters of a whole module.

    Attributes:
        stored: All of them, those of a packed base unpacked.
        dense: Those of the dense baseline.
        trained: Those that are trained.
    """

    stored: int
    dense: int
    trained: int


def parameter_totals(trainer: Trainer, pl_module: LightningModule) -> ParameterTotals:
    """The parameters of all stages of a pipeline, else of the module; all ranks call it together.

    Args:
        trainer: Trainer of the run.
        pl_module: Module, or the part of it that this rank holds.
    """
    stored, dense = parameter_counts(pl_module)
    strategy = trainer.strategy
    if not isinstance(strategy, HoldsStages):
        return ParameterTotals(stored, dense, _num_trained(pl_module.parameters()))
    own = strategy.own_parameters()
    counts = [sum(map(unpacked_size, own)), dense - stored, _num_trained(own)]
    stored, saved, trained = strategy.over_stages(counts)
    return ParameterTotals(stored, stored + saved, trained)


def _num_trained(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters if p.requires_grad)


@runtime_checkable
class SkipsRows(Protocol):
    """A datamodule that may skip bad rows of its text."""

    def skipped_rows(self) -> tuple[int, str | None]:
        """Number of skipped rows, and place and fault of the first."""


@runtime_checkable
class CountsTokens(Protocol):
    """A module that reports how many tokens of its batches it trains on."""

    def num_tokens(self, batch: Any) -> int | Tensor:
        """Supervised tokens of one batch on this rank."""


def num_tokens(pl_module: LightningModule, batch: Any) -> int | Tensor:
    """Supervised tokens of a batch: as the module counts them, else labels that are not -100.

    Raises:
        TypeError: The module has no ``num_tokens(batch)`` and the batch no ``labels``.
    """
    if isinstance(pl_module, CountsTokens):
        return pl_module.num_tokens(batch)
    labels = batch["labels"] if isinstance(batch, Mapping) and "labels" in batch else None
    if not isinstance(labels, Tensor):
        keys = f" with the keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
        raise TypeError(
            f"tokens per second need {type(pl_module).__name__}.num_tokens(batch), which is not"
            " there, or batches that are mappings with the tensor 'labels', not"
            f" {type(batch).__name__}{keys}"
        )
    return (labels != IGNORED_LABEL).sum()


class Cadence:
    """Reports, once after each optimizer step, whether that step is to be logged.

    Args:
        every_n_steps: Optimizer steps from log to log; None takes the trainer's
            ``log_every_n_steps``.

    Raises:
        ValueError: ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} is below 1")
        self._every_n_steps = every_n_steps
        self._last_step = 0

    def start(self, trainer: Trainer) -> None:
        """Begins at the trainer's current step, which is not 0 where it resumes."""
        self._last_step = trainer.global_step

    def next_is_due(self, trainer: Trainer) -> bool:
        """Whether the step under way will be logged; False where the trainer never logs."""
        period = self._period(trainer)
        return period > 0 and (trainer.global_step + 1) % period == 0

    def stepped(self, trainer: Trainer) -> bool:
        """Whether an optimizer step ended since the last call: not inside an accumulation."""
        before, self._last_step = self._last_step, trainer.global_step
        return self._last_step != before

    def is_due(self, trainer: Trainer) -> bool:
        """Whether the step that just ended is to be logged."""
        period = self._period(trainer)
        return period > 0 and trainer.global_step % period == 0

    def log(
        self, trainer: Trainer, pl_module: LightningModule, metrics: Mapping[str, float]
    ) -> None:
        """Logs figures of the step that just ended, which are equal on all ranks.

        In the trainer's rhythm they join the row of the module's own metrics. In another one they
        get rows of their own: Lightning would repeat them in its rows until they change.
        """
        if self._period(trainer) == _log_every_n_steps(trainer):
            pl_module.log_dict(dict(metrics), on_step=True, on_epoch=False)
            return
        for logger in trainer.loggers:
            logger.log_metrics(dict(metrics), step=trainer.global_step - 1)

    def _period(self, trainer: Trainer) -> int:
        return self._every_n_steps or _log_every_n_steps(trainer)


def over_ranks(
    trainer: Trainer, values: Sequence[float | int | None], reduce_op: str
) -> list[float | None]:
    """Each value reduced over all ranks, which must call this together.

    Args:
        trainer: Trainer whose strategy does the reducing.
        values: Values of this rank; None where it has none: the result is then None on every rank.
        reduce_op: Operation, ``max``, ``sum`` or ``mean``.
    """
    numbers = [math.nan if value is None else float(value) for value in values]
    tensor = torch.tensor(numbers, dtype=torch.float64, device=trainer.strategy.root_device)
    missing = torch.isnan(tensor).to(torch.float64)
    reduce = trainer.strategy.reduce
    reduced = cast("Tensor", reduce(tensor.nan_to_num(), reduce_op=reduce_op))
    anywhere = cast("Tensor", reduce(missing, reduce_op="max"))
    return [
        None if gone else value
        for value, gone in zip(reduced.tolist(), anywhere.tolist(), strict=True)
    ]


def record_in_wandb_summary(trainer: Trainer, figures: Mapping[str, float | int | str]) -> None:
    """Puts figures that a run has once into the columns of the W&B runs table.

    They have no history: each would become a chart of one point.
    """
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(dict(figures))


def record_summary(trainer: Trainer, figures: Mapping[str, float | int | str]) -> None:
    """Gives loggers the figures that a run has once, when it ends.

    In W&B they are columns of the runs table, elsewhere metrics of the last step, and text a tag
    where there are tags (MLflow). They are not in the CSV file of a run, beside which they have a
    file of their own.
    """
    record_in_wandb_summary(trainer, figures)
    if not trainer.is_global_zero:
        return
    numbers = {k: float(v) for k, v in figures.items() if not isinstance(v, str)}
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger | CSVLogger):
            continue
        logger.log_metrics(numbers, step=max(trainer.global_step - 1, 0))
        if isinstance(logger, MLFlowLogger):
            for key, value in figures.items():
                if isinstance(value, str):
                    logger.experiment.set_tag(logger.run_id, key, value)


def _log_every_n_steps(trainer: Trainer) -> int:
    # Lightning 2.6 sets it outside the class, unseen by type checkers.
    return int(trainer.log_every_n_steps)  # type: ignore[attr-defined]
