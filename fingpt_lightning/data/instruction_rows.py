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
from fingpt_lightning.models.formats.tokenizer import begin_tokens
from fingpt_lightning.tasks import Example
from fingpt_lightning.tasks.cutting import cut_own_text


class InstructionRow(NamedTuple):
    """One example as tokens.

    Args:
        tokens: The prompt, the right answer and the end of text.
        num_context: How many of them are the prompt's.
        task: The number of its task.
        answer: The index of the right answer, where the task has the same answers in every row.
    """

    tokens: tuple[int, ...]
    num_context: int
    task: int
    answer: int | None


class InstructionRows(ConcatDataset[dict[str, Tensor]]):
    """Rows as ``input_ids`` and ``labels``, with ``task``; only answer and end have labels."""

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
        return {"input_ids": tokens[:-1], "labels": labels, "task": torch.tensor(row.task)}


def encode_examples(
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
    max_length: int,
    task: int = 0,
    answers_are_labels: bool = False,
) -> list[InstructionRow]:
    """The tokens of each example's prompt and right answer.

    They are those of the joined text, begun as the tokenizer begins texts; the answer's are what
    follows as many tokens as the prompt alone has, which is how they are scored.

    A row that is too long loses tokens of its own text: the end of it where the prompt goes on
    after it, else its beginning. Instruction and answer stay.

    Args:
        tokenizer: Of the network.
        examples: Of one task.
        max_length: Tokens of a row that the network reads at most.
        task: The task's number.
        answers_are_labels: Whether an answer's index means the same in every row.

    Raises:
        ValueError: A row has no known answer, its answer merges into the prompt, or it does not
            fit even without its own text.
    """
    if not examples:
        return []
    golds = [_gold(example) for example in examples]
    prompts = [
        example.prefix + example.prompts[gold if len(example.prompts) > 1 else 0]
        for example, gold in zip(examples, golds, strict=True)
    ]
    answers = [e.choices[gold] for e, gold in zip(examples, golds, strict=True)]
    contexts = tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
    joined = tokenizer(
        [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)],
        add_special_tokens=False,
        verbose=False,
    )["input_ids"]
    begin, end = begin_tokens(tokenizer), (int(tokenizer.eos_token_id),)
    rows = []
    for i, example in enumerate(examples):
        context: Sequence[int] | None = contexts[i]
        answer = tuple(joined[i][len(contexts[i]) :])
        if not answer:
            raise ValueError(
                f"row {example.row}: the tokenizer merges the answer {answers[i]!r} into the"
                " prompt's last token"
            )
        # The end is never read, only foretold.
        num_excess = len(begin) + len(contexts[i]) + len(answer) - max_length
        if num_excess > 0:
            own_text = tokenizer(example.text, add_special_tokens=False)["input_ids"]
            context = cut_own_text(contexts[i], own_text, num_excess)
        if context is None:
            raise ValueError(
                f"row {example.row}: {num_excess} tokens more than max_length {max_length} are more"
                " than its own text has"
            )
        before = (*begin, *context) or end
        label = golds[i] if answers_are_labels else None
        rows.append(InstructionRow((*before, *answer, *end), len(before), task, label))
    return rows


def _gold(example: Example) -> int:
    if example.gold is None:
        raise ValueError(f"row {example.row}: its answer is not known, so it cannot be trained on")
    return example.gold
