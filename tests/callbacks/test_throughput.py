import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.throughput import ThroughputMonitor
from tests.callbacks.tiny_run import (
    BLOCK,
    Clock,
    PlainModule,
    TimedModule,
    TinyModule,
    fit,
    logged_rows,
    make_batch,
    tiny_trainer,
)

_TOKENS = 3 * BLOCK - 2  # of one batch, without the ignored ones
_STEP_S, _FETCH_S = 1.0, 0.5


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("callbacks.throughput.time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr("callbacks.throughput.measured_peak_flops_per_s", lambda *_: 1e12)
    return clock


def _rows(folder: Path) -> list[dict[str, float]]:
    return [row for row in logged_rows(folder) if "throughput/tokens_per_s" in row]


def _run(
    folder: Path, clock: Clock, *callbacks: Callback, num_batches: int = 6, **options: Any
) -> list[dict[str, float]]:
    trainer = tiny_trainer(folder, list(callbacks), **options)
    fit(trainer, TimedModule(clock), [make_batch()] * num_batches, clock)
    return _rows(folder)


def test_the_clock_runs_over_steps_and_fetches_after_the_warm_up(
    tmp_path: Path, clock: Clock
) -> None:
    rows = _run(tmp_path, clock, ThroughputMonitor(), log_every_n_steps=2)
    assert [row["step"] for row in rows] == [3, 5]
    for row in rows:
        assert row["throughput/step_time_s"] == pytest.approx(_STEP_S + _FETCH_S)
        assert row["throughput/tokens_per_s"] == pytest.approx(_TOKENS / (_STEP_S + _FETCH_S))
        assert "train/loss" in row
        assert "throughput/gpu_utilization_percent" not in row


@pytest.mark.parametrize("warmup_steps", [0, 1, 2, 5])
def test_steps_of_the_warm_up_are_not_logged(
    tmp_path: Path, clock: Clock, warmup_steps: int
) -> None:
    rows = _run(tmp_path, clock, ThroughputMonitor(warmup_steps=warmup_steps))
    assert [row["step"] for row in rows] == list(range(warmup_steps, 6))
    assert rows[-1]["throughput/step_time_s"] == pytest.approx(_STEP_S + _FETCH_S)


def test_a_step_is_all_microbatches_of_an_accumulation(tmp_path: Path, clock: Clock) -> None:
    monitor = ThroughputMonitor(warmup_steps=1)
    rows = _run(tmp_path, clock, monitor, num_batches=7, accumulate_grad_batches=3)
    # 7 batches make steps of 3, 3 and 1; the first one warms up.
    assert [row["throughput/step_time_s"] for row in rows] == [pytest.approx(4.5), 1.5]
    rate = pytest.approx(_TOKENS / (_STEP_S + _FETCH_S))
    assert [row["throughput/tokens_per_s"] for row in rows] == [rate, rate]
    assert monitor.run_tokens_per_s == rate


def test_validation_stops_the_clock(tmp_path: Path, clock: Clock) -> None:
    rows = _run(tmp_path, clock, ThroughputMonitor(), limit_val_batches=1, val_check_interval=1)
    assert [row["step"] for row in rows] == [2, 3, 4, 5]
    for row in rows:
        # A fetch after an interruption is lost with it, but for the first step's.
        assert _STEP_S <= row["throughput/step_time_s"] <= _STEP_S + _FETCH_S


@pytest.mark.parametrize("save_weights_only", [False, True])
def test_writing_a_checkpoint_stops_the_clock(
    tmp_path: Path, clock: Clock, save_weights_only: bool
) -> None:
    checkpoint = ModelCheckpoint(
        tmp_path, every_n_train_steps=1, save_top_k=-1, save_weights_only=save_weights_only
    )
    monitor = ThroughputMonitor()
    rows = _run(tmp_path, clock, monitor, checkpoint, enable_checkpointing=True)
    assert len(list(tmp_path.glob("*.ckpt"))) == 6
    assert len(rows) == 4
    for row in rows:
        assert _STEP_S <= row["throughput/step_time_s"] <= _STEP_S + _FETCH_S


def test_the_hook_on_the_module_goes_with_the_run(tmp_path: Path, clock: Clock) -> None:
    module = TimedModule(clock)
    fit(tiny_trainer(tmp_path, [ThroughputMonitor()]), module, [make_batch()] * 3, clock)
    assert not module._state_dict_pre_hooks


def test_mfu_is_useful_operations_over_those_the_devices_could_do(
    tmp_path: Path, clock: Clock
) -> None:
    row = _run(tmp_path, clock, ThroughputMonitor(peak_tflops=2e-6))[-1]
    flops_per_s = TinyModule().budget().training_flops_per_token * _TOKENS / (_STEP_S + _FETCH_S)
    assert row["throughput/mfu"] == pytest.approx(flops_per_s / 2e6)


def test_an_unknown_peak_is_measured_once_and_said(
    tmp_path: Path,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[tuple[torch.device, torch.dtype]] = []

    def measure(device: torch.device, dtype: torch.dtype) -> float:
        asked.append((device, dtype))
        return 3e6

    monkeypatch.setattr("callbacks.throughput.measured_peak_flops_per_s", measure)
    # As the command line sets it, which must not hide the line.
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.WARNING)
    rows = _run(tmp_path, clock, ThroughputMonitor())
    flops_per_s = TinyModule().budget().training_flops_per_token * _TOKENS / (_STEP_S + _FETCH_S)
    assert rows[-1]["throughput/mfu"] == pytest.approx(flops_per_s / 3e6)
    assert asked == [(torch.device("cpu"), torch.float32)]
    printed = capsys.readouterr().out.splitlines()
    (line,) = [line for line in printed if "throughput/mfu" in line]
    assert line.startswith("throughput/mfu is relative to 3e-06 TFLOP/s, the rate of fp32 matrix")


def test_without_a_budget_there_is_no_mfu_and_a_given_peak_is_said_to_be_idle(
    tmp_path: Path,
) -> None:
    trainer = tiny_trainer(tmp_path, [ThroughputMonitor(peak_tflops=1.0)])
    with pytest.warns(UserWarning, match="PlainModule has no budget"):
        fit(trainer, PlainModule(), [make_batch()] * 3)
    rows = _rows(tmp_path)
    assert len(rows) == 1
    assert "throughput/mfu" not in rows[0]
    assert rows[0]["throughput/tokens_per_s"] > 0


def test_a_rhythm_of_its_own_gets_rows_of_its_own(tmp_path: Path, clock: Clock) -> None:
    rows = _run(tmp_path, clock, ThroughputMonitor(every_n_steps=3), log_every_n_steps=4)
    assert [row["step"] for row in rows] == [2, 5]
    assert rows[0]["throughput/step_time_s"] == pytest.approx(_STEP_S + _FETCH_S)


def test_before_the_first_log_the_run_has_no_rate(tmp_path: Path, clock: Clock) -> None:
    monitor = ThroughputMonitor(warmup_steps=6)
    assert _run_without_rows(tmp_path, clock, monitor) is None


def _run_without_rows(folder: Path, clock: Clock, monitor: ThroughputMonitor) -> float | None:
    trainer = tiny_trainer(folder, [monitor], logger=False)
    fit(trainer, TimedModule(clock), [make_batch()] * 6, clock)
    return monitor.run_tokens_per_s


@pytest.mark.parametrize("error", [ModuleNotFoundError("pynvml"), RuntimeError("driver")])
def test_a_utilization_that_nobody_can_tell_is_left_out(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from callbacks.throughput import _gpu_utilization_percent

    def fail(device: torch.device) -> int:
        raise error

    monkeypatch.setattr(torch.cuda, "utilization", fail)
    assert _gpu_utilization_percent(torch.device("cuda")) is None
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 97)
    assert _gpu_utilization_percent(torch.device("cuda")) == 97.0


def test_the_labels_of_a_batch_are_asked_for(tmp_path: Path) -> None:
    class TupleModule(PlainModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step({"input_ids": batch[0], "labels": batch[1]}, batch_idx)

    trainer = tiny_trainer(tmp_path, [ThroughputMonitor(warmup_steps=0)])
    batch = make_batch()
    with pytest.raises(TypeError, match="'labels', not tuple"):
        fit(trainer, TupleModule(), [(batch["input_ids"], batch["labels"])])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"peak_tflops": 0.0}, r"peak_tflops=0\.0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
    ],
)
def test_values_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThroughputMonitor(**arguments)


def test_the_clock_stands_still_for_other_callbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((10.0, 11.0, 50.0, 53.0))
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    monitor = ThroughputMonitor()
    monitor._resume()
    with monitor.standing_still():
        assert monitor._running_since_s is None
    monitor._pause()
    assert monitor._training_time_s == (11.0 - 10.0) + (53.0 - 50.0)
    with monitor.standing_still():
        pass
    assert monitor._running_since_s is None  # it was not running before
