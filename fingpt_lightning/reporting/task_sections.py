"""The section about accuracy: before and after, confusions, mistakes with high confidence."""

from collections.abc import Sequence
from typing import NamedTuple

from fingpt_lightning.metric_keys import EVAL_FIGURES
from fingpt_lightning.reporting.answers import StoredResult, confusion_of, worst
from fingpt_lightning.reporting.page import (
    Block,
    Cell,
    Matrices,
    Matrix,
    Note,
    Section,
    Table,
    number,
)
from fingpt_lightning.reporting.runs import Evaluation, Run

_NUM_WORST = 8
_MAX_TEXT = 280
_SURE = 0.8


class _Source(NamedTuple):
    """What answered a task: a run, with its color, or an evaluation."""

    name: str
    run: int | None
    task_results: tuple[StoredResult, ...]


def accuracy_section(
    runs: Sequence[Run], evaluations: Sequence[Evaluation]
) -> Section | str | None:
    """Figures of all tasks, from every run and evaluation that has some."""
    sources = [_Source(run.name, place, run.task_results) for place, run in enumerate(runs)]
    sources += [_Source(one.name, None, one.task_results) for one in evaluations]
    tasks = dict.fromkeys(result.task for source in sources for result in source.task_results)
    if not tasks:
        return (
            "Accuracy on tasks: nothing was evaluated; add callbacks.FinancialEvaluation to a run,"
            " or give the output folder of fingpt evaluate beside it."
        )
    blocks: list[Block] = []
    for task in tasks:
        shown = [(source, _first_and_last(source.task_results, task)) for source in sources]
        shown = [(source, task_results) for source, task_results in shown if task_results]
        blocks.append(_figures(task, shown))
        blocks += _confusions(task, shown)
        for source, task_results in shown:
            blocks += _mistakes(source, task_results[-1])
    without = [source.name for source in sources if not source.task_results]
    if without:
        blocks.append(Note(f"Not evaluated: {', '.join(without)}."))
    lead = "Answers that cannot be read are missing, and count as wrong."
    return Section("accuracy", "Accuracy before and after", lead, blocks)


def _first_and_last(task_results: Sequence[StoredResult], task: str) -> list[StoredResult]:
    own = [result for result in task_results if result.task == task]
    return own if len(own) < 2 else [own[0], own[-1]]


def _figures(task: str, shown: Sequence[tuple[_Source, list[StoredResult]]]) -> Table:
    all_results = [result for _, task_results in shown for result in task_results]
    keys = [key for key in EVAL_FIGURES if any(key in result.figures for result in all_results)]
    rows = []
    for source, task_results in shown:
        for result in task_results:
            name = ", ".join(part for part in (source.name, result.moment) if part)
            cells = [
                number(f"{result.figures[k]:.3f}" if k in result.figures else "-") for k in keys
            ]
            if result.interval and "accuracy" in result.figures:
                low, high = result.interval
                cells[0] = number(f"{result.figures['accuracy']:.3f} ({low:.2f}-{high:.2f})")
            rows.append([Cell(name, run=source.run), *cells])
    return Table([Cell(""), *(number(EVAL_FIGURES[key]) for key in keys)], rows, task)


def _confusions(task: str, shown: Sequence[tuple[_Source, list[StoredResult]]]) -> list[Block]:
    made = []
    for source, task_results in shown:
        for result in task_results:
            if (confusion := confusion_of(result)) is not None:
                title = ", ".join(part for part in (source.name, result.moment) if part)
                made.append(Matrix(title, confusion))
    if not made:
        return []
    caption = f"{task}: rows are right answers, columns what was answered"
    return [Matrices(caption, made)]


def _mistakes(source: _Source, result: StoredResult) -> list[Block]:
    if not result.answers:
        text = "predictions.jsonl is not there; figures only"
        return [Note(f"{source.name}, {result.task}: {text}.")]
    if all(answer.is_right is None for answer in result.answers):
        return []  # summaries and scores are right to a degree
    found = worst(result, _NUM_WORST)
    if not found:
        return [Note(f"{source.name}, {result.task}: no answer is wrong.")]
    wrong = [answer for answer in result.answers if answer.is_wrong]
    num_sure = sum((answer.confidence or 0.0) >= _SURE for answer in wrong)
    rows = [
        [
            number("-" if answer.confidence is None else f"{answer.confidence:.0%}"),
            Cell(answer.prediction or "missing"),
            Cell(answer.gold or "-"),
            Cell(_cut(answer.text)),
        ]
        for answer in found
    ]
    where = ", ".join(part for part in (source.name, result.moment) if part)
    caption = (
        f"Confident and wrong: {result.task}, {where}. {len(wrong):,} of {len(result.answers):,}"
        f" answers are wrong, {num_sure:,} of them at {_SURE:.0%} or more."
    )
    head = [number("sure"), Cell("answer"), Cell("right"), Cell("text")]
    return [Table(head, rows, caption)]


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 3]}..."
