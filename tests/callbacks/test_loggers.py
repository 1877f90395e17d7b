"""Every callback with every logger, with two at once and with none."""

import csv
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
import wandb
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from typing_extensions import override

import callbacks
from callbacks import pipeline_trace
from fingpt_lightning.pipeline import Pass, Schedule, Work
from tests.callbacks.tiny_run import tiny_trainer
from tests.evaluation.tiny_language import tiny_network, tiny_tokenizer, write_rows
from tests.support.token_data import TokenData

pytestmark = [
    pytest.mark.filterwarnings("ignore:Found . module.s. in eval mode"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists"),
]
# One of each callback; those that log nothing are there so that none is forgotten.
KEYS = {
    "CompressionMonitor": "compression/parameters",
    "FinancialEvaluation": "eval/fpb/accuracy",
    "MemoryMonitor": "memory/peak_rss_mib",
    "PipelineTrace": "pipeline/bubble_share",
    "RunSummary": "summary/steps",
    "ThroughputMonitor": "throughput/tokens_per_s",
}
SILENT = {"BestCheckpoint", "LastCheckpoint", "LogLines", "PredictionWriter", "TrainingProgress"}


class _Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = tiny_network("llama").train()

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self.network(input_ids=batch["input_ids"], labels=batch["input_ids"])
        loss: Tensor = output.loss
        return loss

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class _Data(TokenData):
    def __init__(self) -> None:
        super().__init__(batch_size=4)
        self.tokenizer = tiny_tokenizer()


class _Layout:
    schedule, num_microbatches, bubble_share = Schedule.ONE_F_ONE_B, 2, 0.25


class _Strategy:
    layout = _Layout()


class _Traced(callbacks.PipelineTrace):
    """Reports a step as in a pipeline of several processes, which this is not."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None: ...

    @override
    def on_train_batch_start(self, *_: Any) -> None: ...

    @override
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline_trace, "_strategy_of", lambda trainer: _Strategy())
            one = Pass(0, 0, 0, Work.FORWARD, 0.0, 1.0)
            self._report(trainer, trainer.global_step - 1, [one], [1, 2])


def _callbacks(folder: Path, data_dir: Path) -> list[Callback]:
    return [
        callbacks.BestCheckpoint(dirpath=str(folder / "checkpoints")),
        callbacks.CompressionMonitor(),
        callbacks.FinancialEvaluation(["fpb"], str(data_dir)),
        callbacks.LastCheckpoint(dirpath=str(folder / "checkpoints")),
        callbacks.LogLines(),
        callbacks.MemoryMonitor(),
        _Traced(),
        callbacks.PredictionWriter(),
        callbacks.RunSummary(),
        callbacks.ThroughputMonitor(warmup_steps=1),
        callbacks.TrainingProgress(),
    ]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Holds the rows of a task, and the one database of MLflow, which takes seconds to make."""
    folder = tmp_path_factory.mktemp("shared")
    write_rows(folder, "fpb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", _uri(folder))
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_MODE", "dryrun")  # as Lightning sets it
        yield folder
    mlflow.set_tracking_uri("")
    os.environ.pop("MLFLOW_TRACKING_URI", None)


def _uri(shared: Path) -> str:
    return f"sqlite:///{shared / 'mlflow.db'}"


def _csv(folder: Path, shared: Path) -> Logger:
    return CSVLogger(folder, name="", version="")


def _tensorboard(folder: Path, shared: Path) -> Logger:
    return TensorBoardLogger(folder, name="", version="", default_hp_metric=False)


def _mlflow(folder: Path, shared: Path) -> Logger:
    location = (shared / "artifacts").as_uri()
    return MLFlowLogger("tiny", folder.name, _uri(shared), artifact_location=location)


def _wandb(folder: Path, shared: Path) -> Logger:
    return WandbLogger(project="tiny", save_dir=folder, offline=True)


def _keys_of(logger: Logger, folder: Path) -> set[str]:
    if isinstance(logger, CSVLogger):
        with (folder / "metrics.csv").open(newline="") as file:
            # The figures of the summary have a file of their own.
            return {*next(csv.reader(file)), "summary/steps"}
    if isinstance(logger, TensorBoardLogger):
        return set(EventAccumulator(str(folder)).Reload().Tags()["scalars"])
    if isinstance(logger, MLFlowLogger):
        assert logger.run_id is not None
        run = MlflowClient(logger._tracking_uri).get_run(logger.run_id)
        assert run.info.status == "FINISHED"
        return set(run.data.metrics)
    assert wandb.run is not None
    return set(dict(wandb.run.summary))


def test_every_callback_is_walked() -> None:
    assert SILENT | KEYS.keys() == set(callbacks.__all__) - {"DISTRIBUTION"}


@pytest.mark.parametrize(
    "kinds",
    [(_csv,), (_wandb,), (_tensorboard,), (_mlflow,), (_mlflow, _tensorboard), ()],
    ids=lambda kinds: "+".join(kind.__name__[1:] for kind in kinds) or "none",
)
def test_every_callback_logs_to_every_logger(
    kinds: tuple[Callable[[Path, Path], Logger], ...], tmp_path: Path, shared: Path
) -> None:
    loggers = [kind(tmp_path, shared) for kind in kinds]
    trainer = tiny_trainer(
        tmp_path, _callbacks(tmp_path, shared), logger=loggers or False, limit_val_batches=1,
        num_sanity_val_steps=0, enable_checkpointing=True, enable_progress_bar=True,
    )  # fmt: skip
    trainer.fit(_Module(), datamodule=_Data())
    try:
        for logger in loggers:
            missing = {*KEYS.values(), "val/loss"} - _keys_of(logger, tmp_path)
            assert not missing, type(logger).__name__
    finally:
        wandb.finish()
    assert (tmp_path / "summary.json").is_file()
