"""An evaluation by many jobs: each runs its share of the batches, a merge makes the results.

The batches are those of one run, so that answers, and all figures, are the same to the last digit.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fingpt_lightning.evaluation.results import identity_of
from fingpt_lightning.evaluation.runner import Scoring, TaskResult, TaskRun, metrics_of
from fingpt_lightning.evaluation.scoring import Prediction
from fingpt_lightning.files import read_json, write_json
from fingpt_lightning.shards.folders import FinishedShard
from fingpt_lightning.shards.options import Shard
from fingpt_lightning.terminal.progress import shown_progress

_TIMES = ("started_at", "seconds")
_OF_MACHINE = ("device", "dequantize")
"""The settings in which shards may differ: their answers are the same."""
_STORED = tuple(field for field in Prediction._fields if field != "is_pending")


class NamedRun(NamedTuple):
    """A task to be answered.

    Attributes:
        name: Name of the result.
        scoring: How its answers come about.
        run: Task and rows.
    """

    name: str
    scoring: Scoring
    run: TaskRun


Answer = Callable[[NamedRun, Callable[[int], None]], list[Prediction]]


def identities(named: Sequence[NamedRun]) -> dict[str, Any]:
    """What is answered: of each result the rows, the prompts and the way of answering."""
    found: dict[str, Any] = {"tasks": [one.name for one in named]}
    for one in named:
        own = {"scoring": one.scoring.value, **identity_of(one.run)}
        found |= {f"{one.name}.{key}": value for key, value in own.items()}
    return found


def answer_shard(
    folder: Path,
    shard: Shard,
    named: Sequence[NamedRun],
    answer: Answer,
) -> int:
    """Answers the rows of a shard, a result after the other; what is there already is left alone.

    Args:
        folder: Folder of the shard, begun.
        shard: Number of the shard.
        named: All results.
        answer: Function that answers the rows of the shard, and takes a callback for progress.

    Returns:
        Number of rows answered, with those that an earlier job had answered.
    """
    num_rows = 0
    for one in named:
        file = _file(folder, one.name)
        if not file.is_file():
            write_json(file, _answered(shard, one, answer), indent=None)
        num_rows += len(read_json(file)["answers"])
    return num_rows


def _answered(shard: Shard, one: NamedRun, answer: Answer) -> dict[str, Any]:
    """The answers to the rows of a shard, each after its place among all rows."""
    total = math.ceil(len(one.run.examples) / shard.count)
    what = f"evaluating {one.name}, shard {shard}"
    started_s = time.perf_counter()
    with shown_progress(what, total, "rows", in_log=False) as show:
        # Batches differ in size, so that a shard may have more rows than its share.
        found = answer(one, lambda number: show(min(number, total)))
    seconds = time.perf_counter() - started_s
    answers = [
        (place, *prediction[: len(_STORED)])
        for place, prediction in enumerate(found)
        if not prediction.is_pending
    ]
    return {"seconds": seconds, "answers": answers}


def merged_results(shards: Sequence[FinishedShard], named: Sequence[NamedRun]) -> list[TaskResult]:
    """The results of all shards; their seconds are added up.

    Raises:
        ValueError: A row has no answer, or two that differ.
    """
    results = []
    for one in named:
        found = [read_json(_file(shard.folder, one.name)) for shard in shards]
        predictions: list[Prediction | None] = [None] * len(one.run.examples)
        for shard, part in zip(shards, found, strict=True):
            for place, choice, scores, *rest in part["answers"]:
                prediction = Prediction(choice, tuple(scores), *rest)
                if predictions[place] not in (None, prediction):
                    raise ValueError(
                        f"{shard.folder}: row {one.run.examples[place].row} of {one.name} has"
                        " another answer in another shard"
                    )
                predictions[place] = prediction
        whole = [prediction for prediction in predictions if prediction is not None]
        if len(whole) < len(predictions):
            row = one.run.examples[predictions.index(None)].row
            raise ValueError(f"row {row} of {one.name} has no answer in any of the shards")
        seconds = sum(part["seconds"] for part in found)
        metrics = metrics_of(one.run, whole)
        results.append(TaskResult(one.run, whole, metrics, seconds, one.scoring, one.name))
    return results


def settings_of_head(head: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the head of ``results.json`` in which all shards must be equal."""
    settings = {key: value for key, value in head["settings"].items() if key not in _OF_MACHINE}
    rest = {key: value for key, value in head.items() if key not in (*_TIMES, "settings")}
    return {**rest, **settings}


def merged_head(shards: Sequence[FinishedShard]) -> dict[str, Any]:
    """The head of ``results.json``: it began with the first shard and took what all took."""
    heads: list[dict[str, Any]] = [shard.facts["head"] for shard in shards]
    own = {
        key: ", ".join(dict.fromkeys(head["settings"][key] for head in heads))
        for key in _OF_MACHINE
    }
    return heads[0] | {
        "settings": heads[0]["settings"] | own,
        "started_at": min(head["started_at"] for head in heads),
        "seconds": sum(head["seconds"] for head in heads),
    }


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.answers.json"
