import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Optimizer

from callbacks.progress import TrainingProgress
from fingpt_lightning.modules import LowRankPretraining
from tests.support.lightning_ranks import RanksEnvironment
from tests.support.ranks import run_ranks
from tests.support.token_data import TokenData

SIZES: dict[str, Any] = {
    "preset": "gpt2-nano", "num_layers": 2, "width": 12, "num_heads": 3, "num_positions": 16,
    "rank": 3, "embedding_rank": 4, "warmup": 1,
}  # fmt: skip


def _module(**changes: Any) -> LowRankPretraining:
    torch.manual_seed(3)
    return LowRankPretraining(**(SIZES | changes))


class GradientRecorder(LowRankPretraining):
    """Keeps the gradients each optimiser step gets, weighted and before clipping."""

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        self.weights_before = {k: v.clone() for k, v in self.state_dict().items()}
        self.recorded = [p.grad.clone() for p in self.parameters() if p.grad is not None]
        super().configure_gradient_clipping(optimizer, *args, **kwargs)


def _trainer(folder: Path, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_steps": 1, "max_epochs": -1, "logger": False,
        "precision": "64-true", "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": folder, "log_every_n_steps": 1,
    }  # fmt: skip
    return Trainer(**(settings | changes))


def _gradients_of_one_big_batch(weights: dict[str, Tensor]) -> list[Tensor]:
    """The plain way: all rows at once, transformers' logits, torch's mean cross-entropy."""
    module = _module(vocab_size=23)
    module.configure_model()
    module.double().load_state_dict(weights)
    (batch,) = TokenData(batch_size=8).train_dataloader()
    logits = module.network(batch["input_ids"]).logits
    F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
    return [p.grad for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("batch_size", "accumulated"), [(8, 1), (2, 4), (1, 8), (3, 3)], ids=lambda value: str(value)
)
def test_gradients_are_those_of_one_big_batch(
    tmp_path: Path, batch_size: int, accumulated: int
) -> None:
    torch.manual_seed(3)
    module = GradientRecorder(**SIZES)
    trainer = _trainer(tmp_path, accumulate_grad_batches=accumulated)
    trainer.fit(module, datamodule=TokenData(batch_size))
    expected = _gradients_of_one_big_batch(module.weights_before)
    assert len(expected) == len(module.recorded) > 20
    for ours, plain in zip(module.recorded, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-14)
    assert module.tokens_seen == sum(11 - (row + 1) for row in range(8))


def _fit_on_ranks(process_rank: int, world_size: int, folder: str) -> dict[str, Any]:
    torch.manual_seed(3)
    module = GradientRecorder(**SIZES)
    trainer = _trainer(
        Path(folder),
        strategy=DDPStrategy(process_group_backend="gloo"),
        plugins=[RanksEnvironment()],
        devices=world_size,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        max_steps=2,
        limit_val_batches=0,
    )
    data = TokenData(batch_size=1)
    trainer.fit(module, datamodule=data)
    gradients = [g.clone() for g in module.recorded]
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    return {
        "weights": {k: v.clone() for k, v in module.state_dict().items()},
        "gradients": gradients,
        "tokens_seen": module.tokens_seen,
        "test/loss": tested["test/loss"],
    }


@pytest.mark.slow
def test_two_ranks_equal_one_rank_on_the_same_global_batches(tmp_path: Path) -> None:
    per_rank = run_ranks(_fit_on_ranks, 2, str(tmp_path), timeout_s=120)
    torch.manual_seed(3)
    module = GradientRecorder(**SIZES)
    trainer = _trainer(
        tmp_path, accumulate_grad_batches=2, gradient_clip_val=0.5, max_steps=2, limit_val_batches=0
    )
    trainer.fit(module, datamodule=TokenData(batch_size=2))
    (tested,) = trainer.test(module, datamodule=TokenData(batch_size=3), verbose=False)
    for rank in per_rank:
        assert rank["tokens_seen"] == module.tokens_seen
        assert rank["test/loss"] == pytest.approx(tested["test/loss"], rel=1e-12)
        for ours, plain in zip(rank["gradients"], module.recorded, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-13)
        for name, weight in module.state_dict().items():
            torch.testing.assert_close(rank["weights"][name], weight, rtol=1e-9, atol=1e-12)


class Poison(Callback):
    """Makes one weight infinite before the given batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.batch:
            with torch.no_grad():
                next(pl_module.parameters()).fill_(math.inf)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path,
) -> None:
    checkpoints = ModelCheckpoint(tmp_path, "last", every_n_train_steps=1)
    trainer = _trainer(
        tmp_path,
        max_steps=9,
        callbacks=[Poison(batch=3), checkpoints],
        enable_checkpointing=True,
        limit_val_batches=0,
    )
    message = r"train/loss is nan at step 3, learning rate .*, batch 3 of epoch 0"
    with pytest.raises(FloatingPointError, match=message):
        trainer.fit(_module(), datamodule=TokenData(batch_size=2))
    kept = LowRankPretraining.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert all(p.isfinite().all() for p in kept.parameters())
    assert kept.tokens_seen > 0


def test_validation_weighs_every_token_the_same(tmp_path: Path) -> None:
    losses = []
    for batch_size in (8, 3, 1):
        trainer = _trainer(tmp_path)
        (logged,) = trainer.validate(_module(), datamodule=TokenData(batch_size), verbose=False)
        losses.append(logged["val/loss"])
        assert logged["val/perplexity"] == pytest.approx(math.exp(logged["val/loss"]), rel=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert losses[0] == pytest.approx(losses[2], rel=1e-12)


class _CountedBytes(TokenData):
    """Knows the bytes of its splits."""

    def bytes_per_token(self, split: str) -> float | None:
        return {"train": 2.5, "val": 4.0, "test": 5.0}[split]


def test_bits_per_byte_are_logged_where_the_data_know_their_bytes(tmp_path: Path) -> None:
    module = _module(vocab_size=TokenData(2).vocabulary_size)
    trainer = _trainer(tmp_path, max_steps=2, limit_val_batches=1, val_check_interval=2)
    trainer.fit(module, datamodule=_CountedBytes(2))
    logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
    bits = logged["val/loss"] / math.log(2) / 4
    assert logged["val/bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert logged["train/bytes"] == 2.5 * module.tokens_seen > 0
    (tested,) = _trainer(tmp_path).test(module, datamodule=_CountedBytes(2), verbose=False)
    bits = tested["test/loss"] / math.log(2) / 5
    assert tested["test/bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert "train/bytes" not in tested
    (tested,) = _trainer(tmp_path).test(module, datamodule=TokenData(2), verbose=False)
    assert "test/bits_per_byte" not in tested


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_a_split_whose_loss_is_no_number_has_no_result(tmp_path: Path, verb: str) -> None:
    module = _module(vocab_size=TokenData(2).vocabulary_size)
    module.configure_model()
    name = "network.transformer.h.1.mlp.c_proj.down"
    with torch.no_grad():
        module.get_parameter(name)[0, 0] = math.nan
    prefix = verb[:4] if verb == "test" else "val"
    message = rf"{prefix}/loss nan: .*the tensor {name.removeprefix('network.')} holds a NaN"
    with pytest.raises(FloatingPointError, match=message):
        getattr(_trainer(tmp_path), verb)(module, datamodule=TokenData(2), verbose=False)


class LogReader(Callback):
    """Keeps what was logged at each step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def test_logged_values_are_those_of_the_step(tmp_path: Path) -> None:
    reader = LogReader()
    trainer = _trainer(tmp_path, max_steps=4, callbacks=[reader], limit_val_batches=0)
    module = _module(learning_rate=0.01, warmup=2, final_learning_rate_ratio=0.1)
    trainer.fit(module, datamodule=TokenData(batch_size=2))
    rates = [row["train/learning_rate"] for row in reader.rows]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.0055])
    tokens = [row["train/tokens"] for row in reader.rows]
    assert tokens == [19, 34, 45, 52]  # row i supervises 11 - (i + 1) positions
    assert all(row["train/gradient_norm"] > 0 for row in reader.rows)
    assert reader.rows[0]["train/loss"] == pytest.approx(math.log(23), abs=0.05)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_is_torchs(tmp_path: Path, algorithm: str) -> None:
    clipped: list[Tensor] = []

    class Reader(Callback):
        def on_before_zero_grad(self, trainer: Trainer, *args: Any) -> None:
            clipped.extend(p.grad.clone() for p in trainer.model.parameters() if p.grad is not None)  # type: ignore[union-attr]

    trainer = _trainer(
        tmp_path,
        gradient_clip_val=0.001,
        gradient_clip_algorithm=algorithm,
        max_steps=2,
        callbacks=[Reader()],
    )
    trainer.fit(_module(), datamodule=TokenData(batch_size=4))
    assert clipped
    if algorithm == "norm":
        assert torch.stack([g.norm() for g in clipped]).norm().item() == pytest.approx(1e-3, 1e-3)
    else:
        assert max(g.abs().max().item() for g in clipped) == pytest.approx(1e-3, 1e-6)


def test_another_tokenizer_than_the_checkpoints_is_refused(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, limit_val_batches=0)
    trainer.fit(_module(), datamodule=TokenData(batch_size=2))
    path = tmp_path / "run.ckpt"
    trainer.save_checkpoint(path)
    data = TokenData(batch_size=2)
    data.tokenizer_reference = lambda: {  # type: ignore[method-assign]
        "name_or_path": "other",
        "sha256": "1",
        "vocabulary_size": 23,
    }
    with pytest.raises(ValueError, match=r"data.tokenizer 'other' differs from the one"):
        _trainer(tmp_path).validate(_module(), data, ckpt_path=path, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
@pytest.mark.parametrize("fits", [True, False])
def test_a_checkpoint_of_integers_or_truth_values_is_refused_by_name(
    tmp_path: Path, dtype: torch.dtype, fits: bool
) -> None:
    trainer = _trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(_module(), datamodule=TokenData(8))
    path = tmp_path / "one.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    name = "network.transformer.h.1.mlp.c_fc.down"
    saved["state_dict"][name] = saved["state_dict"][name].to(dtype)
    torch.save(saved, path)
    again, kind = _trainer(tmp_path, max_steps=2), str(dtype).removeprefix("torch.")
    message = rf"^ckpt_path .*one\.ckpt: transformer\.h\.1\.mlp\.c_fc\.down is stored as {kind}, a"
    call = again.fit if fits else again.validate
    with pytest.raises(ValueError, match=message):
        call(_module(), datamodule=TokenData(8), ckpt_path=path, weights_only=True)


@pytest.mark.parametrize(("bar", "shown"), [(TQDMProgressBar, True), (TrainingProgress, False)])
def test_a_bar_of_lightning_shows_the_loss_and_ours_has_it_read_at_no_step(
    tmp_path: Path, bar: type[Callback], shown: bool
) -> None:
    trainer = _trainer(tmp_path, enable_progress_bar=True, callbacks=[bar()], limit_val_batches=0)
    trainer.fit(_module(), datamodule=TokenData(batch_size=2))
    assert ("train/loss" in trainer.progress_bar_metrics) == shown
    assert "train/loss" in trainer.callback_metrics
