"""What a log without a terminal shows of a run."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from callbacks import log_lines, progress
from callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from callbacks.log_lines import LOG_FILE, LogLines, start_texts, tell
from callbacks.progress import TrainingProgress
from tests.callbacks.tiny_run import TinyModule, fit, make_batch, tiny_trainer


class _Clock:
    """Moves on at each step."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


class _Stepping(TinyModule):
    """A step takes a second and trains on 100 tokens."""

    tokens_seen = 0

    def __init__(self, clock: _Clock) -> None:
        super().__init__()
        self._clock = clock

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self._clock.now_s += 1
        self.tokens_seen += 100
        self.log("train/tokens", float(self.tokens_seen))
        self.log("train/learning_rate", 0.01)
        return super().training_step(batch, batch_idx)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(log_lines, "time", clock)
    monkeypatch.setattr(progress, "time", clock)
    return clock


Lines = Callable[..., list[str]]


@pytest.fixture
def lines(tmp_path: Path, clock: _Clock, capsys: pytest.CaptureFixture[str]) -> Lines:
    """Runs some steps; gives the lines on standard error without their times."""

    def run(lines: LogLines, num_steps: int, *others: Callback, **options: Any) -> list[str]:
        trainer = tiny_trainer(tmp_path, [*others, lines], logger=False, **options)
        fit(trainer, _Stepping(clock), [make_batch() for _ in range(num_steps)])
        shown = capsys.readouterr().err.splitlines()
        pattern = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.*)"
        return [found[1] for line in shown if (found := re.fullmatch(pattern, line))]

    return run


def _steps(shown: list[str]) -> list[int]:
    return [int(found[1]) for line in shown if (found := re.match(r"step (\d+)", line))]


def test_a_line_comes_every_some_seconds_and_at_the_end(lines: Lines) -> None:
    shown = lines(LogLines(every_s=4.0), 10)
    assert _steps(shown) == [4, 8, 10]
    line = next(line for line in shown if line.startswith("step 8"))
    assert re.fullmatch(
        r"step 8/10, 2\.0 s left, loss \d\.\d+, 100 tokens/s, rate 1\.00e-02, [\d.]+ [MG]iB", line
    )


def test_lines_come_less_often_after_the_first_sixty(
    lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_lines, "_RARELY_AFTER", 3)
    assert _steps(lines(LogLines(every_s=1.0), 16)) == [1, 2, 3, 9, 15, 16]


def test_a_line_comes_every_some_steps_in_place_of_seconds(lines: Lines) -> None:
    assert _steps(lines(LogLines(every_n_steps=3), 8)) == [3, 6, 8]


def test_steps_are_those_of_the_optimizer(lines: Lines) -> None:
    shown = lines(LogLines(every_n_steps=1), 6, accumulate_grad_batches=2)
    assert _steps(shown) == [1, 2, 3]


def test_start_validation_checkpoints_and_end_have_lines(lines: Lines, tmp_path: Path) -> None:
    kept = [BestCheckpoint(dirpath=str(tmp_path)), LastCheckpoint(2, str(tmp_path))]
    shown = lines(
        LogLines(every_s=100.0),
        4,
        *kept,
        enable_checkpointing=True,
        limit_val_batches=1,
        val_check_interval=2,
        num_sanity_val_steps=1,
    )
    patterns = [
        r"training of _Stepping: steps 1 to 4, cpu, 32-true",
        r"trainable params: (\d+) \|\| all params: \1 \|\| trainable%: 100\.0000",
        r"memory before activations: weights .* KiB, gradients .* KiB; .*",
        r"validation after step 2: loss \d\.\d{4} \(best so far\), .*",
        r"checkpoint of step 2: best\.ckpt, last\.ckpt",
        r"validation after step 4: loss .*",
        r"checkpoint of step 4: .*",
        r"step 4/4, .*",
        r"training ended after step 4: 4\.0 s",
    ]
    assert len(shown) >= len(patterns) - 1, shown
    left = iter(shown)
    for pattern in patterns:
        assert any(re.fullmatch(pattern, line) for line in left), (pattern, shown)


def test_the_file_has_what_standard_error_has(lines: Lines, tmp_path: Path) -> None:
    shown = lines(LogLines(), 3)
    written = (tmp_path / LOG_FILE).read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in written] == shown
    assert len(shown) == 5


def test_no_file_is_written_where_none_is_wanted(lines: Lines, tmp_path: Path) -> None:
    assert lines(LogLines(file=False), 2)
    assert not (tmp_path / LOG_FILE).exists()


def test_a_bar_on_the_screen_leaves_the_lines_to_the_file(lines: Lines, tmp_path: Path) -> None:
    bar = TrainingProgress()
    assert lines(LogLines(), 3, bar, enable_progress_bar=True) == []
    assert "trainable params: " in (tmp_path / LOG_FILE).read_text()
    bar.disable()
    assert lines(LogLines(), 3, bar, enable_progress_bar=True) != []


def test_another_rank_writes_nothing(
    lines: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self: False))
    assert lines(LogLines(every_n_steps=1), 3) == []
    assert not (tmp_path / LOG_FILE).exists()


class _Failing(Callback):
    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        tell(trainer, "a line of another callback")
        raise RuntimeError("stopped")


def test_a_failure_and_other_callbacks_have_lines(lines: Lines, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        lines(LogLines(), 3, _Failing())
    written = (tmp_path / LOG_FILE).read_text()
    assert "a line of another callback\n" in written
    assert written.endswith("ended by RuntimeError at step 1\n")


class _FailingAtOnce(Callback):
    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise RuntimeError("no data")


def test_a_failure_before_the_first_step_leaves_no_file(lines: Lines, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no data"):
        lines(LogLines(), 3, _FailingAtOnce())
    assert not (tmp_path / LOG_FILE).exists()


def test_a_slow_first_batch_is_told(
    lines: Lines, clock: _Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_lines, "_SLOW_FIRST_S", 0.5)
    assert "first batch: 1.0 s" in lines(LogLines(), 3)
    monkeypatch.setattr(_Stepping, "hparams", {"compile": True})
    assert "first batch: 1.0 s, compilation included" in lines(LogLines(), 3)


class _Half(TinyModule):
    """Half of the parameters are frozen, and count double, as packed ones do."""

    def trained_share(self) -> float:
        return 0.25


def test_the_share_of_trained_parameters_is_the_modules_own(tmp_path: Path) -> None:
    module = _Half()
    trainer = tiny_trainer(tmp_path, [LogLines()], logger=False)
    fit(trainer, module, [make_batch()])
    count = sum(p.numel() for p in module.parameters())
    expected = f"trainable params: {count:,} || all params: {4 * count:,} || trainable%: 25.0000"
    assert start_texts(trainer, module)[1] == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_s": 0.0}, r"every_s 0\.0 is not above 0"),
        ({"every_n_steps": 0}, "every_n_steps 0 is below 1"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogLines(**settings)
