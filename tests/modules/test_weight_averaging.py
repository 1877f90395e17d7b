"""Lightning's own averaging callbacks around our modules."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
)
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fingpt_lightning.data import FinancialInstructions
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.modules import LowRankPretraining, QuantizedFinetuning
from fingpt_lightning.modules.base_model import RandomLlama
from tests.support.token_data import TokenData

_DECAY = 0.5
pytestmark = [
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]


class Watch(Callback):
    """Keeps the trained weights after each step, and those that are validated."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step > len(self.steps):
            self.steps.append(_trained(pl_module))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        self.validated.append(_trained(pl_module))


def _trained(module: LightningModule) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


def _pretraining(**settings: Any) -> tuple[LightningModule, Any]:
    torch.manual_seed(3)
    sizes: dict[str, Any] = {"num_layers": 2, "width": 12, "num_heads": 3, "num_positions": 16}
    module = LowRankPretraining("gpt2-nano", warmup=1, **(sizes | {"rank": 3} | settings))
    return module, TokenData(batch_size=8)  # all rows in each step


def _finetuning(
    quantize: Literal["nf4", "int8"] | None, **settings: Any
) -> tuple[LightningModule, Any]:
    torch.manual_seed(5)
    module = QuantizedFinetuning(
        random_base=RandomLlama(num_positions=400), rank=3, learning_rate=0.01, warmup=1,
        quantize=quantize, **({"dtype": "bfloat16"} | settings),
    )  # fmt: skip
    data = FinancialInstructions(
        num_synthetic_items=30, batch_size=4, vocab_size=400, max_length=400
    )
    return module, data


_CASES: dict[str, Callable[[], tuple[LightningModule, Any]]] = {
    "pretraining": _pretraining,
    "pretraining, float64": _pretraining,
    "pretraining, narrow": lambda: _pretraining(
        rank="auto", recipe="narrow", compression=1.5, width=36, vocab_size=99
    ),
    "finetuning, dense base": lambda: _finetuning(None),
    "finetuning, nf4": lambda: _finetuning("nf4"),
    "finetuning, int8": lambda: _finetuning("int8"),
}


def _trainer(folder: Path, callbacks: list[Callback], **settings: Any) -> Trainer:
    given: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_steps": 4, "max_epochs": -1, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0,
        "default_root_dir": folder, "enable_checkpointing": False, "callbacks": callbacks,
    }  # fmt: skip
    return Trainer(**(given | settings))


def _average(steps: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    averaged = steps[0]
    for step in steps[1:]:
        averaged = {n: _DECAY * averaged[n] + (1 - _DECAY) * step[n] for n in averaged}
    return averaged


def _check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("case", _CASES)
def test_an_average_is_validated_saved_and_gone_on_from(case: str, tmp_path: Path) -> None:
    precision: dict[str, Any] = {"precision": "64-true"} if "float64" in case else {}
    plain, data = _CASES[case]()
    watch = Watch()
    _trainer(tmp_path, [watch], **precision).fit(plain, datamodule=data)
    steps = [*watch.steps, _trained(plain)][-4:]
    assert len(steps) == 4

    module, data = _CASES[case]()
    half = _trainer(
        tmp_path, [EMAWeightAveraging(decay=_DECAY), seen := Watch()], max_steps=2,
        limit_val_batches=1, val_check_interval=1, check_val_every_n_epoch=None,
        num_sanity_val_steps=0, **precision,
    )  # fmt: skip
    saving = _SaveAt(2, tmp_path / "two.ckpt")
    half.callbacks.append(saving)  # type: ignore[attr-defined]
    half.fit(module, datamodule=data)
    # Training goes its way, and what is validated is the average of it.
    _check_equal(seen.validated[-1], _average(steps[:2]))
    _check_equal(_trained(module), _average(steps[:2]))
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)
    _check_equal(
        {n: t for n, t in saved["state_dict"].items() if n in steps[0]}, _average(steps[:2])
    )
    _check_equal({n: t for n, t in saved["current_model_state"].items() if n in steps[0]}, steps[1])
    if "finetuning" in case:
        assert saved["state_dict"].keys() == saved["current_model_state"].keys() == steps[0].keys()

    resumed, data = _CASES[case]()
    trainer = _trainer(tmp_path, [EMAWeightAveraging(decay=_DECAY)], **precision)
    trainer.fit(resumed, datamodule=data, ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    _check_equal(_trained(resumed), _average(steps))
    # What is frozen is left to the bit.
    for (name, ours), theirs in zip(resumed.named_parameters(), plain.parameters(), strict=True):
        if not ours.requires_grad:
            assert torch.equal(ours, theirs), name
    for (name, kept), as_it_was in zip(resumed.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(kept, as_it_was), name


@pytest.mark.parametrize("optimizer", ["adamw", "lora_muon"])
def test_an_average_of_the_tail_is_the_trained_weights_until_it_begins(
    optimizer: str, tmp_path: Path
) -> None:
    def made() -> tuple[LightningModule, Any]:
        return _pretraining(optimizer=optimizer, embedding_rank=5)

    module, data = made()
    _trainer(tmp_path, [watch := Watch()]).fit(module, datamodule=data)
    steps = [*watch.steps, _trained(module)][-4:]

    def tail() -> EMAWeightAveraging:
        return EMAWeightAveraging(decay=_DECAY, update_starting_at_step=2)

    module, data = made()
    trainer = _trainer(
        tmp_path, [tail(), seen := Watch(), _SaveAt(2, tmp_path / "two.ckpt")],
        limit_val_batches=1, val_check_interval=1, check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert len(seen.validated) == 4
    for validated, step in zip(seen.validated, steps[:3], strict=False):
        _check_equal(validated, step)
    _check_equal(seen.validated[3], _average(steps[2:]))
    _check_equal(_trained(module), _average(steps[2:]))
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)["state_dict"]
    _check_equal({n: t for n, t in saved.items() if n in steps[1]}, steps[1])

    resumed, data = made()
    path = tmp_path / "two.ckpt"
    _trainer(tmp_path, [tail()]).fit(resumed, datamodule=data, ckpt_path=path, weights_only=True)
    _check_equal(_trained(resumed), _average(steps[2:]))

    short, data = made()  # it ends before the average begins
    never = EMAWeightAveraging(update_starting_at_step=100)
    _trainer(tmp_path, [never]).fit(short, datamodule=data)
    _check_equal(_trained(short), steps[3])


class _SaveAt(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self._step, self._path = step, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self._step:
            trainer.save_checkpoint(self._path)


def test_the_adapter_that_is_left_is_the_average(tmp_path: Path) -> None:
    module, data = _finetuning("nf4")
    trainer = _trainer(tmp_path, [EMAWeightAveraging(decay=_DECAY)])
    trainer.fit(module, datamodule=data)
    (path,) = (tmp_path / "adapter").glob("*.safetensors")
    stored = load_file(path)
    trained = list(_trained(module).values())
    assert len(stored) == len(trained)
    assert sorted(float(t.double().sum()) for t in stored.values()) == pytest.approx(
        sorted(float(t.double().sum()) for t in trained)
    )


def test_a_checkpoint_of_averages_is_read_as_a_model(tmp_path: Path) -> None:
    module, data = _pretraining()
    trainer = _trainer(tmp_path, [EMAWeightAveraging(decay=_DECAY)])
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = load_model(str(tmp_path / "last.ckpt")).network
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, module.state_dict()[f"network.{name}"]), name


# At 0.9 the average of a code of 8 bits with itself, cut to a whole number, is often one below.
@pytest.mark.parametrize(
    "callback",
    [
        lambda: EMAWeightAveraging(decay=0.9),
        WeightAveraging,
        lambda: WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    ],
    ids=["exponential", "mean", "multiple"],
)
def test_codes_of_a_frozen_base_are_not_taken_for_numbers(
    callback: Callable[[], Callback], tmp_path: Path
) -> None:
    (plain, data), (module, _) = _finetuning("nf4"), _finetuning("nf4")
    _trainer(tmp_path, [], max_steps=1).fit(plain, datamodule=data)
    trainer = _trainer(tmp_path, [callback()], max_steps=4)
    trainer.fit(module, datamodule=_finetuning("nf4")[1])
    frozen = [
        (ours, theirs)
        for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True)
        if not ours.requires_grad
    ]
    assert len(frozen) > 5
    assert all(torch.equal(ours, theirs) for ours, theirs in frozen)


@pytest.mark.parametrize(
    ("callback", "settings", "message"),
    [
        (
            lambda: StochasticWeightAveraging(0.1),
            {},
            r"^callback StochasticWeightAveraging copies the module before its network is built;"
            r" take lightning\.pytorch\.callbacks\.WeightAveraging$",
        ),
        (
            EMAWeightAveraging,
            {"self_guided": 0.5},
            r"^callback EMAWeightAveraging averages .* model\.self_guided 0\.5 changes in between",
        ),
        (
            EMAWeightAveraging,
            {"quantization_aware": "nf4"},
            r"^callback EMAWeightAveraging averages .* model\.quantization_aware nf4 changes",
        ),
    ],
)
def test_what_cannot_be_averaged_is_refused_by_the_callbacks_name(
    callback: Callable[[], Callback], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    module, data = _pretraining(**settings)
    with pytest.raises(ValueError, match=message):
        _trainer(tmp_path, [callback()]).fit(module, datamodule=data)
