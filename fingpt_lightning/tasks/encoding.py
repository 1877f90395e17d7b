"""Examples as tokens: the one encoder, which training and evaluation share.

A text's tokens are those of prompt and answer joined. Up to the first token in which any answer
shows, they are the context; the rest is trained on or scored. Mostly those are the prompt's tokens
by itself and what follows them; where the tokenizer merges the prompt's end with an answer, the
merged token belongs to the answer, and so do the tokens of that place with every other answer, so
that the scores of one prompt stay comparable. Where the tokenizer has a chat template in use,
texts are what it renders of prompt and answer.
"""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from itertools import takewhile
from typing import NamedTuple

from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from fingpt_lightning.models.formats.tokenizer import begin_tokens
from fingpt_lightning.tasks.chat import ChatTemplate, as_chats, template_of, with_shots
from fingpt_lightning.tasks.examples import Example, Turn

Tokens = tuple[int, ...]
Span = tuple[int, int]


class TooLong(StrEnum):
    """Treatment of a row with more tokens than a network reads."""

    CUT = "cut"
    """It loses tokens of its own text; a row that has too few of them is left out."""
    DROP = "drop"
    """It is left out."""
    ERROR = "error"
    """It ends the run."""


class Text(NamedTuple):
    """The tokens of a whole text, of which those from ``first_scored`` on are the answer."""

    tokens: Tokens
    first_scored: int


class EncodedExample(NamedTuple):
    """An example's texts, one per choice, and whether its own text has been cut."""

    texts: tuple[Text, ...]
    is_cut: bool


class Conversation(NamedTuple):
    """The tokens of several turns.

    Args:
        tokens: Tokens up to the last one of an answer.
        are_answers: Whether each token is the assistant's.
        is_cut: Whether turns at the end have been left out.
    """

    tokens: Tokens
    are_answers: tuple[bool, ...]
    is_cut: bool


def encode_examples(
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
    max_length: int,
    *,
    ends: bool = False,
    too_long: TooLong = TooLong.CUT,
) -> list[EncodedExample | None]:
    """The tokens of each example's texts; None for a row that is left out.

    A text begins with the token that the tokenizer puts there, if it is one of those that do; an
    empty context is the end token.

    Args:
        tokenizer: Tokenizer of the network.
        examples: Examples of one task.
        max_length: Largest number of tokens that the network reads; the last token of a text is
            only predicted.
        ends: Whether each answer is ended: by the end token, or as the chat template ends it.
        too_long: Treatment of longer rows.

    Raises:
        ValueError: An answer has no token, a row is too long and ``too_long`` is ``error``, or the
            chat template does not render it.
    """
    examples, begin = _rendered(tokenizer, examples, ends)
    end = (int(tokenizer.eos_token_id),) if ends and template_of(tokenizer) is None else ()
    prompts = _prompt_tokens(tokenizer, examples)
    texts = [
        example.prefix + example.prompts[_prompt_of(example, index)] + choice
        for example in examples
        for index, choice in enumerate(example.choices)
    ]
    tokens = iter(_tokenize(tokenizer, texts))
    answers = []
    for example, own_prompts in zip(examples, prompts, strict=True):
        joined = [next(tokens) for _ in example.choices]
        answers.append(_split(example, own_prompts, joined))
    rooms = [max(map(len, own)) + len(end) for own in answers]
    contexts = _fitted_contexts(tokenizer, begin, examples, prompts, rooms, max_length, too_long)
    return [
        None if fitted is None else _encoded(example, fitted, own, end)
        for example, fitted, own in zip(examples, contexts, answers, strict=True)
    ]


def encode_prompts(
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
    max_length: int,
    num_new: int,
    *,
    too_long: TooLong = TooLong.CUT,
) -> list[EncodedExample | None]:
    """The tokens of each example's one prompt, for an answer yet to be written.

    Args:
        tokenizer: Tokenizer of the network.
        examples: Examples with one prompt each.
        max_length: Largest number of tokens that the network reads.
        num_new: Largest number of tokens of the answer.
        too_long: Treatment of longer rows, as in `encode_examples`.

    Returns:
        Tokens as in `encode_examples`, with the prompt as the one text, of which nothing is scored.

    Raises:
        ValueError: A row is too long and ``too_long`` is ``error``.
    """
    examples, begin = _rendered(tokenizer, examples, False)
    prompts = _prompt_tokens(tokenizer, examples)
    rooms = [num_new] * len(examples)
    contexts = _fitted_contexts(tokenizer, begin, examples, prompts, rooms, max_length, too_long)
    return [
        None if fitted is None else _encoded(example, fitted, [()], ())
        for example, fitted in zip(examples, contexts, strict=True)
    ]


def encode_conversations(
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
    max_length: int,
    *,
    too_long: TooLong = TooLong.CUT,
) -> list[Conversation | None]:
    """The tokens of conversations as the chat template renders them; None for a row left out.

    A longer one keeps as many turns from its beginning as fit, up to one of the assistant's.

    Args:
        tokenizer: Tokenizer of the network, with a chat template in use.
        examples: Examples with turns.
        max_length: Largest number of tokens that the network reads; the last token of a
            conversation is only predicted.
        too_long: Treatment of longer rows.

    Raises:
        ValueError: No chat template is in use, it does not render a row so that it can be trained
            on, or a row is too long and ``too_long`` is ``error``.
    """
    template = template_of(tokenizer)
    if template is None and examples:
        raise ValueError(
            f"row {examples[0].row}: conversations need a chat template, and none is in use; give"
            " one by chat_template"
        )
    found: list[Conversation | None] = []
    for example in examples:
        assert template is not None
        tokens, are_answers = _turn_tokens(tokenizer, template, example)
        ends = [
            place + 1
            for place, is_answer in enumerate(are_answers)
            if is_answer and not any(are_answers[place + 1 : place + 2])
        ]
        if not ends:
            raise ValueError(f"row {example.row}: the {template} marks no token as the assistant's")
        fitting = [end for end in ends if end - 1 <= max_length]
        is_cut = len(fitting) < len(ends)
        if is_cut and too_long is TooLong.ERROR:
            raise ValueError(_is_too_long(example, ends[-1] - 1, max_length))
        if not fitting or (is_cut and too_long is TooLong.DROP):
            found.append(None)
        else:
            end = fitting[-1]
            found.append(Conversation(tuple(tokens[:end]), tuple(are_answers[:end]), is_cut))
    return found


def encode_message(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The tokens of a prompt as a model reads it: what a user says, where chats are rendered."""
    template = template_of(tokenizer)
    if template is None:
        return list(tokenizer.encode(text, verbose=False))
    return encode_turns(tokenizer, template, [Turn("user", text)])


def encode_turns(
    tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, turns: Sequence[Turn]
) -> list[int]:
    """The tokens of a conversation, up to where the assistant's next turn has to be written.

    Args:
        tokenizer: Tokenizer of the network.
        template: Its chat template in use.
        turns: Turns so far.

    Raises:
        ValueError: The template cannot render them.
    """
    (text,) = template.render([turns], opens_answer=True)
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def end_tokens(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens that end an answer: the end of a text, and that of a turn of a chat."""
    template = template_of(tokenizer)
    of_turn = None if template is None else template.end_token
    return list(dict.fromkeys(t for t in (tokenizer.eos_token_id, of_turn) if t is not None))


def length_remarks(
    name: str, num_rows: int, num_cut: int, num_dropped: int, max_length: int
) -> list[str]:
    """One line for the rows that were cut, one for those that were left out.

    >>> length_remarks("fpb", 4102, 3, 0, 512)
    ['fpb: 3 of 4,102 rows were cut to 512 tokens']
    """
    of_all = f"of {num_rows:,} rows"
    found = []
    if num_cut:
        found.append(f"{name}: {num_cut:,} {of_all} were cut to {max_length:,} tokens")
    if num_dropped:
        found.append(
            f"{name}: {num_dropped:,} {of_all} do not fit {max_length:,} tokens and were left out"
        )
    return found


class _Fitted(NamedTuple):
    """The contexts of an example, one per prompt."""

    contexts: list[Tokens]
    is_cut: bool


def _rendered(
    tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], ends: bool
) -> tuple[list[Example], Tokens]:
    """The examples as the texts that are tokenized, and the tokens that begin each of them."""
    template = template_of(tokenizer)
    if template is None:
        return [with_shots(example) for example in examples], begin_tokens(tokenizer)
    return as_chats(template, examples, closes=ends), ()  # the template begins the text


def _turn_tokens(
    tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, example: Example
) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and which of them are the assistant's."""
    if template.marks_answers:
        return template.tokens(example.turns)
    (text,) = template.render([example.turns])
    spans = template.answer_spans(example.turns, text, example.row)
    tokens = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    (places,) = _offsets(tokenizer, [text])
    are_answers = [
        any(begin < span.end and end > span.begin for span in spans) for begin, end in places
    ]
    return tokens, are_answers


def _is_too_long(example: Example, num_tokens: int, max_length: int) -> str:
    return (
        f"row {example.row}: {num_tokens:,} tokens, which are more than {max_length:,};"
        " too_long cut takes tokens of its text, drop leaves it out"
    )


def _prompt_of(example: Example, choice: int) -> int:
    return choice if len(example.prompts) > 1 else 0


def _prompt_tokens(
    tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]
) -> list[list[Tokens]]:
    tokens = iter(_tokenize(tokenizer, [e.prefix + p for e in examples for p in e.prompts]))
    return [[next(tokens) for _ in example.prompts] for example in examples]


def _tokenize(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[Tokens]:
    if not texts:
        return []
    found = tokenizer(list(texts), add_special_tokens=False, verbose=False)
    return [tuple(tokens) for tokens in found["input_ids"]]


def _split(example: Example, prompts: list[Tokens], joined: Sequence[Tokens]) -> list[Tokens]:
    """The answers of joined texts; ``prompts`` lose the tokens that differ there."""
    for number, prompt in enumerate(prompts):
        with_it = joined if len(prompts) == 1 else [joined[number]]
        prompts[number] = prompt[: _num_common([prompt, *with_it])]
    answers = [
        tokens[len(prompts[_prompt_of(example, index)]) :] for index, tokens in enumerate(joined)
    ]
    if not all(answers):
        choice = example.choices[answers.index(())]
        raise ValueError(f"row {example.row}: the tokenizer has no token for the answer {choice!r}")
    return answers


def _num_common(texts: Sequence[Tokens]) -> int:
    """How many tokens all texts begin with."""
    # What the first and the last in order share, all between them share too.
    first, last = min(texts), max(texts)
    if last[: len(first)] == first:
        return len(first)
    return sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    )


def _encoded(
    example: Example, fitted: _Fitted, answers: Sequence[Tokens], end: Tokens
) -> EncodedExample:
    texts = []
    for index, answer in enumerate(answers):
        context = fitted.contexts[_prompt_of(example, index)]
        texts.append(Text((*context, *answer, *end), len(context)))
    return EncodedExample(tuple(texts), fitted.is_cut)


def _fitted_contexts(
    tokenizer: PreTrainedTokenizerFast,
    begin: Tokens,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[Tokens]],
    rooms: Sequence[int],
    max_length: int,
    too_long: TooLong,
) -> list[_Fitted | None]:
    """The tokens before the answers, cut to leave ``rooms`` tokens for them; None is left out."""
    eos = tokenizer.eos_token_id
    found: list[_Fitted | None] = []
    to_cut = []
    for example, own, room in zip(examples, prompts, rooms, strict=True):
        contexts = [begin + prompt or (int(eos),) for prompt in own]
        num_tokens = max(map(len, contexts)) + room - 1
        if num_tokens > max_length:
            if too_long is TooLong.ERROR:
                raise ValueError(_is_too_long(example, num_tokens, max_length))
            if too_long is TooLong.CUT:
                to_cut.append(len(found))
            found.append(None)
        else:
            found.append(_Fitted(contexts, is_cut=False))
    whole = [examples[index].prefix + p for index in to_cut for p in examples[index].prompts]
    offsets = iter(_offsets(tokenizer, whole))
    for index in to_cut:
        example, allowed = examples[index], max_length + 1 - rooms[index]
        cut = []
        for number, prompt in enumerate(prompts[index]):
            span = example.spans[number] if example.spans else None
            places = next(offsets)[: len(prompt)]
            num_excess = len(begin) + len(prompt) - allowed
            kept = _cut(prompt, places, span, len(example.prefix), num_excess)
            cut.append(None if kept is None else begin + kept)
        kept_contexts = [context for context in cut if context]  # an answer needs a context
        if len(kept_contexts) == len(cut):
            found[index] = _Fitted(kept_contexts, is_cut=True)
    return found


def _offsets(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[Span]]:
    """Where each token stands in its text, blanks included."""
    if not texts:
        return []
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    # A post-processor may trim the blanks of tokens, which hides the part that they belong to.
    copy.post_processor = processors.ByteLevel(trim_offsets=False)
    encoded = copy.encode_batch(list(texts), add_special_tokens=False)
    return [encoding.offsets for encoding in encoded]


def _cut(
    prompt: Tokens, places: Sequence[Span], span: Span | None, first: int, num_excess: int
) -> Tokens | None:
    """The prompt without ``num_excess`` tokens of the row's own text, or a few more.

    They are taken from the end of the text where the prompt continues after it, else from its
    beginning. A character is not cut in two.

    Args:
        prompt: Tokens of the context.
        places: First and last character of each token.
        span: First and last character of the row's own text.
        first: Number of characters before those that ``span`` counts.
        num_excess: Number of excess tokens; not above 0 for a shorter one of several prompts.

    Returns:
        Tokens that are left; None where the text has fewer tokens than that.
    """
    if num_excess <= 0:
        return prompt
    own = _tokens_within(places, span, first)
    if len(own) < num_excess:
        return None
    if own.stop == len(prompt):
        begin, stop = own.start, own.start + num_excess
        while stop < own.stop and places[stop][0] < places[stop - 1][1]:
            stop += 1
    else:
        begin, stop = own.stop - num_excess, own.stop
        while begin > own.start and places[begin][0] < places[begin - 1][1]:
            begin -= 1
    return prompt[:begin] + prompt[stop:]


def _tokens_within(places: Iterable[Span], span: Span | None, first: int) -> range:
    """The tokens without characters outside the span."""
    if span is None:
        return range(0)
    begin, end = span[0] + first, span[1] + first
    within = [i for i, (left, right) in enumerate(places) if begin <= left and right <= end]
    return range(within[0], within[-1] + 1) if within else range(0)
