"""DDP and FSDP2 on two gloo processes give what one process gives on the same global batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import DoublePrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from fingpt_lightning.modules import LowRankPretraining
from fingpt_lightning.profiling.memory import module_memory
from fingpt_lightning.strategies import FullySharded
from tests.models.tiny_models import tiny_gpt2
from tests.support.lightning_ranks import RanksEnvironment
from tests.support.ranks import run_ranks
from tests.support.token_data import TokenData

SIZES: dict[str, Any] = {
    "preset": "gpt2-nano", "num_layers": 2, "width": 12, "num_heads": 3, "num_positions": 16,
    "rank": 3, "embedding_rank": 5, "learning_rate": 0.01, "warmup": 1,
}  # fmt: skip
DENSE: dict[str, Any] = {"rank": None, "embedding_rank": None}
NARROW: dict[str, Any] = {
    "recipe": "narrow", "compression": 1.5, "rank": "auto", "embedding_rank": None, "width": 36,
    "vocab_size": 99, "learning_rate": None,
}  # fmt: skip
NARROW_ADAMW = NARROW | {"optimizer": "adamw"}
BF16: dict[str, Any] = {"plugins": [], "precision": "bf16-mixed"}
NUM_STEPS, CHECKPOINT_STEP = 6, 4


class LossReader(Callback):
    """Keeps the loss of each optimiser step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self.losses.append(trainer.callback_metrics["train/loss"].item())


def _fit(
    folder: Path,
    *,
    batch_size: int,
    resume_from: Path | None = None,
    changes: dict[str, Any] | None = None,
    observers: Sequence[Callback] = (),
    **options: Any,
) -> dict[str, Any]:
    """Six clipped steps of two microbatches, a checkpoint after the fourth, then a test."""
    torch.manual_seed(3)
    module = LowRankPretraining(**(SIZES | (changes or {})))
    reader = LossReader()
    checkpoint = ModelCheckpoint(
        folder, "{step}", every_n_train_steps=CHECKPOINT_STEP, save_top_k=-1
    )
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_steps": NUM_STEPS, "max_epochs": -1,
        "accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0,
        "default_root_dir": folder, "callbacks": [reader, checkpoint, *observers],
        "log_every_n_steps": 1, "plugins": [DoublePrecision()],
    }  # fmt: skip
    trainer = Trainer(**(settings | options))
    trainer.fit(module, datamodule=TokenData(batch_size), ckpt_path=resume_from, weights_only=True)
    held = module_memory(module, trainer.optimizers[0])
    (tested,) = trainer.test(module, datamodule=TokenData(batch_size), verbose=False)
    return {
        "losses": reader.losses,
        "weights": {name: whole_copy(weight) for name, weight in module.state_dict().items()},
        "held_bytes": list(held),
        "test/loss": tested["test/loss"],
        "tokens_seen": module.tokens_seen,
    }


def whole_copy(tensor: Tensor) -> Tensor:
    """Also of a sharded tensor; the ranks that share it call this together."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _fit_in_one_process(folder: Path, **options: Any) -> dict[str, Any]:
    return _fit(folder, batch_size=2, **options)


def _taught(folder: Path) -> dict[str, Any]:
    return {
        "teacher": str(folder / "teacher"), "teacher_dtype": "float64", "teacher_weight": 0.7,
        "teacher_temperature": 2.0,
    }  # fmt: skip


def _checkpoint(folder: Path) -> Path:
    return folder / f"step={CHECKPOINT_STEP}.ckpt"


class WeightDtypes(Callback):
    """Sees in which dtype a block's matrices and norms are while it runs."""

    def __init__(self) -> None:
        self.seen: dict[str, str] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name in ("mlp.c_fc", "ln_2"):
            part = pl_module.get_submodule(f"network.transformer.h.1.{name}")
            part.register_forward_pre_hook(lambda part, _, name=name: self._see(name, part))

    def _see(self, name: str, part: torch.nn.Module) -> None:
        self.seen[name] = str(next(part.parameters()).dtype)


def _fit_on_ranks(process_rank: int, world_size: int, name: str) -> dict[str, dict[str, Any]]:
    folder = Path(name)

    def fit(case: str, strategy: Any, **options: Any) -> dict[str, Any]:
        ranks: dict[str, Any] = {
            "strategy": strategy, "devices": world_size,
            "plugins": [RanksEnvironment(), *options.pop("plugins", [DoublePrecision()])],
        }  # fmt: skip
        return _fit(folder / case, batch_size=1, **ranks, **options)

    def resume_from(case: str) -> dict[str, Any]:
        return fit("resumed", FullySharded(), resume_from=_checkpoint(folder / case))

    refusal = (
        r"FullySharded splits each matrix, .* \(model.recipe narrow sets it where it is null\)"
    )
    with pytest.raises(ValueError, match=refusal):
        fit("refused", FullySharded(), changes=NARROW)
    dtypes = WeightDtypes()
    return {
        "ddp": fit("ddp", DDPStrategy(gradient_as_bucket_view=True)),
        "fsdp": fit("fsdp", FullySharded()),
        "fsdp recompute": fit("recompute", FullySharded(), changes={"recompute": "block"}),
        "fsdp dense": fit("dense", FullySharded(), changes=DENSE),
        "ddp narrow": fit("ddp_narrow", DDPStrategy(), changes=NARROW),
        "fsdp narrow": fit("fsdp_narrow", FullySharded(), changes=NARROW_ADAMW),
        "ddp taught": fit("ddp_taught", DDPStrategy(), changes=_taught(folder)),
        "fsdp taught": fit("fsdp_taught", FullySharded(), changes=_taught(folder)),
        "fsdp resumed from fsdp": resume_from("fsdp"),
        "fsdp resumed from one": resume_from("one"),
        "fsdp bf16": fit("bf16", FullySharded(), observers=[dtypes], **BF16)
        | {"dtypes": dtypes.seen},
    }


class Runs:
    """What one process and each of two ranks came to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.one = _fit_in_one_process(folder / "one")
        self.one_bf16 = _fit_in_one_process(folder / "one_bf16", **BF16)
        tiny_gpt2().save_pretrained(folder / "teacher")
        self.one_taught = _fit_in_one_process(folder / "one_taught", changes=_taught(folder))
        self.one_dense = _fit_in_one_process(folder / "one_dense", changes=DENSE)
        self.one_narrow = _fit_in_one_process(folder / "one_narrow", changes=NARROW)
        self.one_narrow_adamw = _fit_in_one_process(folder / "adamw", changes=NARROW_ADAMW)
        self.per_rank = run_ranks(_fit_on_ranks, 2, str(folder), timeout_s=120)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def _assert_same(ours: dict[str, Any], truth: dict[str, Any]) -> None:
    num_steps = len(ours["losses"])
    assert ours["losses"] == pytest.approx(truth["losses"][-num_steps:], rel=1e-10)
    assert ours["test/loss"] == pytest.approx(truth["test/loss"], rel=1e-10)
    assert ours["tokens_seen"] == truth["tokens_seen"]
    assert ours["weights"].keys() == truth["weights"].keys()
    for name, weight in truth["weights"].items():
        torch.testing.assert_close(ours["weights"][name], weight, rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "num_steps"),
    [
        ("ddp", NUM_STEPS),
        ("fsdp", NUM_STEPS),
        ("fsdp recompute", NUM_STEPS),
        ("fsdp resumed from fsdp", NUM_STEPS - CHECKPOINT_STEP),
        ("fsdp resumed from one", NUM_STEPS - CHECKPOINT_STEP),
    ],
)
def test_two_ranks_equal_one_process(runs: Runs, case: str, num_steps: int) -> None:
    for results in runs.per_rank:
        assert len(results[case]["losses"]) == num_steps
        _assert_same(results[case], runs.one)


@pytest.mark.slow
def test_a_tied_dense_network_is_split_exactly_too(runs: Runs) -> None:
    for results in runs.per_rank:
        _assert_same(results["fsdp dense"], runs.one_dense)


@pytest.mark.slow
def test_a_narrow_network_is_trained_and_split_exactly_too(runs: Runs) -> None:
    for results in runs.per_rank:
        _assert_same(results["ddp narrow"], runs.one_narrow)
        _assert_same(results["fsdp narrow"], runs.one_narrow_adamw)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ddp taught", "fsdp taught"])
def test_two_ranks_learn_from_a_teacher_as_one_process_does(runs: Runs, case: str) -> None:
    assert runs.one_taught["losses"] != pytest.approx(runs.one["losses"], rel=0.1)
    for results in runs.per_rank:
        _assert_same(results[case], runs.one_taught)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_sharded_checkpoint_is_that_of_one_process(runs: Runs) -> None:
    path = _checkpoint(runs.folder / "fsdp")
    _assert_same(_fit_in_one_process(runs.folder / "back", resume_from=path), runs.one)
    ours = torch.load(path, weights_only=True)
    truth = torch.load(_checkpoint(runs.folder / "one"), weights_only=True)
    assert ours.keys() == truth.keys()
    table, head = (ours["state_dict"][f"network.{n}.table"] for n in ("transformer.wte", "lm_head"))
    assert table.data_ptr() == head.data_ptr()
    loaded = LowRankPretraining.load_from_checkpoint(path, weights_only=True)
    assert loaded.state_dict().keys() == ours["state_dict"].keys()


@pytest.mark.slow
def test_each_of_two_ranks_holds_half_of_weights_gradients_and_optimiser(runs: Runs) -> None:
    per_rank = [results["fsdp"]["held_bytes"] for results in runs.per_rank]
    for whole, *shares in zip(runs.one["held_bytes"], *per_rank, strict=True):
        assert sum(shares) >= whole
        assert max(shares) < 0.6 * whole  # more than half: matrices with odd numbers of rows


@pytest.mark.slow
def test_mixed_precision_gathers_matrices_in_bfloat16_and_norms_in_float32(runs: Runs) -> None:
    for results in runs.per_rank:
        mixed = results["fsdp bf16"]
        assert mixed["dtypes"] == {"mlp.c_fc": "torch.bfloat16", "ln_2": "torch.float32"}
        assert {weight.dtype for weight in mixed["weights"].values()} == {torch.float32}
        assert mixed["losses"][0] == pytest.approx(runs.one_bf16["losses"][0], rel=1e-5)
        assert mixed["test/loss"] == pytest.approx(runs.one_bf16["test/loss"], rel=0.01)


def test_one_device_has_nothing_to_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"FullySharded splits .* raise trainer.devices"):
        _fit_in_one_process(tmp_path, strategy=FullySharded())
