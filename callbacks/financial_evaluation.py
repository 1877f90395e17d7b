"""How training changes a model's answers on tasks."""

import io
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typing_extensions import override

from callbacks.log_lines import tell
from callbacks.progress import TrainingProgress
from callbacks.recording import Cadence
from callbacks.throughput import ThroughputMonitor
from fingpt_lightning.evaluation.results import (
    EVALUATION_PACKAGES,
    RunEvaluations,
    prediction_rows,
)
from fingpt_lightning.evaluation.runner import (
    Scoring,
    TaskResult,
    TaskRun,
    metrics_of,
    predict,
    read_tasks,
    scoring_of,
)
from fingpt_lightning.evaluation.scoring import Prediction
from fingpt_lightning.metric_keys import EVAL_FIGURES, TRAIN_TOKENS, eval_key
from fingpt_lightning.models.formats.tokenizer import tokenizer_sha256
from fingpt_lightning.profiling.versions import installed_versions
from fingpt_lightning.tasks import find_task
from fingpt_lightning.units import format_duration

_TABLE_COLUMNS = ("row", "text", "gold", "prediction", "scores")
_MAX_TABLE_ROWS = 1000
_TOLD = ("accuracy", "macro_f1", "perplexity")


@runtime_checkable
class TrainsOnTasks(Protocol):
    """A datamodule that knows its tasks."""

    data_dir: str | None

    @property
    def task_names(self) -> list[str]:
        """The tasks that are read from files; synthetic rows have none."""


class FinancialEvaluation(Callback):
    """Evaluates the network on tasks before, during and after training.

    Rows are split over the ranks; training goes on as if nothing had happened: modes and random
    streams are left as they were. Data are read and checked before training starts.

    Keys, of each task ``TASK`` those that its kind has:

    - ``eval/TASK/accuracy``, ``eval/TASK/macro_f1``, ``eval/TASK/weighted_f1``, ``eval/TASK/mcc``,
      ``eval/TASK/average_f1`` over the questions of a task that has several.
    - ``eval/TASK/exact_match``, ``eval/TASK/f1``, ``eval/TASK/close_match``: of numbers.
    - ``eval/TASK/entity_f1``, ``eval/TASK/entity_precision``, ``eval/TASK/entity_recall``,
      ``eval/TASK/token_f1``: of spans.
    - ``eval/TASK/rouge1``, ``eval/TASK/rouge2``, ``eval/TASK/rouge_l``: of summaries.
    - ``eval/TASK/pearson``, ``eval/TASK/rmse``, ``eval/TASK/mae``: of scores.
    - ``eval/TASK/missing``: the share of answers that cannot be read; they count as wrong.
    - ``eval/TASK/accuracy_norm``: of choices, compared by log-probability per character.
    - ``eval/TASK/perplexity``: of last words.

    Into ``eval/STEP/`` of the trainer's ``default_root_dir`` go ``results.json`` and
    ``predictions.jsonl``, as `fingpt evaluate` writes them; the predictions stay for the first, the
    best and the last step only (by the mean of the tasks' main metrics). W&B also gets
    ``eval/TASK/confusion``, a picture, and ``eval/TASK/predictions``, a table of the first 1,000
    rows.

    Cost: one pass over the rows, as in ``fingpt evaluate``; nothing at other steps.

    Args:
        tasks: Names of shipped tasks, or YAML files; null takes those that the datamodule trains
            on, without those that have no right answers; where it trains on own files, none.
        data_dir: Folder that holds ``TASK/SPLIT.jsonl``; null takes the datamodule's.
        split: Name of the split.
        every_n_steps: Optimizer steps from evaluation to evaluation; null for none during training.
        before: Whether to evaluate before the first step.
        after: Whether to evaluate after the last step.
        limit: Number of rows of each task; null takes all.
        calibrate: Whether to calibrate the labels.
        batch_tokens: Tokens of a batch, padding included; null derives it from the device.

    Attributes:
        history: Figures of each task and the ``step`` after which it answered, oldest first, of
            this fit; on the first rank.

    Raises:
        ValueError: A setting, a task or a row is wrong, or an existing ``results.json`` is.
        FloatingPointError: A score is NaN or infinite: task, row and likely cause are named.
        TypeError: The module has no network, or the datamodule no tokenizer.
        RuntimeError: The parameters are sharded.
    """

    def __init__(
        self,
        tasks: list[str] | None = None,
        data_dir: str | None = None,
        split: str = "validation",
        every_n_steps: int | None = None,
        before: bool = True,
        after: bool = True,
        limit: int | None = None,
        calibrate: bool = False,
        batch_tokens: int | None = None,
    ) -> None:
        if tasks is not None and not tasks:
            raise ValueError("tasks is empty")
        if batch_tokens is not None and batch_tokens < 1:
            raise ValueError(f"batch_tokens {batch_tokens} is below 1")
        if every_n_steps is None and not (before or after):
            raise ValueError("before and after are false and every_n_steps is null: nothing to do")
        self._cadence = Cadence(every_n_steps)
        self._tasks, self._data_dir, self._split = tasks, data_dir, split
        self._every_n_steps, self._before, self._after = every_n_steps, before, after
        self._limit, self._calibrate, self._batch_tokens = limit, calibrate, batch_tokens
        self._runs: list[TaskRun] = []
        self.history: dict[str, list[dict[str, float]]] = {}
        self._evaluated_at: int | None = None
        self._files: RunEvaluations | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            _tokenizer(trainer)
            of_data = getattr(trainer, "datamodule", None)
            own_dir = of_data.data_dir if isinstance(of_data, TrainsOnTasks) else None
            self._runs = read_tasks(
                _tasks_of(of_data) if self._tasks is None else self._tasks,
                own_dir if self._data_dir is None else self._data_dir,
                self._split,
                limit=self._limit,
                calibrate=self._calibrate,
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._cadence.start(trainer)
        self._evaluated_at = None
        self.history = {}
        _network(pl_module)
        if trainer.is_global_zero:
            self._files = RunEvaluations(Path(trainer.default_root_dir), trainer.global_step)
        if self._before:
            self._evaluate(trainer, pl_module)

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._every_n_steps is None:
            return
        if self._cadence.stepped(trainer) and self._cadence.is_due(trainer):
            self._evaluate(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._after and self._evaluated_at != trainer.global_step:
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._runs:
            return
        self._evaluated_at = trainer.global_step
        network, tokenizer = _network(pl_module), _tokenizer(trainer)
        in_training = [part for part in network.modules() if part.training]
        network.eval()
        try:
            with ExitStack() as stack:
                for callback in trainer.callbacks:  # type: ignore[attr-defined]
                    if isinstance(callback, ThroughputMonitor):
                        stack.enter_context(callback.standing_still())
                self._answer(trainer, network, tokenizer)
        finally:
            for part in in_training:
                part.training = True

    def _answer(
        self, trainer: Trainer, network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        started_at, started_s = datetime.now(UTC), time.perf_counter()
        results = []
        for run in self._runs:
            run_started_s = time.perf_counter()
            with trainer.precision_plugin.forward_context():
                predictions = self._predict(trainer, network, tokenizer, run)
            if trainer.is_global_zero:
                seconds = time.perf_counter() - run_started_s
                metrics = metrics_of(run, predictions)
                scoring = scoring_of(run.task, Scoring.CHOICES)
                result = TaskResult(run, predictions, metrics, seconds, scoring, run.task.name)
                figures = _log(trainer, result) | {"step": trainer.global_step}
                self.history.setdefault(run.task.name, []).append(figures)
                shown = [f"{k} {v:.3f}" for k, v in figures.items() if k in _TOLD]
                took = format_duration(seconds)
                when = f"after step {trainer.global_step:,}"
                tell(trainer, f"{run.task.name} {when}: {', '.join([*shown, took])}")
                results.append(result)
        if self._files is None:
            return
        num_tokens = getattr(trainer.lightning_module, "tokens_seen", None)
        head = {
            **({} if num_tokens is None else {"tokens": int(num_tokens)}),
            "settings": {
                "scoring": Scoring.CHOICES.value,
                "calibrate": self._calibrate,
                "limit": self._limit,
                "batch_tokens": self._batch_tokens,
            },
            "started_at": started_at.isoformat(timespec="microseconds"),
            "seconds": time.perf_counter() - started_s,
            "tokenizer_sha256": tokenizer_sha256(tokenizer),
            "versions": installed_versions(EVALUATION_PACKAGES),
        }
        self._files.write(trainer.global_step, head, results)

    def _predict(
        self,
        trainer: Trainer,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        run: TaskRun,
    ) -> list[Prediction]:
        """The answers to all rows, of which each rank computes its share."""
        examples = run.examples[trainer.global_rank :: trainer.world_size]
        with _shown(trainer, f"evaluating {run.task.name}", len(examples)) as show:
            own = predict(
                network,
                tokenizer,
                run.task,
                examples,
                calibrate=self._calibrate,
                batch_tokens=self._batch_tokens,
                on_answered=show,
            )
        if trainer.world_size == 1:
            return own
        by_rank: list[Sequence[Prediction]] = [[] for _ in range(trainer.world_size)]
        torch.distributed.all_gather_object(by_rank, own)
        return [
            by_rank[index % trainer.world_size][index // trainer.world_size]
            for index in range(len(run.examples))
        ]


def _shown(
    trainer: Trainer, what: str, total: int
) -> AbstractContextManager[Callable[[int], None] | None]:
    """Shows the work below the training, where that is shown."""
    bar = trainer.progress_bar_callback
    return bar.work(what, total) if isinstance(bar, TrainingProgress) else nullcontext()


def _tasks_of(datamodule: Any) -> list[str]:
    known = datamodule.task_names if isinstance(datamodule, TrainsOnTasks) else []
    names = [name for name in known if find_task(name).kind != "instructions"]
    if not names and getattr(datamodule, "train_files", None) is not None:
        rank_zero_info("FinancialEvaluation: own files have no right answers to score; name tasks")
        return []
    if not names:
        raise ValueError(
            "FinancialEvaluation: tasks is null, and the datamodule trains on none that has right"
            " answers; name some, as tasks: [fpb]"
        )
    return names


def _network(pl_module: LightningModule) -> PreTrainedModel:
    network = getattr(pl_module, "network", None)
    if not isinstance(network, PreTrainedModel):
        raise TypeError(
            "FinancialEvaluation needs a module whose network is one of transformers, which"
            f" {type(pl_module).__name__} has not"
        )
    if any(isinstance(parameter, DTensor) for parameter in network.parameters()):
        raise RuntimeError(
            "FinancialEvaluation cannot run sharded parameters; leave it out and evaluate the"
            " checkpoint with fingpt evaluate"
        )
    if getattr(pl_module, "partial_network", None) is not None:
        raise RuntimeError(
            "FinancialEvaluation cannot run a network whose blocks are on other ranks; leave it out"
            " and evaluate the checkpoint with fingpt evaluate"
        )
    return network


def _tokenizer(trainer: Trainer) -> PreTrainedTokenizerFast:
    datamodule = getattr(trainer, "datamodule", None)
    tokenizer = getattr(datamodule, "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        found = (
            "and there is no datamodule"
            if datamodule is None
            else f"which {type(datamodule).__name__} has not"
        )
        raise TypeError(f"FinancialEvaluation needs a datamodule with a tokenizer, {found}")
    return tokenizer


def _log(trainer: Trainer, result: TaskResult) -> dict[str, float]:
    """Logs the figures, and returns them without prefix."""
    name = result.run.task.name
    figures = {key: result.metrics[key] for key in EVAL_FIGURES if key in result.metrics}
    logged = {eval_key(name, key): value for key, value in figures.items()}
    # In the same row, so that a chart of them can use tokens as its axis.
    num_tokens = getattr(trainer.lightning_module, "tokens_seen", None)
    if num_tokens is not None:
        logged[TRAIN_TOKENS] = float(num_tokens)
    # As in the figures of training, steps are counted from 0.
    step = max(trainer.global_step - 1, 0)
    for logger in trainer.loggers:
        logger.log_metrics(logged, step=step)
        if isinstance(logger, WandbLogger):
            _log_answers(logger, result, step)
    return figures


def _log_answers(logger: WandbLogger, result: TaskResult, step: int) -> None:
    name = result.run.task.name
    rows = prediction_rows([result])[:_MAX_TABLE_ROWS]
    cells = [[row.get(column, []) for column in _TABLE_COLUMNS] for row in rows]
    logger.log_table(eval_key(name, "predictions"), list(_TABLE_COLUMNS), cells, step=step)
    if "confusion" in result.metrics:
        from PIL import Image  # comes with matplotlib, whose import takes a second

        from fingpt_lightning.evaluation.pictures import confusion_png

        picture = Image.open(
            io.BytesIO(confusion_png(result.metrics["confusion"], result.run.task))
        )
        logger.log_image(eval_key(name, "confusion"), [picture], step=step)
