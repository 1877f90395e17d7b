import csv
from pathlib import Path

import pytest

from fingpt_lightning.cli.metrics_file import RunMetrics


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_an_earlier_run_moves_aside_with_the_first_row_and_not_before(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,a\n0,7\n")
    log = RunMetrics(tmp_path)
    log.experiment.log_hparams({})
    log.finalize("failed")
    assert [path.name for path in tmp_path.glob("*.csv")] == ["metrics.csv"]
    log.log_metrics({"a": 1.0}, step=0)
    log.log_metrics({"a": 2.0}, step=1)
    assert _rows(tmp_path / "metrics-1.csv") == [{"step": "0", "a": "7"}]
    assert [row["a"] for row in _rows(tmp_path / "metrics.csv")] == ["1.0", "2.0"]


def test_a_kill_while_a_column_is_added_loses_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    log = RunMetrics(tmp_path)
    log.log_metrics({"a": 1.0}, step=0)
    with monkeypatch.context() as patch:
        patch.setattr("fingpt_lightning.cli.metrics_file.write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            log.log_metrics({"b": 2.0}, step=1)
    assert _rows(tmp_path / "metrics.csv") == [{"a": "1.0", "step": "0"}]
    log.save()
    assert [row["b"] for row in _rows(tmp_path / "metrics.csv")] == ["", "2.0"]
