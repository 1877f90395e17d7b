"""Examples and conversations as a tokenizer's chat template renders them, before they are tokens.

A template is used where `use_chat_template` has said so of the tokenizer: training, evaluation,
generation and labeling take it from there, and so it is stored wherever the tokenizer is.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from fingpt_lightning.files import not_utf8
from fingpt_lightning.models.formats.tokenizer import (
    chat_template_in_use,
    own_chat_template,
    use_chat_template,
    uses_chat_template,
)
from fingpt_lightning.tasks.examples import Example, Shot, Turn
from fingpt_lightning.terminal.inputs import TEMPLATE_CHOICES, refuse_missing_template
from fingpt_lightning.terminal.messages import first_line

AUTO, NONE = TEMPLATE_CHOICES
_USER, _ASSISTANT = "user", "assistant"
_QUESTION, _ANSWER = "FingptQuestion", "FingptAnswer"
"""Texts whose places show what a template puts around them."""
_INSTRUCT = re.compile(
    r"(?:^|[^a-z])(?:instruct|chat|it|sft|dpo|rlhf|assistant)(?:[^a-z]|$)", re.IGNORECASE
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Frame(NamedTuple):
    """What a template puts around a question and its answer.

    Args:
        before: Text before the question.
        between: Text after it, up to the turn of the assistant.
        opening: What the assistant's turn begins with, before the answer.
        closing: Text after the answer, up to the token that ends the turn.
    """

    before: str
    between: str
    opening: str
    closing: str


class Span(NamedTuple):
    """First and last character of a part of a text."""

    begin: int
    end: int


class ChatTemplate:
    """A template as a tokenizer renders it.

    Args:
        tokenizer: Tokenizer with the special tokens of the template.
        text: The template, in Jinja.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        self._tokenizer, self.text = tokenizer, text
        self._frames: dict[tuple[Shot, ...], Frame] = {}

    @property
    def marks_answers(self) -> bool:
        """Whether it says itself which tokens are the assistant's."""
        return _GENERATION.search(self.text) is not None

    def render(
        self, conversations: Sequence[Sequence[Turn]], *, opens_answer: bool = False
    ) -> list[str]:
        """The text of each conversation.

        Args:
            conversations: Turns of each.
            opens_answer: Whether the assistant's next turn is begun.

        Raises:
            ValueError: The template cannot render one.
        """
        if not conversations:
            return []
        try:
            found = self._tokenizer.apply_chat_template(
                [_messages(turns) for turns in conversations],
                chat_template=self.text,
                tokenize=False,
                add_generation_prompt=opens_answer,
            )
        except Exception as error:  # of many kinds, and all are the template's
            raise self._cannot_render(error) from None
        return [str(text) for text in found]

    def tokens(self, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
        """The tokens of a conversation, and which of them the template marks as the assistant's."""
        try:
            found: Any = self._tokenizer.apply_chat_template(
                _messages(turns),
                chat_template=self.text,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except Exception as error:  # of many kinds, and all are the template's
            raise self._cannot_render(error) from None
        return list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]

    def frame(self, shots: tuple[Shot, ...] = ()) -> Frame:
        """What stands around a question that follows some examples.

        Raises:
            ValueError: The template does not keep the texts of turns as they are.
        """
        if shots not in self._frames:
            turns = [turn for shot in shots for turn in _turns_of(shot)]
            turns.append(Turn(_USER, _QUESTION))
            (asked,) = self.render([turns], opens_answer=True)
            (answered,) = self.render([[*turns, Turn(_ASSISTANT, _ANSWER)]])
            place, answer = asked.rfind(_QUESTION), answered.rfind(_ANSWER)
            if not answered.startswith(asked) or place < 0 or answer < len(asked):
                raise ValueError(
                    f"the {self} does not go on after a question as it asks for the answer"
                )
            closing = answered[answer + len(_ANSWER) :]
            self._frames[shots] = Frame(
                asked[:place],
                asked[place + len(_QUESTION) :],
                answered[len(asked) : answer],
                closing[: self._end_of_turn(closing)],
            )
        return self._frames[shots]

    @cached_property
    def end_token(self) -> int | None:
        """The special token that ends a turn of the assistant; None where text does."""
        closing = self.frame().closing
        tokens = self._tokenizer(closing, add_special_tokens=False)["input_ids"]
        last = tokens[-1] if tokens else None
        return last if last in self._special_tokens.values() else None

    def answer_spans(self, turns: Sequence[Turn], text: str, number: int) -> list[Span]:
        """Where the assistant's turns stand in a rendered conversation.

        Args:
            turns: Turns of the conversation.
            text: The conversation as `render` has it.
            number: Number of the row, for messages.

        Raises:
            ValueError: The template renders a turn otherwise once others follow it.
        """
        places = [place for place, turn in enumerate(turns) if turn.role == _ASSISTANT]
        before = self.render([turns[:place] for place in places], opens_answer=True)
        after = self.render([turns[: place + 1] for place in places])
        spans = []
        for place, start, whole in zip(places, before, after, strict=True):
            end = len(start) + self._end_of_turn(whole[len(start) :])
            if not whole.startswith(start) or not text.startswith(whole[:end]):
                raise ValueError(
                    f"row {number}: the {self} renders turn {place + 1} otherwise where others"
                    " follow, so that it cannot be trained on; give another by chat_template"
                )
            spans.append(Span(len(start), end))
        return spans

    def _end_of_turn(self, text: str) -> int:
        """Where the assistant's part of a text ends: with its last special token, if any."""
        ends = [
            place + len(token)
            for token in self._special_tokens
            if (place := text.rfind(token)) >= 0
        ]
        return max(ends, default=len(text))

    @cached_property
    def _special_tokens(self) -> dict[str, int]:
        return {
            token.content: number
            for number, token in self._tokenizer.added_tokens_decoder.items()
            if token.special and token.content
        }

    def _cannot_render(self, error: Exception) -> ValueError:
        return ValueError(f"the {self} cannot render a conversation ({first_line(error)})")

    def __str__(self) -> str:
        return f"chat template of {self._tokenizer.name_or_path or 'the tokenizer'}"


def template_of(tokenizer: PreTrainedTokenizerFast) -> ChatTemplate | None:
    """The template that prompts of a tokenizer are rendered with; None where they are plain."""
    text = chat_template_in_use(tokenizer)
    return None if text is None else ChatTemplate(tokenizer, text)


def as_chats(
    template: ChatTemplate, examples: Sequence[Example], *, closes: bool = False
) -> list[Example]:
    """The examples with prompts and answers as a template renders them.

    The prompt is what the user says, an answer what the assistant does; examples before the
    question are turns before it. Blanks around both are removed.

    Args:
        template: Template of the tokenizer.
        examples: Examples without turns.
        closes: Whether the answers end as the template ends them.

    Raises:
        ValueError: The template changes the text of a message.
    """
    framed = [_framed(template, example, closes) for example in examples]
    asked = [
        [*(t for s in example.shots for t in _turns_of(s)), Turn(_USER, message)]
        for example, messages in zip(examples, map(_messages_of, examples), strict=True)
        for message, _, _ in messages
    ]
    rendered = iter(template.render(asked, opens_answer=True))
    for example in framed:
        for prompt, text in zip(
            example.prompts, islice(rendered, len(example.prompts)), strict=True
        ):
            if example.prefix + prompt != text:
                raise ValueError(f"row {example.row}: the {template} changes the text of a message")
    return framed


def with_shots(example: Example) -> Example:
    """The example in plain text, with the examples before its question in its prefix."""
    if not example.shots:
        return example
    before = "".join(f"{shot.prompt}{shot.answer}\n\n" for shot in example.shots)
    return example._replace(prefix=before + example.prefix, shots=())


def choose_chat_template(
    tokenizer: PreTrainedTokenizerFast, choice: str, model: str, base: str | None = None
) -> str | None:
    """Puts a chat template in use, or none, and says which.

    Args:
        tokenizer: Tokenizer of the model; what is chosen is stored with it.
        choice: ``auto`` for what the model was trained with, else the tokenizer's own where the
            model is an instruct model; ``none``; or a file with a template in Jinja.
        model: Name of the model, which may tell that it is an instruct model.
        base: Name of the network where ``model`` is an adapter, which may tell it too.

    Returns:
        A line for people; None where there is nothing to tell.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The template does not render a question and its answer.
    """
    own, recorded = own_chat_template(tokenizer), uses_chat_template(tokenizer)
    if choice == NONE:
        use_chat_template(tokenizer, None)
        return "chat template: none, as set" if own else None
    if choice != AUTO:
        refuse_missing_template(choice)
        text = _read_template(Path(choice).expanduser())
        use_chat_template(tokenizer, text)
        _check(tokenizer, choice)
        return f"chat template: {choice}"
    if recorded is not None:
        use_chat_template(tokenizer, own if recorded else None)
        which = "the one" if recorded else "none, as"
        return f"chat template: {which} that {model} was trained with" if recorded or own else None
    use_chat_template(tokenizer, None)
    if own is None:
        return None
    reason = _instruct_reason(tokenizer, own, [model, base or model])
    if reason is None:
        return (
            f"chat template: none, for nothing says that {model} is an instruct model; to use one,"
            " name its file as chat_template"
        )
    use_chat_template(tokenizer, own)
    _check(tokenizer, "the tokenizer's own")
    return f"chat template: the tokenizer's own, for {reason}; chat_template none leaves it out"


def _check(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    template = template_of(tokenizer)
    assert template is not None
    try:
        template.frame()
    except ValueError as error:
        use_chat_template(tokenizer, None)
        raise ValueError(f"chat_template {name}: {error}") from None


def _read_template(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(not_utf8(path)) from None
    if not text.strip():
        raise ValueError(f"chat_template {path} is empty")
    return text


def _instruct_reason(
    tokenizer: PreTrainedTokenizerFast, own: str, models: Sequence[str]
) -> str | None:
    """What tells that a model is an instruct model; None where nothing does."""
    for name in (model.rstrip("/").rpartition("/")[2] for model in models):
        if _INSTRUCT.search(name):
            return f"{name} is an instruct model by its name"
    try:
        end = ChatTemplate(tokenizer, own).end_token
    except ValueError:
        return None
    if end is not None and end == tokenizer.eos_token_id:
        return f"its turns end with {tokenizer.eos_token}, as the model's texts do"
    return None


def _framed(template: ChatTemplate, example: Example, closes: bool) -> Example:
    before, between, opening, closing = template.frame(example.shots)
    end = closing if closes else ""
    messages = _messages_of(example)
    num_shared = messages[0][2]
    return example._replace(
        prefix=before + messages[0][0][:num_shared],
        prompts=tuple(message[num_shared:] + between for message, _, _ in messages),
        choices=tuple(opening + choice.strip() + end for choice in example.choices),
        spans=tuple(
            None if span is None else (span[0] - num_shared, span[1] - num_shared)
            for _, span, _ in messages
        ),
        message=None,
        shots=(),
    )


class _Message(NamedTuple):
    """What the user says, what of it may be cut, and how much of it is the task's prefix."""

    text: str
    span: tuple[int, int] | None
    num_shared: int


def _messages_of(example: Example) -> list[_Message]:
    if example.message is not None:
        return [_Message(*example.message, 0)]
    found = []
    for number, prompt in enumerate(example.prompts):
        whole = example.prefix + prompt
        text = whole.strip()
        num_gone = len(whole) - len(whole.lstrip())
        shift = len(example.prefix) - num_gone
        num_shared = min(max(shift, 0), len(text))
        span = example.spans[number] if example.spans else None
        if span is not None:
            begin, end = span[0] + shift, min(span[1] + shift, len(text))
            span = (max(begin, num_shared), max(end, num_shared))
        found.append(_Message(text, span, num_shared))
    return found


def _turns_of(shot: Shot) -> tuple[Turn, Turn]:
    return Turn(_USER, shot.prompt.strip()), Turn(_ASSISTANT, shot.answer.strip())


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [turn._asdict() for turn in turns]
