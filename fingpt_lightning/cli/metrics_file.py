"""``metrics.csv`` of a run: whole at any moment, and it never costs an earlier run its own."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from typing_extensions import override

from fingpt_lightning.cli.run_folders import keep_old_metrics
from fingpt_lightning.files import append_whole, write_whole


class _WholeRows(ExperimentWriter):
    """Starts with the first row; only then is the file of an earlier run moved aside."""

    _has_begun = False

    @override
    def _check_log_dir_exists(self) -> None:
        """Lightning's method removes an earlier run's file before this run has written anything."""

    @override
    def save(self) -> None:
        if not self.metrics:
            return
        path = Path(self.metrics_file_path)
        if not self._has_begun:
            keep_old_metrics(path.parent)
            self._has_begun = True
        keys = sorted({*self.metrics_keys, *(key for row in self.metrics for key in row)})
        if keys == self.metrics_keys and path.exists():
            append_whole(path, _as_text(keys, self.metrics))
        else:
            header = _as_text(keys, [dict(zip(keys, keys, strict=True)), *_rows(path)])
            write_whole(path, header + _as_text(keys, self.metrics))
        # Only now: an interrupted attempt is repeated, with the columns that the file then has.
        self.metrics_keys, self.metrics = keys, []


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _as_text(keys: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    text = io.StringIO(newline="")
    csv.DictWriter(text, keys).writerows(rows)
    return text.getvalue()


class RunMetrics(CSVLogger):
    """Writes ``metrics.csv`` into a run's folder, each row at once: a kill loses no row.

    Args:
        folder: Folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), "", "", flush_logs_every_n_steps=1)

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            Path(self.root_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _WholeRows(log_dir=self.log_dir)
        assert isinstance(self._experiment, ExperimentWriter)
        return self._experiment
