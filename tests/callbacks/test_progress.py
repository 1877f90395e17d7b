import functools
import io
import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import Progress
from typing_extensions import override

from callbacks import progress
from callbacks.financial_evaluation import FinancialEvaluation
from callbacks.progress import TrainingProgress
from tests.callbacks.test_financial_evaluation import _Data, _Module
from tests.callbacks.tiny_run import Batches, TinyModule, fit, make_batch, tiny_trainer
from tests.evaluation.tiny_language import write_rows


class _Counted(TinyModule):
    """Counts tokens as our own modules do."""

    @override
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log("train/tokens", 100.0 * (self.trainer.global_step + 1))


class _Clock:
    """Half a second at each look."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        self.now_s += 0.5
        return self.now_s


class _Failing(Callback):
    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        if trainer.global_step == 2:
            raise RuntimeError("stopped")


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal of 120 columns would see, twice a second."""
    text = io.StringIO()

    def console(**given: Any) -> Console:
        assert given.pop("stderr")
        return Console(file=text, force_terminal=True, width=120, **given)

    monkeypatch.setattr(progress, "Console", console)
    monkeypatch.setattr(progress, "time", _Clock())
    # Each change is drawn, not only what a timer finds.
    drawn = functools.partialmethod(_update_and_draw)
    monkeypatch.setattr(Progress, "update", drawn)
    return text


_UPDATE = Progress.update


def _update_and_draw(self: Any, *args: Any, **kwargs: Any) -> None:
    _UPDATE(self, *args, refresh=True, **kwargs)


def _lines(screen: io.StringIO) -> list[str]:
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    return [line.strip() for line in re.split(r"[\r\n]+", plain) if line.strip()]


def test_a_run_shows_steps_time_loss_rate_and_memory(screen: io.StringIO, tmp_path: Path) -> None:
    bar = TrainingProgress()
    trainer = tiny_trainer(
        tmp_path, [bar], enable_progress_bar=True, limit_val_batches=1, val_check_interval=2
    )
    fit(trainer, _Counted(), [make_batch() for _ in range(4)])
    lines = _lines(screen)
    running = r"^training \S+ +3/4, \S+ s left, loss \d\.\d{3}, val \d\.\d{3}, "
    assert any(re.search(running, line) for line in lines)
    assert re.search(r" 4/4, loss \d\.\d{3}, val \d\.\d{3}, [\d,]+ tokens/s, \S+ .iB$", lines[-1])
    assert any(line.startswith("validating") for line in lines)
    assert bar._display is None


def test_a_run_that_fails_leaves_the_screen(screen: io.StringIO, tmp_path: Path) -> None:
    bar = TrainingProgress()
    trainer = tiny_trainer(tmp_path, [bar, _Failing()], enable_progress_bar=True)
    with pytest.raises(RuntimeError, match="stopped"):
        fit(trainer, _Counted(), [make_batch() for _ in range(4)])
    assert bar._display is None
    assert " 2/4, " in screen.getvalue()


def test_a_validation_alone_is_shown(screen: io.StringIO, tmp_path: Path) -> None:
    trainer = tiny_trainer(
        tmp_path, [TrainingProgress()], enable_progress_bar=True, limit_val_batches=2
    )
    trainer.validate(TinyModule(), Batches([make_batch()] * 2), verbose=False)
    assert any(line.startswith("validating") for line in _lines(screen))


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")
def test_an_evaluation_within_a_run_counts_its_rows(screen: io.StringIO, tmp_path: Path) -> None:
    evaluation = FinancialEvaluation(["fpb"], str(write_rows(tmp_path / "data", "fpb")))
    trainer = tiny_trainer(
        tmp_path / "run", [TrainingProgress(), evaluation], enable_progress_bar=True, max_steps=1
    )
    trainer.fit(_Module(), datamodule=_Data())
    rows = [line for line in _lines(screen) if line.startswith("evaluating fpb")]
    assert any(line.endswith("5/5") for line in rows)
    assert len(evaluation.history["fpb"]) == 2


def test_a_disabled_bar_shows_nothing(screen: io.StringIO, tmp_path: Path) -> None:
    bar = TrainingProgress()
    bar.disable()
    trainer = tiny_trainer(tmp_path, [bar], enable_progress_bar=True)
    fit(trainer, _Counted(), [make_batch()])
    with bar.work("evaluating", 3) as show:
        show(1)
    assert screen.getvalue() == ""
