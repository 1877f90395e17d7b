"""Lightning's own tools with our modules: each works, or is refused in one line."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.tuner.tuning import Tuner

from fingpt_lightning.data import FinancialInstructions, TextBlocks
from fingpt_lightning.modules import LowRankPretraining, QuantizedFinetuning
from fingpt_lightning.modules.base_model import RandomLlama
from tests.callbacks.tiny_run import logged_rows, tiny_trainer

# Averaging: test_weight_averaging.py.
pytestmark = [
    pytest.mark.filterwarnings("ignore:When using .*accumulate_grad_batches != 1"),
    pytest.mark.filterwarnings("ignore:The PyTorch Profiler default schedule"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated"),
]

Case = tuple[LightningModule, LightningDataModule]
Rows = list[dict[str, float]]
_COMPARED = ("step", "train/loss", "train/learning_rate", "train/tokens", "val/loss")
_SEARCH: dict[str, Any] = {"min_lr": 1e-5, "max_lr": 0.1}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def _pretraining(cache: Path, batch_size: int = 4, **settings: Any) -> Case:
    torch.manual_seed(3)
    sizes: dict[str, Any] = {"num_layers": 1, "width": 12, "num_heads": 3, "num_positions": 16}
    given = {"rank": 3, "warmup": 1} | sizes | settings
    data = TextBlocks(
        num_synthetic_items=40, val_share=0.2, vocab_size=300, block_length=16,
        batch_size=batch_size, cache_dir=str(cache),
    )  # fmt: skip
    return LowRankPretraining("gpt2-nano", **given), data


def _finetuning(cache: Path, batch_size: int = 4, **settings: Any) -> Case:
    torch.manual_seed(3)
    module = QuantizedFinetuning(
        random_base=RandomLlama(num_positions=400), rank=3, warmup=1, quantize="nf4",
        dtype="bfloat16", **settings,
    )  # fmt: skip
    data = FinancialInstructions(
        num_synthetic_items=30, batch_size=batch_size, vocab_size=400, max_length=400
    )
    return module, data


def _dense(cache: Path, **settings: Any) -> Case:
    return _pretraining(cache, rank=None, **settings)


_CASES: dict[str, Callable[..., Case]] = {
    "low-rank pretraining": _pretraining,
    "dense pretraining": _dense,
    "QLoRA finetuning": _finetuning,
}
EACH_CASE = pytest.mark.parametrize("build", _CASES.values(), ids=_CASES)


def _trainer(folder: Path, callbacks: Sequence[Callback] = (), **settings: Any) -> Trainer:
    two_steps: dict[str, Any] = {
        "max_steps": 2, "max_epochs": -1, "val_check_interval": 2, "limit_val_batches": 1,
        "check_val_every_n_epoch": None, "num_sanity_val_steps": 0,
    }  # fmt: skip
    return tiny_trainer(folder, list(callbacks), **(two_steps | settings))


def _fit(trainer: Trainer, module: LightningModule, data: LightningDataModule) -> Rows:
    """The rows that a fit logs."""
    trainer.fit(module, datamodule=data)
    return _compared(Path(trainer.default_root_dir))


def _compared(folder: Path) -> Rows:
    rows = [{k: row[k] for k in _COMPARED if k in row} for row in logged_rows(folder)]
    return [row for row in rows if len(row) > 1]


@pytest.fixture(scope="module")
def plain(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[object, Rows]:
    """Two steps of each case without any tool."""
    found: dict[object, Rows] = {}
    for build in _CASES.values():
        folder = tmp_path_factory.mktemp("plain")
        found[build] = _fit(_trainer(folder), *build(cache))
        assert [row["step"] for row in found[build]] == [0, 1, 1]
    return found


@EACH_CASE
def test_what_observes_a_run_leaves_it_as_it_is(
    build: Callable[..., Case],
    plain: dict[object, Rows],
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    early = EarlyStopping("val/loss", patience=1)
    observers: list[tuple[Any, list[Callback], dict[str, Any]]] = [
        (SimpleProfiler,
         [DeviceStatsMonitor(cpu_stats=True), LearningRateMonitor(), RichModelSummary(2),
          RichProgressBar()],
         {"detect_anomaly": True}),
        (AdvancedProfiler, [ModelSummary(2), TQDMProgressBar(), early, Timer("00:01:00:00")],
         {"benchmark": True}),
        (PyTorchProfiler, [], {}),
    ]  # fmt: skip
    for number, (profiler, callbacks, settings) in enumerate(observers):
        folder = tmp_path / str(number)
        trainer = _trainer(
            folder, callbacks, profiler=profiler(folder, "profile"),
            enable_progress_bar=number < 2, enable_model_summary=number < 2, **settings,
        )  # fmt: skip
        assert _fit(trainer, *build(cache)) == plain[build], profiler
        assert (folder / "fit-profile.txt").stat().st_size > 100
    logged = {key for row in logged_rows(tmp_path / "0") for key in row}
    assert any(key.startswith("DeviceStatsMonitor.on_train_batch_end/cpu") for key in logged)
    assert any(key.startswith("lr-") for key in logged)
    assert list((tmp_path / "2").glob("*.pt.trace.json"))
    assert "Modules in train mode" in capsys.readouterr().out


@EACH_CASE
def test_what_changes_a_run_changes_it_as_it_says(
    build: Callable[..., Case], plain: dict[object, Rows], cache: Path, tmp_path: Path
) -> None:
    def fit(name: str, *callbacks: Callback, **settings: Any) -> tuple[Rows, Trainer]:
        trainer = _trainer(tmp_path / name, callbacks, **settings)
        return _fit(trainer, *build(cache)), trainer

    accumulated, _ = fit("accumulate", accumulate_grad_batches=2)
    scheduled, _ = fit("schedule", GradientAccumulationScheduler({0: 2}))
    assert scheduled == accumulated
    assert accumulated[0]["train/tokens"] > plain[build][0]["train/tokens"]

    stop = EarlyStopping("val/loss", stopping_threshold=100.0)
    stopped, trainer = fit("early", stop, val_check_interval=1)
    assert trainer.global_step == 1
    assert stopped[0]["train/loss"] == plain[build][0]["train/loss"]

    epoch: dict[str, Any] = {
        "max_steps": -1, "max_epochs": 2, "val_check_interval": 1.0, "check_val_every_n_epoch": 1
    }  # fmt: skip
    limited, trainer = fit("limit", limit_train_batches=1, **epoch)
    assert trainer.global_step == 2
    assert limited[0]["train/loss"] == plain[build][0]["train/loss"]
    overfitted, trainer = fit("overfit", overfit_batches=1, **epoch)
    assert trainer.global_step == 2
    first, second = (row["train/tokens"] for row in overfitted if "train/loss" in row)
    assert second == 2 * first, "the same batch twice"

    trainer = _trainer(tmp_path / "fast", fast_dev_run=True, **epoch)
    trainer.fit(*build(cache)[:1], datamodule=build(cache)[1])
    assert trainer.global_step == 1
    assert not list((tmp_path / "fast").rglob("metrics.csv"))


@EACH_CASE
def test_a_deterministic_run_is_the_run(
    build: Callable[..., Case], plain: dict[object, Rows], cache: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        try:
            rows = _fit(_trainer(tmp_path, deterministic=True), *build(cache))
        finally:
            torch.use_deterministic_algorithms(False)
    assert rows == plain[build]


@EACH_CASE
def test_stochastic_weight_averaging_is_refused(
    build: Callable[..., Case], cache: Path, tmp_path: Path
) -> None:
    module, data = build(cache)
    trainer = _trainer(tmp_path, [StochasticWeightAveraging(0.01)])
    with pytest.raises(ValueError, match=r"take lightning\.pytorch\.callbacks\.Weight"):
        trainer.fit(module, datamodule=data)


@EACH_CASE
def test_a_run_goes_on_with_the_rate_that_was_found(
    build: Callable[..., Case], cache: Path, tmp_path: Path
) -> None:
    module, data = build(cache)
    trainer = _trainer(tmp_path / "tuner")
    Tuner(trainer).lr_find(module, datamodule=data, num_training=13, **_SEARCH)
    found = module.hparams["learning_rate"]
    assert 1e-5 < found <= 0.1
    assert found not in (0.0006, 0.0005)
    by_tuner = _fit(trainer, module, data)

    finder = LearningRateFinder(num_training_steps=13, **_SEARCH)
    module, data = build(cache)
    by_callback = _fit(_trainer(tmp_path / "callback", [finder]), module, data)
    assert module.hparams["learning_rate"] == found

    expected = _fit(_trainer(tmp_path / "given"), *build(cache, learning_rate=found))
    assert expected[0]["train/learning_rate"] == pytest.approx(found)
    assert by_tuner == expected
    assert by_callback == expected


@EACH_CASE
def test_a_run_goes_on_with_the_batch_size_that_was_found(
    build: Callable[..., Case], cache: Path, tmp_path: Path
) -> None:
    module, data = build(cache)
    trainer = _trainer(tmp_path / "tuner")
    size = Tuner(trainer).scale_batch_size(
        module, datamodule=data, init_val=4, max_trials=2, steps_per_trial=1
    )
    assert size == data.hparams["batch_size"] == 8
    by_tuner = _fit(trainer, module, data)

    finder = BatchSizeFinder(init_val=4, max_trials=2, steps_per_trial=1)
    by_callback = _fit(_trainer(tmp_path / "callback", [finder]), *build(cache))
    expected = _fit(_trainer(tmp_path / "given"), *build(cache, batch_size=8))
    assert by_tuner == expected
    assert by_callback == expected


@EACH_CASE
def test_a_search_for_the_batch_size_says_where_the_data_end(
    build: Callable[..., Case], cache: Path, tmp_path: Path
) -> None:
    finder = BatchSizeFinder(steps_per_trial=1, init_val=512)
    with pytest.raises(ValueError, match=r"; a BatchSizeFinder ends before with max_val \d+$"):
        _fit(_trainer(tmp_path, [finder]), *build(cache))


@pytest.mark.parametrize(
    "settings", [{"optimizer": "spectron"}, {"embedding_learning_rate": 0.01}], ids=str
)
def test_one_rate_is_not_sought_where_there_are_several(
    settings: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    module, data = _pretraining(cache, **settings)
    with pytest.raises(ValueError, match=r"has several \(0.0006, 0.0\d+\): try rates with"):
        Tuner(_trainer(tmp_path)).lr_find(module, datamodule=data, num_training=3)
    assert module.hparams["learning_rate"] == 0.0006
    assert not list(tmp_path.glob(".lr_find*"))
