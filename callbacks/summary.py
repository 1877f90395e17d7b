"""What a run was and achieved, in one table and one file."""

import copy
import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeGuard, TypeVar, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import AdamW, Optimizer
from typing_extensions import override

from callbacks.compression import counted_figures
from callbacks.financial_evaluation import FinancialEvaluation
from callbacks.memory import MemoryMonitor
from callbacks.recording import (
    Budgeted,
    Finetunes,
    HoldsStages,
    ParameterTotals,
    PartlyTrained,
    SkipsRows,
    num_tokens,
    over_ranks,
    parameter_totals,
    record_summary,
)
from callbacks.throughput import ThroughputMonitor
from fingpt_lightning.data.batch import KnowsBytes
from fingpt_lightning.files import write_json
from fingpt_lightning.metric_keys import ACCURACY_AFTER, ACCURACY_BEFORE, VAL_LOSS, summary_key
from fingpt_lightning.profiling.memory import peak_rss_bytes
from fingpt_lightning.units import MIB, format_count

_AFTER = f"/{ACCURACY_AFTER}"
_CallbackT = TypeVar("_CallbackT", bound=Callback)


@runtime_checkable
class HasDenseBaseline(Protocol):
    """A module that can build itself anew with every layer dense."""

    def dense_baseline(self) -> LightningModule:
        """The dense baseline, whose ``configure_model`` has not been called yet."""


class RunSummary(Callback):
    """Prints a table of the run when fit ends, and keeps its figures.

    They go to ``summary.json`` in the trainer's ``default_root_dir``, to the summary of a W&B run,
    and to other loggers, except CSV files, as metrics of the last step. A figure that the run did
    not yield is left out, of the table too; of a module without ``budget()`` those of its blocks
    are.

    Keys of loggers; without ``summary/`` those of the file:

    - ``summary/steps``: optimizer steps.
    - ``summary/block_parameters``, ``summary/parameters``: stored in the blocks, and in total.
    - ``summary/dense_block_parameters``, ``summary/dense_parameters``: of the dense baseline.
    - ``summary/block_parameter_ratio``, ``summary/total_parameter_ratio``: dense over stored.
    - ``summary/trained_parameters``, ``summary/trained_share``: trained parameters, and those over
      all, of a module that freezes some.
    - ``summary/base``, ``summary/adapter``: what a finetuning starts from, and what it trains.
    - ``summary/TASK/accuracy_before``, ``summary/TASK/accuracy_after``: of each task that a
      `FinancialEvaluation` beside it evaluated first and last.
    - ``summary/first_val_loss``, ``summary/best_val_loss``, ``summary/last_val_loss``:
      ``val/loss`` of this fit's first and last validation, in nats per token, and of the best one,
      those of the runs that it goes on from included.
    - ``summary/val_bits_per_byte``: the last of them in bits per byte of the text, which losses of
      two tokenizers can be compared in; where the datamodule knows its bytes per token.
    - ``summary/skipped_rows``, ``summary/first_skipped_row``: bad rows that the datamodule skipped
      in its text, and place and fault of the first; where there are any.
    - ``summary/tokens_per_s``: of the training, as `ThroughputMonitor` beside it measured.
    - ``summary/timed_tokens_per_s``, ``summary/dense_baseline_tokens_per_s``: of the timed steps.
    - ``summary/speed_ratio``: this network's timed tokens per second over the dense baseline's.
    - ``summary/peak_allocated_mib`` on CUDA, ``summary/peak_rss_mib`` elsewhere: largest over
      ranks, of this fit with a `MemoryMonitor` beside it, else of the process.
    - ``summary/best_checkpoint``, ``summary/last_checkpoint``: paths.
    - ``summary/run_folder``, ``summary/log_folder``: paths.

    Cost: with ``dense_baseline_steps``, that many and one more training steps (forward, backward,
    fused AdamW, on the last batch) of a copy of the network and of its dense baseline in turn, and
    the memory of both; else nothing. Trained weights and random state stay as they are.

    Args:
        dense_baseline_steps: Timed steps of each; 0 times nothing. In one process only.

    Raises:
        ValueError: ``dense_baseline_steps`` is below 0.
        TypeError: The dense baseline is to be timed and the module has no ``dense_baseline()``.
    """

    def __init__(self, dense_baseline_steps: int = 0) -> None:
        if dense_baseline_steps < 0:
            raise ValueError(f"dense_baseline_steps={dense_baseline_steps} is below 0")
        self._dense_baseline_steps = dense_baseline_steps
        self._last_batch: Any = None
        self._first_val_loss: float | None = None
        self._best_val_loss: float | None = None
        self._last_val_loss: float | None = None
        self._peak_mib: dict[str, float] = {}
        self._totals: ParameterTotals | None = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_batch = None
        self._first_val_loss = self._best_val_loss = self._last_val_loss = None
        self._peak_mib = {}
        self._totals = parameter_totals(trainer, pl_module)  # a run may be without a step
        if self._dense_baseline_steps == 0:
            return
        if not isinstance(pl_module, HasDenseBaseline):
            raise TypeError(
                f"RunSummary(dense_baseline_steps={self._dense_baseline_steps}) needs a module with"
                f" dense_baseline(), which {type(pl_module).__name__} has not"
            )
        if trainer.world_size > 1:
            rank_zero_warn(
                f"RunSummary(dense_baseline_steps={self._dense_baseline_steps}) has no effect in"
                f" {trainer.world_size} processes: the dense baseline is timed in one process only"
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
        if self._dense_baseline_steps and trainer.world_size == 1:
            self._last_batch = batch

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or VAL_LOSS not in trainer.callback_metrics:
            return
        self._last_val_loss = trainer.callback_metrics[VAL_LOSS].item()
        if self._first_val_loss is None:
            self._first_val_loss = self._last_val_loss
        best = self._best_val_loss
        if best is None or self._last_val_loss < best:
            self._best_val_loss = self._last_val_loss

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Here, since all ranks must join, and before the timed steps add to the peak.
        self._totals = parameter_totals(trainer, pl_module)
        device = trainer.strategy.root_device
        monitor = _beside(trainer, MemoryMonitor)
        on_cuda = device.type == "cuda"
        if monitor is not None:
            peak_bytes = monitor.run_peak_bytes()
        else:
            peak_bytes = torch.cuda.max_memory_allocated(device) if on_cuda else peak_rss_bytes()
        largest = over_ranks(trainer, [peak_bytes], "max")[0]
        assert largest is not None
        self._peak_mib = {"peak_allocated_mib" if on_cuda else "peak_rss_mib": largest / MIB}

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in on_train_end: the last checkpoints are written there, after this callback.
        if not trainer.is_global_zero:
            return
        figures = self._figures(trainer, pl_module)
        console = Console()
        console.print(_table(figures))
        for name in (
            "first_skipped_row",
            "best_checkpoint",
            "last_checkpoint",
            "run_folder",
            "log_folder",
        ):
            is_told = name == "log_folder" and figures.get(name) == figures["run_folder"]
            if name not in figures or is_told:
                continue
            line = f"{name.replace('_', ' ')}: {figures[name]}"
            console.print(line, soft_wrap=True, markup=False, highlight=False)
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "summary.json", figures)
        record_summary(trainer, {summary_key(key): v for key, v in figures.items()})
        self._last_batch = None

    def _best_of_history(self, trainer: Trainer) -> float | None:
        """The lowest loss of this fit and of those that it resumes from, which checkpoints know."""
        known = [] if self._best_val_loss is None else [self._best_val_loss]
        for checkpoint in trainer.checkpoint_callbacks:
            if isinstance(checkpoint, ModelCheckpoint) and checkpoint.monitor == VAL_LOSS:
                score = checkpoint.best_model_score
                known += [] if score is None else [float(score)]
        return min(known, default=None)

    def _bits_per_byte(self, trainer: Trainer) -> float | None:
        data = getattr(trainer, "datamodule", None)
        if self._last_val_loss is None or not isinstance(data, KnowsBytes):
            return None
        bytes_per_token = data.bytes_per_token("val")
        if bytes_per_token is None:
            return None
        return self._last_val_loss / math.log(2) / bytes_per_token

    def _figures(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, float | int | str]:
        totals = self._totals
        assert totals is not None
        figures: dict[str, float | int | str | None] = {"steps": trainer.global_step}
        if isinstance(pl_module, Budgeted):
            budget = pl_module.budget()
            figures |= {
                "block_parameters": budget.block_parameters,
                "parameters": budget.total_parameters,
                "dense_block_parameters": budget.dense_block_parameters,
                "dense_parameters": budget.dense_total_parameters,
                "block_parameter_ratio": budget.block_compression_ratio,
                "total_parameter_ratio": budget.total_compression_ratio,
            }
        else:
            figures |= counted_figures(totals)
        if isinstance(pl_module, PartlyTrained):
            figures["trained_parameters"] = totals.trained
            # What a module knows is its own part, of which a stage is one.
            is_part = isinstance(trainer.strategy, HoldsStages)
            share = totals.trained / totals.stored if is_part else pl_module.trained_share()
            figures["trained_share"] = share
        if isinstance(pl_module, Finetunes):
            figures |= {"base": pl_module.base_text(), "adapter": pl_module.adapter_text()}
        evaluation = _beside(trainer, FinancialEvaluation)
        for task, found in ({} if evaluation is None else evaluation.history).items():
            if found[0]["step"] == 0:
                figures[f"{task}/{ACCURACY_BEFORE}"] = found[0].get("accuracy")
            if found[-1]["step"] > 0:
                figures[f"{task}/{ACCURACY_AFTER}"] = found[-1].get("accuracy")
        throughput = _beside(trainer, ThroughputMonitor)
        figures |= {
            "first_val_loss": self._first_val_loss,
            "best_val_loss": self._best_of_history(trainer),
            "last_val_loss": self._last_val_loss,
            "val_bits_per_byte": self._bits_per_byte(trainer),
            **_skipped_rows(trainer),
            "tokens_per_s": None if throughput is None else throughput.run_tokens_per_s,
            **self._peak_mib,
            "run_folder": trainer.default_root_dir,
        }
        if self._last_batch is not None:
            assert isinstance(pl_module, HasDenseBaseline)
            race = _race(trainer, pl_module, self._last_batch, self._dense_baseline_steps)
            figures |= {} if race is None else race._asdict()
        for checkpoint in trainer.checkpoint_callbacks:
            if isinstance(checkpoint, ModelCheckpoint):
                # Without a metric, the "best" is the newest.
                written = checkpoint.best_model_path or None
                key = "last_checkpoint" if checkpoint.monitor is None else "best_checkpoint"
                figures[key] = figures.get(key) or written
                figures["last_checkpoint"] = (
                    figures.get("last_checkpoint") or checkpoint.last_model_path or None
                )
        if trainer.loggers:
            logger = trainer.loggers[0]
            log_folder = logger.log_dir or logger.save_dir
            figures["log_folder"] = log_folder and log_folder.rstrip("/")
        return {key: value for key, value in figures.items() if _is_figure(value)}


def _skipped_rows(trainer: Trainer) -> dict[str, int | str | None]:
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, SkipsRows):
        return {}
    number, first = data.skipped_rows()
    return {"skipped_rows": number, "first_skipped_row": first} if number else {}


class _Race(NamedTuple):
    """Keys of the summary."""

    timed_tokens_per_s: float
    dense_baseline_tokens_per_s: float
    speed_ratio: float


def _race(trainer: Trainer, pl_module: LightningModule, batch: Any, num_steps: int) -> _Race | None:
    """Steps of the dense baseline and of a copy in turn; None where memory does not suffice."""
    assert isinstance(pl_module, HasDenseBaseline)
    with isolate_rng(), torch.enable_grad():
        try:
            twin = pl_module.dense_baseline()
            twin.trainer = trainer
            precision = trainer.precision_plugin
            with trainer.strategy.tensor_init_context(), precision.module_init_context():
                twin.configure_model()
            contenders = [_Contender(trainer, m) for m in (twin, _copy(pl_module))]
            times_s: list[list[float]] = [[], []]
            for _ in range(1 + num_steps):
                for contender, its_times_s in zip(contenders, times_s, strict=True):
                    its_times_s.append(contender.step_s(batch))
        except torch.OutOfMemoryError:
            rank_zero_warn(
                "RunSummary: too little memory for the dense baseline beside the network"
            )
            return None
    dense_s, ours_s = (statistics.median(its_times_s[1:]) for its_times_s in times_s)
    tokens = int(num_tokens(pl_module, batch))
    return _Race(tokens / ours_s, tokens / dense_s, dense_s / ours_s)


def _copy(module: LightningModule) -> LightningModule:
    """A deep copy that is compiled where the module is, which torch leaves out of a copy."""
    copied = copy.deepcopy(module)
    for part, its_copy in zip(module.modules(), copied.modules(), strict=True):
        if part._compiled_call_impl is not None:
            its_copy.compile()
    if hasattr(copied, "teacher"):
        copied.teacher = None  # type: ignore[assignment]  # the dense baseline has none either
    return copied


class _Contender:
    """A module that nothing else uses, with an optimizer, ready to be timed."""

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._device = trainer.strategy.root_device
        self._precision = trainer.precision_plugin
        module.trainer = trainer
        for name in ("log", "log_dict"):  # the run is over: there is no logger any more
            setattr(module, name, lambda *_, **__: None)
        self._precision.convert_module(module)  # in place
        self._module = module.to(self._device).train()
        trained = [p for p in module.parameters() if p.requires_grad]
        self._optimizer: Optimizer = AdamW(trained, fused=True)

    def step_s(self, batch: Any) -> float:
        self._synchronize()
        started_s = time.perf_counter()
        self._optimizer.zero_grad()
        with self._precision.train_step_context():
            output = self._module.training_step(batch, 0)
        loss = output["loss"] if isinstance(output, Mapping) else output
        assert isinstance(loss, Tensor)
        loss.backward()
        self._optimizer.step()
        self._synchronize()
        return time.perf_counter() - started_s

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _is_figure(value: float | int | str | None) -> TypeGuard[float | int | str]:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _beside(trainer: Trainer, kind: type[_CallbackT]) -> _CallbackT | None:
    # Lightning 2.6 sets the list outside the class, unseen by type checkers.
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def _table(figures: Mapping[str, float | int | str]) -> Table:
    """The figures that the run has; a column of the dense baseline where it is known."""
    table = Table(title="Run summary")
    has_dense = any("dense_" in key for key in figures)
    for column in ("", "this run", *(["dense baseline"] if has_dense else []), ""):
        table.add_column(column, justify="right" if column else "left")

    def cell(key: str, template: str) -> str:
        return template.format(figures[key]) if key in figures else ""

    def count(key: str) -> str:
        return format_count(float(figures[key])) if key in figures else ""

    def row(name: str, ours: str, dense: str = "", remark: str = "") -> None:
        if ours:
            table.add_row(name, ours, *([dense] if has_dense else []), remark)

    row("base", cell("base", "{}"))
    row("adapter", cell("adapter", "{}"))
    for name, prefix, ratio in (
        ("parameters, blocks", "block_", "block_parameter_ratio"),
        ("parameters, total", "", "total_parameter_ratio"),
    ):
        ours, dense = count(f"{prefix}parameters"), count(f"dense_{prefix}parameters")
        row(name, ours, dense, cell(ratio, "{:.2f}x smaller"))
    row("parameters, trained", count("trained_parameters"), "", cell("trained_share", "{:.2%}"))
    verdict = ""
    if "speed_ratio" in figures:
        speed = float(figures["speed_ratio"])
        verdict = f"{speed:.2f}x: {'faster' if speed > 1 else 'not faster'}"
    timed, dense_timed = "timed_tokens_per_s", "dense_baseline_tokens_per_s"
    row("tokens/s, timed in turn", cell(timed, "{:,.0f}"), cell(dense_timed, "{:,.0f}"), verdict)
    row("tokens/s, training", cell("tokens_per_s", "{:,.0f}"))
    row("optimizer steps", cell("steps", "{:,}"))
    row("first validation loss", cell("first_val_loss", "{:.4f}"))
    bits = cell("val_bits_per_byte", "{:.3f} bits per byte")
    row("last validation loss", cell("last_val_loss", "{:.4f}"), "", bits)
    row("bad rows skipped", cell("skipped_rows", "{:,}"))
    row("peak memory, allocated", cell("peak_allocated_mib", "{:,.1f} MiB"))
    row("peak memory, process", cell("peak_rss_mib", "{:,.1f} MiB"))
    for key in figures:
        if key.endswith(_AFTER):
            task = key.removesuffix(_AFTER)
            before = f"{task}/{ACCURACY_BEFORE}"
            change = f"before: {cell(before, '{:.3f}')}" if before in figures else ""
            row(f"accuracy, {task}", cell(key, "{:.3f}"), "", change)
    return table
