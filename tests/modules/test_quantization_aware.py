from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from fingpt_lightning.deploy.exporting import export
from fingpt_lightning.models import vocabulary_loss
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.models.quantization.fake_quantization import RoundedWeights
from fingpt_lightning.modules import LowRankPretraining
from fingpt_lightning.modules.quantization_aware import RoundingSchedule
from tests.support.token_data import TokenData

SETTINGS: dict[str, Any] = {
    "preset": "gpt2-nano", "num_layers": 2, "width": 12, "num_heads": 3, "num_positions": 16,
    "rank": 3, "embedding_rank": 4, "learning_rate": 0.02, "warmup": 0,
}  # fmt: skip
NARROW: dict[str, Any] = {
    "recipe": "narrow", "compression": 1.5, "rank": "auto", "embedding_rank": None, "width": 36,
    "vocab_size": 99,
}  # fmt: skip


def _fit(
    folder: Path, ckpt_path: Path | None = None, *, trainer: dict[str, Any] | None = None,
    num_rows: int = 2,
    **changes: Any,
) -> Trainer:  # fmt: skip
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "accelerator": "cpu", "max_steps": 6, "max_epochs": -1, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0,
        "enable_model_summary": False, "default_root_dir": folder, "num_sanity_val_steps": 0,
    }  # fmt: skip
    made = Trainer(**(settings | (trainer or {})))
    module = LowRankPretraining(**SETTINGS | changes)
    made.fit(module, datamodule=TokenData(2, num_rows), ckpt_path=ckpt_path, weights_only=True)
    return made


def _weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    assert trainer.lightning_module is not None
    return {name: tensor.clone() for name, tensor in trainer.lightning_module.state_dict().items()}


class _Saves(Callback):
    """Saves a checkpoint between passes and step, and after each step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.save_checkpoint(self.folder / f"backward{trainer.global_step}.ckpt")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, *args: Any, **kwargs: Any
    ) -> None:
        trainer.save_checkpoint(self.folder / f"step{trainer.global_step}.ckpt")


def test_the_first_steps_are_plain_and_a_checkpoint_has_the_weights_themselves(
    tmp_path: Path,
) -> None:
    aware: dict[str, Any] = {"quantization_aware": "nf4", "quantization_start": 0.5}
    whole = _weights(_fit(tmp_path, trainer={"callbacks": [_Saves(tmp_path)]}, **aware))
    plain = _fit(tmp_path / "plain", trainer={"callbacks": [_Saves(tmp_path / "plain")]})

    def saved(name: str) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = torch.load(tmp_path / name, weights_only=True)[
            "state_dict"
        ]
        return state

    assert set(whole) == set(_weights(plain))
    assert _equal(saved("step3.ckpt"), saved("plain/step3.ckpt"))
    assert not _equal(saved("step4.ckpt"), saved("plain/step4.ckpt"))
    # Saving between the passes and the step gives the weights themselves, and disturbs nothing.
    assert _equal(saved("backward3.ckpt"), saved("step3.ckpt"))
    assert _equal(_weights(_fit(tmp_path, **aware)), whole)


def test_a_resumed_run_is_the_whole_one(tmp_path: Path) -> None:
    # The same rate and rounding at each step, so that a shorter run is the beginning of a longer.
    aware: dict[str, Any] = {
        "quantization_aware": "int8", "quantization_start": 0.0, "final_learning_rate_ratio": 1.0,
    }  # fmt: skip
    _fit(tmp_path, trainer={"max_steps": 4}, **aware).save_checkpoint(tmp_path / "half.ckpt")
    resumed = _fit(tmp_path, tmp_path / "half.ckpt", **aware)
    assert _equal(_weights(resumed), _weights(_fit(tmp_path, **aware)))


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("changes", [{}, NARROW], ids=["low-rank layers", "narrow"])
@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_validation_among_rounded_steps_is_that_of_the_exported_folder(
    method: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    trainer = _fit(
        tmp_path, **changes, quantization_aware=method, quantization_start=0.0,
        trainer={"limit_val_batches": 1, "check_val_every_n_epoch": 6},
    )  # fmt: skip
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    source = load_model(tmp_path / "last.ckpt")._replace(tokenizer=None)
    export(source, method, tmp_path / "out", tolerance=2.0)
    network = load_model(tmp_path / "out").network
    loss_sum, num_tokens = 0.0, 0
    for batch in TokenData(2, 2).val_dataloader():
        with torch.no_grad():
            hidden = network.base_model(batch["input_ids"]).last_hidden_state
            sums = vocabulary_loss(network.get_submodule("lm_head"), hidden, batch["labels"])
        loss_sum, num_tokens = loss_sum + float(sums.loss_sum), num_tokens + int(sums.num_tokens)
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(
        loss_sum / num_tokens, rel=1e-6
    )


def test_weights_are_rounded_once_a_step_however_many_microbatches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded = []
    apply = RoundedWeights.apply

    def counted(self: RoundedWeights) -> None:
        if not self.are_applied:
            rounded.append(1)
        apply(self)

    monkeypatch.setattr(RoundedWeights, "apply", counted)
    changes = {"max_steps": 3, "accumulate_grad_batches": 2}
    _fit(tmp_path, quantization_aware="int8", quantization_start=0.3, trainer=changes, num_rows=8)
    assert len(rounded) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization_aware": "nf4", "quantization_start": 1.5}, r"start 1\.5 is outside \[0, 1"),
        ({"quantization_start": 0.5}, r"quantization_start 0\.5 has no effect"),
    ],
)
def test_settings_without_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRankPretraining(**SETTINGS | settings)


def test_sharded_weights_cannot_be_rounded() -> None:
    module = LowRankPretraining(**SETTINGS)
    module._device_mesh = object()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="nf4 rounds whole matrices, which FSDP leaves no rank"):
        RoundingSchedule("nf4", 0.8).attach(module)
    RoundingSchedule(None, 0.8).attach(module)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="quantization_aware 'int4' is none of nf4, int8"):
        RoundingSchedule.checked("int4", 0.8)
