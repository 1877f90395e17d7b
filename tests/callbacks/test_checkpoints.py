import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from fingpt_lightning.data import FinancialInstructions
from fingpt_lightning.modules import LowRankPretraining
from tests.support.token_data import TokenData


def _fit(
    folder: Path, max_steps: int, every_n_train_steps: int, ckpt_path: str | None = None
) -> Trainer:
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
    return trainer


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


def test_a_run_can_be_resumed_with_another_interval(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    _fit(first, 4, every_n_train_steps=1)
    _fit(second, 8, every_n_train_steps=3, ckpt_path=str(first / "last.ckpt"))
    assert torch.load(second / "last.ckpt", weights_only=True)["global_step"] == 8


def _best_of(file: Path) -> tuple[float, int]:
    saved = torch.load(file, weights_only=True)
    (score,) = (x["best_model_score"] for key, x in saved["callbacks"].items() if "Best" in key)
    return float(score), saved["global_step"]


def test_a_resumed_run_knows_the_best_of_its_whole_history(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    _fit(first, 4, every_n_train_steps=1)
    score, step = _best_of(first / "best.ckpt")
    content = (first / "best.ckpt").read_bytes()
    for name in ("best.ckpt", "last.ckpt"):  # as if it had been much better
        saved = torch.load(first / name, weights_only=True)
        for key, state in saved["callbacks"].items():
            if "Best" in key:
                state["best_model_score"] = torch.tensor(score - 5)
        torch.save(saved, first / name)
    content = (first / "best.ckpt").read_bytes()
    trainer = _fit(second, 8, every_n_train_steps=1, ckpt_path=str(first / "last.ckpt"))
    found, its_step = _best_of(second / "best.ckpt")
    assert found == pytest.approx(score - 5)
    assert its_step == step
    best = trainer.checkpoint_callbacks[0]
    assert isinstance(best, BestCheckpoint)
    assert best.best_model_path == str(second / "best.ckpt")
    assert (first / "best.ckpt").read_bytes() == content
    # A best one that is gone is not known any more; one that is beaten stays in its own folder.
    saved = torch.load(second / "best.ckpt", weights_only=True)
    for key, state in saved["callbacks"].items():
        if "Best" in key:
            state["best_model_score"] = torch.tensor(1e3)
    torch.save(saved, second / "best.ckpt")
    _fit(third, 12, every_n_train_steps=1, ckpt_path=str(second / "last.ckpt"))
    assert _best_of(third / "best.ckpt")[1] in range(9, 13)
    assert _best_of(second / "best.ckpt")[0] == 1e3
    (third / "best.ckpt").unlink()
    fourth = tmp_path / "fourth"
    _fit(fourth, 16, every_n_train_steps=1, ckpt_path=str(third / "last.ckpt"))
    assert _best_of(fourth / "best.ckpt")[1] in range(13, 17)


class _Killed(Callback):
    """Ends a run before its ``batch``-th batch, counted from 1 since it began or went on."""

    def __init__(self, batch: int) -> None:
        self._num_left = batch

    def on_train_batch_start(self, *_: Any) -> None:
        self._num_left -= 1
        if self._num_left == 0:
            raise RuntimeError("killed")


def _run(folder: Path, *callbacks: Callback, resumed: bool = False, **options: Any) -> Trainer:
    torch.manual_seed(3)
    module = LowRankPretraining(
        "gpt2-nano", rank=3, num_layers=1, width=12, num_heads=3, num_positions=400
    )
    trainer = Trainer(
        accelerator="cpu", max_steps=6, max_epochs=-1, logger=False,
        check_val_every_n_epoch=None, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*callbacks, BestCheckpoint(dirpath=str(folder)), LastCheckpoint(2, str(folder))],
        default_root_dir=folder, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    path = folder / "last.ckpt" if resumed else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Checkpoint directory .* is not empty")
        trainer.fit(module, _data(), ckpt_path=path, weights_only=True)
    return trainer


def _data() -> FinancialInstructions:
    return FinancialInstructions(
        num_synthetic_items=40, batch_size=4, vocab_size=400, max_length=400, batching="padded"
    )


@pytest.mark.parametrize("number", [1, 2])
def test_best_and_last_survive_a_kill_after_a_validation_at_a_saved_step(
    tmp_path: Path, number: int
) -> None:
    options: dict[str, Any] = {"val_check_interval": 2}
    whole = _run(tmp_path / "whole", **options)
    with pytest.raises(RuntimeError, match="killed"):
        _run(tmp_path / "halves", _Killed(2 + number), **options)
    saved = torch.load(tmp_path / "halves" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    (best,) = (state for key, state in saved["callbacks"].items() if key.startswith("Best"))
    assert best["best_model_score"] is not None
    resumed = _run(tmp_path / "halves", resumed=True, **options)
    for name, tensor in whole.lightning_module.state_dict().items():
        assert torch.equal(resumed.lightning_module.state_dict()[name], tensor), name
    best_of_whole, best_of_halves = (
        torch.load(tmp_path / name / "best.ckpt", weights_only=True)["global_step"]
        for name in ("whole", "halves")
    )
    assert best_of_whole == best_of_halves


def test_a_resumed_run_is_not_saved_within_a_window_of_accumulation(tmp_path: Path) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "val_check_interval": 3}
    whole = _run(tmp_path / "whole", **options)
    for resumed in (False, True):  # in the third window, and then in its second batch
        with pytest.raises(RuntimeError, match="killed"):
            _run(tmp_path / "parts", _Killed(3 if resumed else 8), resumed=resumed, **options)
    trainer = _run(tmp_path / "parts", resumed=True, **options)
    for name, tensor in whole.lightning_module.state_dict().items():
        assert torch.equal(trainer.lightning_module.state_dict()[name], tensor), name


def test_an_interval_of_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match="every_n_train_steps 0 is below 1"):
        LastCheckpoint(0)
