"""Written answers read by the rules of their kind, and their figures.

`row_fields` is what ``predictions.jsonl`` holds of a row beside the text that was written; figures
are those of these rows (`fingpt_lightning.evaluation.paired`), here and in ``fingpt compare``.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from fingpt_lightning.evaluation.entities import (
    count,
    count_by_type,
    entity,
    read_entities,
    token_f1,
)
from fingpt_lightning.evaluation.numbers import is_missing, number_figures, read_number
from fingpt_lightning.evaluation.paired import intervals, row_statistics
from fingpt_lightning.tasks import Example, Task
from fingpt_lightning.tasks.references import Reference, written
from fingpt_lightning.tasks.task import Kind

FIGURES_OF_KIND: Mapping[Kind, tuple[str, ...]] = {
    "numeric": ("exact_match", "f1", "close_match"),
    "spans": ("entity_f1", "entity_precision", "entity_recall", "token_f1", "exact_match"),
    "summary": ("rouge1", "rouge2", "rouge_l"),
    "regression": ("pearson", "rmse", "mae"),
}
"""The figures of each kind, the first of them with its interval."""

_ROUGE = {"rouge1": "rouge1", "rouge2": "rouge2", "rouge_l": "rougeL"}
"""Our names of the figures and those of the package rouge-score."""


def check_readable(task: Task) -> None:
    """Raises where a package that reads the answers of a task is missing.

    Raises:
        ImportError: It is not installed.
    """
    if task.kind == "summary":
        _rouge()


def row_fields(task: Task, example: Example, answer: str) -> dict[str, Any]:
    """What is known of a row from the text that was written.

    Args:
        task: Task of a kind whose answers are written.
        example: Row.
        answer: Text that was written.

    Returns:
        ``gold`` and ``prediction`` (None: missing), and what the figures of the kind need.
    """
    reference = example.reference
    text = answer.strip()
    fields: dict[str, Any] = {"gold": None, "prediction": text or None}
    match task.kind:
        case "numeric":
            if reference is not None:
                fields |= _number_fields(task, reference, text)
        case "spans":
            fields |= _span_fields(task, reference, text)
        case "summary":
            if reference is not None:
                fields["figures"] = _rouge_figures(text, reference.texts[0])
        case "regression":
            number = read_number(text)
            fields["prediction"] = None if number is None else f"{number:g}"
            if reference is not None:
                fields["values"] = [float(reference.texts[0]), number]
    if reference is not None:
        fields["gold"] = written(reference)
        if reference.type:
            fields["type"] = reference.type
    return fields


def written_metrics(task: Task, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of answers.

    Args:
        task: Task of a kind whose answers are written.
        rows: Result of `row_fields` for each row with a known answer, at least one.

    Returns:
        The figures of `FIGURES_OF_KIND` without those that the rows do not have, the interval of
        the first, ``missing``, ``n``, and ``by_type`` where answers have types.
    """
    found: dict[str, Any] = {}
    for figure in (*FIGURES_OF_KIND[task.kind], "missing"):
        if task.kind == "numeric" and figure == "f1" and task.numbers.rule == "value":
            continue
        statistics = row_statistics(figure, rows, ())
        assert statistics is not None
        found[figure] = statistics.value
        if f"{figure}_interval" not in found and figure == FIGURES_OF_KIND[task.kind][0]:
            (found[f"{figure}_interval"],), _ = intervals([statistics])
    found["n"] = len(rows)
    if task.kind == "spans" and task.labels:
        found["by_type"] = _entities_by_type(task, rows)
    elif any("type" in row for row in rows):
        found["by_type"] = _figures_by_type(rows)
    return found


def _number_fields(task: Task, reference: Reference, text: str) -> dict[str, Any]:
    figures = number_figures(text, reference, task.numbers)
    shown = figures._asdict()
    if task.numbers.rule == "value":
        del shown["f1"]
    missing = is_missing(text, reference, task.numbers)
    return {
        "prediction": None if missing else text,
        "is_right": figures.exact_match == 1,
        "figures": shown,
    }


def _span_fields(task: Task, reference: Reference | None, text: str) -> dict[str, Any]:
    predicted = read_entities(text, task.labels) if text else []
    if reference is None:
        return {}
    gold = [entity(item, task.labels) for item in reference.texts]
    counts = count(predicted, gold)
    is_right = bool(text) and counts.hits == counts.predicted == counts.gold
    fields: dict[str, Any] = {
        "is_right": is_right,
        "counts": list(counts),
        "figures": {
            "token_f1": token_f1(predicted, gold) if text else 0.0,
            "exact_match": float(is_right),
        },
    }
    if task.labels:
        by_type = count_by_type(predicted, gold, task.labels)
        fields["counts_by_type"] = {kind: list(own) for kind, own in by_type.items() if any(own)}
    return fields


def _entities_by_type(task: Task, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and number of right entities of each type."""
    found = {}
    for kind in task.labels:
        own = [row["counts_by_type"].get(kind, (0, 0, 0)) for row in rows]
        hits, predicted, gold = (sum(column) for column in zip(*own, strict=True))
        found[kind] = {
            "entity_precision": hits / max(1, predicted),
            "entity_recall": hits / max(1, gold),
            "entity_f1": 2 * hits / max(1, predicted + gold),
            "n": gold,
        }
    return found


def _figures_by_type(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    by_type: dict[str, list[Mapping[str, float]]] = {}
    for row in rows:
        by_type.setdefault(row.get("type", ""), []).append(row["figures"])
    return {
        kind: {
            **{name: sum(one[name] for one in own) / len(own) for name in own[0]},
            "n": len(own),
        }
        for kind, own in sorted(by_type.items())
    }


def _rouge_figures(text: str, right: str) -> dict[str, float]:
    scores = _rouge()(right, text)
    return {ours: float(scores[theirs].fmeasure) for ours, theirs in _ROUGE.items()}


@cache
def _rouge() -> Callable[[str, str], Any]:
    """The scorer of the package rouge-score, without stemming, as ``evaluate`` and PIXIU use it."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ImportError(
            "summaries are scored by the package rouge-score: pip install 'fingpt-lightning[rouge]'"
        ) from None
    scorer = RougeScorer(list(_ROUGE.values()), use_stemmer=False)
    score: Callable[[str, str], Any] = scorer.score
    return score
