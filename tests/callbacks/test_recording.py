import json
import math
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import DDPStrategy
from typing_extensions import override

from callbacks.compression import CompressionMonitor
from callbacks.memory import MemoryMonitor
from callbacks.recording import over_ranks
from callbacks.summary import RunSummary
from callbacks.throughput import ThroughputMonitor
from tests.callbacks.tiny_run import (
    BLOCK,
    Batch,
    TinyModule,
    fit,
    logged_rows,
    make_batch,
    tiny_trainer,
)
from tests.support.lightning_ranks import RanksEnvironment
from tests.support.ranks import run_ranks


class _Run:
    """The part of a W&B run that a logger uses."""

    name = id = "run"

    def __init__(self) -> None:
        self.summary: dict[str, Any] = {}
        self.history: list[dict[str, float]] = []

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def log(self, metrics: dict[str, float]) -> None:
        self.history.append(metrics)


def test_figures_of_a_run_are_summary_values_in_wandb_and_no_charts(tmp_path: Path) -> None:
    run = _Run()
    logger = WandbLogger(experiment=run, save_dir=tmp_path)  # type: ignore[arg-type]
    callbacks: list[Callback] = [CompressionMonitor(), RunSummary(), MemoryMonitor()]
    fit(tiny_trainer(tmp_path, callbacks, logger=logger), TinyModule(), [make_batch()] * 2)
    figures = json.loads((tmp_path / "summary.json").read_text())
    assert {k: v for k, v in run.summary.items() if k.startswith("summary/")} == {
        f"summary/{key}": value for key, value in figures.items()
    }
    assert run.summary["compression/total_parameter_ratio"] == figures["total_parameter_ratio"]
    assert len(run.history) == 2
    assert all("train/loss" in row and "memory/weights_mib" in row for row in run.history)
    assert not any("compression" in key for row in run.history for key in row)


class _OnlyOneOfTwo(Callback):
    """Writes what `over_ranks` makes of values that differ by rank."""

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rank = trainer.global_rank
        found = {
            op: over_ranks(trainer, [rank, 10.0, None if rank == 1 else 3.0], op)
            for op in ("max", "sum", "mean")
        }
        folder = Path(trainer.default_root_dir)
        (folder / f"rank{rank}.json").write_text(json.dumps(found))


class _LessOnRankOne(TinyModule):
    @override
    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        labels = batch["labels"].clone()
        if self.global_rank == 1:
            labels[1] = -100
        return batch | {"labels": labels}


def _fit(process_rank: int, world_size: int, name: str) -> None:
    trainer = tiny_trainer(
        Path(name),
        [
            MemoryMonitor(),
            ThroughputMonitor(warmup_steps=0, peak_tflops=1e-3),
            RunSummary(dense_baseline_steps=1),
            _OnlyOneOfTwo(),
        ],
        devices=world_size,
        strategy=DDPStrategy(),
        plugins=[RanksEnvironment()],
    )
    fit(trainer, _LessOnRankOne(), [make_batch()] * 2)


@pytest.mark.slow
def test_two_processes_log_their_tokens_together_and_their_largest_memory(tmp_path: Path) -> None:
    run_ranks(_fit, 2, str(tmp_path))
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found == {"max": [1, 10, None], "sum": [1, 20, None], "mean": [0.5, 10, None]}
    rows = logged_rows(tmp_path)
    assert len(rows) == 2
    of_both = (3 * BLOCK - 2) + (2 * BLOCK - 2)
    for row in rows:
        tokens = row["throughput/tokens_per_s"] * row["throughput/step_time_s"]
        assert tokens == pytest.approx(of_both)
        flops = TinyModule().budget().training_flops_per_token
        mfu = row["throughput/tokens_per_s"] * flops / (2 * 1e9)
        assert row["throughput/mfu"] == pytest.approx(mfu)
        assert row["memory/peak_rss_mib"] > 10
    figures = json.loads((tmp_path / "summary.json").read_text())
    assert figures["steps"] == 2
    assert math.isfinite(figures["tokens_per_s"])
    assert "speed_ratio" not in figures
