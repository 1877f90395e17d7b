"""From examples to tokens: those of the joined text, cut where the context is too short."""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from fingpt_lightning.evaluation.token_tree import Text
from fingpt_lightning.models.formats.tokenizer import begin_tokens
from fingpt_lightning.tasks import Example
from fingpt_lightning.tasks.cutting import cut_own_text

Tokens = tuple[int, ...]

_NUM_CHECKED = 16
"""Rows whose answers are tokenised with their prompts before others are taken to be alike."""


class EncodedRow(NamedTuple):
    """An example's texts, one a choice, and whether a prompt of it has been cut."""

    texts: list[Text]
    is_cut: bool


def encode_rows(
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
    num_positions: int,
    answer_room: int | None = None,
) -> list[EncodedRow]:
    """The tokens of each example's texts.

    They are those of prompt and choice joined; the answer's are what follows as many tokens as
    the prompt alone has, as in lm-evaluation-harness. A text begins with the token that the
    tokenizer puts there, if it is of those that do.

    A prompt that does not fit the context loses tokens of the row's own text: the end of it
    where the prompt goes on after it, else its beginning. Instruction and answer stay.

    Args:
        tokenizer: Of the network.
        examples: Of one task.
        num_positions: The longest sequence that the network takes.
        answer_room: Tokens to keep free for an answer yet to be written, in place of the choices'.

    Raises:
        ValueError: A prompt does not fit even without the row's own text.
    """
    prompts = _prompt_tokens(tokenizer, examples)
    answers = _answer_tokens(tokenizer, examples, prompts)
    begin = begin_tokens(tokenizer)
    rows = []
    for example, own_prompts, own_answers in zip(examples, prompts, answers, strict=True):
        room = answer_room or max(map(len, own_answers))
        whole = [begin + prompt or (int(tokenizer.eos_token_id),) for prompt in own_prompts]
        # The last token of a text is never run.
        cut = [_cut(tokenizer, tokens, example, num_positions - room + 1) for tokens in whole]
        contexts = cut if len(cut) > 1 else cut * len(own_answers)
        texts = [
            Text(context + answer, len(context))
            for context, answer in zip(contexts, own_answers, strict=True)
        ]
        rows.append(EncodedRow(texts, cut != whole))
    return rows


def _prompt_tokens(
    tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]
) -> list[list[Tokens]]:
    tokens = iter(_tokenize(tokenizer, [e.prefix + p for e in examples for p in e.prompts]))
    return [[next(tokens) for _ in example.prompts] for example in examples]


def _answer_tokens(
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[Tokens]],
) -> list[list[Tokens]]:
    first = _joined_answers(tokenizer, examples[:_NUM_CHECKED], prompts)
    are_alike = all(
        len(example.prompts) == 1 and example.choices == examples[0].choices for example in examples
    ) and all(answers == first[0] for answers in first)
    if are_alike:  # the prompts of a task end alike, and so do all after those looked at
        return [first[0]] * len(examples)
    rest = _joined_answers(tokenizer, examples[_NUM_CHECKED:], prompts[_NUM_CHECKED:])
    return first + rest


def _joined_answers(
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[Tokens]],
) -> list[list[Tokens]]:
    texts, lengths = [], []
    for example, own_prompts in zip(examples, prompts, strict=False):
        for index, choice in enumerate(example.choices):
            of_prompt = index if len(example.prompts) > 1 else 0
            texts.append(example.prefix + example.prompts[of_prompt] + choice)
            lengths.append(len(own_prompts[of_prompt]))
    joined = iter(
        tokens[length:] for tokens, length in zip(_tokenize(tokenizer, texts), lengths, strict=True)
    )
    answers = [[next(joined) for _ in example.choices] for example in examples]
    for example, own in zip(examples, answers, strict=True):
        if not all(own):
            raise ValueError(
                f"row {example.row}: the tokenizer merges the answer"
                f" {example.choices[own.index(())]!r} into the prompt's last token"
            )
    return answers


def _tokenize(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[Tokens]:
    if not texts:
        return []
    found = tokenizer(list(texts), add_special_tokens=False, verbose=False)
    return [tuple(tokens) for tokens in found["input_ids"]]


def _cut(
    tokenizer: PreTrainedTokenizerFast, context: Tokens, example: Example, num_allowed: int
) -> Tokens:
    num_excess = len(context) - num_allowed
    if num_excess <= 0:
        return context
    (own_text,) = _tokenize(tokenizer, [example.text])
    cut = cut_own_text(context, own_text, num_excess)
    if cut is None:
        raise ValueError(
            f"row {example.row}: instruction and answer leave no room for the text in a context"
            f" {num_excess} tokens too short"
        )
    return cut
