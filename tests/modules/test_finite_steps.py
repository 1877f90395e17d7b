import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import Optimizer

from fingpt_lightning.modules import LowRankPretraining, language_modeling
from fingpt_lightning.modules.finite_steps import can_skip
from tests.support.token_data import TokenData

RECIPES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "product decay": {"factor_decay": "product"},
    "spectron": {"optimizer": "spectron"},
    "lora-muon": {"optimizer": "lora_muon"},
    "spectron of dense layers": {
        "optimizer": "spectron", "spectron_dense": True, "rank_overrides": {"*.mlp.*": None},
        "factor_decay": "product",
    },
}  # fmt: skip


class _Poison(Callback):
    """Makes a number of a gradient NaN at one step, and keeps the weights before that step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.kept: dict[str, Tensor] = {}

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if trainer.global_step == self.step:
            self.kept = _weights(pl_module)
            gradient = list(pl_module.parameters())[-3].grad
            assert gradient is not None
            gradient.view(-1)[0] = math.nan


def _weights(module: LightningModule) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in module.state_dict().items()}


def _module(recipe: str) -> LowRankPretraining:
    torch.manual_seed(3)
    return LowRankPretraining(
        preset="gpt2-nano", num_layers=1, width=12, num_heads=3, num_positions=16, rank=3,
        warmup=1, **RECIPES[recipe],
    )  # fmt: skip


def _fit(module: LightningModule, folder: Path, *callbacks: Callback, max_steps: int = 4) -> None:
    Trainer(
        accelerator="cpu", devices=1, max_steps=max_steps, callbacks=list(callbacks),
        gradient_clip_val=1.0, logger=False, enable_progress_bar=False, limit_val_batches=0,
        enable_model_summary=False, default_root_dir=folder,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    ).fit(module, datamodule=TokenData(batch_size=2))  # fmt: skip


@pytest.fixture
def read_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the CPU take steps as a CUDA device takes them."""
    monkeypatch.setattr(language_modeling, "can_skip", lambda *_: True)


@pytest.mark.usefixtures("read_late")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_that_is_read_late_is_skipped_and_ends_the_run_in_the_next(
    tmp_path: Path, recipe: str
) -> None:
    module, poison = _module(recipe), _Poison(step=1)
    message = r"train/gradient_norm is nan at step 1, learning rate .*, batch 1 of epoch 0; the w"
    with pytest.raises(FloatingPointError, match=message):
        _fit(module, tmp_path, poison)
    assert module.trainer.global_step == 2  # as many as were begun and not read
    after = module.state_dict()
    assert poison.kept.keys() == after.keys()
    assert all(torch.equal(poison.kept[name], after[name]) for name in after)


@pytest.mark.usefixtures("read_late")
def test_a_last_step_that_is_not_finite_ends_the_run_too(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="at step 3"):
        _fit(_module("adamw"), tmp_path, _Poison(step=3))


@pytest.mark.usefixtures("read_late")
def test_a_step_is_read_before_a_checkpoint_of_it(tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(FloatingPointError, match="at step 2"):
        _fit(_module("adamw"), tmp_path, _Poison(step=2), checkpoints)
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"step=1.ckpt", "step=2.ckpt"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_finite_step_is_the_same_however_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    found = []
    for is_late in (False, True):
        if is_late:
            monkeypatch.setattr(language_modeling, "can_skip", lambda *_: True)
        module = _module(recipe)
        _fit(module, tmp_path, max_steps=3)
        found.append((_weights(module), module.tokens_seen))
    (now, tokens_now), (late, tokens_late) = found
    assert tokens_now == tokens_late > 0
    assert all(torch.equal(now[name], late[name]) for name in now)


def test_the_host_reads_at_once_where_it_waits_for_no_device() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    assert not can_skip(torch.optim.AdamW([weight], fused=True), torch.zeros(()))


@pytest.mark.usefixtures("read_late")
def test_a_step_is_read_before_a_validation(tmp_path: Path) -> None:
    module, poison = _module("adamw"), _Poison(step=1)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=4, callbacks=[poison], val_check_interval=2,
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match="at step 1"):
        trainer.fit(module, datamodule=TokenData(batch_size=2))
    assert "val/loss" not in trainer.callback_metrics
