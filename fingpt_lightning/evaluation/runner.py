"""One evaluation: tasks are read and checked first, then answered one after the other."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fingpt_lightning.evaluation.calibration import calibrate as calibrated
from fingpt_lightning.evaluation.generation import generate, write_answers
from fingpt_lightning.evaluation.metrics import choice_metrics, label_metrics
from fingpt_lightning.evaluation.paired import intervals, row_statistics
from fingpt_lightning.evaluation.scoring import Prediction, score
from fingpt_lightning.evaluation.written_answers import (
    check_readable,
    row_fields,
    written_metrics,
)
from fingpt_lightning.shards.options import Shard
from fingpt_lightning.tasks import Example, Task, read_rows
from fingpt_lightning.tasks.encoding import TooLong
from fingpt_lightning.tasks.library import find_scored_task
from fingpt_lightning.tasks.shots import with_examples_before


class Scoring(StrEnum):
    """How an answer comes about."""

    CHOICES = "choices"
    """The most likely of the possible answers."""
    GENERATE = "generate"
    """Text is written and the label in it is read; unreadable answers count as missing."""
    BOTH = "both"
    """Tasks of labels are answered both ways, each with a result of its own."""


class TaskRun(NamedTuple):
    """A task and its rows, ready to be answered.

    Attributes:
        task: Task of the rows.
        split: Name of the split.
        examples: Examples, the first of the split where there is a limit.
        sha256: Digest of the whole split.
        num_skipped: Number of examples left out because their text is empty.
        split_rule: Rule that selects the rows of the split.
        num_fewshot: Number of examples of the split ``train`` before each question.
    """

    task: Task
    split: str
    examples: list[Example]
    sha256: str
    num_skipped: int
    split_rule: str
    num_fewshot: int = 0


class TaskResult(NamedTuple):
    """The answers to a task.

    Attributes:
        run: Task and rows.
        predictions: Answers to the rows.
        metrics: Figures of answered rows with a known gold answer.
        seconds: Duration.
        scoring: How the answers came about.
        name: Name of the result: that of the task, with an ending where it is answered twice.
    """

    run: TaskRun
    predictions: list[Prediction]
    metrics: dict[str, Any]
    seconds: float
    scoring: Scoring
    name: str

    @property
    def num_cut(self) -> int:
        """Rows that lost a part of their text."""
        return sum(prediction.is_cut for prediction in self.predictions)

    @property
    def num_dropped(self) -> int:
        """Rows that were left out because they do not fit the context."""
        return sum(prediction.is_dropped for prediction in self.predictions)

    @property
    def prompts_per_s(self) -> float:
        """Rows answered per second, calibration included."""
        return len(self.predictions) / self.seconds


def read_tasks(
    names: Sequence[str],
    data_dir: str | Path | None,
    split: str,
    *,
    strict: bool = False,
    limit: int | None = None,
    scoring: Scoring = Scoring.CHOICES,
    calibrate: bool = False,
    separator: str | None = None,
    encoding: str | None = None,
    num_fewshot: int = 0,
    fewshot_seed: int = 1,
) -> list[TaskRun]:
    """Reads the rows of all tasks and checks that they can be evaluated as requested.

    Args:
        names: Names of shipped tasks, or YAML files.
        data_dir: Folder of all sets; None reads from the hub.
        split: Name of the split, ``validation`` or another that the sets have.
        strict: Whether an empty text is an error.
        limit: Number of rows of each task, from its first; None takes all.
        scoring: Scoring that will be used.
        calibrate: Whether label tasks will be calibrated.
        separator: Separator of CSV files, as in `read_rows`.
        encoding: Encoding of CSV files, as in `read_rows`.
        num_fewshot: Number of examples of the split ``train`` before each question.
        fewshot_seed: Seed of their draw.

    Raises:
        ValueError: A name, row or setting is wrong.
        FileNotFoundError: A split is missing.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit} is below 1")
    for key, value in (("num_fewshot", num_fewshot), ("fewshot_seed", fewshot_seed)):
        if value < 0:
            raise ValueError(f"{key} {value} is below 0")
    runs: dict[str, TaskRun] = {}
    for name in dict.fromkeys(names):
        task = find_scored_task(name)
        if task.name in runs:
            raise ValueError(f"two tasks are named {task.name}")
        if scoring is Scoring.GENERATE and not (task.kind == "labels" or task.is_generated):
            raise ValueError(
                f"scoring generate reads labels, which task {task.name} of kind {task.kind} has not"
            )
        check_readable(task)
        rows = read_rows(
            task, data_dir, split, strict=strict, separator=separator, encoding=encoding
        )
        examples = rows.examples[:limit]
        if all(example.gold is None for example in examples):
            raise ValueError(f"{rows.path}: no row has a right answer")
        if num_fewshot:
            pool = rows
            if split != "train":
                pool = read_rows(task, data_dir, "train", separator=separator, encoding=encoding)
            with _named(task):
                examples = with_examples_before(examples, pool.examples, num_fewshot, fewshot_seed)
        runs[task.name] = TaskRun(
            task, split, examples, rows.sha256, rows.num_skipped, rows.split_rule, num_fewshot
        )
    if calibrate and scoring is Scoring.GENERATE:
        raise ValueError("calibrate has no effect on generated answers; leave one of them out")
    if calibrate and not any(run.task.kind == "labels" for run in runs.values()):
        raise ValueError(f"calibrate has no effect: none of {', '.join(runs)} has labels")
    return list(runs.values())


def predict(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    examples: Sequence[Example],
    *,
    scoring: Scoring = Scoring.CHOICES,
    calibrate: bool = False,
    batch_tokens: int | None = None,
    too_long: TooLong = TooLong.CUT,
    on_answered: Callable[[int], None] | None = None,
    shard: Shard | None = None,
) -> list[Prediction]:
    """Answers examples of a task.

    Args:
        network: Network in evaluation mode.
        tokenizer: Tokenizer of the network.
        task: Task of the examples.
        examples: Some or all examples of the task.
        scoring: How answers come about.
        calibrate: Whether labels are calibrated; other kinds never are.
        batch_tokens: Tokens of a batch, as in `score`.
        too_long: Treatment of rows that do not fit, as in `score`.
        on_answered: Callback, as in `score`.
        shard: Share of the batches that is run, as in `score`.

    Raises:
        FloatingPointError: A score or logit is NaN or infinite: task, row and likely cause are
            named.
    """
    try:
        return _predict(
            network,
            tokenizer,
            task,
            examples,
            scoring,
            calibrate,
            batch_tokens,
            too_long,
            on_answered,
            shard,
        )
    except FloatingPointError as error:
        raise FloatingPointError(f"task {task.name}, {error}") from None


def _predict(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    examples: Sequence[Example],
    scoring: Scoring,
    calibrate: bool,
    batch_tokens: int | None,
    too_long: TooLong,
    on_answered: Callable[[int], None] | None,
    shard: Shard | None,
) -> list[Prediction]:
    if task.is_generated or task.kind == "instructions":
        return write_answers(
            network,
            tokenizer,
            examples,
            task.max_new_tokens,
            stop=task.stop,
            batch_tokens=batch_tokens,
            too_long=too_long,
            on_answered=on_answered,
            shard=shard,
        )
    if scoring is Scoring.GENERATE:
        return generate(
            network,
            tokenizer,
            examples,
            batch_tokens=batch_tokens,
            too_long=too_long,
            on_answered=on_answered,
            shard=shard,
        )
    has_labels = task.kind == "labels"
    found = score(
        network,
        tokenizer,
        examples,
        relative=has_labels,
        batch_tokens=batch_tokens,
        too_long=too_long,
        on_answered=on_answered,
        shard=shard,
    )
    if calibrate and has_labels and examples:
        return calibrated(network, tokenizer, task, examples, found, batch_tokens)
    return found


def answers(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    run: TaskRun,
    *,
    scoring: Scoring = Scoring.CHOICES,
    calibrate: bool = False,
    batch_tokens: int | None = None,
    too_long: TooLong = TooLong.CUT,
    on_answered: Callable[[int], None] | None = None,
    shard: Shard | None = None,
) -> list[Prediction]:
    """`predict` on all rows of a task.

    Raises:
        FloatingPointError: As `predict`.
        ValueError: As `predict`; the task is named.
    """
    with _named(run.task):
        return predict(
            network,
            tokenizer,
            run.task,
            run.examples,
            scoring=scoring,
            calibrate=calibrate,
            batch_tokens=batch_tokens,
            too_long=too_long,
            on_answered=on_answered,
            shard=shard,
        )


@contextmanager
def _named(task: Task) -> Iterator[None]:
    """Within it a ValueError begins with the name of the task."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{task.name}: {error}") from error


def evaluate(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    run: TaskRun,
    *,
    scoring: Scoring = Scoring.CHOICES,
    calibrate: bool = False,
    batch_tokens: int | None = None,
    too_long: TooLong = TooLong.CUT,
    on_answered: Callable[[int], None] | None = None,
) -> TaskResult:
    """`predict` on all rows of a task, its duration, and the figures of `metrics_of`.

    Raises:
        ValueError: As `predict`, or no row with a known answer fits the context.
    """
    started_s = time.perf_counter()
    predictions = answers(
        network,
        tokenizer,
        run,
        scoring=scoring,
        calibrate=calibrate,
        batch_tokens=batch_tokens,
        too_long=too_long,
        on_answered=on_answered,
    )
    seconds = time.perf_counter() - started_s
    return TaskResult(
        run,
        predictions,
        metrics_of(run, predictions),
        seconds,
        scoring_of(run.task, scoring),
        run.task.name,
    )


def scoring_of(task: Task, scoring: Scoring) -> Scoring:
    """How a task is answered where a scoring is requested: written answers are always generated."""
    return Scoring.GENERATE if task.is_generated else scoring


def scorings_of(task: Task, scoring: Scoring) -> dict[str, Scoring]:
    """The results that a task has, by name, and how the answers of each come about."""
    if scoring is not Scoring.BOTH:
        return {task.name: scoring_of(task, scoring)}
    if task.kind != "labels":
        return {task.name: scoring_of(task, Scoring.CHOICES)}
    return {task.name: Scoring.CHOICES, f"{task.name}_generated": Scoring.GENERATE}


def metrics_of(run: TaskRun, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """The figures of a task's answers, by name; those that its kind does not have are left out.

    Rows that were left out are not counted anywhere.

    Raises:
        ValueError: No row with a known answer fits the context.
    """
    known = [
        (example, example.gold, prediction)
        for example, prediction in zip(run.examples, predictions, strict=True)
        if example.gold is not None and not prediction.is_dropped
    ]
    if not known:
        after = f" after {run.num_fewshot} examples" if run.num_fewshot else ""
        raise ValueError(
            f"{run.task.name}: no row with a right answer fits the context of the network{after}"
        )
    if run.task.is_generated:
        fields = [row_fields(run.task, example, one.answer) for example, _, one in known]
        return written_metrics(run.task, fields)
    gold = [right for _, right, _ in known]
    predicted = [prediction.choice for _, _, prediction in known]
    if run.task.kind == "labels":
        found = label_metrics(gold, predicted, len(run.task.labels))._asdict()
        return found | _average_f1(run.task, [example for example, _, _ in known], predicted)
    scores = [prediction.scores for _, _, prediction in known]
    choices = [example.choices for example, _, _ in known]
    of_choices = choice_metrics(gold, predicted, scores, choices)._asdict()
    if run.task.kind == "partial":  # one continuation for all: its length says nothing
        del of_choices["accuracy_norm"]
    return {name: value for name, value in of_choices.items() if value is not None}


def _average_f1(
    task: Task, examples: Sequence[Example], predicted: Sequence[int | None]
) -> dict[str, Any]:
    """The mean over groups, such as questions, of the weighted F1; nothing without groups."""
    if task.group is None:
        return {}
    labels = task.labels
    rows = [
        {
            "gold": labels[example.gold].strip(),
            "prediction": None if choice is None else labels[choice].strip(),
            "group": example.group,
        }
        for example, choice in zip(examples, predicted, strict=True)
        if example.gold is not None
    ]
    statistics = row_statistics("average_f1", rows, labels)
    assert statistics is not None
    ((interval,), _) = intervals([statistics])
    return {"average_f1": statistics.value, "average_f1_interval": interval}
