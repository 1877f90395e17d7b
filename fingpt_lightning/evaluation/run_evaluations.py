"""The evaluations of one run, in its folder: ``eval/STEP/`` of each optimizer step that had one.

Each holds what `fingpt evaluate` writes, without pictures. ``results.json`` stays for every step:
it takes a kB per task. ``predictions.jsonl`` holds every row, so it stays only for the first, the
best and the last step: a run with thousands of evaluations keeps three.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fingpt_lightning.files import (
    JSON_LINES,
    ROW_DECODER,
    refuse_blocked,
    refuse_existing,
    refuse_read_only,
)
from fingpt_lightning.metric_keys import EVAL_FIGURES
from fingpt_lightning.terminal.messages import wrong_ending
from fingpt_lightning.terminal.shapes import check_shape

FOLDER, RESULTS, PREDICTIONS = "eval", "results.json", "predictions.jsonl"
_ENTRY = {
    **{f"{figure}?": float for figure in EVAL_FIGURES},
    "accuracy_interval?": (float, float),
    "labels?": [str],
    "main_metric?": str | None,
    "n?": float,
    "split?": str,
    "split_rule?": str,
    "rows_sha256?": str,
}
_HEAD = {"settings?": dict, "versions?": dict}
_OF_RUN = {"started_at": str, "tasks": {"*": {"main_metric": str}}}


class RunEvaluation(NamedTuple):
    """One evaluation of a run.

    Attributes:
        step: Number of optimizer steps before it.
        folder: Folder of its files.
        results: Object in ``results.json``.
    """

    step: int
    folder: Path
    results: dict[str, Any]


def check_output(folder: Path, overwrite: bool) -> None:
    """Raises where results could not be written.

    Args:
        folder: Folder of the results.
        overwrite: Whether results in it are replaced.

    Raises:
        NotADirectoryError: A part of its path is a file.
        PermissionError: It cannot be written to.
        ValueError: ``folder`` is a file, or holds results that are not to be overwritten.
    """
    refuse_blocked(folder, "output")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {folder} is a file, not a folder")
    if folder.exists():
        refuse_read_only(folder, f"output {folder}")
    if (folder / RESULTS).exists() and not overwrite:
        raise ValueError(f"output {folder} holds results already; --overwrite replaces them")


def refuse_predictions(file: Path, overwrite: bool) -> None:
    """Refuses a file of predictions to write that is there already, or cannot be.

    Args:
        file: Value of ``predictions.path``, or the file in a run folder.
        overwrite: Whether a file of that name is replaced.

    Raises:
        OSError: The file is there and not to be replaced, or its folder cannot be had.
        ValueError: It is a folder, or its ending is that of another form.
    """
    if file.suffix != JSON_LINES and not file.is_dir():
        raise ValueError(f"predictions.path {wrong_ending(file, [JSON_LINES])}")
    refuse_existing(file, "predictions.path", overwrite)


def read_run_evaluations(run_folder: Path) -> list[RunEvaluation]:
    """The evaluations of a run, in the order of the steps.

    Those of an abandoned attempt are left out: a resumed run goes back to a checkpoint, and
    evaluations of the first attempt after it are older than those of the second one before.

    Args:
        run_folder: Folder of the run.

    Raises:
        ValueError: A ``results.json`` is broken: the file is named.
    """
    found: list[RunEvaluation] = []
    newest = ""
    for step, folder in sorted(step_folders(run_folder / FOLDER)):
        path = folder / RESULTS
        if not path.is_file():
            continue  # the writer was killed: a folder without it does not count
        try:
            results = ROW_DECODER.decode(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not the results of an evaluation: {error}") from None
        check_results(results, path, _OF_RUN)
        written_at = results["started_at"]
        if written_at >= newest:
            newest = written_at
            found.append(RunEvaluation(step, folder, results))
    return found


def check_results(results: Any, path: Path, more: Mapping[str, Any] | None = None) -> None:
    """Refuses contents of a ``results.json`` that no evaluation writes.

    Args:
        results: Contents of the file.
        path: File, for messages.
        more: Further shape of the contents, as of `check_shape`.

    Raises:
        ValueError: A value is missing or of another kind; the message names its key.
    """
    place = f"{path} is not the results of an evaluation"
    check_shape(results, {"tasks": {"*": _ENTRY}, **_HEAD}, place)
    check_shape(results, more or {}, place)
    for task, entry in results["tasks"].items():
        if (main := entry.get("main_metric")) is not None and main not in entry:
            raise ValueError(f"{place}: 'tasks.{task}.{main}', the main_metric, is missing")


def step_folders(folder: Path) -> Iterator[tuple[int, Path]]:
    """Each step that has a folder in ``eval/``, in no particular order."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.isdecimal() and path.is_dir():
            yield int(path.name), path


def score_of(results: Mapping[str, Any]) -> float:
    """The mean over tasks of each one's main metric; for all of these more is better."""
    found = [float(figures[figures["main_metric"]]) for figures in results["tasks"].values()]
    return sum(found) / len(found) if found else 0.0
