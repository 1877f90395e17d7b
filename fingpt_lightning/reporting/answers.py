"""Answers to tasks, as a run or ``fingpt evaluate`` left them: figures, confusion, mistakes."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fingpt_lightning.reporting.files import Row, read_object, read_objects
from fingpt_lightning.tasks import find_task, task_names

METRICS = {
    "accuracy": "accuracy",
    "accuracy_norm": "by length",
    "macro_f1": "macro F1",
    "weighted_f1": "weighted F1",
    "mcc": "MCC",
    "missing": "missing",
    "perplexity": "perplexity",
}
"""The figures that are shown, by key, and what they are called."""


class Answer(NamedTuple):
    """One row of a task; ``confidence`` is the share of probability on the answer, where known."""

    row: int
    text: str
    gold: str | None
    prediction: str | None
    confidence: float | None

    @property
    def is_wrong(self) -> bool:
        """Whether the right answer is known and is another one."""
        return self.gold is not None and self.gold != self.prediction


class Exam(NamedTuple):
    """A task's figures and answers at one moment.

    Attributes:
        task: Its name.
        moment: Before training, after a step, or empty outside of training.
        figures: By key of `METRICS`.
        interval: Of the accuracy, where known.
        answers: All rows, or the first ones; none where only the figures were kept.
    """

    task: str
    moment: str
    figures: dict[str, float]
    answers: tuple[Answer, ...] = ()
    interval: tuple[float, float] | None = None


class Confusion(NamedTuple):
    """Counts, a row a gold label and a column an answer."""

    labels: tuple[str, ...]
    answers: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


def exams_of_run(folder: Path, rows: Sequence[Row]) -> list[Exam]:
    """What `callbacks.FinancialEvaluation` left: figures in the rows, answers in W&B's tables.

    Raises:
        ValueError: A table is broken.
    """
    exams: list[Exam] = []
    first_step = next((place for place, row in enumerate(rows) if "train/loss" in row), len(rows))
    tasks = {key.split("/")[1]: None for row in rows for key in row if _is_figure(key)}
    for task in tasks:
        moments = [
            (place, row)
            for place, row in enumerate(rows)
            if any(key.startswith(f"eval/{task}/") for key in row)
        ]
        tables = _tables(folder, task)
        for number, (place, row) in enumerate(moments):
            before = place < first_step and row["step"] == 0
            moment = "before training" if before else f"after step {row['step'] + 1:,.0f}"
            # Of a run that was moved to a server, or resumed, some tables are missing: then only
            # the last one is known to belong to the last figures.
            from_last = len(moments) - 1 - number
            answers: tuple[Answer, ...] = ()
            if tables and (len(tables) == len(moments) or from_last == 0):
                answers = _answers_of_table(tables[-1 - from_last])
            names = {key: f"eval/{task}/{key}" for key in METRICS}
            figures = {key: row[name] for key, name in names.items() if name in row}
            exams.append(Exam(task, moment, figures, answers))
    return exams


def exams_of_evaluation(folder: Path, results: dict[str, Any]) -> list[Exam]:
    """What ``fingpt evaluate`` wrote.

    Args:
        folder: Its output.
        results: The object in ``results.json``.

    Raises:
        ValueError: A file is broken.
    """
    by_task: dict[str, list[Answer]] = {}
    for row in read_objects(folder / "predictions.jsonl"):
        by_task.setdefault(str(row.get("task")), []).append(_answer(row))
    exams = []
    for task, found in results.get("tasks", {}).items():
        figures = {key: float(found[key]) for key in METRICS if key in found}
        low_high = found.get("accuracy_interval")
        interval = None if low_high is None else (float(low_high[0]), float(low_high[1]))
        exams.append(Exam(task, "", figures, tuple(by_task.get(task, ())), interval))
    return exams


def confusion_of(exam: Exam) -> Confusion | None:
    """The confusion of an exam's answers; None for tasks whose answers are no labels."""
    known = [answer for answer in exam.answers if answer.gold is not None]
    seen = {answer.gold: None for answer in known}
    labels = [label for label in seen if label is not None]
    if exam.task in task_names():
        task = find_task(exam.task)
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


def worst(exam: Exam, count: int) -> list[Answer]:
    """The wrong answers that the model was surest of, the surest first.

    >>> sure = Answer(1, "a", "yes", "no", 0.9)
    >>> [a.row for a in worst(Exam("t", "", {}, (sure._replace(row=2, confidence=0.6), sure)), 5)]
    [1, 2]
    """
    wrong = [answer for answer in exam.answers if answer.is_wrong]
    return sorted(wrong, key=lambda answer: -(answer.confidence or 0.0))[:count]


_MAX_LABELS = 12


def _is_figure(key: str) -> bool:
    parts = key.split("/")
    return len(parts) == 3 and parts[0] == "eval" and parts[2] in METRICS


def _tables(folder: Path, task: str) -> list[Path]:
    found = []
    for path in folder.glob(f"wandb/*run-*/files/media/table/eval/{task}/predictions_*.table.json"):
        if match := re.fullmatch(r"predictions_(\d+)_\w+\.table\.json", path.name):
            found.append((path.parents[5].name, int(match[1]), path))
    return [path for _, _, path in sorted(found)]


def _answers_of_table(path: Path) -> tuple[Answer, ...]:
    table = read_object(path)
    columns, data = table.get("columns", []), table.get("data", [])
    try:
        return tuple(_answer(dict(zip(columns, cells, strict=True))) for cells in data)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no table of predictions: {error!r}") from error


def _answer(row: dict[str, Any]) -> Answer:
    scores = row.get("scores") or []
    # Scores of several choices are normalised: their exponentials add up to 1.
    confidence = math.exp(max(scores)) if len(scores) > 1 else None
    gold, prediction = row.get("gold"), row.get("prediction")
    return Answer(int(row["row"]), str(row["text"]), gold, prediction, confidence)
