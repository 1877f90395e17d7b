"""What is said of the parameters of a run is of all stages of its pipeline, on the first rank."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from callbacks import CompressionMonitor, LogLines, RunSummary
from fingpt_lightning.data import FinancialInstructions
from fingpt_lightning.modules import QuantizedFinetuning
from fingpt_lightning.modules.base_model import RandomLlama
from fingpt_lightning.strategies import PipelineStrategy
from tests.support.lightning_ranks import RanksEnvironment
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.timeout(300)


def _fit(folder: Path, **options: Any) -> None:
    torch.manual_seed(5)
    module = QuantizedFinetuning(
        random_base=RandomLlama(num_layers=2, num_positions=400), rank=3, dtype="float32",
        quantize=None, warmup=0,
    )  # fmt: skip
    data = FinancialInstructions(
        num_synthetic_items=30, batch_size=4, vocab_size=400, max_length=400, batching="padded"
    )
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
        limit_val_batches=0, num_sanity_val_steps=0,
        callbacks=[RunSummary(), LogLines(), CompressionMonitor()], **options,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)


def _on_two(process_rank: int, num_ranks: int, folder: str) -> int:
    _fit(Path(folder), devices=2, strategy=PipelineStrategy(), plugins=[RanksEnvironment()])
    return process_rank


def test_parameters_are_those_of_all_stages(tmp_path: Path) -> None:
    _fit(tmp_path / "one", devices=1)
    assert run_ranks(_on_two, 2, str(tmp_path / "two"), timeout_s=240) == [0, 1]
    said = []
    for name in ("one", "two"):
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        figures = [summary[key] for key in ("parameters", "trained_parameters", "trained_share")]
        (line,) = re.findall(r"trainable params: .*", (tmp_path / name / "log.txt").read_text())
        said.append((figures, line))
    assert said[0] == said[1]
    assert said[0][0][1] > 0
