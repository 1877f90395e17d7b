from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from fingpt_lightning.modules import LowRankPretraining
from tests.support.token_data import TokenData


def _fit(
    folder: Path, max_steps: int, every_n_train_steps: int, ckpt_path: str | None = None
) -> None:
    module = LowRankPretraining(
        "gpt2-nano", rank=3, num_layers=1, width=12, num_heads=3, num_positions=16
    )
    last = LastCheckpoint(every_n_train_steps, str(folder))
    trainer = Trainer(
        accelerator="cpu", max_steps=max_steps, max_epochs=-1, logger=False, val_check_interval=1,
        check_val_every_n_epoch=None, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[BestCheckpoint(dirpath=str(folder)), last],
        default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, TokenData(batch_size=2), ckpt_path=ckpt_path, weights_only=True)
    assert last.best_model_path == str(folder / "last.ckpt")


@pytest.mark.parametrize("every_n_train_steps", [1, 2, 3, 100])
def test_last_is_of_the_last_step_and_best_of_the_lowest_loss(
    tmp_path: Path, every_n_train_steps: int
) -> None:
    _fit(tmp_path, 4, every_n_train_steps)
    assert {path.name for path in tmp_path.iterdir()} == {"best.ckpt", "last.ckpt"}
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)
    (score,) = (
        state["best_model_score"]
        for key, state in best["callbacks"].items()
        if key.startswith("BestCheckpoint")
    )
    assert score > 0


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_can_be_resumed_with_another_interval(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    _fit(first, 4, every_n_train_steps=1)
    _fit(second, 8, every_n_train_steps=3, ckpt_path=str(first / "last.ckpt"))
    assert torch.load(second / "last.ckpt", weights_only=True)["global_step"] == 8


def test_an_interval_of_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match="every_n_train_steps 0 is below 1"):
        LastCheckpoint(0)
