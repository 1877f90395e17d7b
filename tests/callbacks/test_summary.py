import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from typing_extensions import override

from callbacks.memory import MemoryMonitor
from callbacks.summary import RunSummary
from callbacks.throughput import ThroughputMonitor
from tests.callbacks.tiny_run import (
    VOCABULARY,
    WIDTH,
    Batch,
    Batches,
    PlainModule,
    TinyModule,
    fit,
    make_batch,
    tiny_trainer,
)

_RANK = 3
_BAR = "\N{BOX DRAWINGS LIGHT VERTICAL}"


def _written(folder: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    assert [path.name for path in folder.glob("summary*")] == ["summary.json"]
    return figures


class _KeepValidationLosses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.losses.append(trainer.callback_metrics["val/loss"].item())


def test_a_whole_run_is_summed_up_in_table_and_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory, throughput = MemoryMonitor(), ThroughputMonitor(peak_tflops=1.0)
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/loss", save_last=True)
    validation = _KeepValidationLosses()
    trainer = tiny_trainer(
        tmp_path,
        [RunSummary(), memory, throughput, checkpoint, validation],
        enable_checkpointing=True,
        limit_val_batches=1,
        val_check_interval=2,
    )
    fit(trainer, TinyModule(_RANK), [make_batch()] * 6)

    figures = _written(tmp_path)
    peak_mib = figures.pop("peak_rss_mib")
    assert peak_mib == pytest.approx(memory.run_peak_bytes() / 2**20, rel=0.05)
    dense_block, block, rest = WIDTH**2, 2 * WIDTH * _RANK, 2 * VOCABULARY * WIDTH
    assert len(validation.losses) == 3
    assert validation.losses[0] != validation.losses[-1]
    assert figures == {
        "steps": 6,
        "block_parameters": block,
        "parameters": block + rest,
        "dense_block_parameters": dense_block,
        "dense_parameters": dense_block + rest,
        "block_parameter_ratio": dense_block / block,
        "total_parameter_ratio": (dense_block + rest) / (block + rest),
        "first_val_loss": validation.losses[0],
        "best_val_loss": min(validation.losses),
        "last_val_loss": validation.losses[-1],
        "tokens_per_s": throughput.run_tokens_per_s,
        "best_checkpoint": checkpoint.best_model_path,
        "last_checkpoint": checkpoint.last_model_path,
        "run_folder": str(tmp_path),
        "log_folder": str(tmp_path),
    }
    assert Path(checkpoint.last_model_path).exists()
    printed = capsys.readouterr().out
    for shown in (
        f"{validation.losses[-1]:.4f}",
        f"{peak_mib:,.1f} MiB",
        f"{dense_block / block:.2f}x smaller",
        f"best checkpoint: {checkpoint.best_model_path}\n",
        f"last checkpoint: {checkpoint.last_model_path}\n",
        f"run folder: {tmp_path}\n",
    ):
        assert shown in printed
    assert "log folder:" not in printed, "it is the run folder"


def test_what_a_run_did_not_yield_has_no_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = tiny_trainer(tmp_path, [RunSummary()], logger=False, limit_val_batches=1, max_steps=1)
    fit(trainer, PlainModule(), [make_batch()] * 3)
    assert _written(tmp_path).keys() == {"steps", "parameters", "peak_rss_mib", "run_folder"}
    printed = capsys.readouterr().out
    cells = {
        line.split(_BAR)[1].strip(): line.split(_BAR)[2].strip()
        for line in printed.splitlines()
        if line.startswith(_BAR)
    }
    assert cells.keys() == {"parameters, total", "optimizer steps", "peak memory, process"}
    assert cells["optimizer steps"] == "1"
    assert "dense baseline" not in printed
    assert "checkpoint:" not in printed
    assert "log folder:" not in printed


class _Adapter(PlainModule):
    """Trains its head on a frozen embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.network[0].requires_grad_(False)

    def trained_share(self) -> float:
        return 0.25

    def base_text(self) -> str:
        return "models/base in nf4"

    def adapter_text(self) -> str:
        return "LoRA of rank 3"


class _Bytes(LightningDataModule):
    """Knows its bytes per token."""

    def bytes_per_token(self, split: str) -> float | None:
        return {"val": 4.0}[split]

    @override
    def train_dataloader(self) -> Any:
        return Batches([make_batch()] * 2)

    @override
    def val_dataloader(self) -> Any:
        return Batches([make_batch()])


def test_a_finetuning_shows_base_adapter_and_what_it_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = _Adapter()
    fit(tiny_trainer(tmp_path, [RunSummary()], logger=False), module, [make_batch()] * 2)
    figures, printed = _written(tmp_path), capsys.readouterr().out
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert figures["trained_parameters"] == trained
    assert figures["trained_share"] == 0.25
    assert (figures["base"], figures["adapter"]) == ("models/base in nf4", "LoRA of rank 3")
    for text in ("models/base in nf4", "LoRA of rank 3", f"{trained}", "25.00%"):
        assert text in printed
    assert "dense baseline" not in printed
    assert not re.search(rf"{_BAR} +- +{_BAR}", printed)


def test_bits_per_byte_stand_beside_the_loss_where_the_data_know_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = tiny_trainer(tmp_path, [RunSummary()], logger=False, limit_val_batches=1)
    trainer.fit(PlainModule(), _Bytes())
    figures = _written(tmp_path)
    bits = figures["last_val_loss"] / math.log(2) / 4
    assert figures["val_bits_per_byte"] == pytest.approx(bits)
    assert f"{bits:.3f} bits per byte" in capsys.readouterr().out


class _Skipping(_Bytes):
    number = 1234

    def skipped_rows(self) -> tuple[int, str | None]:
        return self.number, f"news.jsonl:7: no JSON ({'x' * 200})" if self.number else None


def test_skipped_rows_stand_in_the_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = _Skipping()
    trainer = tiny_trainer(tmp_path, [RunSummary()], logger=False, limit_val_batches=1)
    trainer.fit(PlainModule(), data)
    figures, printed = _written(tmp_path), capsys.readouterr().out
    assert figures["skipped_rows"] == 1234
    assert figures["first_skipped_row"] == data.skipped_rows()[1]
    assert re.search(r"bad rows skipped +. +1,234", printed)
    assert f"first skipped row: {figures['first_skipped_row']}" in printed
    data.number = 0
    trainer = tiny_trainer(tmp_path, [RunSummary()], logger=False, limit_val_batches=1)
    trainer.fit(PlainModule(), data)
    assert "skipped_rows" not in _written(tmp_path)


@pytest.mark.parametrize(("monitor", "expected"), [("val/loss", 0.25), ("val/other", 1.5)])
def test_the_best_loss_is_that_of_the_whole_history_where_checkpoints_know_it(
    tmp_path: Path, monitor: str, expected: float
) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor=monitor)
    checkpoint.best_model_score = torch.tensor(0.25)
    summary = RunSummary()
    summary._best_val_loss = 1.5
    trainer = tiny_trainer(tmp_path, [checkpoint], enable_checkpointing=True)
    assert summary._best_of_history(trainer) == expected


def test_losses_of_the_sanity_check_are_no_validation(tmp_path: Path) -> None:
    trainer = tiny_trainer(
        tmp_path, [RunSummary()], limit_val_batches=1, num_sanity_val_steps=1, max_steps=1
    )
    fit(trainer, TinyModule(), [make_batch()] * 3)
    assert "first_val_loss" not in _written(tmp_path)


class _Diverging(TinyModule):
    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/loss", torch.tensor(torch.nan))


def test_a_loss_that_is_no_number_is_left_out_of_the_json(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, [RunSummary()], limit_val_batches=1)
    fit(trainer, _Diverging(), [make_batch()])
    assert "last_val_loss" not in _written(tmp_path)


class _Costly(TinyModule):
    """A step takes so many seconds on the clock; the twin's two."""

    now_s = 0.0

    def __init__(self, rank: int | None = _RANK, step_s: float = 1.0) -> None:
        super().__init__(rank)
        self.step_s = step_s

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        _Costly.now_s += self.step_s
        return super().training_step(batch, batch_idx)

    @override
    def dense_baseline(self) -> TinyModule:
        return _Costly(rank=None, step_s=2.0)


@pytest.mark.parametrize(
    ("step_s", "verdict"),
    [(1.0, "2.00x: faster"), (4.0, "0.50x: not faster")],
)
def test_the_dense_baseline_is_timed_beside_and_the_verdict_said_either_way(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step_s: float,
    verdict: str,
) -> None:
    clock = SimpleNamespace(perf_counter=lambda: _Costly.now_s)
    monkeypatch.setattr("callbacks.summary.time", clock)
    module, batch = _Costly(step_s=step_s), make_batch()
    fit(tiny_trainer(tmp_path, [RunSummary(dense_baseline_steps=3)]), module, [batch] * 2)
    figures = _written(tmp_path)
    num_tokens = int((batch["labels"] != -100).sum())
    assert figures["timed_tokens_per_s"] == num_tokens / step_s
    assert figures["dense_baseline_tokens_per_s"] == num_tokens / 2
    assert figures["speed_ratio"] == 2 / step_s
    assert verdict in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
def test_timing_leaves_weights_gradients_and_random_state_alone(
    tmp_path: Path, precision: str
) -> None:
    after: list[tuple[list[Tensor], Tensor, int]] = []
    for steps in (0, 2):
        torch.manual_seed(0)
        module = TinyModule()
        folder = tmp_path / str(steps)
        trainer = tiny_trainer(
            folder, [RunSummary(dense_baseline_steps=steps)], precision=precision
        )
        fit(trainer, module, [make_batch() for _ in range(3)])
        weights = [p.detach() for p in module.parameters()]
        after.append((weights, torch.get_rng_state(), len(module.losses)))
        assert ("speed_ratio" in _written(folder)) == (steps > 0)
        assert not torch.is_autocast_enabled("cpu")
    (plain, plain_state, plain_losses), (timed, timed_state, timed_losses) = after
    assert all(torch.equal(a, b) for a, b in zip(plain, timed, strict=True))
    assert torch.equal(plain_state, timed_state)
    assert plain_losses == timed_losses == 3


class _KeepsDtypes(TinyModule):
    dtypes: ClassVar[set[torch.dtype]] = set()

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.dtypes.update(p.dtype for p in self.parameters())
        return super().training_step(batch, batch_idx)

    @override
    def dense_baseline(self) -> TinyModule:
        return _KeepsDtypes(rank=None)


def test_the_twin_is_timed_in_the_precision_of_the_run(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, [RunSummary(dense_baseline_steps=1)], precision="bf16-true")
    fit(trainer, _KeepsDtypes(), [make_batch()])
    assert _KeepsDtypes.dtypes == {torch.bfloat16}


class _Compiled(TinyModule):
    def configure_model(self) -> None:
        super().configure_model()
        self.compile()


def test_the_copy_that_is_timed_is_compiled_where_the_module_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []

    def note(call: Any, **_: Any) -> Any:
        compiled.append(call)
        return call

    monkeypatch.setattr(torch, "compile", note)
    trainer = tiny_trainer(tmp_path, [RunSummary(dense_baseline_steps=1)])
    fit(trainer, _Compiled(), [make_batch()])
    # The module, its twin, which is plain, and its copy.
    assert len(compiled) == 2


class _TooLarge(TinyModule):
    @override
    def dense_baseline(self) -> TinyModule:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_twin_that_does_not_fit_costs_its_figures_only(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, [RunSummary(dense_baseline_steps=1)])
    with pytest.warns(UserWarning, match="too little memory"):
        fit(trainer, _TooLarge(), [make_batch()])
    assert "speed_ratio" not in _written(tmp_path)


def test_a_run_without_a_step_times_nothing(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, [RunSummary(dense_baseline_steps=1)], max_steps=0)
    fit(trainer, TinyModule(), [make_batch()])
    figures = _written(tmp_path)
    assert figures["steps"] == 0
    assert "speed_ratio" not in figures


def test_a_module_without_a_twin_is_refused_before_training(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, [RunSummary(dense_baseline_steps=1)])
    module = PlainModule()
    with pytest.raises(TypeError, match=r"dense_baseline\(\), which PlainModule has not"):
        fit(trainer, module, [make_batch()])
    assert not module.losses


def test_a_negative_number_of_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="dense_baseline_steps=-1"):
        RunSummary(dense_baseline_steps=-1)
