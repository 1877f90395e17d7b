"""Answers to tasks, as a run or ``fingpt evaluate`` left them: figures, confusion, mistakes."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fingpt_lightning.evaluation.run_evaluations import (
    PREDICTIONS,
    RESULTS,
    check_results,
    read_run_evaluations,
)
from fingpt_lightning.metric_keys import EVAL_FIGURES
from fingpt_lightning.reporting.files import read_objects
from fingpt_lightning.tasks import find_task, task_names


class Answer(NamedTuple):
    """One row of a task.

    Attributes:
        row: Number of the row.
        text: Text of the row.
        gold: Right answer, where it is known.
        prediction: Answer; None where it is missing.
        confidence: Share of probability on the answer, where known.
        is_right: Whether it is right; None where that is not known, or a matter of degree.
    """

    row: int
    text: str
    gold: str | None
    prediction: str | None
    confidence: float | None
    is_right: bool | None

    @property
    def is_wrong(self) -> bool:
        """Whether the right answer is known and is another one."""
        return self.is_right is False


class StoredResult(NamedTuple):
    """A task's figures and answers at one moment.

    Attributes:
        task: Name of the task.
        moment: Moment of the evaluation: before training, after a step, or empty without training.
        figures: Figures by key of `EVAL_FIGURES`.
        interval: Interval of the accuracy, where known.
        answers: All rows, or the first ones; none where only the figures were kept.
    """

    task: str
    moment: str
    figures: dict[str, float]
    answers: tuple[Answer, ...] = ()
    interval: tuple[float, float] | None = None


class Confusion(NamedTuple):
    """Counts, a row per gold label and a column per answer."""

    labels: tuple[str, ...]
    answers: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


def task_results_of_run(folder: Path) -> list[StoredResult]:
    """The task results that `callbacks.FinancialEvaluation` left, by task and then by step.

    Args:
        folder: Folder of the run.

    Raises:
        ValueError: A file is broken.
    """
    found: dict[str, list[StoredResult]] = {}
    for one in read_run_evaluations(folder):
        moment = f"after step {one.step:,}" if one.step else "before training"
        for result in task_results_of_evaluation(one.folder, one.results):
            found.setdefault(result.task, []).append(result._replace(moment=moment))
    return [result for task_results in found.values() for result in task_results]


def task_results_of_evaluation(folder: Path, results: dict[str, Any]) -> list[StoredResult]:
    """What ``fingpt evaluate`` wrote.

    Args:
        folder: Output folder of the evaluation.
        results: Object in ``results.json``.

    Raises:
        ValueError: A file is broken.
    """
    by_task: dict[str, list[Answer]] = {}
    check_results(results, folder / RESULTS)
    for row in read_objects(folder / PREDICTIONS, _ANSWER):
        by_task.setdefault(str(row.get("task")), []).append(_answer(row))
    return [
        StoredResult(task, "", _figures(found), tuple(by_task.get(task, ())), _interval(found))
        for task, found in results["tasks"].items()
    ]


def _figures(found: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(found[key]) for key in EVAL_FIGURES if key in found}


def _interval(found: Mapping[str, Any]) -> tuple[float, float] | None:
    low_high = found.get("accuracy_interval")
    return None if low_high is None else (float(low_high[0]), float(low_high[1]))


def confusion_of(result: StoredResult) -> Confusion | None:
    """The confusion of a task result; None for tasks whose answers are not labels."""
    known = [answer for answer in result.answers if answer.gold is not None]
    seen = {answer.gold: None for answer in known}
    labels = [label for label in seen if label is not None]
    if result.task in task_names():
        task = find_task(result.task)
        if task.kind != "labels":
            return None
        labels = list(dict.fromkeys([*(label.strip() for label in task.labels), *sorted(labels)]))
    elif len(labels) > _MAX_LABELS:
        return None
    if not known:
        return None
    given = {answer.prediction for answer in known}
    answers = [*labels, *sorted(str(x) for x in given - set(labels) - {None})]
    counted = [
        [sum(a.gold == gold and a.prediction == said for a in known) for said in answers]
        for gold in labels
    ]
    if None in given:
        answers.append("missing")
        for row, gold in zip(counted, labels, strict=True):
            row.append(sum(a.gold == gold and a.prediction is None for a in known))
    return Confusion(tuple(labels), tuple(answers), tuple(map(tuple, counted)))


def worst(result: StoredResult, count: int) -> list[Answer]:
    """The wrong answers of which the model was most certain, the most certain first.

    >>> sure = Answer(1, "a", "yes", "no", 0.9, False)
    >>> answers = (sure._replace(row=2, confidence=0.6), sure)
    >>> [answer.row for answer in worst(StoredResult("t", "", {}, answers), 5)]
    [1, 2]
    """
    wrong = [answer for answer in result.answers if answer.is_wrong]
    return sorted(wrong, key=lambda answer: -(answer.confidence or 0.0))[:count]


_MAX_LABELS = 12
_ANSWER = {
    "row": float,
    "text": str,
    "gold?": str | None,
    "prediction?": str | None,
    "is_right?": bool | None,
    "scores?": [float],
}


def _answer(row: dict[str, Any]) -> Answer:
    scores = row.get("scores") or []
    # Scores of several choices are normalized: their exponentials add up to 1.
    confidence = math.exp(max(scores)) if len(scores) > 1 else None
    gold, prediction = row.get("gold"), row.get("prediction")
    is_right = row.get("is_right")
    if is_right is None and gold is not None and not {"figures", "values"} & row.keys():
        is_right = gold == prediction
    return Answer(int(row["row"]), str(row["text"]), gold, prediction, confidence, is_right)
