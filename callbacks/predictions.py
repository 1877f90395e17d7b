"""What is predicted for the rows of the data, as a file."""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from typing_extensions import override

from callbacks.log_lines import tell
from fingpt_lightning.data.predicted_rows import PredictedRow
from fingpt_lightning.evaluation.run_evaluations import PREDICTIONS, refuse_predictions
from fingpt_lightning.files import CountedWriter, to_json, written_whole


class PredictionWriter(BasePredictionWriter):
    """Writes what ``predict_step`` gives as JSON lines: each row of the data once, in its order.

    Of several processes the first one writes, batch by batch; the file gets its name when the last
    row is in it.

    Args:
        path: File to write; null for ``predictions.jsonl`` in the folder of the run.
        overwrite: Whether a file of that name is replaced.

    Raises:
        FileExistsError: The file is there, and ``overwrite`` is false.
        ValueError: ``path`` is a folder, or does not end in ``.jsonl``.
        TypeError: The module's ``predict_step`` gives no rows with a place.
    """

    def __init__(self, path: str | None = None, overwrite: bool = False) -> None:
        super().__init__("batch")
        self.path, self.overwrite = path, overwrite
        self._open: ExitStack | None = None
        self._num_rows = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "predict" and trainer.is_global_zero:
            refuse_predictions(self._file(trainer), self.overwrite)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._num_rows = 0
        if trainer.is_global_zero:
            file = self._file(trainer)
            file.parent.mkdir(parents=True, exist_ok=True)
            self._open = ExitStack()
            aside = self._open.enter_context(written_whole(file))
            self._writer = self._open.enter_context(CountedWriter(aside))

    @override
    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        if not _are_rows(prediction):
            raise TypeError(
                f"PredictionWriter writes lists of PredictedRow, and {type(pl_module).__name__}"
                f".predict_step gives {type(prediction).__name__}"
            )
        # The ranks of a pipeline all have the same rows; replicas have every n-th.
        by_place = {row.place: row.fields for row in _of_all_ranks(trainer, prediction)}
        if self._open is None:
            return
        places = range(self._num_rows, self._num_rows + len(by_place))
        assert sorted(by_place) == list(places), "a row is lost or doubled"
        self._num_rows += len(by_place)
        lines = [to_json(by_place[place], ensure_ascii=False) for place in places]
        self._writer.write("".join(f"{line}\n" for line in lines).encode())

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._open is not None:
            finished, self._open = self._open, None
            finished.close()
            tell(trainer, f"{self._file(trainer)}: {self._num_rows:,} rows")

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self._open is not None:
            begun, self._open = self._open, None
            with suppress(type(exception)):
                begun.__exit__(type(exception), exception, exception.__traceback__)

    def _file(self, trainer: Trainer) -> Path:
        if self.path is not None:
            return Path(self.path).expanduser()
        return Path(trainer.default_root_dir) / PREDICTIONS


def _are_rows(prediction: Any) -> bool:
    return isinstance(prediction, list) and all(isinstance(x, PredictedRow) for x in prediction)


def _of_all_ranks(trainer: Trainer, own: list[PredictedRow]) -> list[PredictedRow]:
    if trainer.world_size == 1:
        return own
    by_rank: list[list[PredictedRow]] = [[] for _ in range(trainer.world_size)]
    torch.distributed.all_gather_object(by_rank, own)
    return [row for rows in by_rank for row in rows]
