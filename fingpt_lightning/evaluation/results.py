"""What an evaluation leaves: a table, ``results.json``, ``predictions.jsonl``, pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fingpt_lightning.evaluation.run_evaluations import (
    FOLDER,
    PREDICTIONS,
    RESULTS,
    read_run_evaluations,
    score_of,
    step_folders,
)
from fingpt_lightning.evaluation.runner import TaskResult, TaskRun
from fingpt_lightning.evaluation.scoring import Prediction
from fingpt_lightning.evaluation.written_answers import row_fields
from fingpt_lightning.files import to_json, write_json, write_whole
from fingpt_lightning.metric_keys import EVAL_FIGURES
from fingpt_lightning.tasks import Example, Task
from fingpt_lightning.tasks.encoding import length_remarks
from fingpt_lightning.tasks.rows import examples_sha256

EVALUATION_PACKAGES = ("fingpt-lightning", "torch", "transformers", "tokenizers", "bitsandbytes")
"""The packages whose versions stand in ``results.json``."""

_COLUMNS = {
    "accuracy": "accuracy (95 %)",
    "accuracy_norm": "by length",
    **{
        key: title
        for key, title in EVAL_FIGURES.items()
        if key not in ("accuracy", "accuracy_norm", "perplexity")
    },
    "n": "n",
}


def table(results: Sequence[TaskResult]) -> Table:
    """One line per task; the accuracy with its interval."""
    shown = {
        key: title
        for key, title in _COLUMNS.items()
        if any(key in result.metrics for result in results)
    }
    made = Table(box=None, pad_edge=False)
    made.add_column("task", no_wrap=True)
    for title in (*shown.values(), "prompts/s"):
        made.add_column(title, justify="right", no_wrap=True)
    for result in results:
        cells = [_cell(result.metrics, key) for key in shown]
        made.add_row(result.name, *cells, f"{result.prompts_per_s:.1f}")
    return made


def remarks(results: Sequence[TaskResult], max_length: int) -> list[str]:
    """What a reader of the table must know: rows cut and rows left out.

    Args:
        results: Results of all tasks.
        max_length: Largest number of tokens that the network reads.
    """
    found = []
    for result in results:
        num_rows, num_cut = len(result.predictions), result.num_cut
        name = result.name
        found += length_remarks(name, num_rows, num_cut, result.num_dropped, max_length)
        num_shots = result.run.num_fewshot
        if num_shots and (num_cut or result.num_dropped):
            found.append(
                f"{name}: they have {num_shots} examples before the question (num_fewshot); fewer"
                " leave more room"
            )
        if result.run.num_skipped:
            found.append(f"{name}: {result.run.num_skipped:,} rows with an empty text left out")
    return found


def identity_of(run: TaskRun) -> dict[str, Any]:
    """What the answers to a task are of: its version, prompts, split and rows, by digest."""
    return {
        "task_version": run.task.version,
        "template_sha256": run.task.template_sha256,
        "split": run.split,
        "split_rule": run.split_rule,
        "split_sha256": run.sha256,
        "rows_sha256": examples_sha256(run.examples),
        "num_fewshot": run.num_fewshot,
    }


def results_of(result: TaskResult) -> dict[str, Any]:
    """The entry of a task in ``results.json``."""
    run = result.run
    return {
        **result.metrics,
        **({"labels": list(run.task.labels)} if run.task.labels else {}),
        "kind": run.task.kind,
        "scoring": result.scoring.value,
        "main_metric": run.task.main_metric,
        **identity_of(run),
        "num_skipped": run.num_skipped,
        "num_cut": result.num_cut,
        "num_dropped": result.num_dropped,
        "seconds": result.seconds,
        "prompts_per_s": result.prompts_per_s,
    }


def write_results(
    folder: Path,
    head: Mapping[str, Any],
    results: Sequence[TaskResult],
    *,
    has_pictures: bool = True,
) -> None:
    """Writes all files, each aside and then renamed, ``results.json`` last.

    So a folder with a ``results.json`` is whole, and one without it does not count as results.

    Args:
        folder: Output folder; made where it is not there.
        head: Object that ``results.json`` holds beside ``tasks``.
        results: One result per task.
        has_pictures: Whether the confusions are drawn too.

    Raises:
        ValueError: A figure is NaN or infinite; nothing is written then.
    """
    by_task = {result.name: results_of(result) for result in results}
    found = {"tasks": by_task, **head}
    to_json(found)  # raises before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS).unlink(missing_ok=True)
    if has_pictures:
        for name, picture in _pictures(results).items():
            write_whole(folder / name, picture)
    lines = [to_json(row, ensure_ascii=False) for row in prediction_rows(results)]
    write_whole(folder / PREDICTIONS, "".join(f"{line}\n" for line in lines))
    write_json(folder / RESULTS, found)


class RunEvaluations:
    """Writes the evaluations of a run, on one process.

    Args:
        run_folder: Folder of the run; ``eval/`` is made in it.
        step: Optimizer steps that the run has taken. Later evaluations are of an earlier attempt
            that was given up: they are no longer the best or the last ones.

    Raises:
        ValueError: A ``results.json`` of an earlier start is broken.
    """

    def __init__(self, run_folder: Path, step: int) -> None:
        self._folder = run_folder / FOLDER
        found = read_run_evaluations(run_folder)
        self._scores = {one.step: score_of(one.results) for one in found if one.step <= step}

    def write(self, step: int, head: Mapping[str, Any], results: Sequence[TaskResult]) -> None:
        """Writes an evaluation, whole or not at all, and drops predictions that need not stay.

        Args:
            step: Optimizer steps before it.
            head: Object that ``results.json`` holds beside ``tasks`` and ``step``.
            results: One result per task.

        Raises:
            ValueError: A figure is NaN or infinite.
        """
        write_results(self._folder / str(step), {"step": step, **head}, results, has_pictures=False)
        by_task = {result.name: results_of(result) for result in results}
        self._scores[step] = score_of({"tasks": by_task})
        best = max(self._scores, key=lambda one: (self._scores[one], one))
        kept = {min(self._scores), best, step}
        for folder_step, folder in step_folders(self._folder):
            if folder_step not in kept:
                (folder / PREDICTIONS).unlink(missing_ok=True)


def _pictures(results: Sequence[TaskResult]) -> dict[str, bytes]:
    from fingpt_lightning.evaluation.pictures import confusion_png  # matplotlib takes a second

    return {
        f"confusion_{result.name}.png": confusion_png(result.metrics["confusion"], result.run.task)
        for result in results
        if "confusion" in result.metrics
    }


def prediction_rows(results: Sequence[TaskResult]) -> list[dict[str, Any]]:
    """One object per row: task, row of its file, text, gold, prediction, and how it came about."""
    return [
        prediction_row(result.name, result.run.task, example, prediction)
        for result in results
        for example, prediction in zip(result.run.examples, result.predictions, strict=True)
    ]


def prediction_row(
    name: str, task: Task, example: Example, prediction: Prediction
) -> dict[str, Any]:
    """The object of one row, as in `prediction_rows`.

    Args:
        name: Name of the result.
        task: Task of the row.
        example: Row.
        prediction: Answer to it.
    """
    answers = example.choices
    if len(example.prompts) > 1:  # the prompts differ, not what follows them
        answers = tuple(map(str, range(len(answers))))
    row: dict[str, Any] = {"task": name, "row": example.row, "text": example.text}
    if task.is_generated or task.kind == "instructions":
        row |= row_fields(task, example, prediction.answer)
        if task.kind == "instructions":
            row["gold"] = _answer(answers, example.gold)
        row |= {"is_dropped": True} if prediction.is_dropped else {}
        return row | {"answer": prediction.answer}
    row |= {
        "gold": _answer(answers, example.gold),
        "prediction": _answer(answers, prediction.choice),
    }
    if example.group:
        row["group"] = example.group
    if example.gold is not None and not prediction.is_dropped:
        row["is_right"] = prediction.choice == example.gold
    if prediction.is_dropped:
        row |= {"scores": [], "is_dropped": True}
    elif prediction.scores:
        row["scores"] = [round(score, 6) for score in prediction.scores]
    else:
        row["answer"] = prediction.answer
    return row


def _answer(answers: Sequence[str], index: int | None) -> str | None:
    return None if index is None else answers[index].strip()


def _cell(metrics: Mapping[str, Any], key: str) -> str:
    if key not in metrics:
        return "-"
    if key == "n":
        return f"{metrics[key]:,}"
    if key == "accuracy" or (f"{key}_interval" in metrics and "accuracy" not in metrics):
        low, high = metrics[f"{key}_interval"]
        return f"{metrics[key]:.3f} ({low:.2f}-{high:.2f})"
    return f"{metrics[key]:.3f}"
