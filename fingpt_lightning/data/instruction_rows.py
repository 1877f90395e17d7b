"""From a task's examples to rows of tokens to train on: prompt, answer, end of text."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset
from transformers import PreTrainedTokenizerFast
from typing_extensions import override

from fingpt_lightning.data.batch import IGNORED_LABEL
from fingpt_lightning.data.blocks import EMPTY_BLOCK
from fingpt_lightning.tasks import Example
from fingpt_lightning.tasks.encoding import (
    Conversation,
    TooLong,
    encode_conversations,
    encode_examples,
)


class InstructionRow(NamedTuple):
    """One example as tokens.

    Args:
        tokens: Tokens of the prompt, the right answer and the end of text.
        num_context: Number of tokens of the prompt.
        task: Number of the task.
        answer: Index of the right answer, where the task has the same answers in every row.
        others: First token and end of what follows the prompt and is not an answer: the turns of
            others in a conversation.
    """

    tokens: tuple[int, ...]
    num_context: int
    task: int
    answer: int | None
    others: tuple[tuple[int, int], ...] = ()


class EncodedRows(NamedTuple):
    """One row per example.

    Args:
        rows: Rows in the order of the examples; None where a row was left out.
        num_cut: Number of rows that lost a part of their text.
    """

    rows: list[InstructionRow | None]
    num_cut: int

    @property
    def kept(self) -> list[InstructionRow]:
        """The rows that were not left out."""
        return [row for row in self.rows if row is not None]


class InstructionRows(ConcatDataset[dict[str, Tensor]]):
    """Rows as ``input_ids`` and ``labels``, with ``task``; only answers with ends have labels."""

    def __init__(self, rows: Sequence[InstructionRow], eos_token_id: int) -> None:
        super().__init__([rows])  # type: ignore[list-item]
        self.rows = rows
        self.eos_token_id = eos_token_id

    @override
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A row; ``EMPTY_BLOCK`` is one token without a label."""
        if index == EMPTY_BLOCK:
            row = InstructionRow((self.eos_token_id,) * 2, 2, -1, None)
        else:
            row = self.rows[index]
        tokens = torch.tensor(row.tokens)
        labels = tokens[1:].clone()
        labels[: row.num_context - 1] = IGNORED_LABEL
        for begin, end in row.others:
            labels[begin - 1 : end - 1] = IGNORED_LABEL
        return {"input_ids": tokens[:-1], "labels": labels, "task": torch.tensor(row.task)}


def encode_rows(
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
    max_length: int,
    task: int = 0,
    answers_are_labels: bool = False,
    too_long: TooLong = TooLong.CUT,
) -> EncodedRows:
    """The tokens of each example's prompt and right answer, as evaluation scores them.

    Of a conversation, all turns of the assistant are answers.

    Args:
        tokenizer: Tokenizer of the network.
        examples: Examples of one task.
        max_length: Tokens of a row that the network reads at most.
        task: Number of the task.
        answers_are_labels: Whether an answer's index means the same in every row.
        too_long: Treatment of longer rows.

    Raises:
        ValueError: A row has no known answer or one without a token, it is too long and
            ``too_long`` is ``error``, or it is a conversation and no chat template renders it.
    """
    right = [_with_right_answer(example) for example in examples if not example.turns]
    encoded = iter(encode_examples(tokenizer, right, max_length, ends=True, too_long=too_long))
    turns = [example for example in examples if example.turns]
    conversations = iter(encode_conversations(tokenizer, turns, max_length, too_long=too_long))
    rows: list[InstructionRow | None] = []
    num_cut = 0
    for example in examples:
        if example.turns:
            conversation = next(conversations)
            num_cut += conversation is not None and conversation.is_cut
            rows.append(None if conversation is None else _row_of_turns(conversation, task))
            continue
        row = next(encoded)
        if row is None:
            rows.append(None)
            continue
        num_cut += row.is_cut
        (text,) = row.texts
        label = example.gold if answers_are_labels else None
        rows.append(InstructionRow(text.tokens, text.first_scored, task, label))
    return EncodedRows(rows, num_cut)


def _row_of_turns(conversation: Conversation, task: int) -> InstructionRow:
    marks = conversation.are_answers
    num_context = max(marks.index(True), 1)  # nothing predicts the first token
    others, begin = [], None
    for place, is_answer in enumerate(marks[num_context:], num_context):
        if not is_answer and begin is None:
            begin = place
        elif is_answer and begin is not None:
            others.append((begin, place))
            begin = None
    return InstructionRow(conversation.tokens, num_context, task, None, tuple(others))


def _with_right_answer(example: Example) -> Example:
    """The example with its right answer as the only one."""
    gold = example.gold
    if gold is None:
        raise ValueError(f"row {example.row}: its answer is not known, so it cannot be trained on")
    prompt = gold if len(example.prompts) > 1 else 0
    return example._replace(
        prompts=(example.prompts[prompt],),
        choices=(example.choices[gold],),
        gold=0,
        spans=(example.spans[prompt],) if example.spans else (),
    )
