"""All callbacks in a plain Trainer: over a module that knows nothing of ours, and over ours."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

import callbacks as package
from callbacks.compression import CompressionMonitor
from callbacks.summary import RunSummary
from callbacks.throughput import ThroughputMonitor
from fingpt_lightning.low_rank import LowRankLinear
from fingpt_lightning.metric_keys import LOGGED_BY
from fingpt_lightning.modules import LowRankPretraining
from tests.callbacks.tiny_run import logged_rows
from tests.support.token_data import TokenData

_CALLBACKS: dict[str, Callable[[], Callback]] = {
    name: getattr(package, name) for name in package.__all__ if name != "DISTRIBUTION"
}
_CALLBACKS["FinancialEvaluation"] = lambda: package.FinancialEvaluation(["fpb"], "data")
# What each lacks in a module of somebody else; the others work.
_REFUSED_BY_FOREIGN = {
    "FinancialEvaluation": "FinancialEvaluation needs a datamodule with a tokenizer, and there is"
    " no datamodule",
    "PipelineTrace": "PipelineTrace needs trainer.strategy PipelineStrategy, not"
    " SingleDeviceStrategy",
}
_REFUSED_BY_OURS = {
    "FinancialEvaluation": "FinancialEvaluation needs a datamodule with a tokenizer, which"
    " TokenData has not",
    "PipelineTrace": _REFUSED_BY_FOREIGN["PipelineTrace"],
}
_NEEDS_TOKENS = (
    "tokens per second need Foreign.num_tokens(batch), which is not there, or batches that are"
    " mappings with the tensor 'labels', not "
)


class Rows(Dataset[Any]):
    """Numbers to be told from others, as a tuple or as a mapping."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        x, y = torch.full((5,), index / 12), torch.tensor(index % 2)
        return (x, y) if self._kind == "tuple" else {"x": x, "y": y}


class Foreign(LightningModule):
    """A classifier of somebody else, with names of its own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.classifier = nn.Sequential(layer, nn.Linear(3, 2))

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch if isinstance(batch, list | tuple) else (batch["x"], batch["y"])
        loss = nn.functional.cross_entropy(self.classifier(x), y)
        self.log("their_loss", loss)
        return loss

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ForeignWithTokens(Foreign):
    """One that says how many tokens its batches have."""

    def num_tokens(self, batch: Any) -> int:
        return 5 * len(batch[0])


def _trainer(folder: Path, callbacks: list[Callback]) -> Trainer:
    has_bar = any(isinstance(callback, package.TrainingProgress) for callback in callbacks)
    return Trainer(
        accelerator="cpu", devices=1, max_epochs=1, log_every_n_steps=1, callbacks=callbacks,
        logger=CSVLogger(folder, name="", version=""), default_root_dir=folder,
        enable_progress_bar=has_bar, enable_model_summary=False, num_sanity_val_steps=0,
        enable_checkpointing=any("Checkpoint" in type(c).__name__ for c in callbacks),
    )  # fmt: skip


def _loader(kind: str) -> DataLoader[Any]:
    return DataLoader(Rows(kind), batch_size=2)


@pytest.mark.parametrize("kind", ["tuple", "mapping"])
@pytest.mark.parametrize("name", _CALLBACKS)
def test_a_foreign_module_is_observed_or_told_what_it_lacks(
    name: str, kind: str, tmp_path: Path
) -> None:
    trainer = _trainer(tmp_path, [_CALLBACKS[name]()])
    module, loader = Foreign(nn.Linear(5, 3)), _loader(kind)
    refusal = _REFUSED_BY_FOREIGN.get(name)
    if name == "ThroughputMonitor":
        refusal = _NEEDS_TOKENS + ("list" if kind == "tuple" else "dict with the keys x, y")
    if refusal is None:
        trainer.fit(module, loader, loader)
        assert trainer.global_step == 6
        _check_traces(name, tmp_path)
    else:
        with pytest.raises(TypeError) as raised:
            trainer.fit(module, loader, loader)
        assert str(raised.value) == refusal
        assert trainer.global_step < 2, "it is said before time was spent"


@pytest.mark.parametrize("name", _CALLBACKS)
def test_our_module_is_observed_or_told_what_it_lacks(name: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"num_layers": 1, "width": 22, "num_heads": 2, "num_positions": 16}
    module = LowRankPretraining("gpt2-nano", rank=3, **sizes)
    trainer = _trainer(tmp_path, [_CALLBACKS[name]()])
    data = TokenData(batch_size=2)
    if (refusal := _REFUSED_BY_OURS.get(name)) is not None:
        with pytest.raises(TypeError) as raised:
            trainer.fit(module, datamodule=data)
        assert str(raised.value) == refusal
        return
    trainer.fit(module, datamodule=data)
    assert trainer.global_step > 2
    _check_traces(name, tmp_path)


def _check_traces(name: str, folder: Path) -> None:
    """Each callback that worked has left what it is there for."""
    if name == "RunSummary":
        found = json.loads((folder / "summary.json").read_text())
        assert {"steps", "parameters", "first_val_loss", "peak_rss_mib"} <= found.keys()
    elif name in LOGGED_BY:
        logged = {key for row in logged_rows(folder) for key in row}
        assert logged & set(LOGGED_BY[name])
    elif "Checkpoint" in name:
        assert [path.name for path in folder.rglob("*.ckpt")] == [f"{name[:4].lower()}.ckpt"]


def test_a_module_may_count_its_tokens_itself(tmp_path: Path) -> None:
    loader = _loader("tuple")
    monitor = ThroughputMonitor(peak_tflops=None, warmup_steps=1)
    trainer = _trainer(tmp_path, [monitor])
    trainer.fit(ForeignWithTokens(nn.Linear(5, 3)), loader, loader)
    rows = [row for row in logged_rows(tmp_path) if "throughput/tokens_per_s" in row]
    assert len(rows) == 5
    for row in rows:
        tokens = row["throughput/tokens_per_s"] * row["throughput/step_time_s"]
        assert tokens == pytest.approx(10)


@pytest.mark.parametrize(
    ("layer", "stored", "dense"),
    [(nn.Linear(5, 3), 18 + 8, None), (LowRankLinear(5, 3, rank=1), 11 + 8, 18 + 8)],
)
def test_parameters_of_a_foreign_module_are_counted(
    layer: nn.Module, stored: int, dense: int | None, tmp_path: Path
) -> None:
    trainer = _trainer(tmp_path, [CompressionMonitor(), RunSummary()])
    trainer.fit(Foreign(layer), _loader("tuple"), _loader("tuple"))
    (row,) = [row for row in logged_rows(tmp_path) if "compression/parameters" in row]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert row["compression/parameters"] == summary["parameters"] == stored
    assert row["compression/total_mib_at_16_bits"] == stored * 2 / 2**20
    for found, key in ((row, "compression/dense_parameters"), (summary, "dense_parameters")):
        assert found.get(key) == dense
    ratio = None if dense is None else pytest.approx(dense / stored)
    assert row.get("compression/total_parameter_ratio") == ratio
    assert summary.get("total_parameter_ratio") == ratio
    assert "block_parameters" not in summary
