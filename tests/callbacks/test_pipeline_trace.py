import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from callbacks import PipelineTrace
from fingpt_lightning.modules import LowRankPretraining
from fingpt_lightning.strategies import PipelineStrategy
from tests.support.lightning_ranks import RanksEnvironment
from tests.support.ranks import run_ranks
from tests.support.token_data import TokenData

SIZES: dict[str, Any] = {
    "preset": "gpt2-nano", "num_layers": 2, "width": 12, "num_heads": 3, "num_positions": 16,
    "rank": None, "warmup": 1,
}  # fmt: skip
KEYS = {
    "pipeline/bubble_share", "pipeline/bubble_share_formula", "pipeline/largest_rank_mib",
    "pipeline/smallest_rank_mib",
}  # fmt: skip


def _fit(process_rank: int, num_ranks: int, folder: str) -> list[list[float]]:
    module = LowRankPretraining(**SIZES)
    trainer = Trainer(
        accelerator="cpu", devices=num_ranks, plugins=[RanksEnvironment()], max_steps=4,
        strategy=PipelineStrategy(num_microbatches=2), default_root_dir=folder,
        callbacks=[PipelineTrace(first_step=1, every_n_steps=2)], limit_val_batches=0,
        logger=CSVLogger(folder, name="", version=""), enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, datamodule=TokenData(2))
    assert isinstance(trainer.strategy, PipelineStrategy)
    passes = trainer.strategy.recorded_passes()
    return [[p.rank, p.stage, p.microbatch, p.start_s, p.end_s] for p in passes]


@pytest.mark.slow
def test_two_of_four_steps_are_drawn_traced_and_logged(tmp_path: Path) -> None:
    first, second = run_ranks(_fit, 2, str(tmp_path), timeout_s=120)
    assert first == second
    folder = tmp_path / "pipeline"
    assert {path.name for path in folder.iterdir()} == {
        "step_1.png", "step_1.json", "step_3.png", "step_3.json",
    }  # fmt: skip
    events = json.loads((folder / "step_3.json").read_text())["traceEvents"]
    # Each of two microbatches forward and backward on two stages, and the loss on the last.
    assert sorted((e["tid"], e["args"]["microbatch"], e["cat"]) for e in events) == [
        (0, 0, "backward"), (0, 0, "forward"), (0, 1, "backward"), (0, 1, "forward"),
        (1, 0, "backward"), (1, 0, "forward"), (1, 0, "forward"),
        (1, 1, "backward"), (1, 1, "forward"), (1, 1, "forward"),
    ]  # fmt: skip
    for rank in (0, 1):  # one after the other
        own = sorted((p[3], p[4]) for p in first if p[0] == rank)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(own))
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert set(header.split(",")) >= KEYS
    column = header.split(",").index("pipeline/bubble_share_formula")
    logged = [row.split(",")[column] for row in rows]
    assert [float(value) for value in logged if value] == [pytest.approx(1 / 3)] * 2


def test_without_a_pipeline_there_is_nothing_to_trace(tmp_path: Path) -> None:
    torch.manual_seed(3)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=1, callbacks=[PipelineTrace()], logger=False,
        default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(TypeError, match=r"needs trainer\.strategy PipelineStrategy, not Single"):
        trainer.fit(LowRankPretraining(**SIZES), datamodule=TokenData(2))


@pytest.mark.parametrize("settings", [{"first_step": -1}, {"every_n_steps": 0}])
def test_steps_that_never_come_are_refused(settings: dict[str, int]) -> None:
    ((key, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{key}={value} is below"):
        PipelineTrace(**settings)
