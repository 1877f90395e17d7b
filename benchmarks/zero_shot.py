"""What does a model know of each task untrained, beside a classifier on word counts?

Each validation set is answered with and without calibration; beside it stand the majority class
and, where there is a split to train on, logistic regression on TF-IDF of words and word pairs.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import markdown_table, new_record, write_record
from fingpt_lightning.evaluation.calibration import calibrate
from fingpt_lightning.evaluation.metrics import label_metrics
from fingpt_lightning.evaluation.runner import TaskRun, metrics_of, read_tasks
from fingpt_lightning.evaluation.scoring import score
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.tasks import Example, read_rows

QUESTION = (
    "What does the model know of each task without training, with and without calibration, beside"
    " logistic regression on TF-IDF and the majority class?"
)
TASKS = (
    *("fpb", "fiqa_sa", "tfns", "nwgi", "nwgi7", "headline", "fin_ner_types"),
    *("arc_easy", "arc_challenge", "boolq", "openbookqa", "piqa", "winogrande"),
)
_SPLIT = "validation"
_FIGURES = ("accuracy", "accuracy_norm", "macro_f1", "weighted_f1", "mcc", "n")


def main() -> None:
    """Answers all sets and writes record and table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="record to write; .md beside")
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=int, help="rows of each task")
    options = parser.parse_args()
    runs = read_tasks(options.tasks.split(","), options.data_dir, _SPLIT, limit=options.limit)
    settings = {
        "model": options.model,
        "dtype": options.dtype,
        "limit": options.limit,
        "split": _SPLIT,
        "split_sha256": {run.task.name: run.sha256 for run in runs},
    }
    record = new_record(QUESTION, settings)
    model = load_model(options.model, dtype=options.dtype, device=options.device)
    tokenizer = model.require_tokenizer()
    rows: list[dict[str, Any]] = []
    for run in runs:
        has_labels = run.task.kind == "labels"
        found = score(model.network, tokenizer, run.examples, relative=has_labels)
        rows.append(_row(run, "zero-shot", metrics_of(run, found)))
        if has_labels:
            found = calibrate(model.network, tokenizer, run.task, run.examples, found)
            rows.append(_row(run, "zero-shot, calibrated", metrics_of(run, found)))
        rows += baselines(run, options.data_dir)
    record["rows"] = rows
    record["summary"] = summary(rows)
    write_record(options.json, record, table(rows))
    print(json.dumps(record["summary"], indent=1))


def baselines(run: TaskRun, data_dir: Path) -> list[dict[str, Any]]:
    """The answers that need no language model, for a task of labels.

    Both learn from the split to train on; without one, the majority is that of the rows
    themselves and there is no classifier.
    """
    if run.task.kind != "labels":
        return []
    gold = [_known(example) for example in run.examples]
    try:
        training = read_rows(run.task, data_dir, "train").examples
    except FileNotFoundError:
        training = []
    learned_from = [_known(example) for example in training] or gold
    majority = Counter(learned_from).most_common(1)[0][0]
    answers: dict[str, Sequence[int]] = {"majority class": [majority] * len(gold)}
    if training:
        answers["TF-IDF and logistic regression"] = _classify(training, run.examples)
    return [
        _row(run, contender, label_metrics(gold, own, len(run.task.labels))._asdict())
        for contender, own in answers.items()
    ]


def _classify(training: Sequence[Example], examples: Sequence[Example]) -> list[int]:
    from sklearn.feature_extraction.text import TfidfVectorizer  # type: ignore[import-untyped]
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
    from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]

    classifier = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced"),
    )
    # The row's own text has all that differs: the question about a headline, the name of an entity.
    classifier.fit([e.text for e in training], [_known(e) for e in training])
    return [int(label) for label in classifier.predict([e.text for e in examples])]


def _known(example: Example) -> int:
    if example.gold is None:
        raise ValueError(f"row {example.row} has no right answer")
    return example.gold


def _row(run: TaskRun, contender: str, metrics: dict[str, Any]) -> dict[str, Any]:
    figures = {key: metrics[key] for key in _FIGURES if key in metrics}
    return {"task": run.task.name, "contender": contender, **figures}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean accuracy of each contender over the label tasks that all of them answered."""
    by_contender: dict[str, dict[str, float]] = {}
    for row in rows:
        if "macro_f1" in row:
            by_contender.setdefault(row["contender"], {})[row["task"]] = row["accuracy"]
    common = set.intersection(*(set(own) for own in by_contender.values())) if by_contender else ()
    return {
        f"mean_accuracy: {contender}": sum(own[task] for task in common) / len(common)
        for contender, own in by_contender.items()
        if common
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The Markdown table."""
    lines = [
        [
            f"{row['task']}: {row['contender']}",
            *(f"{row[key]:.3f}" if key in row else "-" for key in _FIGURES[:-1]),
            f"{row['n']:,}",
        ]
        for row in rows
    ]
    return markdown_table(["", *(name.replace("_", " ") for name in _FIGURES)], lines)


if __name__ == "__main__":
    main()
