"""What is predicted for: rows of tasks that are asked, numbered blocks of text; and the answers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset
from typing_extensions import override

from fingpt_lightning.data.blocks import EMPTY_BLOCK, TokenBlocks
from fingpt_lightning.tasks import Example, Task
from fingpt_lightning.tasks.encoding import TooLong


class PredictedRow(NamedTuple):
    """What is predicted for one row of the data.

    Args:
        place: Place of the row among all that are predicted for, from 0.
        fields: What is known of it, as an object of JSON.
    """

    place: int
    fields: dict[str, Any]


class Question(NamedTuple):
    """A row of a task whose answer is predicted."""

    place: int
    name: str
    task: Task
    example: Example


class QuestionBatch:
    """Questions as one batch: no tensors, for their prompts are made by what answers them.

    Args:
        questions: Questions in the order of their places; None fills up a rank.
        too_long: Treatment of rows longer than the network reads.
    """

    def __init__(self, questions: Sequence[Question | None], too_long: TooLong) -> None:
        self.questions = [question for question in questions if question is not None]
        self.too_long = too_long


class CollateQuestions:
    """Makes a batch of questions.

    Args:
        too_long: Treatment of rows as in `QuestionBatch`.
    """

    def __init__(self, too_long: TooLong) -> None:
        self.too_long = too_long

    def __call__(self, questions: Sequence[Question | None]) -> QuestionBatch:
        """The batch of some questions."""
        return QuestionBatch(questions, self.too_long)


class Questions(ConcatDataset[Question | None]):
    """The rows of several tasks as questions, one task after the other."""

    def __init__(self, tasks: Sequence[tuple[str, Task, Sequence[Example]]]) -> None:
        rows = [(name, task, example) for name, task, examples in tasks for example in examples]
        super().__init__([rows])  # type: ignore[list-item]
        self.rows = rows

    @override
    def __getitem__(self, index: int) -> Question | None:
        """A question; ``EMPTY_BLOCK`` is None."""
        return None if index == EMPTY_BLOCK else Question(index, *self.rows[index])


class NumberedBlocks(ConcatDataset[dict[str, Tensor]]):
    """Blocks that hold their number as ``place``; that of ``EMPTY_BLOCK`` is itself."""

    def __init__(self, blocks: TokenBlocks) -> None:
        super().__init__([blocks])
        self.blocks = blocks

    @override
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**self.blocks[index], "place": torch.tensor(index)}
