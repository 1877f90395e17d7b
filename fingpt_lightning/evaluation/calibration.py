"""Contextual calibration: what a model answers without any content is removed from its answers.

Source: https://arxiv.org/abs/2102.09690, section 5 (their W is the inverse of ``content_free``,
their b is 0).
"""

import math
import re
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fingpt_lightning.evaluation.scoring import DROPPED, Prediction, score
from fingpt_lightning.tasks import Example, Task
from fingpt_lightning.tasks.encoding import TooLong
from fingpt_lightning.tasks.examples import Shot
from fingpt_lightning.tasks.task import Template

CONTENT_FREE = ("N/A", "", "[MASK]")


def calibrate(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    batch_tokens: int | None = None,
) -> list[Prediction]:
    """Divides each label's probability by its probability for content-free inputs.

    That is the mean over `CONTENT_FREE` in place of the row's texts. Fields with a small set of
    values stay: the question about a headline, whether a text is news or a tweet.

    Args:
        network: Network in evaluation mode.
        tokenizer: Tokenizer of the network.
        task: Task of kind ``labels``.
        examples: Examples of the task.
        predictions: Predictions for the examples, with relative scores; those that are pending
            stay so, and change nothing for the others.
        batch_tokens: Tokens of a batch, as in `score`.

    Raises:
        ValueError: The task is of another kind.
    """
    if task.kind != "labels":
        raise ValueError(f"task {task.name} is of kind {task.kind}: only labels are calibrated")
    emptied = [
        () if prediction.is_dropped else content_free_prompts(task, example)
        for example, prediction in zip(examples, predictions, strict=True)
    ]
    rows: dict[tuple[str, tuple[Shot, ...]], int] = {}
    """The first row of each prompt and the examples before it, for messages."""
    for example, prompts in zip(examples, emptied, strict=True):
        for prompt in prompts:
            rows.setdefault((prompt, example.shots), example.row)
    empty = [
        Example(task.instruction, (prompt,), examples[0].choices, None, row, "", shots=shots)
        for (prompt, shots), row in rows.items()
    ]
    answers = score(
        network,
        tokenizer,
        empty,
        relative=True,
        batch_tokens=batch_tokens,
        too_long=TooLong.DROP,
    )
    scores = {
        prompt: answer.scores
        for prompt, answer in zip(rows, answers, strict=True)
        if not answer.is_dropped
    }
    return [
        _calibrated(
            prediction,
            [scores[prompt, example.shots] for prompt in own if (prompt, example.shots) in scores],
        )
        for example, prediction, own in zip(examples, predictions, emptied, strict=True)
    ]


def content_free_prompts(task: Task, example: Example) -> tuple[str, ...]:
    """The prompt of an example with each of `CONTENT_FREE` in place of its own texts."""
    (prompt,) = example.prompts
    for template in task.templates:
        found = _pattern(template).fullmatch(prompt)
        if found is None:
            continue
        kept = {name: text for name, text in found.groupdict().items() if _is_closed(task, name)}
        return tuple(
            template.render({name: kept.get(name, text) for name in template.names})
            for text in CONTENT_FREE
        )
    raise ValueError(f"row {example.row}: its prompt is of no template of task {task.name}")


def _is_closed(task: Task, name: str) -> bool:
    return any(
        name in shape.values or (name == "question" and bool(shape.questions))
        for shape in task.shapes
    )


def _pattern(template: Template) -> re.Pattern[str]:
    """The pattern of the template's prompts: a group for the first place of each field."""
    pattern = re.escape(template.pattern)
    for name in template.names:
        place = re.compile(r"\\\{" + name + r"(\\\|capitalize)?\\\}")
        pattern = place.sub(f"(?P<{name}>.*?)", pattern, count=1)
        pattern = place.sub(".*?", pattern)
    return re.compile(pattern, re.DOTALL)


def _calibrated(prediction: Prediction, content_free: Sequence[tuple[float, ...]]) -> Prediction:
    if prediction.is_pending:
        return prediction
    if not content_free:  # not even the empty text fits the context
        return DROPPED
    means = [
        math.log(sum(math.exp(x) for x in column) / len(column))
        for column in zip(*content_free, strict=True)
    ]
    raw = [score - mean for score, mean in zip(prediction.scores, means, strict=True)]
    total = math.log(sum(math.exp(x - max(raw)) for x in raw)) + max(raw)
    scores = tuple(x - total for x in raw)
    return prediction._replace(choice=scores.index(max(scores)), scores=scores)
